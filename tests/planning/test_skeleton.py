"""Folders without weights: what is missing is made of holes, and what is odd is refused."""

import json

import pytest

from megatron_pdmd.conversion.pipeline_folder import read_pipeline
from megatron_pdmd.models import WanConfig
from megatron_pdmd.planning.skeleton import complete_folder, preset_folder

CONFIG = WanConfig(num_attention_heads=2, attention_head_dim=12, text_dim=6, freq_dim=8, ffn_dim=20, num_layers=2)
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"


def test_configurations_alone_are_completed(tmp_path):
    source = preset_folder(tmp_path / "source", CONFIG, boundary_ratio=0.5)
    found = read_pipeline(complete_folder(source, tmp_path / "whole"))
    assert found.configs == {"high_noise": CONFIG, "low_noise": CONFIG}


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("transformer/config.json", {**CONFIG.to_hf(), "num_layers": 10**6}, "num_layers 1000000: no Wan model"),
        ("transformer/config.json", {**CONFIG.to_hf(), "patch_size": None}, "patch_size None"),
        (INDEX, {"weight_map": {"proj_out.bias": ".."}}, "'..', which is no safetensors file in this folder"),
        (INDEX, {"weight_map": 3}, "has no weight_map"),
        ("model_index.json", [], "expected a JSON object, got list"),
    ],
)
def test_what_is_odd_is_refused(tmp_path, file, content, words):
    source = preset_folder(tmp_path / "source", CONFIG)
    (source / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words):
        complete_folder(source, tmp_path / "whole")

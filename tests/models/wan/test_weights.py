"""Names of original Wan weights against diffusers' own converter."""

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from megatron_pdmd.models import WanConfig, WanModel
from megatron_pdmd.models.wan.weights import from_original_name, is_original, to_original_name

CONFIG = WanConfig(num_attention_heads=1, attention_head_dim=6, ffn_dim=4, num_layers=12)


def names() -> set[str]:
    with torch.device("meta"):
        return {name for name, _ in WanModel(CONFIG).named_parameters()}


def test_renaming_there_and_back_changes_nothing():
    originals = {to_original_name(name) for name in names()}
    assert {from_original_name(name) for name in originals} == names()
    assert is_original(originals) and not is_original(names())
    assert {"blocks.11.self_attn.norm_q.weight", "head.modulation", "blocks.0.ffn.2.bias"} <= originals


def test_diffusers_converter_agrees():
    originals = sorted(to_original_name(name) for name in names())
    converted = convert_wan_transformer_to_diffusers({name: torch.tensor(i) for i, name in enumerate(originals)})
    assert {name: int(i) for name, i in converted.items()} == {
        from_original_name(n): i for i, n in enumerate(originals)
    }


def test_a_name_that_is_not_wans_stays_as_it_is():
    assert from_original_name("img_emb.proj.0.weight") == "img_emb.proj.0.weight"

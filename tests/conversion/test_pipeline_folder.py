"""Reading a pipeline folder, and refusing broken ones."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_pdmd.conversion.pipeline_folder import read_pipeline


def test_two_experts(two_experts: Path) -> None:
    folder = read_pipeline(two_experts)
    assert folder.experts == {"high_noise": "transformer", "low_noise": "transformer_2"}
    assert (folder.boundary_ratio, folder.shift, folder.pipeline_class) == (0.75, 3.0, "WanPipeline")
    assert (folder.has_vae, folder.has_text_encoder) == (False, True)
    assert folder.model_classes["transformer"] == "WanTransformer3DModel"


def test_one_expert(one_expert: Path) -> None:
    folder = read_pipeline(one_expert)
    assert folder.experts == {"single": "transformer"}
    assert folder.boundary_ratio is None


def _edit(relative: str, **changes: object):
    def damage(folder: Path) -> None:
        path = folder / relative
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def _remove(relative: str):
    def damage(folder: Path) -> None:
        path = folder / relative
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def _truncate(relative: str):
    def damage(folder: Path) -> None:
        path = folder / relative
        path.write_bytes(path.read_bytes()[:-10])

    return damage


def _repatched(folder: Path) -> None:
    _edit("transformer_2/config.json", patch_size=[1, 2, 8])(folder)
    path = folder / WEIGHTS
    state = load_file(path)
    state["patch_embedding.weight"] = state["patch_embedding.weight"].reshape(-1, 1, 1, 2, 8)
    save_file(state, path)


WEIGHTS = "transformer_2/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove("model_index.json"), "no model_index.json"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "model_index.json").write_text("[]"), "expected a JSON object"),
        (_remove("transformer_2"), "no transformer_2/"),
        (_remove("tokenizer"), "no tokenizer/"),
        (_remove("transformer/config.json"), "no such file"),
        (_remove(WEIGHTS), "neither diffusion_pytorch_model.safetensors nor"),
        (_truncate(WEIGHTS), "is truncated"),
        (_truncate("text_encoder/model.safetensors"), "is truncated"),
        (_edit("model_index.json", boundary_ratio=None), "boundary_ratio is None"),
        (_edit("model_index.json", boundary_ratio=1.5), "boundary_ratio is 1.5"),
        (_edit("model_index.json", transformer_2=[None, None]), "boundary_ratio 0.75 but no transformer_2"),
        (_edit("model_index.json", transformer=[None, None]), "names no transformer"),
        (_edit("model_index.json", vae=["my_code", "Vae"]), "only diffusers and transformers classes"),
        (_edit("model_index.json", **{"../x": ["diffusers", "A"]}), "not a component's name"),
        (_edit("model_index.json", boundary_ratio=True), "boundary_ratio is True"),
        (_edit("model_index.json", boundary_ratio=[0.5]), "'boundary_ratio' is [[]0.5"),
        (_edit("model_index.json", transformer=["null", "null"]), "'transformer' is [[]'null', 'null'[]]; only"),
        (_edit("model_index.json", transformer=["diffusers", None]), "only diffusers and transformers classes"),
        (_edit("model_index.json", **{"..": ["diffusers", "A"]}), "'..' is not a component's name"),
        (_edit("model_index.json", **{"x" * 300: ["diffusers", "A"]}), "x... is not a component's name"),
        (_edit("model_index.json", _class_name=3), "_class_name is 3"),
        (_edit("scheduler/scheduler_config.json", shift=-1), "the shift is -1"),
        (_edit("scheduler/scheduler_config.json", shift=True), "the shift is True"),
        (_edit("scheduler/scheduler_config.json", shift=1e300), "the shift is 1e[+]300"),
        (_edit("scheduler/scheduler_config.json", shift=[3]), "the shift is [[]3"),
        (_edit("scheduler/scheduler_config.json", use_dynamic_shifting="no"), "use_dynamic_shifting is 'no'"),
        (_edit("transformer/config.json", num_layers=5), "config.json says 5 layers, the weights have 2"),
        (_edit("transformer/config.json", text_dim=32), r"the config asks for \[128, 32\]"),
        (_edit("transformer/config.json", patch_size=None), "patch_size None"),
        (_repatched, r"patch_size is \(1, 4, 4\) in one transformer and \(1, 2, 8\) in the other"),
    ],
)
def test_broken_folders_are_refused_in_one_line(tmp_path: Path, two_experts: Path, damage, message: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(two_experts, folder)
    damage(folder)
    with pytest.raises(ValueError, match=message) as refused:
        read_pipeline(folder)
    assert "\n" not in str(refused.value)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        read_pipeline(tmp_path / "absent")

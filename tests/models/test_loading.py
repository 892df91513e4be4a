"""Models from folders that diffusers wrote, and from folders that are broken."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from megatron_pdmd.models import WAN_PRESETS, WanConfig, WanModel, base_parameters, from_hf, to_hf_state_dict
from megatron_pdmd.models.wan.weights import tensor_shapes, to_original_name
from megatron_pdmd.parallel import without_cuda
from megatron_pdmd.parallel.pipeline.stages import Stage

CONFIG = WanConfig(
    num_attention_heads=2, attention_head_dim=12, in_channels=3, out_channels=3, text_dim=6, freq_dim=8, ffn_dim=20,
    num_layers=2, rope_max_seq_len=16,
)  # fmt: skip
FILE = "diffusion_pytorch_model.safetensors"
INDEX = f"{FILE}.index.json"


def teacher() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(**{name: value for name, value in CONFIG.to_hf().items() if not name.startswith("_")})


@pytest.fixture
def folder(tmp_path) -> Path:
    teacher().save_pretrained(tmp_path / "transformer")
    return tmp_path


@pytest.fixture
def sharded(tmp_path) -> Path:
    teacher().save_pretrained(tmp_path / "transformer", max_shard_size="20KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    return tmp_path


@pytest.mark.parametrize("layout", ["folder", "sharded"])
def test_a_state_comes_back_as_it_went_in(layout, request):
    model = from_hf(request.getfixturevalue(layout))
    state, reference = to_hf_state_dict(model), teacher().state_dict()
    assert state.keys() == reference.keys()
    assert all(torch.equal(state[name], reference[name]) for name in reference)
    assert all(parameter.requires_grad for _, parameter in base_parameters(model))


def test_bf16_keeps_in_fp32_what_diffusers_keeps(folder):
    reference = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=torch.bfloat16)
    state = to_hf_state_dict(from_hf(folder, dtype=torch.bfloat16))
    for name, tensor in reference.state_dict().items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name


def test_original_names_are_understood(folder):
    path = folder / "transformer" / FILE
    save_file({to_original_name(name): tensor for name, tensor in load_file(path).items()}, path)
    state, reference = to_hf_state_dict(from_hf(folder)), teacher().state_dict()
    assert all(torch.equal(state[name], reference[name]) for name in reference)


def test_a_stage_reads_its_own_tensors_of_a_folder_that_is_judged_as_a_whole(folder):
    path, reference = folder / "transformer" / FILE, teacher().state_dict()
    first, last = (Stage.of(index, (1, 1)) for index in range(2))
    tensors = load_file(path)
    tensors["blocks.1.ffn.net.2.bias"][0] = float("nan")
    save_file(tensors, path)
    own = dict(from_hf(folder, stage=first).named_parameters())
    assert "blocks.0.ffn.net.2.bias" in own and "blocks.1.ffn.net.2.bias" not in own
    assert all(torch.equal(parameter, reference[name]) for name, parameter in own.items())
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.net\.2\.bias"):
        from_hf(folder, stage=last)
    del tensors["blocks.1.ffn.net.2.bias"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match="1 missing tensors"):
        from_hf(folder, stage=first)


def test_links_out_of_the_folder_are_files_of_a_hub_cache(folder):
    path = folder / "transformer" / FILE
    path.rename(folder / "blob")
    path.symlink_to(folder / "blob")
    assert len(to_hf_state_dict(from_hf(folder))) == len(teacher().state_dict())


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_state(path: Path, change) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path)


BREAKAGES = {
    "no config": (lambda path: (path / "config.json").unlink(), "config.json: no such file"),
    "config is not JSON": (lambda path: (path / "config.json").write_text("{"), "not valid JSON"),
    "config is a list": (lambda path: (path / "config.json").write_text("[]"), "expected a JSON object"),
    "config of another size": (
        lambda path: edit_json(path / "config.json", lambda config: config.update(ffn_dim=24)),
        r"ffn.net.0.proj.weight is \[20, 24\], the config asks for \[24, 24\]",
    ),
    "config with more layers": (
        lambda path: edit_json(path / "config.json", lambda config: config.update(num_layers=3)),
        "config.json says 3 layers, the weights have 2",
    ),
    "config with fewer layers": (
        lambda path: edit_json(path / "config.json", lambda config: config.update(num_layers=1)),
        "config.json says 1 layers, the weights have 2",
    ),
    "bad config": (
        lambda path: edit_json(path / "config.json", lambda config: config.update(num_layers=-1)),
        "config.json: num_layers -1",
    ),
    "no weights": (lambda path: (path / FILE).unlink(), f"neither {FILE} nor {INDEX} is there"),
    "truncated": (
        lambda path: (path / FILE).write_bytes((path / FILE).read_bytes()[:-10]),
        "is truncated",
    ),
    "empty file": (lambda path: (path / FILE).write_bytes(b""), "is truncated or no safetensors file"),
    "a pointer in place of the file": (
        lambda path: (path / FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "is truncated",
    ),
    "an absurd number of layers": (
        lambda path: edit_json(path / "config.json", lambda config: config.update(num_layers=1_000_000)),
        "config.json: num_layers 1000000: no Wan model has more than 1000",
    ),
    "an absurd width": (
        lambda path: edit_json(path / "config.json", lambda config: config.update(ffn_dim=10**12)),
        "config.json: ffn_dim 1000000000000: no Wan model has more than",
    ),
    "a width that memory cannot hold": (
        lambda path: edit_json(path / "config.json", lambda config: config.update(text_dim=10**6)),
        r"linear_1.weight is \[24, 6\], the config asks for \[24, 1000000\]",
    ),
    "a patch of null": (
        lambda path: edit_json(path / "config.json", lambda config: config.update(patch_size=None)),
        "config.json: patch_size None: expected three positive integers",
    ),
    "integers in place of weights": (
        lambda path: edit_state(path / FILE, lambda state: state.update({"proj_out.bias": torch.zeros(12).long()})),
        "proj_out.bias is I64; expected floating-point numbers",
    ),
    "not a number": (
        lambda path: edit_state(path / FILE, lambda state: state["blocks.1.ffn.net.2.bias"][3].fill_(float("nan"))),
        "'blocks.1.ffn.net.2.bias' holds values that are not finite",
    ),
    "infinity": (
        lambda path: edit_state(path / FILE, lambda state: state["proj_out.weight"][0, 0].fill_(-float("inf"))),
        "'proj_out.weight' holds values that are not finite",
    ),
    "a tensor is missing": (
        lambda path: edit_state(path / FILE, lambda state: state.pop("proj_out.bias")),
        r"1 missing tensors \('proj_out.bias'\)",
    ),
    "a tensor too many": (
        lambda path: edit_state(path / FILE, lambda state: state.update(extra=torch.zeros(1))),
        r"1 unexpected tensors \('extra'\)",
    ),
}


@pytest.mark.parametrize(("breakage", "message"), BREAKAGES.values(), ids=BREAKAGES.keys())
def test_broken_folders_are_refused_in_one_line(folder, breakage, message):
    breakage(folder / "transformer")
    with pytest.raises(ValueError, match=message) as error:
        from_hf(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.*no such folder"):
        from_hf(tmp_path, subfolder="nowhere")


def test_a_missing_shard_is_named(sharded):
    shard = sorted((sharded / "transformer").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name}: no such file"):
        from_hf(sharded)


@pytest.mark.parametrize(
    "config", [*WAN_PRESETS.values(), CONFIG, dataclasses.replace(CONFIG, cross_attn_norm=False, patch_size=(2, 1, 3))]
)
def test_shapes_are_known_without_the_model(config):
    with without_cuda(), torch.device("meta"):
        model = WanModel(config)
    assert tensor_shapes(config) == {name: tuple(tensor.shape) for name, tensor in base_parameters(model)}

"""Models from folders that diffusers wrote, and from folders that are broken."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from megatron_pdmd.models import WanConfig, base_parameters, from_hf, to_hf_state_dict
from megatron_pdmd.models.wan.weights import to_original_name

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
        r"ffn.net.0.proj.bias is \[20\], the config asks for \[24\]",
    ),
    "config with more layers": (
        lambda path: edit_json(path / "config.json", lambda config: config.update(num_layers=3)),
        "27 missing tensors",
    ),
    "config with fewer layers": (
        lambda path: edit_json(path / "config.json", lambda config: config.update(num_layers=1)),
        "27 unexpected tensors",
    ),
    "bad config": (
        lambda path: edit_json(path / "config.json", lambda config: config.update(num_layers=-1)),
        "config.json: num_layers -1",
    ),
    "no weights": (lambda path: (path / FILE).unlink(), f"neither {FILE} nor {INDEX} is there"),
    "truncated": (
        lambda path: (path / FILE).write_bytes((path / FILE).read_bytes()[:-10]),
        "broken or incomplete safetensors file",
    ),
    "empty file": (lambda path: (path / FILE).write_bytes(b""), "broken or incomplete safetensors file"),
    "a pointer in place of the file": (
        lambda path: (path / FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "broken or incomplete safetensors file",
    ),
    "a tensor is missing": (
        lambda path: edit_state(path / FILE, lambda state: state.pop("proj_out.bias")),
        r"1 missing tensors \(proj_out.bias\)",
    ),
    "a tensor too many": (
        lambda path: edit_state(path / FILE, lambda state: state.update(extra=torch.zeros(1))),
        r"1 unexpected tensors \(extra\)",
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


@pytest.mark.parametrize("name", ["../stolen.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_an_index_cannot_lead_out_of_the_folder(sharded, name):
    save_file(teacher().state_dict(), sharded / "stolen.safetensors")
    edit_json(sharded / "transformer" / INDEX, lambda index: index["weight_map"].update({"proj_out.bias": name}))
    with pytest.raises(ValueError, match="not a file name in this folder; refused"):
        from_hf(sharded)


def test_a_missing_shard_is_named(sharded):
    shard = sorted((sharded / "transformer").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name}: named by {INDEX} but not there"):
        from_hf(sharded)


@pytest.mark.parametrize("weight_map", [None, {}, [], {"proj_out.bias": 3}])
def test_an_index_without_a_map_is_refused(sharded, weight_map):
    edit_json(sharded / "transformer" / INDEX, lambda index: index.update(weight_map=weight_map))
    with pytest.raises(ValueError, match="no weight_map"):
        from_hf(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded):
    first, second = sorted((sharded / "transformer").glob("*.safetensors"))[:2]
    edit_state(second, lambda state: state.update(dict(list(load_file(first).items())[:1])))
    with pytest.raises(ValueError, match=f"is also in {first.name}"):
        from_hf(sharded)

"""Sharded files, against the safetensors library."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_pdmd.conversion.weight_files import plan_files, write_model
from megatron_pdmd.files.safetensors_files import read_header, read_model_header
from megatron_pdmd.models.lora import merged_weights
from megatron_pdmd.models.wan.config import WAN_PRESETS
from megatron_pdmd.models.wan.model import WanModel
from megatron_pdmd.parallel import without_cuda

STEM = "diffusion_pytorch_model"


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    named = {f"layer.{i}.weight": torch.randn(4, i + 1, generator=generator) for i in range(5)}
    return named | {"transposed": base.T, "view": base[:2], "empty": torch.zeros(0, 3), "count": torch.tensor(7)}


def _load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("limit", [1, 100, 10**9])
def test_write_and_read_back(tmp_path: Path, tensors: dict[str, torch.Tensor], limit: int) -> None:
    write_model(tmp_path, iter(tensors.items()), max_shard_size=limit)
    loaded = _load_all(tmp_path)
    header = read_model_header(tmp_path, STEM)
    assert loaded.keys() == tensors.keys() == header.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
        assert header[name].shape == tuple(tensor.shape)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert sum(tensor.size for tensor in header.values()) == size
    files = sorted(path.name for path in tmp_path.iterdir())
    if limit == 10**9:
        assert files == [f"{STEM}.safetensors"]
        return
    index = json.loads((tmp_path / f"{STEM}.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == size
    count = len(set(index["weight_map"].values()))
    assert files[:-1] == [f"{STEM}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    stored = (tensor for path in tmp_path.glob("*.safetensors") for tensor in [read_header(path)])
    assert all(len(shard) == 1 or sum(tensor.size for tensor in shard.values()) <= limit for shard in stored)


def test_a_14b_experts_files_are_planned_before_there_is_any_weight() -> None:
    with without_cuda(), torch.device("meta"):
        model = WanModel(WAN_PRESETS["wan2.2-t2v-a14b"], dtype=torch.bfloat16)
    files = plan_files(Path("transformer"), merged_weights(model, None))
    assert [file.path.name for file in files] == [f"{STEM}-{i:05d}-of-00006.safetensors" for i in range(1, 7)]
    assert max(file.size for file in files) <= 5_000_000_000
    assert sum(file.size for file in files) == sum(p.numel() * p.element_size() for p in model.parameters())


def test_write_casts_floating_point_alone(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    write_model(tmp_path, tensors.items(), dtype=torch.bfloat16)
    loaded = _load_all(tmp_path)
    assert loaded.pop("count").dtype == torch.int64
    assert {tensor.dtype for tensor in loaded.values()} == {torch.bfloat16}
    assert torch.equal(loaded["view"], tensors["view"].bfloat16())

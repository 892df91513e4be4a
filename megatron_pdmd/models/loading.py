"""Models from Hugging Face folders, tensor by tensor, and their states for the way back."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megatron_pdmd.files.safetensors_files import DIFFUSERS_STEM, read_model_headers, require_finite, require_tensors
from megatron_pdmd.models.layers.tensor_parallel import partition_dim
from megatron_pdmd.models.lora import base_parameters, merged_state_dict
from megatron_pdmd.models.wan.config import WanConfig
from megatron_pdmd.models.wan.model import WanModel
from megatron_pdmd.models.wan.weights import count_blocks, from_original_name, is_original, tensor_shapes
from megatron_pdmd.parallel.cpu import without_cuda
from megatron_pdmd.parallel.topology import existing_topology, initialize_topology


@dataclass(frozen=True)
class ModelFolder:
    """A model's folder, of which config.json and the headers of its weights have been read and fit each other.

    Attributes:
        path: the folder.
        config: the model's shape.
        sources: our name of every tensor -> its file, and its name there.
    """

    path: Path
    config: WanConfig
    sources: Mapping[str, tuple[Path, str]]


def read_model_folder(path: Path) -> ModelFolder:
    """Reads a model's config.json and the headers of its weights, diffusers' or original Wan's; nothing is allocated.

    Raises:
        ValueError: something is missing, broken or of another model; one line says what.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; give a pipeline's folder and the subfolder of its transformer")
    config = WanConfig.read(path / "config.json")
    headers = read_model_headers(path, DIFFUSERS_STEM)
    stored = {name: (file, tensor) for file, header in headers.items() for name, tensor in header.items()}
    renamed = from_original_name if is_original(set(stored)) else str
    sources = {renamed(name): (file, name) for name, (file, _) in stored.items()}
    if (blocks := count_blocks(sources)) != config.num_layers:  # first, for the config may say any number
        raise ValueError(
            f"{path}: config.json says {config.num_layers} layers, the weights have {blocks}; do they belong together?"
        )
    require_tensors(path, {renamed(name): tensor for name, (_, tensor) in stored.items()}, tensor_shapes(config))
    return ModelFolder(path, config, sources)


def from_hf(
    folder: str | Path,
    subfolder: str | None = "transformer",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    **options: Any,
) -> WanModel:
    """Builds the model of a Hugging Face folder, sharded for the current topology.

    Reads config.json and `diffusion_pytorch_model.safetensors`, its sharded form with an index, or original Wan files;
    each rank reads its own slice of each tensor straight into place.

    Args:
        folder: a pipeline's folder, or with `subfolder=None` a model's own.
        subfolder: the model inside a pipeline's folder.
        dtype: of the parameters that are not kept in fp32.
        device: where the weights go; the topology's device by default.
        **options: further keyword arguments of `WanModel`; of a `stage` only the tensors that stand there are read.

    Raises:
        ValueError: something is missing, broken or of another model, or this rank's part of a tensor holds values that
            are not finite; one line says what.
    """
    source = read_model_folder(Path(folder) / subfolder if subfolder else Path(folder))
    topology = options.pop("topology", None) or existing_topology() or initialize_topology()
    with without_cuda(), torch.device("meta"):
        model = WanModel(source.config, dtype=dtype, topology=topology, **options)
    materialize(model, device or topology.device)
    _read_weights(model, source.sources)
    return model


def to_hf_state_dict(model: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    """The model's whole state under diffusers' names, an adapter merged into it where one is named."""
    return merged_state_dict(model, adapter)


def materialize(model: nn.Module, device: torch.device | str) -> None:
    """Gives a model built on the meta device uninitialised memory, keeping the marks on its parameters."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                real = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)
                real.__dict__.update(parameter.__dict__)
                setattr(module, name, real)


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: broken or incomplete safetensors file ({error}); fetch it again") from None


@torch.no_grad()
def _read_weights(model: WanModel, sources: Mapping[str, tuple[Path, str]]) -> None:
    """Fills the parameters, file by file, with this rank's slices; what stands on other stages is left alone."""
    parameters = dict(base_parameters(model))
    own = {name: sources[name] for name in sources if name in parameters}
    for path in sorted({path for path, _ in own.values()}):
        with _open(path) as file:
            for name, (where, stored) in own.items():
                if where == path:
                    _read_tensor(model, parameters[name], file.get_slice(stored))
                    require_finite([(name, parameters[name])], path)


def _read_tensor(model: WanModel, parameter: nn.Parameter, stored: Any) -> None:
    dim, rank = partition_dim(parameter), model.parallel.rank
    index = [slice(None)] * parameter.ndim
    if dim is not None:
        index[dim] = slice(rank * parameter.shape[dim], (rank + 1) * parameter.shape[dim])
    parameter.copy_(_read_slice(stored, index, parameter.shape))


def _read_slice(stored: Any, index: list[slice], shape: torch.Size) -> Tensor:
    """A part of a tensor in a file, of this shape."""
    return stored[tuple(index)]

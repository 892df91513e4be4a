"""Models from Hugging Face folders, tensor by tensor, and their states for the way back."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megatron_pdmd.models.layers.tensor_parallel import partition_dim
from megatron_pdmd.models.lora import base_parameters, merged_state_dict
from megatron_pdmd.models.wan.config import WanConfig
from megatron_pdmd.models.wan.model import WanModel
from megatron_pdmd.models.wan.weights import from_original_name, is_original
from megatron_pdmd.parallel.cpu import without_cuda
from megatron_pdmd.parallel.topology import existing_topology, initialize_topology

_STEM = "diffusion_pytorch_model"


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
        **options: further keyword arguments of `WanModel`.

    Raises:
        ValueError: something is missing, broken or of another model; one line says what.
    """
    path = Path(folder) / subfolder if subfolder else Path(folder)
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; give a pipeline's folder and the subfolder of its transformer")
    config = _read_json(path / "config.json")
    try:
        model_config = WanConfig.from_hf(config)
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from None
    topology = options.pop("topology", None) or existing_topology() or initialize_topology()
    files = weight_files(path)
    with without_cuda(), torch.device("meta"):
        model = WanModel(model_config, dtype=dtype, topology=topology, **options)
    sources = _locate_tensors(files)
    _check_names(path, sources, {name for name, _ in base_parameters(model)})
    materialize(model, device or topology.device)
    _read_weights(model, sources)
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


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model's folder, in the order of their names.

    Raises:
        ValueError: there are none, or the index names files that are missing or lie outside of the folder.
    """
    index_path = path / f"{_STEM}.safetensors.index.json"
    single = path / f"{_STEM}.safetensors"
    if not index_path.is_file():
        if not single.is_file():
            raise ValueError(f"{path}: neither {single.name} nor {index_path.name} is there; is the download complete?")
        return [single]
    weight_map = _read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{index_path}: no weight_map of tensor names to file names; fetch the index again")
    names = sorted(set(weight_map.values()))
    for name in names:
        # Compared as text: the files of a Hugging Face cache are links that lead out of the folder.
        if name != Path(name).name or name in ("", ".", ".."):
            raise ValueError(
                f"{index_path}: weight_map names {name!r}, which is not a file name in this folder; refused"
            )
        if not (path / name).is_file():
            raise ValueError(f"{path / name}: named by {index_path.name} but not there; is the download complete?")
    return [path / name for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; is this a Hugging Face model folder?")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object; fetch it again")
    return content


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: broken or incomplete safetensors file ({error}); fetch it again") from None


def _locate_tensors(files: list[Path]) -> dict[str, tuple[Path, str]]:
    """Our name of every tensor -> its file and its name there."""
    sources: dict[str, tuple[Path, str]] = {}
    for path in files:
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict: it cannot be iterated)
                if name in sources:
                    raise ValueError(
                        f"{path}: tensor {name} is also in {sources[name][0].name}; fetch the folder again"
                    )
                sources[name] = (path, name)
    if is_original(set(sources)):
        return {from_original_name(name): source for name, source in sources.items()}
    return sources


def _check_names(path: Path, found: dict[str, tuple[Path, str]], expected: set[str]) -> None:
    for problem, names in (("missing", expected - found.keys()), ("unexpected", found.keys() - expected)):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise ValueError(
                f"{path}: {len(names)} {problem} tensors ({shown}); do weights and config.json belong together?"
            )


@torch.no_grad()
def _read_weights(model: WanModel, sources: dict[str, tuple[Path, str]]) -> None:
    """Fills the parameters, file by file, with this rank's slices."""
    parameters = dict(base_parameters(model))
    for path in sorted({path for path, _ in sources.values()}):
        with _open(path) as file:
            for name, (where, stored) in sources.items():
                if where == path:
                    _read_tensor(model, name, parameters[name], file.get_slice(stored), path)


def _read_tensor(model: WanModel, name: str, parameter: nn.Parameter, stored: Any, path: Path) -> None:
    dim, ranks, rank = partition_dim(parameter), model.parallel.size, model.parallel.rank
    whole = [size * ranks if axis == dim else size for axis, size in enumerate(parameter.shape)]
    if stored.get_shape() != whole:
        raise ValueError(
            f"{path}: {name} is {stored.get_shape()}, the config asks for {whole}; do they belong together?"
        )
    index = [slice(None)] * parameter.ndim
    if dim is not None:
        index[dim] = slice(rank * parameter.shape[dim], (rank + 1) * parameter.shape[dim])
    parameter.copy_(_read_slice(stored, index, parameter.shape))


def _read_slice(stored: Any, index: list[slice], shape: torch.Size) -> Tensor:
    """A part of a tensor in a file, of this shape."""
    return stored[tuple(index)]

"""Model folders without weights: safetensors files with a header and nothing behind it, as sparse files.

A dry run reads them like real ones, up to the numbers. Names and shapes come from config.json and the index.
"""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_pdmd.conversion.pipeline_folder import TRANSFORMERS
from megatron_pdmd.files.documents import read_json_object
from megatron_pdmd.files.safetensors_files import DIFFUSERS_STEM, read_weight_map
from megatron_pdmd.models.lora import base_parameters
from megatron_pdmd.models.wan.config import WanConfig
from megatron_pdmd.models.wan.model import WanModel
from megatron_pdmd.parallel.cpu import without_cuda

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64"}


def write_sparse(path: Path, tensors: Shapes) -> None:
    """Writes a safetensors file whose tensors are holes: it has the length of a real one and takes no room.

    Source: https://github.com/huggingface/safetensors#format
    """
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def complete_folder(source: Path, destination: Path) -> Path:
    """Mirrors a pipeline's folder by links, with sparse files in place of the transformers' weights that it lacks.

    Other components whose weights are not there (VAE, text encoder) are left out of its index.

    Args:
        source: the pipeline's folder.
        destination: a new folder.

    Returns:
        `destination`.

    Raises:
        ValueError: a transformer's config.json or an index cannot be read.
    """
    destination.mkdir()
    for part in sorted(source.iterdir()):
        target = destination / part.name
        if part.name in TRANSFORMERS:
            target.mkdir()
            for file in part.iterdir():
                (target / file.name).symlink_to(file.resolve())
            _complete_model(target)
        elif part.name == "model_index.json":
            target.write_text(_index_of_what_is_there(part), encoding="utf-8")
        else:
            target.symlink_to(part.resolve())
    return destination


def _index_of_what_is_there(path: Path) -> str:
    index = read_json_object(path)
    models = [name for name in index if name in ("vae", "text_encoder", "image_encoder")]
    absent = [name for name in models if not any((path.parent / name).glob("*.safetensors"))]
    return json.dumps(index | {name: [None, None] for name in absent})


def _complete_model(folder: Path) -> None:
    config, index = folder / "config.json", folder / f"{DIFFUSERS_STEM}.safetensors.index.json"
    if not config.is_file():
        return  # told by who reads the folder
    if index.is_file():
        weight_map = read_weight_map(index)
        missing = {name for name in weight_map.values() if not (folder / name).exists()}
        files = {name: {tensor for tensor, where in weight_map.items() if where == name} for name in missing}
    elif any(folder.glob("*.safetensors")):
        return
    else:
        files = {f"{DIFFUSERS_STEM}.safetensors": None}
    if files:
        shapes = model_shapes(config)
        for name, tensors in files.items():
            own = {tensor: shape for tensor, shape in shapes.items() if tensors is None or tensor in tensors}
            write_sparse(folder / name, own)


def model_shapes(config: Path) -> Shapes:
    """Names, dtypes and whole shapes of the tensors that a config.json describes, weights in bf16.

    Raises:
        ValueError: no configuration of a model that is known here.
    """
    model_config = WanConfig.read(config)
    with without_cuda(), torch.device("meta"):
        model = WanModel(model_config, dtype=torch.bfloat16)
    return {name: (parameter.dtype, tuple(parameter.shape)) for name, parameter in base_parameters(model)}


def preset_folder(destination: Path, config: WanConfig, *, boundary_ratio: float | None = None) -> Path:
    """Makes a pipeline's folder with configurations and nothing else, to rehearse a model that is not at hand.

    Args:
        destination: a new folder.
        config: of each transformer.
        boundary_ratio: where the first of two experts hands over to the second; None makes one transformer.

    Returns:
        `destination`.
    """
    index: dict[str, Any] = {"_class_name": "WanPipeline", "boundary_ratio": boundary_ratio}
    for name in TRANSFORMERS if boundary_ratio else TRANSFORMERS[:1]:
        (destination / name).mkdir(parents=True)
        (destination / name / "config.json").write_text(json.dumps(config.to_hf(), indent=2) + "\n", encoding="utf-8")
        index[name] = ["diffusers", "WanTransformer3DModel"]
    (destination / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return destination

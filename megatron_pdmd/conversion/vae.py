"""Latents to pixels, with the pipeline's own VAE in diffusers."""

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megatron_pdmd.conversion.pipeline_folder import PipelineFolder
from megatron_pdmd.errors import library_reason
from megatron_pdmd.files.documents import read_json_object
from megatron_pdmd.files.safetensors_files import (
    DIFFUSERS_STEM,
    StoredTensor,
    read_model_header,
    require_finite,
    require_tensors,
)
from megatron_pdmd.limits import shown

_CLASS = "AutoencoderKLWan"
_CHANNELS = 16  # where its config.json does not say


def check_vae(folder: PipelineFolder) -> int:
    """Refuses, before anything is allocated, a VAE that could not decode.

    Args:
        folder: a pipeline with a VAE.

    Returns:
        Channels of its latents.

    Raises:
        ValueError: diffusers is missing, it is another VAE, or its config.json is not that of its weights.
    """
    if folder.model_classes.get("vae") != _CLASS:
        raise ValueError(f"{folder.path}: decoding needs an {_CLASS}, not {folder.model_classes.get('vae')}")
    if importlib.util.find_spec("diffusers") is None:
        raise ValueError(
            "decoding latents needs diffusers: run `pip install diffusers`, or leave pictures out (--no-pictures of"
            " tools, --sample-prompts 0 of runs)"
        )
    path = folder.path / "vae"
    config, header = read_json_object(path / "config.json"), read_model_header(path, DIFFUSERS_STEM)
    try:
        _check_sizes(config, header)
        for name in ("latents_mean", "latents_std"):
            values = config.get(name, [])
            if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
                raise ValueError(f"{name} is {shown(repr(values))}; expected numbers")
            if values and len(values) != config.get("z_dim", len(values)):
                raise ValueError(f"{name} has {len(values)} numbers for z_dim {shown(repr(config['z_dim']))}")
        if min(config.get("latents_std") or [1]) <= 0:
            raise ValueError(f"latents_std is {shown(repr(config['latents_std']))}; expected numbers greater than 0")
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from None
    return config.get("z_dim", _CHANNELS)


def _check_sizes(config: Mapping[str, Any], header: Mapping[str, StoredTensor]) -> None:
    """No width or count may exceed what is in the weights: a network of any other could be too large to describe.

    Raises:
        ValueError: names the entry.
    """
    widest = max((*(side for tensor in header.values() for side in tensor.shape), len(header)))
    for name, value in config.items():
        values = value if isinstance(value, list) else [value]
        if len(values) > len(header) or any(isinstance(one, int) and abs(one) > widest for one in values):
            raise ValueError(
                f"{shown(repr(name))} is {shown(repr(value))}, more than the weights have; do they belong together?"
            )
    factors = config.get("dim_mult", [1])
    if not isinstance(factors, list) or not factors or not all(type(factor) is int for factor in factors):
        raise ValueError(f"dim_mult is {shown(repr(factors))}; expected integers")
    width = widest // max(1, *factors)
    for name, limit in {
        "base_dim": width,
        "decoder_base_dim": width,
        "num_res_blocks": len(header) // len(factors),
    }.items():
        if type(config.get(name)) is int and config[name] > limit:
            raise ValueError(f"{name} is {config[name]}, more than the weights have; do they belong together?")


@torch.no_grad()
def load_vae(folder: PipelineFolder, device: torch.device | str = "cpu") -> Any:
    """The pipeline's VAE in fp32, with all its weights.

    Raises:
        ValueError: see `check_vae`; or tensors are missing, of other shapes, or not finite.
    """
    check_vae(folder)
    path, diffusers = folder.path / "vae", importlib.import_module("diffusers")
    diffusers.utils.logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            described = diffusers.AutoencoderKLWan.from_config(read_json_object(path / "config.json"))
        shapes = {name: tuple(tensor.shape) for name, tensor in described.state_dict().items()}
        require_tensors(path, read_model_header(path, DIFFUSERS_STEM), shapes)
        vae = diffusers.AutoencoderKLWan.from_pretrained(
            path, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    except Exception as error:
        own = isinstance(error, ValueError) and str(error).startswith(str(path))
        raise ValueError(str(error) if own else f"{path}: cannot be loaded ({library_reason(error)})") from None
    require_finite(vae.named_parameters(), path)
    return vae.to(device).eval().requires_grad_(False)


def decode_latents(folder: PipelineFolder, latents: torch.Tensor) -> torch.Tensor:
    """All the clips of `decoded_clips` in one tensor, [B, 3, 4 (F - 1) + 1, 8 H, 8 W] in [-1, 1] for Wan's strides."""
    return torch.cat(list(decoded_clips(folder, latents)))


@torch.no_grad()
def decoded_clips(folder: PipelineFolder, latents: torch.Tensor) -> Iterator[torch.Tensor]:
    """Decodes one clip at a time, in fp32, where the latents are.

    Args:
        folder: a pipeline with an `AutoencoderKLWan`.
        latents: [B, C, F, H, W], normalised by channel as the transformers see them.

    Yields:
        Pixels of the next clip, [1, 3, 4 (F - 1) + 1, 8 H, 8 W] in [-1, 1] for Wan's strides.

    Raises:
        ValueError: see `load_vae`.
    """
    vae = load_vae(folder, latents.device)
    mean, std = (
        torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    for clip in latents:
        yield vae.decode(clip[None].float() * std + mean, return_dict=False)[0].clamp(-1, 1)

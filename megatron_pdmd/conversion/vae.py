"""Latents to pixels, with the pipeline's own VAE in diffusers."""

import importlib
from collections.abc import Iterator

import torch

from megatron_pdmd.conversion.pipeline_folder import PipelineFolder


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
        ValueError: diffusers is missing, or the VAE is another one or cannot be loaded.
    """
    if folder.model_classes.get("vae") != "AutoencoderKLWan":
        raise ValueError(f"{folder.path}: decoding needs an AutoencoderKLWan, not {folder.model_classes.get('vae')}")
    try:
        diffusers = importlib.import_module("diffusers")
    except ModuleNotFoundError:
        raise ValueError(
            "decoding latents needs diffusers: run `pip install diffusers`, or pass --no-pictures"
        ) from None
    try:
        vae = diffusers.AutoencoderKLWan.from_pretrained(
            folder.path / "vae", dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    except Exception as error:
        raise ValueError(f"{folder.path / 'vae'}: cannot be loaded ({' '.join(str(error).split())[:300]})") from None
    vae = vae.to(latents.device).eval()
    mean, std = (
        torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    for clip in latents:
        yield vae.decode(clip[None].float() * std + mean, return_dict=False)[0].clamp(-1, 1)

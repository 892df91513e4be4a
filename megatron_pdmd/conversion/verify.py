"""Whether diffusers draws from an exported folder what our own sampler draws."""

import copy
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_pdmd.conversion.model_card import unshifted
from megatron_pdmd.conversion.pipeline_folder import TRANSFORMERS, read_pipeline

# What diffusers' Wan pipeline takes for the VAE's strides where there is no VAE.
_FRAME_STRIDE, _PIXEL_STRIDE = 4, 8


@dataclass(frozen=True)
class ExpertLora:
    """A phase's LoRA file and the subfolder of the transformer it belongs to."""

    base: str
    path: Path


def verify_export(
    folder: Path,
    prompt_embeddings: torch.Tensor,
    noise: torch.Tensor,
    sigmas: Sequence[float],
    ours: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    loras: Sequence[ExpertLora] = (),
    boundary_ratio: float | None = None,
    shift: float | None = None,
) -> float:
    """Samples the folder in diffusers and compares.

    Args:
        folder: the exported pipeline, or with `loras` the teacher's.
        prompt_embeddings: [B, L, D].
        noise: the initial latents [B, C, F, H, W].
        sigmas: noise levels of the steps, falling, without the final 0.
        ours: what our sampler made of the same noise, [B, C, F, H, W].
        dtype: of diffusers' models.
        loras: LoRA files to load into the teacher, first phase first.
        boundary_ratio: what separates the experts of two LoRA files.
        shift: of an Euler scheduler that takes the place of the folder's own, which may be of another kind.

    Returns:
        The relative L2 difference |diffusers - ours| / |diffusers|.

    Raises:
        ValueError: diffusers is missing or refuses the folder or a file.
    """
    pipeline = load_in_diffusers(folder, dtype, shift)
    if loras:
        apply_loras(pipeline, loras, boundary_ratio)
    theirs = sample_with_diffusers(pipeline, prompt_embeddings, noise, sigmas).double()
    return float(torch.linalg.vector_norm(theirs - ours.double().cpu()) / torch.linalg.vector_norm(theirs))


def sample_with_diffusers(
    pipeline: Any, prompt_embeddings: torch.Tensor, noise: torch.Tensor, sigmas: Sequence[float]
) -> torch.Tensor:
    """Final latents [B, C, F, H, W] of diffusers' own pipeline and scheduler, without guidance; see `verify_export`."""
    visit_sigmas(pipeline.scheduler, sigmas)
    frames, height, width = noise.shape[-3:]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt_embeds=prompt_embeddings.cpu(),
        latents=noise.float().cpu(),
        num_frames=(frames - 1) * _FRAME_STRIDE + 1,
        height=height * _PIXEL_STRIDE,
        width=width * _PIXEL_STRIDE,
        num_inference_steps=len(sigmas),
        guidance_scale=1.0,
        output_type="latent",
    ).frames


def apply_loras(pipeline: Any, loras: Sequence[ExpertLora], boundary_ratio: float | None) -> None:
    """Loads one or two LoRA files, each into a transformer of its own, and sets the boundary between them."""
    models = [getattr(pipeline, lora.base) for lora in loras]
    if len(models) == 2 and models[0] is models[1]:
        models[1] = copy.deepcopy(models[0])
    pipeline.register_modules(**dict(zip(TRANSFORMERS, [*models, None], strict=False)))
    pipeline.register_to_config(boundary_ratio=boundary_ratio if len(models) == 2 else None)
    for number, lora in enumerate(loras, start=1):
        try:
            pipeline.load_lora_weights(
                lora.path.parent,
                weight_name=lora.path.name,
                adapter_name=f"expert_{number}",
                load_into_transformer_2=number == 2,
                local_files_only=True,
            )
        except Exception as error:
            raise ValueError(f"{lora.path}: diffusers refuses it ({' '.join(str(error).split())[:300]})") from None


def visit_sigmas(scheduler: Any, sigmas: Sequence[float]) -> None:
    """Makes a FlowMatchEulerDiscreteScheduler visit exactly these levels, whatever number of steps it is asked for.

    `set_timesteps(sigmas=...)` shifts what it is given, so it is given the levels before the shift; and diffusers' Wan
    pipeline cannot pass any, so the scheduler's method is wrapped.
    """
    set_timesteps = scheduler.set_timesteps
    levels = [unshifted(sigma, scheduler.shift) for sigma in sigmas]

    def fixed_timesteps(num_inference_steps: int | None = None, device: torch.device | None = None) -> None:
        set_timesteps(sigmas=levels, device=device)

    scheduler.set_timesteps = fixed_timesteps


def load_in_diffusers(folder: Path, dtype: torch.dtype, shift: float | None = None) -> Any:
    """The folder as diffusers' `WanPipeline`, without VAE and text encoder.

    Args:
        folder: a pipeline.
        dtype: of its transformers.
        shift: of an Euler scheduler in place of the folder's own.

    Raises:
        ValueError: diffusers is missing or refuses the folder.
    """
    source = read_pipeline(folder)
    try:
        diffusers = importlib.import_module("diffusers")
    except ModuleNotFoundError:
        raise ValueError("--verify needs diffusers: run `pip install diffusers`") from None
    parts: dict[str, Any] = dict.fromkeys(source.model_classes.keys() & {"text_encoder", "tokenizer"})
    if shift is not None:
        parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    try:
        return diffusers.WanPipeline.from_pretrained(
            folder, vae=None, **parts, dtype=dtype, local_files_only=True, use_safetensors=True
        )
    except Exception as error:
        raise ValueError(f"{folder}: diffusers refuses it ({' '.join(str(error).split())[:300]})") from None

"""The README.md of an exported pipeline: what it is and how it has to be sampled."""

from collections.abc import Sequence

from megatron_pdmd.conversion.few_step_sampling import FewStepSampling
from megatron_pdmd.conversion.pipeline_folder import TRANSFORMERS, PipelineFolder
from megatron_pdmd.files.documents import read_json_object

_CARD = """\
---
library_name: diffusers
pipeline_tag: text-to-video
---

# A {count}-step generator, distilled with Phased DMD

Distilled from a `{pipeline}` teacher. It makes {count} Euler steps of one evaluation each, without classifier-free
guidance.

| step | noise level (sigma) | timestep | expert |
|---|---|---|---|
{table}

- timestep shift {shift:g}; sigma = shift u / (1 + (shift - 1) u) at u = {unshifted}
- `guidance_scale=1`
{boundary}{prompt}{size}
diffusers' pipeline has no `sigmas` argument, so its scheduler is told the steps beforehand. It applies the shift itself
and therefore takes the levels before the shift:

```python
import torch
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("this/folder", torch_dtype=torch.bfloat16)
set_timesteps = pipeline.scheduler.set_timesteps


def fixed_timesteps(num_inference_steps=None, device=None):
    set_timesteps(sigmas={unshifted}, device=device)


pipeline.scheduler.set_timesteps = fixed_timesteps
video = pipeline(
    "a prompt",
    {arguments},
).frames[0]
```
"""


def unshifted(sigma: float, shift: float) -> float:
    """The level u before the timestep shift: sigma = shift u / (1 + (shift - 1) u)."""
    return sigma / (shift - (shift - 1) * sigma)


def model_card(source: PipelineFolder, sampling: FewStepSampling) -> str:
    """The card's text.

    Args:
        source: the teacher's folder.
        sampling: what the card tells.
    """
    shift, boundary, length = sampling.timestep_shift, sampling.boundary_ratio, sampling.prompt_length
    rows = [(t, name) for name, levels in zip(TRANSFORMERS, sampling.steps, strict=False) for t in levels]
    return _CARD.format(
        count=len(rows),
        pipeline=source.pipeline_class,
        table=step_table(rows),
        shift=shift,
        unshifted=[float(f"{unshifted(sigma, shift):.7g}") for sigma, _ in rows],
        boundary="" if boundary is None else f"- `boundary_ratio` {boundary:.6g}: between the experts' steps\n",
        prompt="" if length is None else f"- prompts of {length} tokens: `max_sequence_length={length}`\n",
        size=size_line(source, sampling),
        arguments=",\n    ".join(call_arguments(source, sampling)),
    )


def step_table(rows: Sequence[tuple[float, str]]) -> str:
    """The rows of a table of steps: number, noise level, timestep, expert."""
    return "\n".join(f"| {i} | {t:.6g} | {1000 * t:.6g} | `{name}` |" for i, (t, name) in enumerate(rows, start=1))


def size_line(source: PipelineFolder, sampling: FewStepSampling) -> str:
    """The size that the experts were trained with, a line of a list, or nothing where it is not known."""
    if sampling.latent_size is None:
        return ""
    (latents, pixels) = (" x ".join(map(str, size)) for size in (sampling.latent_size, pixel_size(source, sampling)))
    return f"- trained with {latents} latents (frames, height, width), which are {pixels} pixels\n"


def call_arguments(source: PipelineFolder, sampling: FewStepSampling) -> list[str]:
    """What diffusers' pipeline is called with, besides the prompt."""
    size = zip(("num_frames", "height", "width"), pixel_size(source, sampling), strict=False)
    length = [] if sampling.prompt_length is None else [f"max_sequence_length={sampling.prompt_length}"]
    return [
        *(f"{name}={side}" for name, side in size),
        f"num_inference_steps={sum(map(len, sampling.steps))}",
        f"guidance_scale={sampling.guidance_scale}",
        *length,
        *([] if source.has_vae else ['output_type="latent"']),
    ]


def pixel_size(source: PipelineFolder, sampling: FewStepSampling) -> tuple[int, ...]:
    """Frames, height and width in pixels; empty where the latents' are not known.

    diffusers' pipeline takes pixels even where there is no VAE, and Wan2.1's strides then.
    """
    if sampling.latent_size is None:
        return ()
    config = read_json_object(source.path / "vae" / "config.json") if source.has_vae else {}
    strides = [config.get(name) for name in ("scale_factor_temporal", "scale_factor_spatial")]
    temporal, spatial = strides if all(type(stride) is int for stride in strides) else (4, 8)
    frames, height, width = sampling.latent_size
    return (frames - 1) * temporal + 1, height * spatial, width * spatial

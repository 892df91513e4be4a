"""The README.md of an exported pipeline: what it is and how it has to be sampled."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_pdmd.conversion.pipeline_folder import TRANSFORMERS, PipelineFolder

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
{boundary}{prompt}
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
video = pipeline("a prompt", num_inference_steps={count}, guidance_scale=1.0{length}).frames[0]
```
"""


def unshifted(sigma: float, shift: float) -> float:
    """The level u before the timestep shift: sigma = shift u / (1 + (shift - 1) u)."""
    return sigma / (shift - (shift - 1) * sigma)


def model_card(source: PipelineFolder, steps: Sequence[Sequence[float]], sampling: Mapping[str, Any]) -> str:
    """The card's text.

    Args:
        source: the teacher's folder.
        steps: noise levels of each expert.
        sampling: `timestep_shift`, `boundary_ratio` and `prompt_length`.
    """
    shift, boundary, length = (sampling[key] for key in ("timestep_shift", "boundary_ratio", "prompt_length"))
    rows = [(sigma, name) for name, levels in zip(TRANSFORMERS, steps, strict=False) for sigma in levels]
    table = [f"| {i} | {sigma:.6g} | {1000 * sigma:.6g} | `{name}` |" for i, (sigma, name) in enumerate(rows, start=1)]
    return _CARD.format(
        count=len(rows),
        pipeline=source.pipeline_class,
        table="\n".join(table),
        shift=shift,
        unshifted=[float(f"{unshifted(sigma, shift):.7g}") for sigma, _ in rows],
        boundary="" if boundary is None else f"- `boundary_ratio` {boundary:.6g}: between the experts' steps\n",
        prompt="" if length is None else f"- prompts of {length} tokens: `max_sequence_length={length}`\n",
        length="" if length is None else f", max_sequence_length={length}",
    )

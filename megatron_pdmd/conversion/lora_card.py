"""The README.md of a folder of LoRA files: what they are, and how they are loaded and sampled."""

from collections.abc import Sequence

from megatron_pdmd.conversion.few_step_sampling import FewStepSampling
from megatron_pdmd.conversion.model_card import call_arguments, size_line, step_table, unshifted
from megatron_pdmd.conversion.pipeline_folder import TRANSFORMERS, PipelineFolder

_CARD = """\
---
library_name: diffusers
pipeline_tag: text-to-video
tags:
- lora
---

# LoRA files of a {count}-step generator, distilled with Phased DMD

One file for each phase, on top of the `{pipeline}` teacher that was distilled. alpha / rank is folded into the second
matrices: every file's strength is 1. The generator makes {count} Euler steps of one evaluation each, without
classifier-free guidance.

| step | noise level (sigma) | timestep | file |
|---|---|---|---|
{table}

{bases}
- timestep shift {shift:g}; sigma = shift u / (1 + (shift - 1) u) at u = {unshifted}
- `guidance_scale=1`
{boundary}{prompt}{size}
`python tools/generate.py --lora this/folder --hf the/teacher --prompts prompts.txt --save samples` samples them.
{diffusers}"""

_DIFFUSERS = """
In diffusers the teacher's scheduler is replaced by an Euler one of this shift, which is told the steps beforehand: the
pipeline has no `sigmas` argument. It applies the shift itself and therefore takes the levels before the shift:

```python
import copy

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, {pipeline}

scheduler = FlowMatchEulerDiscreteScheduler(shift={shift!r})
pipeline = {pipeline}.from_pretrained("the/teacher", scheduler=scheduler, torch_dtype=torch.bfloat16)
{experts}
{loading}
set_timesteps = scheduler.set_timesteps


def fixed_timesteps(num_inference_steps=None, device=None):
    set_timesteps(sigmas={unshifted}, device=device)


scheduler.set_timesteps = fixed_timesteps
video = pipeline(
    "a prompt",
    {arguments},
).frames[0]
```
"""


def lora_card(source: PipelineFolder, files: Sequence[str], bases: Sequence[str], sampling: FewStepSampling) -> str:
    """The README's text.

    Args:
        source: the teacher.
        files: names of the LoRA files, first phase first.
        bases: for each of them the teacher's subfolder that it belongs to.
        sampling: how they are to be sampled.
    """
    rows = [(t, name) for name, levels in zip(files, sampling.steps, strict=True) for t in levels]
    length, boundary = sampling.prompt_length, sampling.boundary_ratio
    levels = [float(f"{unshifted(sigma, sampling.timestep_shift):.7g}") for sigma, _ in rows]
    told = {
        "count": len(rows),
        "pipeline": source.pipeline_class,
        "shift": sampling.timestep_shift,
        "unshifted": levels,
    }
    diffusers = _DIFFUSERS.format(
        **told,
        experts=_experts(bases, boundary),
        loading="\n".join(_loading(name, number) for number, name in enumerate(files)),
        arguments=",\n    ".join(call_arguments(source, sampling)),
    )
    return _CARD.format(
        **told,
        table=step_table(rows),
        bases="\n".join(
            f"- `{name}` belongs to the teacher's `{base}`" for name, base in zip(files, bases, strict=True)
        ),
        boundary="" if boundary is None else f"- `boundary_ratio` {boundary:.6g}: between the files' steps\n",
        prompt="" if length is None else f"- prompts of {length} tokens: `max_sequence_length={length}`\n",
        size=size_line(source, sampling),
        diffusers=diffusers if len(files) <= len(TRANSFORMERS) else "",  # its pipelines hold no more
    )


def _experts(bases: Sequence[str], boundary: float | None) -> str:
    """The lines that give each file a transformer of its own."""
    first, second = TRANSFORMERS
    if len(bases) == 1:
        chosen = [f"pipeline.register_modules({first}=pipeline.{bases[0]}, {second}=None)"]
    elif bases[0] == bases[1]:
        chosen = [f"{second} = copy.deepcopy(pipeline.{bases[0]})"]
        chosen += [f"pipeline.register_modules({first}=pipeline.{bases[0]}, {second}={second})"]
    else:
        chosen = [f"pipeline.register_modules({first}=pipeline.{bases[0]}, {second}=pipeline.{bases[1]})"]
    return "\n".join([*chosen, f"pipeline.register_to_config(boundary_ratio={boundary!r})"])


def _loading(name: str, number: int) -> str:
    second = ", load_into_transformer_2=True" if number else ""
    return (
        f'pipeline.load_lora_weights("this/folder", weight_name="{name}", adapter_name="expert_{number + 1}"{second})'
    )

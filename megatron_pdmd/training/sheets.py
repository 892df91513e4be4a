"""Sample sheets of a run: the teacher's many steps beside the student's few, from the same noise."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from megatron_pdmd.config import Config
from megatron_pdmd.conversion.pipeline_folder import read_pipeline
from megatron_pdmd.conversion.vae import decode_latents
from megatron_pdmd.distillation.step import guidance_scale
from megatron_pdmd.evaluation.sheets import save_animation, save_contact_sheet
from megatron_pdmd.training.sampling import Sampler


@dataclass
class SampleSheets:
    """Draws PNG and GIF sheets into the run's samples/; the teacher's half is sampled once.

    Attributes:
        config: names the folder, the number of prompts and the teacher's steps.
    """

    config: Config
    _teacher: torch.Tensor | None = field(default=None, init=False)

    def draw(self, sampler: Sampler, iteration: int) -> None:
        """Samples on all ranks; the first one writes `iter_0000100.png` and `.gif`, or says why it cannot.

        Before the last phase has begun, the teacher takes over where the trained phases end.
        """
        texts = sampler.prompts.prompts
        count = min(self.config.logging.sample_prompts, len(texts))
        chosen = [round(i * (len(texts) - 1) / max(count - 1, 1)) for i in range(count)]
        steps = self.config.evaluation.teacher_steps
        guidance = functools.partial(guidance_scale, self.config.method)
        if self._teacher is None:
            self._teacher = sampler.teacher(chosen, steps, guidance)
        student = sampler.student(chosen)
        label, end = f"student, {len(sampler.plan.times) - 1} steps", sampler.plan.times[-1]
        if end > 0:
            student = sampler.teacher(chosen, steps, guidance, start=(end, student))
            label += ", then teacher"
        if sampler.topology.rank == 0:
            clips = {f"teacher, {steps} steps": self._teacher, label: student}
            try:
                self._write(clips, [texts[i] for i in chosen], f"iter_{iteration:07d}")
            except ValueError as error:
                print(f"iteration {iteration}: no sample sheet ({error})", flush=True)

    def _write(self, clips: Mapping[str, torch.Tensor], prompts: list[str], name: str) -> None:
        """Decodes the latents where the teacher has a VAE, and writes PNG and GIF.

        Raises:
            ValueError: the VAE cannot be used, or there is none and the latents are no pixels.
        """
        source = read_pipeline(self.config.model.teacher)
        pixels = {label: decode_latents(source, x) if source.has_vae else x for label, x in clips.items()}
        folder = self.config.checkpoint.save / "samples"
        save_contact_sheet(folder / f"{name}.png", pixels, prompts)
        pairs = torch.stack(list(pixels.values()), dim=1).flatten(0, 1)
        save_animation(folder / f"{name}.gif", pairs, columns=len(pixels))

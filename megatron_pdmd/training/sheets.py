"""Sample sheets of a run: the teacher's many steps beside the student's few, from the same noise."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_pdmd.config import Config
from megatron_pdmd.conversion.pipeline_folder import read_pipeline
from megatron_pdmd.conversion.vae import decoded_clips
from megatron_pdmd.evaluation.sheets import save_animation, save_contact_sheet, shrunk
from megatron_pdmd.files.whole import synchronise
from megatron_pdmd.parallel.agreement import together
from megatron_pdmd.parallel.patience import patient_group
from megatron_pdmd.training.fixed_samples import FixedSamples, spread
from megatron_pdmd.training.milestones import sheet_files
from megatron_pdmd.training.sampling import Sampler


@dataclass
class SampleSheets:
    """Draws PNG and GIF sheets into the run's samples/; with `--sample-prompts 0` it draws none.

    Attributes:
        config: names the folder and the number of prompts.
        samples: what is drawn.
    """

    config: Config
    samples: FixedSamples
    _drawn: bool = field(default=False, init=False)  # on all ranks alike, where the next two are the first one's
    _teacher: torch.Tensor | None = field(default=None, init=False)
    _teacher_pixels: torch.Tensor | None = field(default=None, init=False)

    def draw(self, sampler: Sampler, iteration: int) -> None:
        """Samples on all ranks; the first one writes `iter_0000100.png` and `.gif`, or says why it cannot."""
        if self.config.logging.sample_prompts:
            self.write(sampler, self.samples.student(sampler)[1], iteration)

    def write(self, sampler: Sampler, student: torch.Tensor, iteration: int) -> None:
        """Draws what was sampled. Called on all ranks, which wait for the first one without their devices.

        Args:
            sampler: of the samples.
            student: this replica's share, at t = 0.
            iteration: names the files.
        """
        if not self.config.logging.sample_prompts:
            return
        chosen = self.samples.prompts(sampler)
        if not self._drawn:
            self._teacher, self._drawn = sampler.gather(self.samples.teacher(sampler), len(chosen)), True
        student = sampler.gather(student, len(chosen))
        with together(patient_group()):
            if sampler.topology.rank == 0:
                try:
                    self._write(sampler, student, chosen, iteration)
                except ValueError as error:
                    print(f"iteration {iteration}: no sample sheet ({error})", flush=True)

    def _write(self, sampler: Sampler, student: torch.Tensor, chosen: list[int], iteration: int) -> None:
        """Decodes the latents where the teacher has a VAE, and writes PNG and GIF.

        Raises:
            ValueError: the VAE cannot be used, or there is none and the latents are no pixels.
        """
        rows = spread(self.config.logging.sample_prompts, len(chosen))
        if self._teacher_pixels is None:
            self._teacher_pixels = self._pixels(self._teacher[rows])
        plan = sampler.plan
        label = f"student, {len(plan.times) - 1} steps" + (", then teacher" if plan.times[-1] > 0 else "")
        steps = self.config.evaluation.teacher_steps
        pixels = {f"teacher, {steps} steps": self._teacher_pixels, label: self._pixels(student[rows])}
        prompts = [sampler.prompts.prompts[chosen[row]] for row in rows]
        pairs = torch.stack(list(pixels.values()), dim=1).flatten(0, 1)
        with _put_into_place(self.config.checkpoint.save, iteration) as (sheet, animation):
            save_contact_sheet(sheet, pixels, prompts)
            save_animation(animation, pairs, columns=len(pixels))

    def _pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes one clip after another on the CPU, for the devices are full, and keeps each in a tile's size."""
        source = read_pipeline(self.config.model.teacher)
        if not source.has_vae:
            return latents
        with _all_cores():
            return torch.cat([shrunk(clip) for clip in decoded_clips(source, latents)])


@contextmanager
def _put_into_place(run: Path, iteration: int) -> Iterator[tuple[Path, Path]]:
    """Where to draw a sheet and its animation, which then go to their places, or nowhere when drawing fails.

    So what is in its place is whole, and a launch that goes on knows what is left to draw.
    """
    sheet, animation = sheet_files(run, iteration)
    beside = run / ".samples.partial"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside / sheet.name, beside / animation.name
        sheet.parent.mkdir(exist_ok=True)
        for drawn in sorted(beside.iterdir()):
            synchronise(drawn)
            drawn.replace(sheet.with_name(drawn.name))
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def _all_cores() -> Iterator[None]:
    """Computes with every core inside the block: the other ranks of the machine wait and leave theirs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

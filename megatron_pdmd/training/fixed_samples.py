"""The same prompts from the same noise, sampled again and again while a run goes."""

import functools
from dataclasses import dataclass, field

import torch

from megatron_pdmd.config import Config
from megatron_pdmd.distillation.step import guidance_scale
from megatron_pdmd.training.sampling import Sampler


@dataclass
class FixedSamples:
    """Samples for evaluations and sheets: each replica has its own share of them, on the CPU.

    Attributes:
        config: names the number of prompts and the teacher's steps.
    """

    config: Config
    _teacher: torch.Tensor | None = field(default=None, init=False)

    def prompts(self, sampler: Sampler) -> list[int]:
        """Indices of the prompts, spread evenly over all."""
        evaluation, logging = self.config.evaluation, self.config.logging
        count = evaluation.eval_samples if evaluation.eval_interval else logging.sample_prompts
        return spread(count, len(sampler.prompts.prompts))

    def teacher(self, sampler: Sampler) -> torch.Tensor:
        """The teacher's, with many steps and its guidance, [n, C, F, H, W]; sampled by the first call."""
        if self._teacher is None:
            self._teacher = sampler.teacher(self.prompts(sampler), self._steps, self._guidance).cpu()
        return self._teacher

    def student(self, sampler: Sampler) -> tuple[torch.Tensor, torch.Tensor]:
        """The student's at the end of the phases trained so far, and the same brought to t = 0.

        Before the last phase has begun, the teacher takes over where the trained phases end.
        """
        chosen, end = self.prompts(sampler), sampler.plan.times[-1]
        student = sampler.student(chosen)
        if end == 0:
            return student.cpu(), student.cpu()
        return student.cpu(), sampler.teacher(chosen, self._steps, self._guidance, start=(end, student)).cpu()

    @property
    def _steps(self) -> int:
        return self.config.evaluation.teacher_steps

    @functools.cached_property
    def _guidance(self) -> functools.partial:
        return functools.partial(guidance_scale, self.config.method)


def spread(count: int, total: int) -> list[int]:
    """At most `count` of `total` indices, evenly spread from the first to the last."""
    count = min(count, total)
    return [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]

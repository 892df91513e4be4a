"""What fixed samples say of a run: how far the student is from its teacher, how much it still moves, and whether the
fake score follows it.

Everything is drawn from the counter's own phase, so training meets the same numbers with and without evaluations.
"""

from dataclasses import dataclass, field

import torch

from megatron_pdmd.config import Config
from megatron_pdmd.distillation.randomness import Purpose
from megatron_pdmd.distillation.roles import Pass, Role
from megatron_pdmd.distillation.step import NOISE_BINS, Iteration
from megatron_pdmd.parallel.agreement import together
from megatron_pdmd.parallel.patience import patient_group
from megatron_pdmd.training.evaluated_samples import EvaluatedSamples
from megatron_pdmd.training.fixed_samples import FixedSamples
from megatron_pdmd.training.sampling import Sampler
from megatron_pdmd.training.sheets import SampleSheets

_RENOISING = -1  # the counter's `update` of the noise that takes the teacher's samples to a phase's end


@dataclass
class Validation:
    """Evaluates the student every `--eval-interval` iterations, and draws the sheets.

    Attributes:
        config: of the run.
        samples: fixed prompts and noise.
        sheets: their pictures.
    """

    config: Config
    samples: FixedSamples = field(init=False)
    sheets: SampleSheets = field(init=False)
    _kept: EvaluatedSamples = field(init=False)
    _phase: int = field(default=0, init=False)
    _last: torch.Tensor | None = field(default=None, init=False)
    _floor: torch.Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.samples = FixedSamples(self.config)
        self.sheets = SampleSheets(self.config, self.samples)
        self._kept = EvaluatedSamples(self.config.checkpoint.save)

    @torch.no_grad()
    def evaluate(self, sampler: Sampler, iteration: Iteration, number: int, *, draw: bool = True) -> dict[str, float]:
        """Samples the student and measures it. Called on all ranks.

        Args:
            sampler: of the fixed prompts.
            iteration: of the phase being trained, for its noise interval and its fake score's loss.
            number: iterations done; names the sheet.
            draw: draw a sheet of what was sampled too.

        Returns:
            On rank 0, means over the samples; elsewhere nothing.

            - `sample_distance`: |student - teacher| / |teacher| at t = 0, from the same noise.
            - `sample_change`: |now - last evaluation| / |last evaluation|; NaN in a phase's first.
            - `eval_fake_loss`: the fake score's loss on the student's samples at the phase's end, at the middle of each
              bin of noise, and its mean over them.
            - `fake_loss_floor`: the teacher's, on its own samples, at the same times and noise.
        """
        at_end, student = self.samples.student(sampler)
        teacher = self.samples.teacher(sampler)
        if iteration.phase.index != self._phase:
            self._phase, self._last = iteration.phase.index, self._before(sampler, iteration, number)
            self._floor = self._losses(sampler, iteration, "teacher", self._at_end(sampler, iteration, teacher))
        losses = self._losses(sampler, iteration, "fake_score", at_end)
        unknown = torch.full((len(student),), torch.nan)
        moved = unknown if self._last is None else _relative_distance(student, self._last)
        self._last = student
        self._keep(sampler, iteration, number)
        table = torch.cat([_relative_distance(student, teacher)[:, None], moved[:, None], losses, self._floor], dim=1)
        gathered = sampler.gather(table, len(self.samples.prompts(sampler)))
        if draw:
            self.sheets.write(sampler, student, number)
        if gathered is None:
            return {}
        means = gathered.double().mean(0)
        return {"sample_distance": means[0].item(), "sample_change": means[1].item()} | (
            _by_level("eval_fake_loss", means[2 : 2 + NOISE_BINS]) | _by_level("fake_loss_floor", means[-NOISE_BINS:])
        )

    def _before(self, sampler: Sampler, iteration: Iteration, number: int) -> torch.Tensor | None:
        """This replica's share of the phase's last evaluation, where a launch before this one made it."""
        samples = self._kept.read(number, iteration.phase.index, self._texts(sampler))
        if samples is None or tuple(samples.shape[1:]) != tuple(sampler.latent_shape):
            return None
        return samples[self._own(sampler)]

    def _keep(self, sampler: Sampler, iteration: Iteration, number: int) -> None:
        """Keeps the samples for the next launch. Called on all ranks."""
        texts = self._texts(sampler)
        samples = sampler.gather(self._last, len(texts))
        with together(patient_group()):
            if samples is not None:
                self._kept.write(number, iteration.phase.index, texts, samples)

    def _texts(self, sampler: Sampler) -> list[str]:
        return [sampler.prompts.prompts[index] for index in self.samples.prompts(sampler)]

    def _at_end(self, sampler: Sampler, iteration: Iteration, samples: torch.Tensor) -> torch.Tensor:
        """Samples at t = 0 with the noise of the phase's end: p(x_s) as the teacher has it."""
        if iteration.phase.end == 0:
            return samples
        device = sampler.topology.device
        noise = sampler.counter.at(update=_RENOISING).seeds(Purpose.DIFFUSION_NOISE, self._own(sampler)).to(device)
        start = torch.zeros(len(samples), device=device)
        end = torch.full_like(start, iteration.phase.end)
        return iteration.schedule.diffuse(samples.to(device), noise, start, end)

    def _losses(self, sampler: Sampler, iteration: Iteration, role: Role, x_s: torch.Tensor) -> torch.Tensor:
        """The fake score's loss of what a role predicts for each sample at the phase's end, [n, NOISE_BINS]."""
        device, chosen = sampler.topology.device, self.samples.prompts(sampler)
        losses = torch.empty(len(x_s), NOISE_BINS, device=device)
        for row, index in enumerate(self._own(sampler)):
            sample, text = (x.to(device) for x in (x_s[row : row + 1], sampler.prompts.batch([chosen[index]])))
            for level in range(NOISE_BINS):
                u = torch.tensor([(level + 0.5) / NOISE_BINS])
                t = iteration.times(u)
                noise = sampler.counter.at(update=level).seeds(Purpose.DIFFUSION_NOISE, [index]).to(device)
                x_t = iteration.schedule.diffuse(sample, noise, torch.full_like(t, iteration.phase.end), t)
                flow = sampler.roles.run(Pass(role, iteration.expert_of(u.item()), x_t, t, text))
                losses[row, level] = iteration.fake_loss(flow, sample, x_t, noise, t)
        return losses.cpu()

    def _own(self, sampler: Sampler) -> list[int]:
        return sampler.share(len(self.samples.prompts(sampler)))


def _relative_distance(samples: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """|x - y| / |y| of each sample, [n]."""
    return (samples - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)


def _by_level(name: str, losses: torch.Tensor) -> dict[str, float]:
    return {name: losses.mean().item()} | {f"{name}_bin_{i}": loss.item() for i, loss in enumerate(losses)}

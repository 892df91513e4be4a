"""Samples of a run's networks: the distilled generator's few steps, and the teacher's many with guidance."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_pdmd.data.prompts import PromptEmbeddings
from megatron_pdmd.diffusion.noise_schedule import NoiseSchedule
from megatron_pdmd.diffusion.phases import Phase, PhasePlan, expert_at
from megatron_pdmd.diffusion.sampler import sample, sample_along
from megatron_pdmd.distillation.distribution_matching import guided_flow
from megatron_pdmd.distillation.randomness import Counter, Purpose
from megatron_pdmd.distillation.roles import Pass, Roles
from megatron_pdmd.parallel.topology import Topology

SAMPLING_PHASE = 0  # the counter's phase for samples that are looked at, so that training never meets their noise

FlowOfTime = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Sampler:
    """Draws samples of prompts; the same numbers whatever the number of ranks and the batch size.

    Attributes:
        roles: the networks.
        plan: the generator's steps.
        schedule: alpha_t and sigma_t.
        prompts: embeddings.
        latent_shape: [C, F, H, W].
        counter: seed of the noise; sample i has the same noise for every sampler.
        topology: data-parallel ranks share the work.
        batch_size: samples in one forward pass.
    """

    roles: Roles
    plan: PhasePlan
    schedule: NoiseSchedule
    prompts: PromptEmbeddings
    latent_shape: tuple[int, ...]
    counter: Counter
    topology: Topology
    batch_size: int

    def student(self, prompts: Sequence[int]) -> torch.Tensor:
        """The generator's samples, without guidance.

        Args:
            prompts: a prompt's index for each sample.

        Returns:
            [N, C, F, H, W] fp32 on every rank.
        """

        def run(x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            def flow(x_t: torch.Tensor, t: torch.Tensor, phase: Phase) -> torch.Tensor:
                return self.roles.run(Pass("generator", phase.index, x_t, t, text))

            return sample(flow, x, self.plan.phases, self.schedule)

        return self._on_all_ranks(prompts, run)

    def teacher(
        self,
        prompts: Sequence[int],
        steps: int,
        guidance: Callable[[str], float],
        start: tuple[float, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The teacher's samples after Euler steps evenly spaced before the shift.

        Args:
            prompts: a prompt's index for each sample.
            steps: number of steps from noise to data.
            guidance: scale of classifier-free guidance of each expert; 1 is none.
            start: a time and latents [N, C, F, H, W] there, to go on from instead of noise.

        Returns:
            [N, C, F, H, W] fp32 on every rank.
        """
        times = self.schedule.shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64)).tolist()
        if start:
            times = [start[0], *(time for time in times if time < start[0])]

        def run(x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            negative = self.prompts.negative.to(text).expand_as(text)

            def flow(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
                expert = expert_at(t[0].item(), self.plan.boundary)
                conditional = self.roles.run(Pass("teacher", expert, x_t, t, text))
                if guidance(expert) == 1:
                    return conditional
                return guided_flow(
                    conditional, self.roles.run(Pass("teacher", expert, x_t, t, negative)), guidance(expert)
                )

            return sample_along(flow, x, times, self.schedule)

        return self._on_all_ranks(prompts, run, start and start[1])

    @torch.no_grad()
    def _on_all_ranks(
        self,
        prompts: Sequence[int],
        run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Batches are dealt to the data-parallel ranks in turn, and their samples put together again.

        Each sample starts from its own noise, or from its row of `latents`.
        """
        samples = torch.zeros(len(prompts), *self.latent_shape, device=self.topology.device)
        starts = range(0, len(prompts), self.batch_size)
        for start in starts[self.topology.data_rank :: self.topology.data]:
            indices = range(start, min(start + self.batch_size, len(prompts)))
            x = self.counter.normal(Purpose.INITIAL_NOISE, self.latent_shape, indices, samples.device)
            if latents is not None:
                x = latents[indices.start : indices.stop]
            text = self.prompts.batch([prompts[i] for i in indices]).to(samples.device)
            samples[indices.start : indices.stop] = run(x, text)
        if self.topology.data > 1:
            torch.distributed.all_reduce(samples, group=self.topology.groups.dp)
        return samples

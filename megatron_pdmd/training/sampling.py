"""Samples of a run's networks: the distilled generator's few steps, and the teacher's many with guidance."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist

from megatron_pdmd.data.prompts import PromptEmbeddings
from megatron_pdmd.diffusion.noise_schedule import NoiseSchedule
from megatron_pdmd.diffusion.phases import Phase, PhasePlan, expert_at
from megatron_pdmd.diffusion.sampler import FlowOfTime, sample, sample_along
from megatron_pdmd.distillation.distribution_matching import guided_flow
from megatron_pdmd.distillation.randomness import Counter, Purpose
from megatron_pdmd.distillation.roles import Pass, Roles
from megatron_pdmd.parallel.patience import patient_group
from megatron_pdmd.parallel.topology import Topology

SAMPLING_PHASE = 0  # the counter's phase for samples that are looked at, so that training never meets their noise

Guidance = Callable[[str], float]


@dataclass(frozen=True)
class Sampler:
    """Draws samples of prompts, whose noise does not depend on the number of ranks or the batch size.

    Batches are dealt to the data-parallel replicas in turn. `student` and `teacher` give a replica its own share, and
    `gather` brings the shares together, so that what is only needed where it was drawn never travels.

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
            prompts: a prompt's index for each of N samples.

        Returns:
            This replica's share of them, [n, C, F, H, W] fp32 on its device.
        """

        def run(x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            def flow(x_t: torch.Tensor, t: torch.Tensor, phase: Phase) -> torch.Tensor:
                return self.roles.run(Pass("generator", phase.index, x_t, t, text))

            return sample(flow, x, self.plan.phases, self.schedule)

        return self._own_share(prompts, run)

    def teacher(
        self,
        prompts: Sequence[int],
        steps: int,
        guidance: Guidance,
        start: tuple[float, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The teacher's samples after Euler steps evenly spaced before the shift.

        Args:
            prompts: a prompt's index for each of N samples.
            steps: number of steps from noise to data.
            guidance: scale of classifier-free guidance of each expert; 1 is none.
            start: a time and this replica's share of latents there, to go on from instead of noise.

        Returns:
            This replica's share, [n, C, F, H, W] fp32 on its device.
        """
        times = self.schedule.shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64)).tolist()
        if start:
            times = [start[0], *(time for time in times if time < start[0])]

        def run(x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            negative = self.prompts.negative.to(text).expand_as(text)
            for now, later in pairwise(times):
                flow = self._guided_flow(expert_at(now, self.plan.boundary), text, negative, guidance)
                x = sample_along(flow, x, (now, later), self.schedule)
            return x

        return self._own_share(prompts, run, start and start[1])

    def _guided_flow(self, expert: str, text: torch.Tensor, negative: torch.Tensor, guidance: Guidance) -> FlowOfTime:
        """A teacher's expert with its guidance."""

        def flow(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            conditional = self.roles.run(Pass("teacher", expert, x_t, t, text))
            if guidance(expert) == 1:
                return conditional
            unconditional = self.roles.run(Pass("teacher", expert, x_t, t, negative))
            return guided_flow(conditional, unconditional, guidance(expert))

        return flow

    def share(self, count: int, replica: int | None = None) -> list[int]:
        """Which of `count` samples a replica draws, by default this rank's: whole batches in turn."""
        starts = range(0, count, self.batch_size)
        own = starts[self.topology.data_rank if replica is None else replica :: self.topology.data]
        return [index for start in own for index in range(start, min(start + self.batch_size, count))]

    def gather(self, own: torch.Tensor, count: int) -> torch.Tensor | None:
        """The shares of all replicas, in order. Called on all ranks, which leave it together.

        They travel from the CPU over gloo: a rank that waits for a slower one meets no timeout of NCCL.

        Args:
            own: what this replica has for each of its samples, [n, ...].
            count: samples of all replicas.

        Returns:
            [count, ...] on the CPU on rank 0, None on the others.
        """
        topology, group, own = self.topology, patient_group(), own.cpu().contiguous()
        # Of each replica one rank speaks: the first of the first pipeline stage, which has the samples as all have.
        speaks = topology.tensor_rank == topology.context_rank == topology.pipeline_rank == 0
        samples = None
        if topology.rank == 0:
            samples, speakers = own.new_empty(count, *own.shape[1:]), dist.get_process_group_ranks(topology.groups.dp)
            for replica in range(topology.data):
                indices, part = self.share(count, replica), own
                if replica and indices:
                    part = own.new_empty(len(indices), *own.shape[1:])
                    dist.recv(part, speakers[replica], group=group)
                if indices:
                    samples[indices] = part
        elif speaks and len(own):
            dist.send(own, 0, group=group)
        dist.barrier(group)
        return samples

    @torch.no_grad()
    def _own_share(
        self,
        prompts: Sequence[int],
        run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs this replica's batches. Each sample starts from its own noise, or from its row of `latents`."""
        device, own = self.topology.device, self.share(len(prompts))
        samples = torch.empty(len(own), *self.latent_shape, device=device)
        for start in range(0, len(own), self.batch_size):
            indices = own[start : start + self.batch_size]
            x = self.counter.normal(Purpose.INITIAL_NOISE, self.latent_shape, indices, device)
            if latents is not None:
                x = latents[start : start + len(indices)].to(device)
            text = self.prompts.batch([prompts[i] for i in indices]).to(device)
            samples[start : start + len(indices)] = run(x, text)
        return samples

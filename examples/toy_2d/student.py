"""The students of the 2-D toy: small networks, their start from the teacher, and the iterations of all phases.

The algorithm is the library's: `Iteration` says which passes an update needs, `Roles` who answers, `walk` runs them.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from ring import Ring
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from megatron_pdmd.config import Config, OptimizerConfig
from megatron_pdmd.diffusion import FlowMatchingSchedule, NoiseSchedule, Phase, PhasePlan, make_move, moves_of
from megatron_pdmd.distillation.randomness import WHOLE_BATCH, Counter, Purpose
from megatron_pdmd.distillation.roles import Generator, Roles
from megatron_pdmd.distillation.step import GENERATOR_UPDATE, Iteration, MicroBatch, Program, walk

FREQUENCIES = (1.0, 2.0, 4.0)  # of the time embedding, in half turns over t in [0, 1]


class PlaneFlow(nn.Module):
    """S independent MLPs that predict the flow in the plane from x_t and t, one for each seed, as one batched network.

    A batch holds the samples of the first MLP, then those of the second, and so on. Small networks are bound by the
    number of operations, so that several cost hardly more than one.
    """

    def __init__(self, width: int, seeds: int = 1) -> None:
        super().__init__()
        sizes = (3 + 2 * len(FREQUENCIES), width, width, width, 2)
        layers = [nn.Linear(size, next_size) for size, next_size in pairwise(sizes)]
        self.weights = nn.ParameterList(layer.weight.detach().T.repeat(seeds, 1, 1) for layer in layers)
        self.biases = nn.ParameterList(layer.bias.detach().repeat(seeds, 1, 1) for layer in layers)
        self.register_buffer("frequencies", torch.pi * torch.tensor(FREQUENCIES), persistent=False)

    def forward(self, x_t: Tensor, t: Tensor, conditions: None = None, adapter: None = None) -> Tensor:
        """x_t [S * B, 2] and t [S * B] -> flow [S * B, 2]; there is nothing to condition on."""
        angle = t[:, None] * self.frequencies
        x = torch.cat([x_t, t[:, None], angle.sin(), angle.cos()], dim=1)
        x = x.unflatten(0, (len(self.weights[0]), -1))
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = nn.functional.silu(torch.baddbmm(bias, x, weight))
        return torch.baddbmm(self.biases[-1], x, self.weights[-1]).flatten(0, 1)

    def repeated(self, seeds: int) -> "PlaneFlow":
        """As many copies of this one MLP, which training will tell apart."""
        copies = copy.deepcopy(self)
        for parameter in copies.parameters():
            parameter.data = parameter.data.repeat(seeds, 1, 1)
        return copies.requires_grad_(True)


@dataclass(frozen=True)
class BatchCounter(Counter):
    """A counter that draws a whole batch from one generator.

    A generator for each sample makes the numbers independent of ranks and micro-batches, of which a toy has one. It
    takes about 10 us a sample, which for thousands of small batches is longer than the networks take.
    """

    def uniform(self, purpose: Purpose, samples: Sequence[int] = (WHOLE_BATCH,)) -> Tensor:
        return torch.rand(len(samples), generator=self.generator(purpose))

    def normal(self, purpose: Purpose, shape: Sequence[int], samples: Sequence[int]) -> Tensor:
        return torch.randn(len(samples), *shape, generator=self.generator(purpose))


def pretrain(ring: Ring, *, width: int, iterations: int, batch_size: int, lr: float, seed: int) -> PlaneFlow:
    """A network that has learnt the teacher's flow, as generator and fake score need weights to start from.

    Times are uniform, noise levels of every shift are thus in reach. Adam with cosine decay to 0.
    """
    torch.manual_seed(seed)
    schedule, draws = FlowMatchingSchedule(), torch.Generator().manual_seed(seed)
    model = PlaneFlow(width)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        x0 = ring.sample(batch_size, draws)
        eps = torch.randn(batch_size, 2, generator=draws)
        t = torch.rand(batch_size, generator=draws)
        x_t = schedule.diffuse(x0, eps, torch.zeros_like(t), t)
        loss = (model(x_t, t) - ring.flow(x_t, t, schedule)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return model.requires_grad_(False)


class Learner:
    """A network with its optimizer; an update is one program of the library."""

    def __init__(self, network: PlaneFlow, lr: float, options: OptimizerConfig) -> None:
        self.network = network
        self._parameters = list(network.parameters())
        self._clip_grad = options.clip_grad
        betas = (options.adam_beta1, options.adam_beta2)
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=lr, betas=betas, eps=options.adam_eps, weight_decay=options.weight_decay, fused=True
        )

    def update(self, program: Program, roles: Roles) -> None:
        """Gradients by the program, clipped, and one step."""
        self._optimizer.zero_grad()
        walk(program, roles)
        self._clip()
        self._optimizer.step()

    def _clip(self) -> None:
        """Scales the gradients of each seed's MLP down to the largest norm allowed.

        The losses are means over the samples of all seeds, so an MLP's own gradient is as many times larger.
        """
        grads = [parameter.grad for parameter in self._parameters]
        seeds = len(grads[0])
        norm = seeds * torch.stack([grad.flatten(1).norm(dim=1) for grad in grads]).norm(dim=0)
        scale = seeds * (self._clip_grad / norm).clamp(max=1.0)
        torch._foreach_mul_(grads, [scale[:, None, None]] * len(grads))


@dataclass(frozen=True)
class Student:
    """A distilled generator for each seed.

    Attributes:
        experts: the networks of each phase, by its 1-based index.
        plan: the phases.
        schedule: alpha and sigma.
    """

    experts: dict[int, PlaneFlow]
    plan: PhasePlan
    schedule: NoiseSchedule

    @torch.no_grad()
    def path(self, noise: Tensor) -> dict[float, Tensor]:
        """The samples [S * B, 2] at every noise level of the sampler, from t = 1 to 0."""
        levels, x = {self.plan.times[0]: noise}, noise
        for move in moves_of(self.plan.phases):
            x = make_move(self._flow, x, move, self.schedule)
            levels[move.t_next] = x
        return levels

    def _flow(self, x_t: Tensor, t: Tensor, phase: Phase) -> Tensor:
        return self.experts[phase.index](x_t, t)


def distill(ring: Ring, start: PlaneFlow, config: Config, seeds: int) -> Student:
    """Trains the experts of all phases in turn, for all seeds side by side.

    The seeds have networks and noise of their own; what is one draw for a global batch, the step of SGTS, they share.

    Args:
        ring: the data, whose exact flow is the teacher.
        start: one MLP, which every expert and every phase's fake score starts from.
        config: its method is one of Fig. 1's; the batch is that of one seed.
        seeds: S.
    """
    schedule = FlowMatchingSchedule(shift=config.method.timestep_shift)
    plan = PhasePlan.build(config.method.num_steps, config.method.phase_steps, schedule)
    delivered: dict[int, PlaneFlow] = {}
    for phase, iterations in zip(plan.phases, config.training.train_iters, strict=True):
        iteration = Iteration(config.method, plan, phase, schedule, (2,), torch.device("cpu"))
        delivered[phase.index] = _train_phase(ring, start.repeated(seeds), delivered, iteration, iterations, config)
    return Student(delivered, plan, schedule)


def _train_phase(
    ring: Ring,
    start: PlaneFlow,
    delivered: dict[int, PlaneFlow],
    iteration: Iteration,
    iterations: int,
    config: Config,
) -> PlaneFlow:
    """The moving average of the phase's expert, after its iterations; `delivered` holds the experts before it."""
    method, training, phase = config.method, config.training, iteration.phase.index
    generator = Learner(copy.deepcopy(start), config.optimizer.lr, config.optimizer)
    fake_score = Learner(copy.deepcopy(start), config.optimizer.fake_lr, config.optimizer)
    average = AveragedModel(generator.network, multi_avg_fn=get_ema_multi_avg_fn(method.ema_decay))

    def teacher(x_t: Tensor, t: Tensor, conditions: None, adapter: None = None) -> Tensor:
        return ring.flow(x_t, t, iteration.schedule)

    experts = {**delivered, phase: generator.network}
    roles = Roles(
        teacher={"single": teacher},
        fake_score={"single": fake_score.network},
        generator={index: Generator(network, None) for index, network in experts.items()},
    )
    batch = MicroBatch(range(training.global_batch_size * len(start.weights[0])), conditions=None, negative=None)
    for index in range(iterations):
        counter = BatchCounter(training.seed, phase, index, GENERATOR_UPDATE)
        for update in range(method.fake_updates + (method.fake_warmup if index == 0 else 0)):
            fake_score.update(iteration.fake_update(counter.at(update=update), batch), roles)
        generator.update(iteration.generator_update(counter, batch), roles)
        average.update_parameters(generator.network)
    return average.module.requires_grad_(False)

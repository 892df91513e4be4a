"""Phased DMD written plainly with diffusers, peft and torch.optim: the baseline of the benchmark and of the tests.

One process, whole networks, the global batch in one pass. The equations are the paper's
(https://arxiv.org/abs/2510.27684), written out for alpha_t = 1 - t and sigma_t = t. Nothing of megatron_pdmd computes
here: its config says what to run, and its counter draws the random numbers, so that both sides meet the same ones.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch import Tensor

from megatron_pdmd.config import Config
from megatron_pdmd.distillation.randomness import Counter, Purpose

GENERATOR_UPDATE = -1
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]


class PlainOptimizer:
    """AdamW with gradient clipping; bf16 parameters get fp32 master weights.

    Args:
        parameters: what is trained.
        values: their values, where these are finer than the parameters' own dtype.
        lr: learning rate.
        options: of the run: beta_1 and beta_2, eps, the largest gradient norm.
    """

    def __init__(self, parameters: Sequence[Tensor], lr: float, options: Config, values: Sequence[Tensor] = ()):
        self.parameters = list(parameters)
        self.narrow = [p for p in self.parameters if p.dtype == torch.bfloat16]
        exact = dict(zip(self.parameters, values or self.parameters, strict=True))
        self.narrow_masters = [exact[p].detach().float().clone() for p in self.narrow]
        masters = dict(zip(self.narrow, self.narrow_masters, strict=True))
        self.masters = [masters.get(p, p) for p in self.parameters]
        self.clip_grad = options.optimizer.clip_grad
        betas = (options.optimizer.adam_beta1, options.optimizer.adam_beta2)
        self.adam = torch.optim.AdamW(
            self.masters, lr=lr, betas=betas, eps=options.optimizer.adam_eps, weight_decay=0.0, fused=True
        )

    def step(self) -> Tensor:
        """Clips, updates and forgets the gradients; returns their norm before clipping."""
        for parameter, master in zip(self.narrow, self.narrow_masters, strict=True):
            master.grad = parameter.grad.float()
            parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.clip_grad)
        self.adam.step()
        self.adam.zero_grad()
        if self.narrow:
            with torch.no_grad():
                torch._foreach_copy_(self.narrow, self.narrow_masters)
        return norm


class PlainDistillation:
    """The networks of a run and its iterations.

    Args:
        config: the run. Weight decay, the moving average and other ablations are left out.
        load_teacher: loads the teacher's network of an expert, in fp32, bf16 (as diffusers mixes it) or fp64; called
            for every network that starts from it.
        boundary: of the teacher's experts, "high_noise" and "low_noise"; None for the one expert "single".
        prompts: embeddings [N, L, D] and that of the negative prompt [L, D].
        latent_shape: [C, F, H, W] of a sample.
        adapter: A of a new adapter by the linear's name, fp32; B is zero. Needed for `--generator lora`.
        around_models: entered around every call of a network.
    """

    def __init__(
        self,
        config: Config,
        load_teacher: Callable[[str], WanTransformer3DModel],
        boundary: float | None,
        prompts: tuple[Tensor, Tensor],
        latent_shape: Sequence[int],
        adapter: Mapping[str, Tensor] | None = None,
        around_models: AbstractContextManager | None = None,
    ):
        method = config.method
        assert method.objective == "flow" and method.dmd_weighting == "score"
        assert method.noise_interval == "nested" and method.timestep_distribution == "uniform"
        assert method.fake_rollout == "same" and method.fake_experts == "match-teacher" and not method.fake_warmup
        assert not method.ema_decay and not config.optimizer.weight_decay
        self.config = config
        self.load_teacher = load_teacher
        self.boundary = boundary
        self.prompts, self.negative = prompts
        self.latent_shape = tuple(latent_shape)
        self.adapter = adapter
        self.around_models = around_models or contextlib.nullcontext()
        experts = ("single",) if boundary is None else ("high_noise", "low_noise")
        self.teacher = {name: load_teacher(name).requires_grad_(False) for name in experts}
        self.generators: dict[int, WanTransformer3DModel] = {}
        self.phase = 0
        # Latents, losses and times are fp32 beside bf16 networks, fp64 beside fp64 ones.
        self.exact = self.teacher[experts[0]].scale_shift_table.dtype
        self.times = [self.shifted(1 - i / method.num_steps) for i in range(method.num_steps + 1)]

    def shifted(self, u: float) -> float:
        """The time of an unshifted time."""
        shift = self.config.method.timestep_shift
        return shift * u / (1 + (shift - 1) * u)

    def unshifted(self, t: float) -> float:
        """The inverse of `shifted`."""
        shift = self.config.method.timestep_shift
        return t / (shift - (shift - 1) * t)

    def times_of(self, phase: int) -> list[float]:
        """Where the phase's expert is evaluated, and the phase's end."""
        steps = self.config.method.phase_steps
        first = sum(steps[: phase - 1])
        return self.times[first : first + steps[phase - 1] + 1]

    def expert_at(self, t: float) -> str:
        """The teacher's expert that owns t."""
        if self.boundary is None:
            return "single"
        return "high_noise" if t >= self.boundary else "low_noise"

    def expert_of(self, phase: int) -> str:
        """The teacher's expert that a phase's generator starts from."""
        times = self.times_of(phase)
        return self.expert_at((times[0] + times[-1]) / 2)

    def start_phase(self, phase: int) -> None:
        """Makes the phase's generator, the fake score and their optimizers."""
        self.phase, self.end = phase, self.times_of(phase)[-1]
        expert, options = self.expert_of(phase), self.config.optimizer
        # A phase of the high-noise expert draws t where that expert alone is needed.
        self.low = max(self.end, self.boundary) if expert == "high_noise" else self.end
        both = self.boundary is not None and self.low < self.boundary
        fakes = ("high_noise", "low_noise") if both else (self.expert_at((self.low + 1) / 2),)
        self.fake_score = {name: self.load_teacher(name).requires_grad_(True) for name in fakes}
        self.fake_optimizer = {
            name: PlainOptimizer(list(model.parameters()), options.fake_lr, self.config)
            for name, model in self.fake_score.items()
        }
        if self.config.method.generator == "full":
            self.generators[phase] = self.load_teacher(expert).requires_grad_(True)
            parameters, values = list(self.generators[phase].parameters()), ()
        else:
            self.generators[phase] = self.teacher[expert]
            parameters, values = self.add_adapter(self.teacher[expert], f"phase_{phase}")
        self.generator_optimizer = PlainOptimizer(parameters, options.lr, self.config, values)

    def add_adapter(self, model: WanTransformer3DModel, name: str) -> tuple[list[Tensor], list[Tensor]]:
        """Adds an adapter in the dtype of its linears; returns its parameters and their values in fp32."""
        method = self.config.method
        model.add_adapter(
            LoraConfig(r=method.lora_rank, lora_alpha=method.lora_alpha, target_modules=LORA_TARGETS), name
        )
        parameters, values = [], []
        for key, parameter in model.named_parameters():
            if f".lora_A.{name}." in key:
                values.append(self.adapter[key.split(".lora_A.")[0]])
            elif f".lora_B.{name}." in key:
                values.append(torch.zeros(parameter.shape))
            else:
                continue
            parameter.data.copy_(values[-1])
            parameters.append(parameter)
        return parameters, values

    def run_iteration(self, index: int) -> dict[str, float]:
        """n updates of the fake score, then one of the generator; returns losses and gradient norms.

        Args:
            index: 0-based iteration of the phase.
        """
        method, counter = self.config.method, Counter(self.config.training.seed, self.phase, index, GENERATOR_UPDATE)
        counters = [*(counter.at(update=n) for n in range(method.fake_updates)), counter]
        reuse = method.phase_start_reuse if self.phase > 1 else 1
        # Prompts and initial noise are those of the group's first update, so its start comes out again.
        *pairs, last = ((own, counters[n // reuse * reuse]) for n, own in enumerate(counters))
        fakes = [self.fake_update(*pair) for pair in pairs]
        fake = {name: torch.stack([update[name] for update in fakes]).mean() for name in fakes[0]}
        return {name: value.item() for name, value in (fake | self.generator_update(*last)).items()}

    def fake_update(self, counter: Counter, shared: Counter) -> dict[str, Tensor]:
        """Eq. 13, or Eq. 4 where s = 0."""
        s, text = self.end, self.text(shared)
        x_s = self.rollout(counter, shared, text, gradient=False)
        t, eps, expert = self.diffusion(counter)
        x_t, t_5d, _, sigma_ts = self.diffuse(x_s, eps, t)
        flow = self.fake_flow(expert, x_t, t, text)
        if s == 0:
            loss = (flow - (eps - x_s)).square().mean()
        else:
            alpha_s = 1 - s
            of_eps = (alpha_s**2 * t_5d + (1 - t_5d) * s**2) / alpha_s**2
            residual = sigma_ts * flow - (of_eps * eps - sigma_ts / alpha_s * x_s)
            weight = (1 / sigma_ts**2).clamp(max=self.config.method.clamp_max)
            loss = (weight * residual.square()).mean()
        loss.backward()
        return {"fake_loss": loss.detach(), "fake_grad_norm": self.fake_optimizer[expert].step()}

    def generator_update(self, counter: Counter, shared: Counter) -> dict[str, Tensor]:
        """Eq. 9 to 11, through the one evaluation that stochastic gradient truncation chose, or all."""
        text = self.text(shared)
        x_s = self.rollout(counter, shared, text, gradient=True)
        t, eps, expert = self.diffusion(counter)
        x_t, t_5d, alpha_ts, _ = self.diffuse(x_s.detach(), eps, t)
        with torch.no_grad():
            teacher = self.teacher_flow(expert, x_t, t, text)
            scale = self.config.method.guidance_scale[-1 if expert == "high_noise" else 0]
            if scale != 1:
                unconditional = self.teacher_flow(expert, x_t, t, self.negative.expand_as(text))
                teacher = unconditional + scale * (teacher - unconditional)
            fake = self.fake_flow(expert, x_t, t, text)
            # lambda_t alpha_{t|s} (T - F), lambda_t = 1 / (sigma_t + sigma_t^2 / alpha_t)
            gradient = alpha_ts / (t_5d + t_5d**2 / (1 - t_5d)) * (teacher - fake)
        x_s.backward(gradient / gradient.numel())
        gap = (teacher - fake).flatten(1).norm(dim=1) / teacher.flatten(1).norm(dim=1)
        norm = self.generator_optimizer.step()
        return {"dmd_gradient": gradient.abs().mean(), "score_gap": gap.mean(), "generator_grad_norm": norm}

    def rollout(self, counter: Counter, shared: Counter, text: Tensor, gradient: bool) -> Tensor:
        """x_s from noise by Euler steps; of the phase's own all, or those up to a drawn one, which jumps to s."""
        x = shared.normal(Purpose.INITIAL_NOISE, self.latent_shape, self.samples).to(self.exact)
        own = self.times_of(self.phase)
        through_all = self.config.method.gradient_truncation == "none"
        kept = own[:-1] if through_all else own[: 1 + counter.integer(Purpose.TRUNCATION, len(own) - 1)]
        moves = [(k, *pair) for k in range(1, self.phase) for pair in pairwise(self.times_of(k))]
        moves += [(self.phase, *pair) for pair in zip(kept, [*kept[1:], self.end], strict=True)]
        for move, (k, t, t_next) in enumerate(moves, start=1):
            learns = move == len(moves) or (through_all and k == self.phase)
            with torch.set_grad_enabled(gradient and learns):
                flow = self.generator_flow(k, x, torch.full((len(x),), t, dtype=self.exact), text)
                x = x + (t_next - t) * flow
        return x

    def diffusion(self, counter: Counter) -> tuple[Tensor, Tensor, str]:
        """t ~ T(t; s, 1) [B], eps [B, C, F, H, W], and the teacher's expert for this t, the same for all samples."""
        eps = counter.normal(Purpose.DIFFUSION_NOISE, self.latent_shape, self.samples).to(self.exact)
        u = counter.uniform(Purpose.DIFFUSION_TIME, self.samples)
        margin = self.config.method.timestep_margin
        low, high = self.unshifted(self.low) + margin, 1 - margin
        expert = next(iter(self.fake_score))
        if len(self.fake_score) == 2:
            below = (self.unshifted(self.boundary) - low) / (high - low)
            is_high = counter.uniform(Purpose.TEACHER_SIDE).item() >= below
            expert = "high_noise" if is_high else "low_noise"
            u = below + (1 - below) * u if is_high else below * u
        time = low + u.double() * (high - low)
        shift = self.config.method.timestep_shift
        t = shift * time / (1 + (shift - 1) * time)
        return t.to(torch.float32).to(self.exact), eps, expert

    def diffuse(self, x_s: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Eq. 2: x_t, and t, alpha_{t|s} and sigma_{t|s} as [B, 1, 1, 1, 1]."""
        s, t = self.end, t.view(-1, 1, 1, 1, 1)
        alpha_ts = (1 - t) / (1 - s)
        # sqrt(t^2 - alpha_ts^2 s^2), in a form that does not cancel as t nears s
        sigma_ts = ((t - s) * (t + s - 2 * t * s)).sqrt() / (1 - s)
        return alpha_ts * x_s + sigma_ts * eps, t, alpha_ts, sigma_ts

    @property
    def samples(self) -> range:
        """Indices of the global batch."""
        return range(self.config.training.global_batch_size)

    def text(self, counter: Counter) -> Tensor:
        """The prompts of the batch [B, L, D]."""
        return self.prompts[counter.integers(Purpose.PROMPT, len(self.prompts), self.samples)]

    def generator_flow(self, phase: int, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The flow of a phase's generator; under LoRA it is the teacher's network with the phase's adapter."""
        model = self.generators[phase]
        if self.config.method.generator == "lora" and model.active_adapters() != [f"phase_{phase}"]:
            model.set_adapter(f"phase_{phase}")
        return self.flow(model, x, t, text)

    def teacher_flow(self, expert: str, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The flow of a teacher's expert."""
        model = self.teacher[expert]
        with without_adapters(model):
            return self.flow(model, x, t, text)

    def fake_flow(self, expert: str, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The flow of the fake score."""
        return self.flow(self.fake_score[expert], x, t, text)

    def flow(self, model: WanTransformer3DModel, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """A network's flow, in the dtype of x."""
        dtype = model.patch_embedding.weight.dtype
        with self.around_models:
            return model(x.to(dtype), 1000 * t, text.to(dtype), return_dict=False)[0].to(x.dtype)


@contextlib.contextmanager
def without_adapters(model: WanTransformer3DModel) -> Iterator[None]:
    """Switches a network's adapters off inside the block, if it has any."""
    if not getattr(model, "peft_config", None):
        yield
        return
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()

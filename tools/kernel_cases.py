"""What benchmark_kernels.py times: each op beside its plain twin, with the bytes that it must move at least."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import pdmd_kernels

LATENTS, QUICK_LATENTS = (1, 16, 21, 60, 104), (2, 16, 3, 6, 10)
TOKENS, QUICK_TOKENS = (1, 32760, 5120), (1, 78, 256)
HEAD_DIM = 128


@dataclass(frozen=True)
class Case:
    """What is timed: `kernel` and `eager` do the same work, which moves at least `bytes`."""

    name: str
    kernel: Callable[[], object]
    eager: Callable[[], object]
    compiled: Callable[[], object] | None
    bytes: int


class Sizes:
    """Random tensors of Wan's sizes, or with `quick` of small ones; flows and activations in `dtype`."""

    def __init__(self, dtype: torch.dtype, quick: bool) -> None:
        self.dtype = dtype
        self.latent_shape = QUICK_LATENTS if quick else LATENTS
        self.token_shape = QUICK_TOKENS if quick else TOKENS
        self.generator = torch.Generator().manual_seed(0)

    def latents(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(self.latent_shape, generator=self.generator).to(dtype)

    def tokens(self) -> Tensor:
        block = torch.randn(self.token_shape[1] // 10, self.token_shape[2], generator=self.generator)
        repeats = -(-self.token_shape[1] // len(block))
        return block.repeat(repeats, 1)[: self.token_shape[1]].to(self.dtype).unsqueeze(0)

    def factor(self) -> Tensor:
        return 0.5 + torch.rand(self.latent_shape[0], generator=self.generator)


def with_gradients(function: Callable[..., object], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> object:
    """One forward and one backward pass."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    return torch.autograd.grad(results, leaves, cotangents)


def both_passes(
    name: str,
    kernel: Callable[..., object],
    twin: Callable[..., object],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    moved: tuple[int, int],
    compiled: bool,
) -> list[Case]:
    """The forward pass alone, and forward with backward; `moved` is the bytes of each."""
    optimised = torch.compile(twin, dynamic=False) if compiled else None

    def bound(function: Callable[..., object] | None, *, train: bool) -> Callable[[], object] | None:
        if function is None:
            return None
        if train:
            return lambda: with_gradients(function, inputs, cotangents)
        return torch.no_grad()(lambda: function(*inputs))

    return [
        Case(
            f"{name}, {label}",
            bound(kernel, train=train),
            bound(twin, train=train),
            bound(optimised, train=train),
            size,
        )
        for label, train, size in (("fwd", False, moved[0]), ("fwd+bwd", True, sum(moved)))
    ]


def one_pass(
    name: str, kernel: Callable[[], object], twin: Callable[[], object], moved: int, *, compiled: bool
) -> Case:
    """An op without a backward pass."""
    optimised = torch.compile(twin, dynamic=False) if compiled else None
    return Case(name, kernel, twin, optimised, moved)


def objective_cases(sizes: Sizes, compiled: bool) -> list[Case]:
    """The fake score's objective: noise and loss, with eps given and drawn again."""
    output, x_s, eps = sizes.latents(sizes.dtype), sizes.latents(), sizes.latents()
    seeds = torch.arange(output.shape[0])
    factors = [sizes.factor() for _ in range(4)]
    ones = torch.ones(output.shape[0])
    a, b = factors[:2]
    drawn = nbytes(x_s) + nbytes(output)
    cases = [
        one_pass(
            "subinterval_noise, drawn",
            lambda: pdmd_kernels.subinterval_noise(x_s, seeds, a, b, sizes.dtype),
            lambda: pdmd_kernels.reference.subinterval_noise(x_s, torch.randn_like(x_s), a, b, sizes.dtype),
            drawn,
            compiled=compiled,
        )
    ]
    for label, noise in (("eps given", eps), ("drawn", seeds)):
        read = nbytes(x_s) + (nbytes(eps) if noise is eps else 0)
        cases += both_passes(
            f"subinterval_loss, {label}",
            lambda output, noise=noise: pdmd_kernels.subinterval_loss(output, x_s, noise, *factors),
            lambda output: pdmd_kernels.reference.subinterval_loss(output, x_s, eps, *factors),
            [output],
            [ones],
            moved=(read + nbytes(output), nbytes(output)),
            compiled=compiled,
        )[1:]
    return cases


def gradient_cases(sizes: Sizes, compiled: bool) -> list[Case]:
    """The generator's gradient and the sampler's step."""
    teacher, fake, unconditional = (sizes.latents(sizes.dtype) for _ in range(3))
    x_s, x_t, weight, c_x = sizes.latents(), sizes.latents(), sizes.factor(), sizes.factor()
    guided = {"unconditional": unconditional, "guidance": 4.0, "count_nonfinite": True}
    flow, wide = nbytes(teacher), nbytes(x_s)

    def of(namespace: object, *samples: Tensor) -> Callable[[], object]:
        return lambda: namespace.dmd_gradient(teacher, fake, weight, *samples, **guided)

    def step(namespace: object) -> Callable[[], object]:
        return lambda: namespace.euler_step(x_s, teacher, weight, c_x, sizes.dtype)

    ours, twin = pdmd_kernels, pdmd_kernels.reference
    return [
        one_pass("dmd_gradient, score", of(ours), of(twin), 3 * flow + wide, compiled=compiled),
        one_pass(
            "dmd_gradient, mean_abs",
            of(ours, x_s, x_t, c_x),
            of(twin, x_s, x_t, c_x),
            5 * flow + 3 * wide,
            compiled=compiled,
        ),
        one_pass("euler_step, with copy", step(ours), step(twin), 2 * flow + 2 * wide, compiled=compiled),
    ]


def block_cases(sizes: Sizes, compiled: bool) -> list[Case]:
    """The transformer block's ops."""
    x, h, grad = (sizes.tokens() for _ in range(3))
    tokens, d = x.shape[1:]
    shift, scale, gate = torch.randn(1, 3, d, generator=sizes.generator).split(1, dim=1)
    weights = [torch.ones(d, dtype=sizes.dtype) for _ in range(2)]
    angles = torch.rand(tokens, HEAD_DIM // 2, generator=sizes.generator)
    norm = {"eps": 1e-6, "size": d, "heads": d // HEAD_DIM, "rope": torch.stack((angles.cos(), angles.sin()), -1)}
    size = nbytes(x)
    table = {
        "modulated_layer_norm": (
            [x, shift, scale],
            [grad],
            (2, 3),
            lambda n: lambda *a: n.modulated_layer_norm(*a, eps=1e-6),
        ),
        "gated_residual": ([x, h, gate], [grad], (3, 3), lambda n: n.gated_residual),
        "gelu_tanh": ([x], [grad], (2, 3), lambda n: n.gelu_tanh),
        "qk_norm_rope": ([x, h, *weights], [grad, grad], (4, 6), lambda n: lambda *a: n.qk_norm_rope(*a, **norm)),
    }
    cases = []
    for name, (inputs, cotangents, (forward, backward), of) in table.items():
        moved = (forward * size, backward * size)
        functions = of(pdmd_kernels), of(pdmd_kernels.reference)
        cases += both_passes(name, *functions, inputs, cotangents, moved=moved, compiled=compiled)
    return cases


def optimizer_cases(sizes: Sizes, compiled: bool) -> list[Case]:
    """The optimizer's step, beside torch.optim's fused one."""
    param = sizes.tokens()[0, : sizes.token_shape[1] // 4].float()
    grad, moment, copy = torch.randn_like(param), torch.rand_like(param), param.to(sizes.dtype)
    copies = [copy] if sizes.dtype == torch.bfloat16 else []
    options = {"lr": 1e-5, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "step": 10}

    def step(namespace: object) -> Callable[[], object]:
        return lambda: namespace.adamw_beta1_zero([param], [grad], [moment], copies, **options)

    moved = 5 * nbytes(param) + (nbytes(copy) if copies else 0)
    return [one_pass("adamw_beta1_zero", step(pdmd_kernels), step(pdmd_kernels.reference), moved, compiled=compiled)]


def nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


SETUPS = {
    "subinterval": objective_cases,
    "dmd_gradient": gradient_cases,
    "euler_step": gradient_cases,
    "modulated_layer_norm": block_cases,
    "gated_residual": block_cases,
    "gelu_tanh": block_cases,
    "qk_norm_rope": block_cases,
    "adamw": optimizer_cases,
}

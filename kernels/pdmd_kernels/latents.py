"""The ops on latents [B, ...]: diffusing, the fake score's objective, the generator's gradient, the sampler's step."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from pdmd_kernels import checks
from pdmd_kernels.backend import KERNEL_DTYPES, select
from pdmd_kernels.reference import primitives
from pdmd_kernels.reference.latents import exact_dtype, expanded


class _LinearCombination(torch.autograd.Function):
    """a x + b y in `dtype`; with copy_dtype also a copy in that. Its gradients are a g and b g."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        y: Tensor,
        a: Tensor,
        b: Tensor,
        dtype: torch.dtype,
        copy_dtype: torch.dtype | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.save_for_backward(a, b)
        ctx.dtypes = x.dtype, y.dtype
        ctx.set_materialize_grads(False)
        return _combined(x, y, a, b, dtype, copy_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        wide = [grad.to(a.dtype) for grad in grads if grad is not None]
        if not wide:
            return (None,) * 6
        grad = sum(wide[1:], wide[0])
        needed = zip((a, b), ctx.dtypes, ctx.needs_input_grad[:2], strict=True)
        return (*((expanded(c, grad, c.dtype) * grad).to(dtype) if need else None for c, dtype, need in needed),) + (
            None,
        ) * 4


class _SubintervalLoss(torch.autograd.Function):
    """The loss; the forward pass has written its gradient, which the first backward pass scales and hands out."""

    @staticmethod
    def forward(ctx: FunctionCtx, output: Tensor, x_s: Tensor, noise: Tensor, *factors: Tensor) -> Tensor:
        ctx.kernels = select(*(t for t in (output, x_s, noise) if t.dtype != torch.int64))
        loss, ctx.gradient = ctx.kernels.subinterval_loss(output, x_s, noise, *factors)
        ctx.save_for_backward(output, x_s, noise, *factors)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:  # an earlier pass, which kept the graph, has given it away
            gradient = ctx.kernels.subinterval_loss(*ctx.saved_tensors)[1]
        if gradient.is_cpu and gradient.dtype != grad.dtype:
            # Factors without a dim: with others, torch's CPU code converts the whole gradient to fp32 and back.
            for sample, factor in zip(gradient, grad, strict=True):
                sample.mul_(factor)
            return (gradient, *(None,) * 6)
        return (gradient.mul_(expanded(grad, gradient, grad.dtype)), *(None,) * 6)


def normal(seeds: Tensor, numel: int, offset: int = 0) -> Tensor:
    """Standard normal numbers from a counter: the elements offset .. offset + numel - 1 of each seed's stream.

    Args:
        seeds: int64 [B].
        numel: elements a sample.
        offset: the first element's index.

    Returns:
        fp32 [B, numel]; the same on every backend to 2 ulp.
    """
    return _kernels_of_seeds(seeds, numel, offset).normal(seeds, numel, offset)


def random_words(seeds: Tensor, numel: int, offset: int = 0) -> Tensor:
    """The 32 random bits behind each element of `normal`: int64 [B, numel] in [0, 2^32), the same on every backend."""
    return _kernels_of_seeds(seeds, numel, offset).random_words(seeds, numel, offset)


def diffuse(x: Tensor, eps: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a x + b eps: Eq. 1 with (alpha_t, sigma_t), Eq. 2 with (alpha_{t|s}, sigma_{t|s}).

    Args:
        x: samples [B, ...].
        eps: noise of the shape of x, or int64 seeds [B] to draw it from.
        a: factor of x [B].
        b: factor of eps [B].

    Returns:
        [B, ...] in the dtype of x, differentiable in x and eps.

    Raises:
        ValueError: shapes or devices that do not fit.
    """
    return subinterval_noise(x, eps, a, b)


def subinterval_noise(x_s: Tensor, noise: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x_t = a x_s + b eps, with eps given or drawn from a counter as it is used, so that it is never stored.

    Args:
        x_s: samples [B, ...].
        noise: eps of the shape of x_s, or int64 seeds [B] of it (see `normal`).
        a: alpha_{t|s} [B].
        b: sigma_{t|s} [B].
        dtype: of the result, by default that of x_s.

    Returns:
        [B, ...], differentiable in x_s and eps.

    Raises:
        ValueError: shapes or devices that do not fit.
    """
    checks.batched(x_s, "x_s")
    checks.noise(noise, x_s, "x_s")
    return _linear(x_s, noise, a, b, dtype or x_s.dtype, None)


def euler_step(
    x: Tensor, flow: Tensor, a: Tensor, b: Tensor, copy_dtype: torch.dtype | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """a x + b flow: one Euler step of the sampler.

    Args:
        x: latents [B, ...], kept in fp32 by the caller while flow may be bf16.
        flow: the model's output, of the shape of x.
        a: factor of x [B].
        b: factor of flow [B].
        copy_dtype: the model's dtype, for a copy that its next pass reads.

    Returns:
        [B, ...] in the dtype of x, differentiable in x and flow; with copy_dtype that and the copy.

    Raises:
        ValueError: shapes or devices that do not fit.
    """
    checks.batched(x, "x")
    checks.same_shape(flow, x, "flow", "x")
    return _linear(x, flow, a, b, x.dtype, copy_dtype)


def subinterval_loss(
    output: Tensor, x_s: Tensor, noise: Tensor, c_out: Tensor, c_eps: Tensor, c_x: Tensor, weight: Tensor
) -> Tensor:
    """weight * mean((c_out output - c_eps eps - c_x x_s)^2): the integrand of Eq. 13, differentiable in output.

    The gradient is written in the same pass as the loss, and no target exists.

    Args:
        output: the model's prediction [B, ...].
        x_s: the samples that were diffused, of the shape of output.
        noise: the eps they were diffused with, of the shape of output, or int64 seeds [B] to draw it again.
        c_out: factor of output [B].
        c_eps: factor of eps [B].
        c_x: factor of x_s [B].
        weight: factor of the squared residual [B].

    Returns:
        One number per sample [B], in fp32 (fp64 if a tensor is fp64).

    Raises:
        ValueError: shapes or devices that do not fit, or a gradient is asked for anything but output.
    """
    checks.batched(output, "output")
    checks.same_shape(x_s, output, "x_s", "output")
    checks.noise(noise, output, "output")
    if torch.is_grad_enabled() and (x_s.requires_grad or noise.requires_grad):
        raise ValueError("x_s or noise requires a gradient, which subinterval_loss does not give; detach it")
    exact = exact_dtype(output, x_s, noise)
    factors = checks.coefficients(output, "output", exact, c_out=c_out, c_eps=c_eps, c_x=c_x, weight=weight)
    return _SubintervalLoss.apply(output.contiguous(), x_s.contiguous(), noise.contiguous(), *factors)


@torch.no_grad()
def dmd_gradient(
    teacher_flow: Tensor,
    fake_flow: Tensor,
    weight: Tensor,
    x_s: Tensor | None = None,
    x_t: Tensor | None = None,
    c_x: Tensor | None = None,
    floor: float = 1e-6,
    *,
    unconditional: Tensor | None = None,
    guidance: float = 1.0,
    count_nonfinite: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """weight (teacher - fake), the gradient of Eq. 9 to 11, or that over the teacher's error on the sample.

    Given x_s, x_t and c_x it is divided by max(mean|x_s - (c_x x_t - weight teacher)|, floor), mean per sample; the
    inner parenthesis is the teacher's posterior mean of x_s if c_x and weight are that mean's coefficients.

    Args:
        teacher_flow: [B, ...].
        fake_flow: of the shape of teacher_flow.
        weight: [B].
        x_s: the generator's samples, of the shape of teacher_flow.
        x_t: the diffused samples, of the shape of teacher_flow.
        c_x: factor of x_t [B].
        floor: the least denominator, in units of the latents.
        unconditional: the teacher's flow without the condition, of the shape of teacher_flow; the teacher is then
            unconditional + guidance (teacher_flow - unconditional).
        guidance: the scale of classifier-free guidance.
        count_nonfinite: also count the elements of the gradient that are not finite.

    Returns:
        The gradient with respect to x_s [B, ...], in fp32 (fp64 if a tensor is fp64), without a graph; with
        count_nonfinite that and the counts, int64 [B].

    Raises:
        ValueError: shapes or devices that do not fit, or only some of x_s, x_t and c_x.
    """
    checks.batched(teacher_flow, "teacher_flow")
    checks.same_shape(fake_flow, teacher_flow, "fake_flow", "teacher_flow")
    if not (x_s is None) == (x_t is None) == (c_x is None):
        raise ValueError("x_s, x_t and c_x come together; give all three or none")
    optional = {"unconditional": unconditional, "x_s": x_s, "x_t": x_t}
    for name, tensor in optional.items():
        if tensor is not None:
            checks.same_shape(tensor, teacher_flow, name, "teacher_flow")
    tensors = [t for t in (teacher_flow, fake_flow, *optional.values()) if t is not None]
    exact = exact_dtype(*tensors)
    (weight,) = checks.coefficients(teacher_flow, "teacher_flow", exact, weight=weight)
    if c_x is not None:
        (c_x,) = checks.coefficients(teacher_flow, "teacher_flow", exact, c_x=c_x)
    unconditional, x_s, x_t = (None if t is None else t.contiguous() for t in (unconditional, x_s, x_t))
    result = select(*tensors).dmd_gradient(
        teacher_flow.contiguous(), unconditional, guidance, fake_flow.contiguous(), weight, x_s, x_t, c_x, floor
    )
    return result if count_nonfinite else result[0]


def _linear(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, copy_dtype: torch.dtype | None
) -> Tensor | tuple[Tensor, Tensor]:
    a, b = checks.coefficients(x, "x", exact_dtype(x, y), a=a, b=b)
    arguments = x.contiguous(), y.contiguous(), a, b, dtype, copy_dtype
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        return _LinearCombination.apply(*arguments)
    return _combined(*arguments)


def _combined(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, copy_dtype: torch.dtype | None
) -> Tensor | tuple[Tensor, Tensor]:
    kernels = select(x, x if y.dtype == torch.int64 else y)
    if not KERNEL_DTYPES.issuperset((dtype, copy_dtype or dtype)):
        kernels = primitives
    if copy_dtype is None:
        return kernels.subinterval_noise(x, y, a, b, dtype)
    if x.dtype == torch.float32:
        return kernels.euler_step(x, y, a, b, copy_dtype)
    combined = kernels.subinterval_noise(x, y, a, b, dtype)
    return combined, combined.to(copy_dtype, copy=True)


def _kernels_of_seeds(seeds: Tensor, numel: int, offset: int) -> object:
    if seeds.dtype != torch.int64 or seeds.ndim != 1:
        raise ValueError(f"seeds is {seeds.dtype} {list(seeds.shape)}; it must be int64 [B]")
    if numel < 0:
        raise ValueError(f"numel is {numel}; it must not be negative")
    if offset < 0 or offset + numel > 2**63 - 8:
        raise ValueError(f"offset is {offset}; it must not be negative, nor the last element's index exceed 2^63 - 8")
    return select(torch.empty(0, device=seeds.device))

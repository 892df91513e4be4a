"""AdamW with beta_1 = 0, whose first moment is the gradient itself.

g = grad grad_scale; v = beta2 v + (1 - beta2) g^2; p = (1 - lr weight_decay) p - lr g / (sqrt(v) / c + eps) with
c = sqrt(1 - beta2^step). Each operation rounds once, and is fused where torch.optim.AdamW(fused=True) fuses it on the
CPU, so that the results are equal to the bit.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from pdmd_kernels.triton.launching import launch

BLOCK = 1024


@triton.jit
def adamw_beta1_zero_kernel(
    param,
    grad,
    exp_avg_sq,
    copy,
    grad_scale,
    numel,
    decay,
    beta2,
    one_minus_beta2,
    correction,
    eps,
    minus_lr,
    SCALE: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < numel - start
    p = tl.load(param + start + lane, mask=mask)
    g = tl.load(grad + start + lane, mask=mask).to(tl.float32)
    v = tl.load(exp_avg_sq + start + lane, mask=mask)
    if SCALE:
        g = g * tl.load(grad_scale).to(tl.float32)
    p = p * decay
    v = tl.fma(one_minus_beta2 * g, g, v * beta2)
    p = p + tl.div_rn(minus_lr * g, tl.div_rn(tl.sqrt_rn(v), correction) + eps)
    tl.store(param + start + lane, p, mask=mask)
    tl.store(exp_avg_sq + start + lane, v, mask=mask)
    if COPY:
        tl.store(copy + start + lane, p.to(copy.dtype.element_ty), mask=mask)


def adamw_beta1_zero(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor],
    lr: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: Tensor | None,
) -> None:
    """One step of the optimizer, in place, one launch a tensor.

    Args:
        params: master weights, fp32.
        grads: fp32 or bf16, of the parameters' shapes.
        exp_avg_sqs: second moments, fp32.
        copies: model weights to be written from the parameters, or [].
        lr: learning rate.
        beta2: decay of the second moment.
        eps: added to the denominator.
        weight_decay: decoupled.
        step: this update's number, from 1.
        grad_scale: fp32 scalar tensor to multiply the gradients by, or none.
    """
    for index, (param, grad, exp_avg_sq) in enumerate(zip(params, grads, exp_avg_sqs, strict=True)):
        launch(
            adamw_beta1_zero_kernel,
            (triton.cdiv(param.numel(), BLOCK),),
            num_warps=4,
            param=param,
            grad=grad,
            exp_avg_sq=exp_avg_sq,
            copy=copies[index] if copies else None,
            grad_scale=grad_scale,
            numel=param.numel(),
            decay=1 - lr * weight_decay,
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            correction=(1 - beta2**step) ** 0.5,
            eps=eps,
            minus_lr=-lr,
            SCALE=grad_scale is not None,
            COPY=bool(copies),
            BLOCK=BLOCK,
        )

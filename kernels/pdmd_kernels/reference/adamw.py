"""AdamW with beta_1 = 0, whose first moment is the gradient itself: torch.optim.AdamW(betas=(0, beta2))."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
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
    """g = grad grad_scale; p *= 1 - lr weight_decay; v = beta2 v + (1 - beta2) g^2; p -= lr g / (sqrt(v) / c + eps).

    c = sqrt(1 - beta2^step). Then each copy takes its parameter's new value.
    """
    correction = (1 - beta2**step) ** 0.5
    for param, grad, exp_avg_sq in zip(params, grads, exp_avg_sqs, strict=True):
        grad = grad.to(param.dtype)
        if grad_scale is not None:
            grad = grad * grad_scale
        param.mul_(1 - lr * weight_decay)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        param.addcdiv_(grad, (exp_avg_sq.sqrt() / correction).add_(eps), value=-lr)
    for copy, param in zip(copies, params, strict=False):
        copy.copy_(param)

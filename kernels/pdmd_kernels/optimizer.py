"""AdamW with beta_1 = 0 in one pass over all tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pdmd_kernels import checks
from pdmd_kernels.backend import select, warn_if_not_compiled
from pdmd_kernels.reference import primitives


@torch.no_grad()
def adamw_beta1_zero(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor] = (),
    *,
    lr: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: Tensor | None = None,
) -> None:
    """One update of torch.optim.AdamW(betas=(0, beta2)), whose first moment is the gradient and is not kept.

    p *= 1 - lr weight_decay; v = beta2 v + (1 - beta2) g^2; p -= lr g / (sqrt(v) / sqrt(1 - beta2^step) + eps).

    Args:
        params: fp32 weights, changed in place.
        grads: of their shapes, in fp32 or bf16.
        exp_avg_sqs: fp32 second moments of their shapes, changed in place.
        copies: none, or bf16 model weights of their shapes, which take the new values.
        lr: learning rate.
        beta2: decay of the second moment.
        eps: added to its root.
        weight_decay: decoupled, times the learning rate.
        step: number of this update, from 1.
        grad_scale: an fp32 scalar that multiplies the gradients (clipping); it is not read on the host.

    Raises:
        ValueError: shapes, dtypes, devices or lengths that do not fit, or a tensor that is not contiguous.
    """
    if step < 1:
        raise ValueError(f"step is {step}; updates are counted from 1")
    lists = {"params": params, "grads": grads, "exp_avg_sqs": exp_avg_sqs}
    if len(copies):
        lists["copies"] = copies
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} has {len(tensors)} tensors for {len(params)} params")
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            checks.same_shape(tensor, param, f"{name}[{i}]", "its parameter")
            if not tensor.is_contiguous():
                raise ValueError(f"{name}[{i}] is not contiguous; an update in place needs it to be")
    for i, (param, exp_avg_sq) in enumerate(zip(params, exp_avg_sqs, strict=True)):
        if param.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"params[{i}] is {param.dtype}; updates need fp32 master weights")
        checks.same_dtype(exp_avg_sq, param, f"exp_avg_sqs[{i}]", "its parameter")
    if not params:
        return
    if grad_scale is not None:
        checks.on_device(grad_scale, params[0], "grad_scale")
        if grad_scale.numel() != 1:
            raise ValueError(f"grad_scale is {list(grad_scale.shape)}; it must be one number")
    kernels = select(*(tensor for tensors in lists.values() for tensor in tensors))
    if kernels is not primitives and params[0].is_cuda:
        warn_if_not_compiled("adamw_beta1_zero")
    arguments = list(params), list(grads), list(exp_avg_sqs), list(copies)
    kernels.adamw_beta1_zero(*arguments, lr, beta2, eps, weight_decay, step, grad_scale)

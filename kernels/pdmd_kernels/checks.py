"""Checks of arguments: a ValueError in one line that names the argument."""

import torch
from torch import Tensor

FLOATS = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))


def floating(tensor: Tensor, name: str) -> None:
    """Refuses integers and the like."""
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} is {tensor.dtype}; it must be a floating tensor")


def on_device(tensor: Tensor, like: Tensor, name: str) -> None:
    """Refuses a tensor on another device."""
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, the other tensors are on {like.device}")


def same_shape(tensor: Tensor, like: Tensor, name: str, like_name: str) -> None:
    """Refuses a tensor of another shape, on another device or not floating."""
    floating(tensor, name)
    if tensor.shape != like.shape:
        raise ValueError(f"{name} is {list(tensor.shape)}; it must have the shape of {like_name}, {list(like.shape)}")
    on_device(tensor, like, name)


def same_dtype(tensor: Tensor, like: Tensor, name: str, like_name: str) -> None:
    """Refuses another dtype."""
    if tensor.dtype != like.dtype:
        raise ValueError(f"{name} is {tensor.dtype}; it must have the dtype of {like_name}, {like.dtype}")


def batched(x: Tensor, name: str) -> None:
    """Refuses what has no batch dim."""
    floating(x, name)
    if x.ndim == 0:
        raise ValueError(f"{name} is a scalar; it must be [B, ...]")


def rows(x: Tensor, name: str) -> None:
    """Refuses what is not [B, S, d]."""
    floating(x, name)
    if x.ndim != 3:
        raise ValueError(f"{name} is {list(x.shape)}; it must be [B, S, d]")


def modulation(m: Tensor, x: Tensor, name: str) -> None:
    """Refuses what is not [B, 1 or S, d] in fp32 (fp64 for an fp64 x) on the device of x."""
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    if m.dtype != wanted:
        raise ValueError(f"{name} is {m.dtype}; it must be {wanted} for a {x.dtype} x")
    batch, tokens, d = x.shape
    if m.shape != (batch, 1, d) and m.shape != (batch, tokens, d):
        raise ValueError(f"{name} is {list(m.shape)}; it must be {[batch, 1, d]} or {[batch, tokens, d]}")
    on_device(m, x, name)


def noise(value: Tensor, x: Tensor, x_name: str) -> None:
    """Refuses what is neither eps of the shape of x nor int64 seeds [B]."""
    if value.dtype != torch.int64:
        same_shape(value, x, "noise", x_name)
    elif value.shape != x.shape[:1]:
        raise ValueError(f"noise is {list(value.shape)} seeds; it must be one for each sample, [{x.shape[0]}]")
    else:
        on_device(value, x, "noise")


def coefficients(x: Tensor, x_name: str, dtype: torch.dtype, **named: Tensor) -> list[Tensor]:
    """The coefficients [B], each in `dtype`; they have no gradients."""
    converted = []
    for name, value in named.items():
        if value.shape != x.shape[:1]:
            raise ValueError(f"{name} is {list(value.shape)}; it must be one number for each sample of {x_name}, [B]")
        on_device(value, x, name)
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, which this op does not give; detach it")
        converted.append(value if value.dtype == dtype and value.is_contiguous() else value.to(dtype).contiguous())
    return converted

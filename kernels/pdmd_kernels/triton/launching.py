"""How a kernel is started, in one place: on its tensors' device, without fused multiply-adds, or only recorded.

Products and sums are never fused behind the kernel's back: where a fused multiply-add is meant, the kernel says tl.fma.
So a GPU computes what the interpreter does, to the bit, up to the order of sums.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton

COMPILE_OPTIONS = {"enable_fp_fusion": False}


@dataclass(frozen=True)
class Launch:
    """One start of a kernel, as a launcher asked for it."""

    kernel: Any
    """The ``triton.jit`` function."""
    grid: tuple[int, ...]
    num_warps: int
    arguments: dict[str, Any]
    """By parameter name: tensors, numbers, None and the values of constexprs."""


_RECORD: ContextVar[list[Launch] | None] = ContextVar("pdmd_triton_record", default=None)


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Collects the launches of the body instead of running them, so that launchers can be called on meta tensors."""
    launches: list[Launch] = []
    token = _RECORD.set(launches)
    try:
        yield launches
    finally:
        _RECORD.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *, num_warps: int, **arguments: Any) -> None:
    """Runs a kernel on the current stream of its tensors' device; an empty grid runs nothing.

    Args:
        kernel: a ``triton.jit`` function.
        grid: programs by axis; the first may be long, the others at most 65,535.
        num_warps: warps a program.
        arguments: the kernel's, by name.
    """
    if 0 in grid:
        return
    record = _RECORD.get()
    if record is not None:
        record.append(Launch(kernel, grid, num_warps, arguments))
        return
    tensor = next(value for value in arguments.values() if isinstance(value, torch.Tensor))
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        with torch.cuda.device(tensor.device):
            kernel[grid](num_warps=num_warps, **COMPILE_OPTIONS, **arguments)
    else:
        kernel[grid](num_warps=num_warps, **COMPILE_OPTIONS, **arguments)


def padded(size: int) -> int:
    """The least power of two that holds `size` lanes."""
    return triton.next_power_of_2(max(size, 1))

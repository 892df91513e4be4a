"""A pytest plugin for the checks in interpreted/: the repaired interpreter, NaN around every tensor, the twins."""

from collections.abc import Callable
from typing import Any

import interpreter
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pdmd_kernels.reference import primitives
from pdmd_kernels.triton import launcher, tiling

_MARGIN = 64
_POISON = -7
"""For integers, which have no NaN."""


def pytest_configure() -> None:
    interpreter.repair()


def poisoned(tensor: Tensor) -> Tensor:
    """The contiguous tensor inside a larger buffer that holds NaN everywhere else."""
    buffer = _poison(tensor.numel(), tensor.dtype)
    return buffer[_MARGIN : _MARGIN + tensor.numel()].view(tensor.shape).copy_(tensor)


class GuardedAllocations(TorchDispatchMode):
    """Allocates from inside larger buffers, all filled with NaN, and finds what was written outside of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket not in (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty):
            return result
        self._buffers.append(_poison(result.numel(), result.dtype))
        return self._buffers[-1][_MARGIN : _MARGIN + result.numel()].view(result.shape)

    def assert_untouched(self) -> None:
        """Fails if a kernel wrote beside a tensor."""
        for buffer in self._buffers:
            margins = torch.cat((buffer[:_MARGIN], buffer[-_MARGIN:]))
            assert (margins.isnan() if buffer.is_floating_point() else margins == _POISON).all()


def run(name: str, *arguments: Any) -> Any:
    """Calls an op's Triton launcher with guarded allocations."""
    with GuardedAllocations() as guard:
        result = launcher(name)(*arguments)
    guard.assert_untouched()
    return result


def widened(argument: Any) -> Any:
    """Floating tensors, and dtypes of results, in fp64; all else as it is."""
    if isinstance(argument, torch.dtype):
        return torch.float64
    return argument.double() if isinstance(argument, Tensor) and argument.is_floating_point() else argument


@pytest.fixture
def agrees_with_twin(assert_as_accurate_as_torch: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
    """Checks ``op(name, *arguments)`` against its twin in the same dtype and in fp64; returns the op's results."""

    def check(name: str, *arguments: Any) -> tuple[Tensor, ...]:
        twin = getattr(primitives, name)
        given = [poisoned(a) if isinstance(a, Tensor) and a.is_contiguous() else a for a in arguments]
        results = [_tuple(run(name, *given)), _tuple(twin(*arguments)), _tuple(twin(*map(widened, arguments)))]
        for ours, plain, exact in zip(*results, strict=True):
            assert ours.shape == plain.shape and ours.dtype == plain.dtype
            if not plain.is_floating_point():
                assert torch.equal(ours, plain)
            elif plain.numel():
                assert_as_accurate_as_torch(ours, plain, exact)
        return results[0]

    return check


@pytest.fixture(autouse=True)
def small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same random inputs in every run, and few programs, so that each walks over several rows."""
    torch.manual_seed(0)
    monkeypatch.setattr(tiling, "ENOUGH_PROGRAMS", 4)


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _poison(numel: int, dtype: torch.dtype) -> Tensor:
    return torch.full((numel + 2 * _MARGIN,), float("nan") if dtype.is_floating_point else _POISON, dtype=dtype)

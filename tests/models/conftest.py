"""Fixtures for the models' tests: diffusers in true fp64, and the tolerance rule by name."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_pdmd.parallel import destroy_topology


class Fp64Mode(TorchFunctionMode):
    """Turns requests for fp32 into fp64, so that code which computes parts in fp32 becomes an fp64 reference."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        if func is torch.Tensor.float:
            return args[0].double()
        return func(*args, **kwargs)


@pytest.fixture
def fp64_mode() -> TorchFunctionMode:
    return Fp64Mode()


@pytest.fixture
def assert_as_exact(assert_as_accurate_as_torch) -> Callable[[str, Tensor, Tensor, Tensor], None]:
    """The project's rule for (name, ours, plain torch in the same dtype, fp64 reference), naming it in the error."""

    def check(name: str, ours: Tensor, plain: Tensor, exact: Tensor) -> None:
        assert exact.norm() > 0, f"{name}: the reference tells nothing"
        try:
            assert_as_accurate_as_torch(ours, plain, exact)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None

    return check


@pytest.fixture(autouse=True, scope="module")
def _no_topology_left() -> Iterator[None]:
    yield
    destroy_topology()

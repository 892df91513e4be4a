"""Fixtures for the models' tests: the tolerance rule by name."""

from collections.abc import Callable, Iterator

import pytest
from torch import Tensor

from megatron_pdmd.parallel import destroy_topology


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

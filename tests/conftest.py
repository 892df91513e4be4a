"""Fixtures for tests that need ranks or a topology."""

import functools
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from megatron_pdmd.distillation import randomness
from megatron_pdmd.parallel import Topology, destroy_topology, initialize_topology
from pdmd_kernels import normal


class Fp64Mode(TorchFunctionMode):
    """Turns requests for fp32 into fp64, so that code which computes parts in fp32 becomes an fp64 reference."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        if func is torch.Tensor.float:
            return args[0].double()
        return func(*args, **kwargs)


@pytest.fixture(scope="session")
def fp64_mode() -> TorchFunctionMode:
    """Inside of it diffusers' models compute in fp64 throughout."""
    return Fp64Mode()


@pytest.fixture(autouse=True, scope="session")
def single_thread() -> None:
    """Keep OpenMP from starting threads in this process: forked ranks would wait for them forever."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[Any]]:
    """The function ``run_ranks(function, world_size, *args)`` of distributed/ranks.py, with megatron-core imported."""
    import megatron.core.distributed
    import megatron.core.optimizer  # noqa: F401  (imported once here, shared by every rank forked later)

    spec = importlib.util.spec_from_file_location("ranks", Path(__file__).parent / "distributed" / "ranks.py")
    ranks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ranks)

    def run(*arguments: Any, **options: Any) -> list[Any]:
        destroy_topology()  # an earlier test's; a fork would inherit its groups
        return ranks.run_ranks(*arguments, **options)

    return run


@pytest.fixture(scope="session")
def load_tool() -> Callable[[str], ModuleType]:
    """The function ``load_tool(name)``: a program of tools/ as a module, its neighbours found as when it runs."""
    tools = Path(__file__).parents[1] / "tools"

    @functools.cache
    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, tools / f"{name}.py")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(tools))
            spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def own_lines() -> Callable[[str], list[str]]:
    """The function ``own_lines(stderr)``: its lines less those that torch's CUDA build logs without a driver."""

    def lines(stderr: str) -> list[str]:
        return [line for line in stderr.splitlines() if not re.match(r"[IW]\d{4} [\d:.]+ \d+ \S*/torch/\S+\]", line)]

    return lines


@pytest.fixture
def noise_devices(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kind of device of each draw of normal numbers from a counter, in order."""
    found = []

    def recorded(seeds: torch.Tensor, numel: int) -> torch.Tensor:
        found.append(seeds.device.type)
        return normal(seeds, numel)

    monkeypatch.setattr(randomness, "normal", recorded)
    return found


@pytest.fixture
def count_flops() -> Callable[[], FlopCounterMode]:
    """The function ``count_flops()``: torch's counter of matrix products, for a block with composed attention."""
    # Its own list has no formula of the in-place addmm, with which an adapter is added.
    in_place = {torch.ops.aten.addmm_: lambda own, a, b, **rest: 2 * a[0] * a[1] * b[1]}
    return lambda: FlopCounterMode(display=False, custom_mapping=in_place)


@pytest.fixture
def topology() -> Iterator[Topology]:
    """A topology of this one process."""
    yield initialize_topology()
    destroy_topology()


@pytest.fixture(scope="session")
def assert_as_accurate_as_torch() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    """Check a result by the project's rule: a relative L2 error at most twice that of plain torch, plus one eps.

    Called with (ours, plain torch in the same dtype, fp64 reference).
    """

    def check(ours: torch.Tensor, plain: torch.Tensor, reference: torch.Tensor) -> None:
        assert reference.dtype == torch.float64

        def error(value: torch.Tensor) -> float:
            return ((value.double() - reference).norm() / reference.norm()).item()

        limit = 2 * error(plain) + torch.finfo(ours.dtype).eps
        assert error(ours) <= limit, f"relative error {error(ours):.2e} > {limit:.2e}"

    return check

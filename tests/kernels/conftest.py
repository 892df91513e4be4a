"""The implementations under test: the plain twins, and each variant of the C++ kernels that this processor runs."""

from collections.abc import Iterator

import pytest
import torch

import pdmd_kernels

VARIANTS = ["avx512", "avx2", "portable"]


def forced_variant(name: str) -> Iterator[None]:
    """Runs the C++ kernels of one instruction set, then those of before."""
    if "native" not in pdmd_kernels.available_backends("cpu"):
        pytest.skip("the native kernels are not built")
    if name not in torch.ops.pdmd.cpu_capabilities():
        pytest.skip(f"this processor has no {name}")
    before = torch.ops.pdmd.cpu_capability()
    torch.ops.pdmd.force_cpu_capability(name)
    with pdmd_kernels.use_backend("native"):
        yield
    torch.ops.pdmd.force_cpu_capability(before)


@pytest.fixture(params=["reference", *VARIANTS])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the implementation that the public ops run on."""
    if request.param == "reference":
        with pdmd_kernels.use_backend("reference"):
            yield "reference"
    else:
        for _ in forced_variant(request.param):
            yield request.param


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the C++ variant that runs."""
    for _ in forced_variant(request.param):
        yield request.param

"""Which implementation an op runs: ``use_backend`` chooses, ``select`` answers for the tensors at hand.

"auto" takes Triton for CUDA tensors and the C++ kernels for CPU tensors, and the plain twins where these are missing or
do not know the dtype. Tensors in fp64 always go to the plain twins. An op that the C++ library has for CUDA too runs
there in place of Triton's.
"""

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType, SimpleNamespace
from typing import Literal

import torch
from torch import Tensor

import pdmd_kernels
from pdmd_kernels import native, schemas, triton
from pdmd_kernels.reference import primitives

BackendName = Literal["auto", "triton", "native", "reference"]
BACKENDS: tuple[BackendName, ...] = ("auto", "triton", "native", "reference")
KERNEL_DTYPES = frozenset((torch.float32, torch.bfloat16))

_NATIVE_CHOICES = ("auto", "native")

_CHOSEN: ContextVar[BackendName] = ContextVar("pdmd_kernel_backend", default="auto")
_HAS_NATIVE = native.load(list(pdmd_kernels.__path__))
_HAS_TRITON = triton.is_available()
_OPS = SimpleNamespace(**{name: getattr(torch.ops.pdmd, name).default for name in schemas.SCHEMAS})
_COMPILED_FOR_CUDA = tuple(
    name for name in schemas.SCHEMAS if torch._C._dispatch_has_kernel_for_dispatch_key(f"pdmd::{name}", "CUDA")
)

if _HAS_TRITON:
    triton.register(schemas.LIBRARY, elsewhere=_COMPILED_FOR_CUDA)


def compiled_for_cuda() -> tuple[str, ...]:
    """The primitive ops that nvcc compiled into the C++ library; none where the build found no nvcc."""
    return _COMPILED_FOR_CUDA


def warn_if_not_compiled(op: str) -> None:
    """Says once that an op's CUDA kernel was left out of the build, to be called where it would run."""
    if op not in _COMPILED_FOR_CUDA and torch.version.cuda:
        _warn_once(
            f"the CUDA kernel of {op} was not built, so Triton's runs, a launch for each tensor; with nvcc on PATH or"
            f" in CUDACXX (docs/gpu.md), {native.BUILD_AGAIN}"
        )


def available_backends(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """The backends that can run on a device, the fastest first; "reference" is always the last."""
    found = {"cpu": ("native",) if _HAS_NATIVE else (), "cuda": ("triton",) if _HAS_TRITON else ()}
    return (*found.get(torch.device(device).type, ()), "reference")


@contextmanager
def use_backend(name: BackendName) -> Iterator[None]:
    """Runs the ops inside on one backend; a backward pass runs on its forward's.

    Args:
        name: "auto", "triton", "native" or "reference".

    Raises:
        ValueError: no such backend, or it is not there. A backend that is there but not for a tensor's device is
            refused by the op.
    """
    if name not in BACKENDS:
        raise ValueError(f"kernel backend {name!r} does not exist; choose one of {', '.join(BACKENDS)}")
    if name == "native" and not _HAS_NATIVE:
        raise ValueError(
            "kernel backend native is not built; install with a C++ compiler at hand, or choose auto or reference"
        )
    if name == "triton" and not _HAS_TRITON:
        raise ValueError("kernel backend triton needs the package triton; install it, or choose auto or reference")
    token = _CHOSEN.set(name)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def select(*tensors: Tensor) -> ModuleType | SimpleNamespace:
    """The primitives, as attributes under the names of the ``pdmd`` ops, for floating tensors of one device.

    Raises:
        ValueError: the chosen backend does not run on their device.
    """
    name = _CHOSEN.get()
    if name == "reference":
        return primitives
    kind = tensors[0].device.type
    for tensor in tensors:
        if tensor.dtype not in KERNEL_DTYPES:
            return primitives
    if kind == "cpu" and name != "triton":
        if _HAS_NATIVE:
            return _OPS
    elif kind == "cuda" and name != "native":
        if _HAS_TRITON:
            return _OPS
        _warn_once("the package triton is not there, so ops on CUDA tensors run in plain torch, which is slower")
    elif name != "auto":
        raise ValueError(f"kernel backend {name} does not run on {kind} tensors; choose auto or reference")
    return primitives


def runs_native(*tensors: Tensor) -> bool:
    """Whether the C++ kernels take tensors, of which the first decides by its dtype; costs less than `select`."""
    if not _HAS_NATIVE or _CHOSEN.get() not in _NATIVE_CHOICES or tensors[0].dtype not in KERNEL_DTYPES:
        return False
    for tensor in tensors:  # noqa: SIM110 (all() over a generator takes three times as long)
        if not tensor.is_cpu:
            return False
    return True


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)

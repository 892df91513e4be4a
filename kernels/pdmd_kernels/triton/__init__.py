"""The CUDA kernels of the ``pdmd`` ops, in Triton: one op a file, its launcher with the op's own arguments.

Triton is imported when the first op is called, not before.
"""

import importlib
import importlib.util
from collections.abc import Callable, Collection
from typing import Any

import torch

OPERATIONS = {
    "random_words": "philox",
    "normal": "philox",
    "subinterval_noise": "subinterval_noise",
    "subinterval_loss": "subinterval_loss",
    "dmd_gradient": "dmd_gradient",
    "euler_step": "euler_step",
    "modulated_layer_norm": "modulated_layer_norm",
    "modulated_layer_norm_backward": "modulated_layer_norm",
    "gated_residual": "gated_residual",
    "gated_residual_backward": "gated_residual",
    "sum_of_squares": "rms_rope",
    "rms_rope": "rms_rope",
    "rms_rope_backward_dots": "rms_rope",
    "rms_rope_backward_dx": "rms_rope",
    "rms_norm_rope": "rms_norm_rope",
    "rms_norm_rope_backward": "rms_norm_rope",
    "adamw_beta1_zero": "adamw_beta1_zero",
}
"""The module of each op's launcher."""


def is_available() -> bool:
    """Whether Triton is installed; it is not imported."""
    return importlib.util.find_spec("triton") is not None


def launcher(name: str) -> Callable[..., Any]:
    """The function that runs an op; imports Triton.

    Args:
        name: one of `OPERATIONS`.
    """
    return getattr(importlib.import_module(f"{__name__}.{OPERATIONS[name]}"), name)


def register(library: torch.library.Library, *, elsewhere: Collection[str] = ()) -> None:
    """Makes the launchers the CUDA kernels of the library's ops.

    Args:
        library: of the namespace ``pdmd``; the registrations live as long as it does.
        elsewhere: ops that have another CUDA kernel, to be left alone.
    """
    for name in OPERATIONS:
        if name not in elsewhere:
            library.impl(name, _on_first_call(name), "CUDA")


def _on_first_call(name: str) -> Callable[..., Any]:
    """The launcher of an op, looked up when it is first called."""
    found: list[Callable[..., Any]] = []

    def run(*arguments: Any) -> Any:
        if not found:
            found.append(launcher(name))
        return found[0](*arguments)

    return run

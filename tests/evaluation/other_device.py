"""A second device for tests on a machine that has none: its tensors are CPU tensors that are marked.

Inside `OtherDevice` an op over tensors of both devices fails, as between a GPU and the CPU; the numbers are the CPU's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("ipu", 0)  # a name that torch knows, without a driver
_DEVICE_OF = torch.Tensor.device.__get__
# Module.to reads its arguments and compares kinds of tensors with these, which compute nothing.
_QUESTIONS = (torch._C._nn._parse_to, torch._has_compatible_shallow_copy_type)


class _There(torch.Tensor):
    """A tensor of the other device."""


class OtherDevice(TorchFunctionMode):
    """A context in which `DEVICE` exists."""

    def __enter__(self) -> "OtherDevice":
        torch.__future__.set_overwrite_module_params_on_conversion(
            True
        )  # else a moved module keeps unmarked parameters
        return super().__enter__()

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)
        torch.__future__.set_overwrite_module_params_on_conversion(False)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = any(isinstance(tensor, _There) for tensor in tensors)
        if func == _DEVICE_OF:
            return DEVICE if there else torch.device("cpu")
        if there and any(tensor.ndim and not isinstance(tensor, _There) for tensor in tensors):
            raise RuntimeError(f"{func}: Expected all tensors to be on the same device")
        if func is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        asked = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.device)]
        if asked:
            there = asked[0] == DEVICE
            args, kwargs = tree_map(lambda value: torch.device("cpu") if value is asked[0] else value, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        kind = _There if there else torch.Tensor
        return tree_map(lambda leaf: leaf.as_subclass(kind) if isinstance(leaf, torch.Tensor) else leaf, result)

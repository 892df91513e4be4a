"""Passes that a rehearsal need not run twice: without a gradient nothing of them remains but their output."""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from megatron_pdmd.distillation.roles import Pass, Roles
from megatron_pdmd.planning.device_memory import DeviceMemory


class RepeatedPasses:
    """Runs each pass of a network once, and answers the same pass by its output's shape and its need of memory.

    Args:
        memory: what the device holds.
    """

    def __init__(self, memory: DeviceMemory):
        self._memory = memory
        self._needs: WeakKeyDictionary[torch.nn.Module, dict[Any, int]] = WeakKeyDictionary()

    def known(self, run: Callable[[Roles, Pass], Tensor]) -> Callable[[Roles, Pass], Tensor]:
        """`Roles.run` that knows what it has run."""

        def run_once(roles: Roles, request: Pass) -> Tensor:
            if request.gradient:
                return run(roles, request)
            model, adapter = roles.network(request)
            needs, key = self._needs.setdefault(model, {}), (adapter, *_shapes(request))
            if key in needs:
                self._memory.need(needs[key])
                return torch.empty_like(request.x_t)
            held = self._memory.held_bytes
            with self._memory.measured() as measured:
                flow = run(roles, request)
            needs[key] = measured.peak_bytes - held
            return flow

        return run_once


def _shapes(request: Pass) -> tuple[Any, ...]:
    conditions = request.conditions if isinstance(request.conditions, Tensor) else vars(request.conditions)
    tensors = [leaf for leaf in tree_leaves((request.x_t, request.t, conditions)) if isinstance(leaf, Tensor)]
    return tuple((tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in tensors)

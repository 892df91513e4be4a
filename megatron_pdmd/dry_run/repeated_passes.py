"""Passes that a rehearsal need not run twice: without a gradient nothing of them remains but their output."""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from megatron_pdmd.distillation.roles import Pass, Roles
from megatron_pdmd.models.conditions import Conditions
from megatron_pdmd.models.wan.model import Hidden, WanModel
from megatron_pdmd.planning.device_memory import DeviceMemory

Looks = tuple[torch.Size, torch.dtype]


class RepeatedPasses:
    """Runs each pass of a network once, and answers the same pass by its output's shape and its need of memory.

    Args:
        memory: what the device holds.
    """

    def __init__(self, memory: DeviceMemory):
        self._memory = memory
        self._needs: WeakKeyDictionary[torch.nn.Module, dict[Any, int]] = WeakKeyDictionary()
        self._made: WeakKeyDictionary[WanModel, dict[Any, tuple[int, list[Looks]]]] = WeakKeyDictionary()

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

    def known_stage(self, run: Callable[..., Hidden | Tensor]) -> Callable[..., Hidden | Tensor]:
        """`WanModel.run_stage` that knows what it has run."""

        def run_once(model: WanModel, given: Any, sizes: Sequence[int], adapter: str | None) -> Hidden | Tensor:
            if torch.is_grad_enabled():
                return run(model, given, sizes, adapter)
            parts = given if isinstance(given, Hidden) else (*given[:2], *vars(Conditions.of(given[2])).values())
            made, key = self._made.setdefault(model, {}), (adapter, *_looks(parts))
            if key in made:
                need, results = made[key]
                self._memory.need(need)
                return _like(results, given, model.stage.is_last)
            held = self._memory.held_bytes
            with self._memory.measured() as measured:
                result = run(model, given, sizes, adapter)
            results = [result] if model.stage.is_last else list(result)
            made[key] = measured.peak_bytes - held, [(one.shape, one.dtype) for one in results]
            return result

        return run_once


def _like(results: list[Looks], given: Any, is_last: bool) -> Hidden | Tensor:
    """New tensors where a stage makes new ones; hidden states but the tokens are handed on."""
    new = results[:1] if isinstance(given, Hidden) else results
    made = [torch.empty(shape, dtype=dtype, device=given[0].device) for shape, dtype in new]
    if is_last:
        return made[0]
    return given._replace(tokens=made[0]) if isinstance(given, Hidden) else Hidden(*made)


def _shapes(request: Pass) -> tuple[Any, ...]:
    conditions = request.conditions if isinstance(request.conditions, Tensor) else vars(request.conditions)
    return _looks((request.x_t, request.t, conditions))


def _looks(values: Any) -> tuple[Any, ...]:
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return tuple((tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in tensors)

"""What fake CUDA tensors must not do, checked operation by operation, and the bytes that they hold."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from megatron_pdmd.planning.device_memory import DeviceMemory
from megatron_pdmd.planning.fake_ranks import FakeRanks
from megatron_pdmd.planning.source_lines import lines_of_caller, summary_of_error


class DeviceError(RuntimeError):
    """An operation that a GPU would refuse, or would make the host wait for."""


class DeviceChecks(TorchDispatchMode):
    """Raises `DeviceError` where a real device or NCCL would fail in a way that fake tensors do not show.

    - an operation of ours over tensors on several devices, or without a kernel for CUDA,
    - a collective call over tensors that its backend cannot send,
    - inside of `passes`, a read of a device tensor by the host.

    Fake tensors themselves refuse mixed devices in torch's own operations. Nothing is sent, and a number that the host
    reads is what it wrote there itself, or else 1.

    Args:
        ranks: the process groups.

    Attributes:
        memory: what the device holds.
    """

    def __init__(self, ranks: FakeRanks):
        super().__init__()
        self.memory = DeviceMemory()
        self._ranks = ranks
        self._passes = False
        self._numbers, self._origins = WeakIdKeyDictionary(), WeakIdKeyDictionary()

    @contextmanager
    def passes(self) -> Iterator[None]:
        """A block in which the host only launches work: it may not wait for the device."""
        before, self._passes = self._passes, True
        try:
            yield
        finally:
            self._passes = before

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if func.namespace == "c10d":
            return self._communicate(func, args, kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return self._read(args[0])
        if func.namespace == "pdmd":
            _check_kernel(func, args, kwargs)
        try:
            result = func(*args, **kwargs)
        except Exception as error:
            if origin := self.origin_among(tree_leaves((args, kwargs))):
                raise DeviceError(f"{summary_of_error(error)} (the CPU's comes from {origin})") from error
            raise
        if func is torch.ops.aten._to_copy.default and (known := self._known(args[0])) is not None:
            self._numbers[result] = known
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            if tensor.is_cuda:
                self.memory.note(tensor)
                continue
            if self._passes:
                _check_stays_on_device(func, args)
            self._origins[tensor] = self.origin_among(tree_leaves(args)) or lines_of_caller(sys._getframe(1))
        return result

    def origin_among(self, values: Iterable[Any]) -> str:
        """The lines that made the first of some values that is a tensor on the CPU; empty where none is."""
        tensors = (value for value in values if isinstance(value, Tensor) and not value.is_cuda)
        return next((origin for tensor in tensors if (origin := self._origins.get(tensor))), "")

    def _read(self, tensor: Tensor) -> float | int | bool:
        if self._passes and tensor.is_cuda:
            raise DeviceError("the host reads a number of the device inside an update's passes, and waits for it")
        known = self._known(tensor)
        if known is not None:
            return known
        return 1.0 if tensor.dtype.is_floating_point else 1

    def _known(self, tensor: Tensor) -> float | int | bool | None:
        """What the host wrote into a tensor of one number; None where only a device could know it."""
        constant = getattr(tensor, "constant", None)
        if constant is None or constant.numel() != 1:
            return self._numbers.get(tensor)
        with unset_fake_temporarily():
            return constant.item()

    def _communicate(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = func._schema.name.removeprefix("c10d::")
        if name != "barrier":
            position = [argument.name for argument in func._schema.arguments].index("process_group")
            device = self._ranks.device_of(dist.ProcessGroup.unbox(args[position]))
            for tensor in tensors:
                if tensor.device.type != device:
                    raise DeviceError(f"{name} over a {tensor.device.type} tensor in a group that sends {device} ones")
        work = FakeWork().boxed()
        return (args[0], work) if len(func._schema.returns) == 2 else work


def _check_kernel(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Our operations' fake kernels ask neither where their tensors are nor whether a GPU has the operation."""
    devices = sorted({leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)})
    if len(devices) > 1:
        raise DeviceError(f"{func} over {' and '.join(devices)} tensors")
    if devices == ["cuda"] and not torch._C._dispatch_has_kernel_for_dispatch_key(func._schema.name, "CUDA"):
        raise DeviceError(f"{func} has no kernel for CUDA")


def _check_stays_on_device(func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Tensors on the host may be sent to the device during passes, but none may come from there."""
    if any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in tree_leaves(args)):
        raise DeviceError(f"{func} copies from the device inside an update's passes, and the host waits for it")

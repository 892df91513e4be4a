"""The one place that teaches megatron-core to run without CUDA.

megatron-core asks for the current CUDA device, for ``device="cuda"`` buffers and for CUDA random states as a matter
of course, so on a machine without CUDA nearly everything in it ends in "Torch not compiled with CUDA enabled". None
of that is essential: the code underneath is plain torch and runs on any device. ``without_cuda`` redirects those
requests. Where a CUDA device exists it does nothing.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CUDA_TYPE_NAMES = {
    f"torch.{device}{kind}Tensor": f"torch.cuda.{kind}Tensor"
    for device in ("", "meta.")
    for kind in ("Float", "Half", "BFloat16")
}


@contextmanager
def without_cuda() -> Iterator[None]:
    """Run a block of megatron-core calls on a machine that may have no CUDA device; a no-op where there is one.

    On first entry, and for the rest of the process (forward and backward of megatron-core's linears need it long
    after any block has ended), it replaces

    - ``torch.cuda.current_device``: torch's default device, so the CPU, or meta inside ``with torch.device("meta")``;
    - ``torch.cuda.synchronize``: nothing to wait for;
    - ``torch.cuda.manual_seed``, ``torch.cuda.get_rng_state`` and the two functions by which megatron-core's random
      tracker reads and sets a CUDA state: the CPU generator takes the place of the CUDA one, so ``tracker.fork()`` and
      ``tensor_parallel.checkpoint`` keep their meaning (tensor-parallel ranks differ inside a fork and agree outside).

    Within the block, for this thread, it also

    - creates tensors asked for with ``device="cuda"`` on that default device, and makes ``tensor.cuda()`` the identity;
    - lets ``tensor.type()`` answer ``torch.cuda.FloatTensor`` and the like, by which megatron-core's optimizers sort
      parameters.

    The block is needed around the construction of ``DistributedDataParallel`` and of optimizers, around schedules and
    around saving and loading a checkpoint, but not around a model's forward and backward, where a function mode would
    cost time on every call.
    """
    if torch.cuda.is_available():
        yield
        return
    _replace_cuda_functions()
    with _CudaRequestsOnDefaultDevice():
        yield


class _CudaRequestsOnDefaultDevice(TorchFunctionMode):
    """Answer requests for CUDA tensors with tensors on torch's default device.

    A mode rather than patched factory functions: a patched ``torch.empty`` escapes ``with torch.device("meta")``.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = torch.get_default_device()
        if func is torch.Tensor.cuda:
            return args[0]
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            return _CUDA_TYPE_NAMES.get(result, result)
        return result


@functools.cache
def _replace_cuda_functions() -> None:
    """Put CPU stand-ins where megatron-core calls CUDA functions by name; once per process."""
    from megatron.core.tensor_parallel import random as megatron_random

    def current_device() -> torch.device:
        return torch.get_default_device()

    def synchronize(device: Any = None) -> None:
        return None

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def get_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.default_generator.get_state()

    def set_rng_state(new_state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
        torch.default_generator.set_state(new_state)

    torch.cuda.current_device = current_device
    torch.cuda.synchronize = synchronize
    torch.cuda.manual_seed = manual_seed
    torch.cuda.get_rng_state = get_rng_state
    megatron_random._get_cuda_rng_state = get_rng_state
    megatron_random._set_cuda_rng_state = set_rng_state

"""CUDA for fake tensors, on a machine that may have no CUDA device and in any build of torch.

    python -m megatron_pdmd.planning.fake_cuda MODULE [arguments]      runs a module as a program in such a process

Fake tensors have shapes, dtypes and devices and no memory, so programs for GPUs run to their end and every operation's
devices are checked. Nothing is computed. torch asks once, when it is imported, what CUDA it has; so this file imports
torch only after the small library that answers is loaded, and a process with fake CUDA does nothing else.
"""

import ctypes
import importlib.util
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIBRARY_NAME = "_fake_cuda.so"

# Tensors of up to so many numbers on the CPU, such as times and what ranks agree on, keep them.
_KNOWN_NUMBERS = 64

# A GPU of the Hopper generation, for what asks for more than "is it there".
_ANSWERS: dict[str, Any] = {
    "is_available": True,
    "is_initialized": True,
    "device_count": 1,
    "current_device": 0,
    "get_device_capability": (9, 0),
    "is_bf16_supported": True,
    "is_current_stream_capturing": False,
    "synchronize": None,
    "set_device": None,
    "manual_seed": None,
    "empty_cache": None,
}


def main() -> None:
    """Runs the module that the command line names."""
    install()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def install() -> None:
    """Makes `cuda` work for fake tensors in this process, for the rest of its life. torch must not be imported yet.

    Raises:
        ValueError: the library was not built.
    """
    assert "torch" not in sys.modules, "torch has looked for CUDA already"
    library = _load_library()
    import torch
    from torch._subclasses import fake_tensor

    library.install_fake_cuda_guard()
    for name, value in _ANSWERS.items():
        setattr(torch.cuda, name, _constant(value))
    torch._C._ensureCUDADeviceGuardSet = _constant(None)
    fake_tensor.init_gpu_context = _constant(None)
    fake_tensor.CONSTANT_NUMEL_LIMIT = _KNOWN_NUMBERS
    fake_tensor.FakeTensorMode.avoid_device_init = property(_constant(True))
    _keep_storage_references_of_fakes(torch)
    _attend_as_on_a_gpu(torch)


def _load_library() -> ctypes.CDLL:
    """The library that the build left beside the kernels, with the libraries of torch that it needs."""
    libraries = Path(_folders("torch")[0]) / "lib"
    for folder in _folders("pdmd_kernels"):
        path = Path(folder) / LIBRARY_NAME
        if path.is_file():
            ctypes.CDLL(str(libraries / "libtorch_cpu.so"))
            return ctypes.CDLL(str(path))
    raise ValueError(
        f"--dry-run: {LIBRARY_NAME} is not built; with a C++ compiler at hand, run pip install --no-build-isolation ."
    )


def _folders(package: str) -> list[str]:
    """Where a package lies, without importing it."""
    return list(importlib.util.find_spec(package).submodule_search_locations)


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *unused, **also_unused: value


def _keep_storage_references_of_fakes(torch: Any) -> None:
    """torch's weak references to storages are freed by pointers that a fake's storage does not have."""
    from torch.multiprocessing.reductions import StorageWeakRef

    StorageWeakRef.__del__ = _constant(None)


def _attend_as_on_a_gpu(torch: Any) -> None:
    """Attention by the kernel that a GPU would take, whose memory is linear in the tokens.

    torch chooses the kernel by asking the device, which only a real one can answer.
    """
    attention, aten = torch.nn.functional.scaled_dot_product_attention, torch.ops.aten

    def choose(query: Any, key: Any, value: Any, *arguments: Any, **options: Any) -> Any:
        if not query.is_cuda or arguments or options:
            return attention(query, key, value, *arguments, **options)
        if query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256:
            return aten._scaled_dot_product_flash_attention(query, key, value)[0]
        return aten._scaled_dot_product_efficient_attention(query, key, value, None, torch.is_grad_enabled())[0]

    torch.nn.functional.scaled_dot_product_attention = choose


if __name__ == "__main__":
    main()

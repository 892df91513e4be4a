"""The CUDA kernel of AdamW: its arithmetic, compiled for the host, is torch's to the bit."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
CUDA = HERE.parents[2] / "kernels" / "csrc" / "cuda"
OPTIONS = {"lr": 3e-3, "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler: the CUDA kernel's arithmetic cannot be compiled for the host")
    library = tmp_path_factory.mktemp("adamw") / "adamw_host.so"
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Werror", "-shared", "-fPIC", f"-I{CUDA}"]
    subprocess.run([compiler, *flags, str(HERE / "adamw_host.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.mark.parametrize("beta2", [0.999, 0.95])
def test_five_steps_are_those_of_torch(host: ctypes.CDLL, beta2: float) -> None:
    torch.manual_seed(0)
    # A multiple of 64: torch's vectorised loop and its loop for the rest round apart.
    param, moment, copy = torch.randn(6400), torch.zeros(6400), torch.zeros(6400, dtype=torch.bfloat16)
    theirs = torch.nn.Parameter(param.clone())
    optimizer = torch.optim.AdamW([theirs], betas=(0.0, beta2), fused=True, **OPTIONS)
    for step in range(1, 6):
        grad = torch.randn(6400) * 10.0 ** (2 * step - 8)
        theirs.grad = grad.clone()
        numbers = (ctypes.c_double(OPTIONS["lr"]), ctypes.c_double(beta2))
        numbers += (ctypes.c_double(OPTIONS["eps"]), ctypes.c_double(OPTIONS["weight_decay"]), ctypes.c_int64(step))
        tensors = (address(param), address(grad), address(moment), address(copy))
        host.adamw_host(ctypes.c_int64(6400), *tensors, *numbers)
        optimizer.step()
        assert torch.equal(param, theirs) and torch.equal(moment, optimizer.state[theirs]["exp_avg_sq"])
        assert torch.equal(copy, param.bfloat16())


def test_bf16_is_read_exactly_and_rounded_to_nearest_even(host: ctypes.CDLL) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    wide, narrow = torch.empty(2**16), torch.empty(2**16, dtype=torch.bfloat16)
    host.widen_host(ctypes.c_int64(2**16), address(every), address(wide))
    assert torch.equal(wide.view(torch.int32), every.float().view(torch.int32))
    between = torch.cat([(wide.view(torch.int32) + low).view(torch.float32) for low in (0, 1, 0x7FFF, 0x8000, 0x8001)])
    for part in between.split(2**16):
        part = part.contiguous()
        host.narrow_host(ctypes.c_int64(2**16), address(part), address(narrow))
        assert torch.equal(narrow.isnan(), part.isnan())
        assert torch.equal(narrow[~part.isnan()], part.bfloat16()[~part.isnan()])

"""Prints torch's folder, whether it uses the C++11 ABI (1 or 0) and its CUDA version (0: none), for CMake."""

from pathlib import Path

import torch

print(Path(torch.__file__).parent, int(torch.compiled_with_cxx11_abi()), torch.version.cuda or 0, sep=";", end="")

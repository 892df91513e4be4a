"""Says what nvcc made of the CUDA kernels in this environment's build of the C++ library; needs no GPU.

    python tools/check_cuda_build.py

Exit codes: 0 every kernel of kernels/csrc/cuda is registered, 2 torch is a CPU build or a kernel is missing.
"""

import re
import subprocess
from pathlib import Path

import torch

import pdmd_kernels
from megatron_pdmd.errors import user_errors
from pdmd_kernels.backend import compiled_for_cuda
from pdmd_kernels.native import BUILD_AGAIN, LIBRARY_NAME

SOURCES = Path(__file__).resolve().parents[1] / "kernels" / "csrc" / "cuda"


def check() -> str:
    """The kernels and the architectures that the library has machine code for, in a line.

    Raises:
        ValueError: torch is no CUDA build, or a kernel is missing from the library.
    """
    if torch.version.cuda is None:
        raise ValueError(f"torch {torch.__version__} is a CPU build; have pip install the CUDA build")
    expected = {source.stem for source in SOURCES.glob("*.cu")}
    if missing := sorted(expected - set(compiled_for_cuda())):
        raise ValueError(f"the C++ library has no CUDA kernel of {', '.join(missing)}; {BUILD_AGAIN}")
    library = next(path for path in (Path(p) / LIBRARY_NAME for p in pdmd_kernels.__path__) if path.exists())
    return (
        f"torch {torch.__version__}, CUDA {torch.version.cuda}: {library} has {', '.join(sorted(expected))} "
        f"for {', '.join(architectures(library)) or 'no architecture that can be listed'}"
    )


def architectures(library: Path) -> list[str]:
    """The architectures of the machine code in a library, read by the cuobjdump that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listed = subprocess.run([tool, "--list-elf", library], capture_output=True, text=True, check=True).stdout
    return sorted(set(re.findall(r"\.(sm_\d+)\.", listed)), key=lambda name: int(name[3:]))


def main() -> None:
    with user_errors():
        print(check())


if __name__ == "__main__":
    main()

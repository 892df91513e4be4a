"""The library of C++ kernels that the build leaves in this package, if it could."""

import warnings
from pathlib import Path

import torch

LIBRARY_NAME = "_native.so"
BUILD_AGAIN = "pip install --no-build-isolation --verbose --editable . builds it and shows what is missing"


def load(folders: list[str]) -> bool:
    """Loads the library from the first of the package's folders that has it; says so if none has or it does not fit.

    A build that fails leaves it out, and pip keeps that to itself.

    Args:
        folders: `__path__` of the package; an editable install has one for its sources and one for what was built.

    Returns:
        Whether the CPU kernels of the ``pdmd`` ops are registered.
    """
    for path in (Path(folder) / LIBRARY_NAME for folder in folders):
        if path.exists():
            try:
                torch.ops.load_library(path)
            except OSError as error:
                _warn(f"{path} does not load with torch {torch.__version__} ({error})")
                return False
            return True
    _warn(f"the C++ kernels were not built: no {LIBRARY_NAME} in {' or '.join(folders)}")
    return False


def _warn(what: str) -> None:
    warnings.warn(f"{what}; ops on CPU tensors run in plain torch, which is slower. {BUILD_AGAIN}", stacklevel=3)

"""The library of C++ kernels that the build leaves in this package, if it could."""

import warnings
from pathlib import Path

import torch

LIBRARY_NAME = "_native.so"


def load(folders: list[str]) -> bool:
    """Loads the library from the first of the package's folders that has it; says so if it does not fit this torch.

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
                warnings.warn(
                    f"{path} does not load with torch {torch.__version__} ({error}); build it again, with pip install"
                    " --no-build-isolation",
                    stacklevel=2,
                )
                return False
            return True
    return False

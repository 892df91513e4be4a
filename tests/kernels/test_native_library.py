"""Finding and loading the library of C++ kernels."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pdmd_kernels import available_backends, native


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler, and then no library")
def test_where_there_is_a_compiler_the_library_was_built():
    """Tests that need the library are skipped without it, so that it is there must be a test of its own."""
    assert "native" in available_backends("cpu")


def test_a_package_without_the_library_says_so_and_how_to_mend_it(tmp_path):
    with pytest.warns(UserWarning, match=r"not built: no _native.so in .*pip install --no-build-isolation") as said:
        assert native.load([str(tmp_path)]) is False
    assert len(said) == 1


def test_a_library_that_does_not_load_is_told_and_left(tmp_path):
    (tmp_path / native.LIBRARY_NAME).write_bytes(b"built for another torch")
    with pytest.warns(UserWarning, match="does not load with torch .* builds it"):
        assert native.load([str(tmp_path / "elsewhere"), str(tmp_path)]) is False


def test_the_first_import_of_a_package_without_the_library_warns_once(tmp_path):
    package = Path(native.__file__).parent
    shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    program = """if True:
        import pdmd_kernels, torch
        x = torch.ones(2, 3)
        pdmd_kernels.euler_step(x, x, x[:, 0], x[:, 0])
        print(pdmd_kernels.__file__)
    """
    folders = [str(tmp_path), *(folder for folder in sys.path if folder.endswith("site-packages"))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, "-S", "-c", program]  # without site, whose hooks would find the installed package
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith(str(tmp_path)), done.stderr
    assert done.stderr.count("UserWarning") == done.stderr.count("the C++ kernels were not built") == 1


def test_the_check_of_a_cuda_build_tells_what_is_missing(load_tool, monkeypatch):
    tool = load_tool("check_cuda_build")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match="is a CPU build; have pip install the CUDA build"):
        tool.check()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(tool, "compiled_for_cuda", lambda: ())
    with pytest.raises(ValueError, match="no CUDA kernel of adamw_beta1_zero; pip install"):
        tool.check()

"""What CMake makes of a CUDA build of torch, with nvcc and without; nothing is compiled."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
CMAKE = shutil.which("cmake")
pytestmark = pytest.mark.skipif(CMAKE is None or shutil.which("c++") is None, reason="needs CMake and a C++ compiler")


@pytest.fixture
def python_with_cuda_torch(tmp_path: Path) -> Path:
    """This Python, but its torch says that it is built for CUDA."""
    wrapper = tmp_path / "python3"
    found = f"{Path(torch.__file__).parent};1;13.0"
    lines = [
        "#!/bin/sh",
        f'case "$*" in *find_torch.py*) printf "%s" "{found}" ;;',
        f'*) exec {sys.executable} "$@" ;; esac',
    ]
    wrapper.write_text("\n".join(lines) + "\n")
    wrapper.chmod(0o755)
    return wrapper


def configure(python: Path, build: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("CUDACXX", "CUDAARCHS")} | variables
    options = [f"-DPython3_EXECUTABLE={python}", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    command = [CMAKE, "-S", str(ROOT), "-B", str(build), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def compile_commands(build: Path) -> dict[str, str]:
    """The command of each source, by its name."""
    entries = json.loads((build / "compile_commands.json").read_text())
    return {Path(entry["file"]).name: entry["command"] for entry in entries}


def test_without_nvcc_the_cuda_part_is_left_out_aloud(python_with_cuda_torch, tmp_path):
    folders = [folder for folder in os.environ["PATH"].split(os.pathsep) if not (Path(folder) / "nvcc").exists()]
    done = configure(python_with_cuda_torch, tmp_path / "build", PATH=os.pathsep.join(folders))
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert "CMake Warning" in said and "the CUDA kernel of adamw_beta1_zero is left out" in said
    assert "CUDACXX=" in said and "LIBRARY_PATH=" in said
    commands = compile_commands(tmp_path / "build")
    assert "bindings_adamw.cpp" in commands and "adamw_beta1_zero.cu" not in commands


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc; make test-cuda-build compiles with one from pip")
def test_with_nvcc_the_cuda_part_is_compiled_for_each_architecture(python_with_cuda_torch, tmp_path):
    done = configure(python_with_cuda_torch, tmp_path / "build")
    assert done.returncode == 0, done.stderr
    command = compile_commands(tmp_path / "build")["adamw_beta1_zero.cu"]
    assert all(f"sm_{architecture}" in command for architecture in (80, 90, 100)) and "-std=c++17" in command

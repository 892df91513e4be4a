"""The launch script and the program as a user starts them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "pretrain_phased_dmd.sh"
FLAGS = [
    "--train-iters", "1,1", "--fake-updates", "1", "--fake-warmup", "0", "--global-batch-size", "2",
    "--micro-batch-size", "1", "--teacher-steps", "2", "--sample-prompts", "2", "--clips", "8", "--log-interval", "1",
]  # fmt: skip


def launch(*command: str, programs: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in this environment, its programs hidden by those of a folder."""
    folders = [programs, Path(sys.executable).parent, os.environ["PATH"]]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")} | {
        "PATH": os.pathsep.join(str(folder) for folder in folders if folder),
        "VIRTUAL_ENV": sys.prefix,
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(command, cwd=ROOT, env=environment | variables, capture_output=True, text=True)


def program(folder: Path, name: str, line: str) -> None:
    """A program that runs one line of shell."""
    (folder / name).write_text(f"#!/bin/sh\n{line}\n")
    (folder / name).chmod(0o755)


def finished_run(folder: Path) -> None:
    assert (folder / "summary.json").is_file()
    assert (folder / "hf" / "model_index.json").is_file()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert (folder / "samples" / "iter_0000002.png").is_file()


def test_bash_launches_two_ranks(tmp_path: Path) -> None:
    result = launch("bash", str(SCRIPT), *FLAGS, "--save", str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    finished_run(tmp_path / "run")


def test_three_gpus_run_the_default_batch_on_two_ranks(tmp_path: Path) -> None:
    program(tmp_path, "nvidia-smi", r"printf 'GPU 0\nGPU 1\nGPU 2\n'")
    flags = [*FLAGS, "--global-batch-size", "16", "--micro-batch-size", "8", "--task", "none"]
    result = launch("bash", str(SCRIPT), *flags, "--save", str(tmp_path / "run"), programs=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "--global-batch-size 16 does not divide over 3 ranks a node: starting 2" in result.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 2


def test_torchrun_runs_the_same_file_as_python(tmp_path: Path) -> None:
    result = launch(
        "torchrun", "--standalone", "--nproc-per-node", "2", str(SCRIPT), *FLAGS, "--save", str(tmp_path / "run")
    )
    assert result.returncode == 0, result.stderr
    finished_run(tmp_path / "run")


def test_torchrun_without_python_starts_one_job_of_two_ranks(tmp_path: Path) -> None:
    program(tmp_path, "python", 'echo "rank $RANK of $WORLD_SIZE runs $*"')
    program(tmp_path, "torchrun", "echo another job")
    torchrun = str(Path(sys.executable).parent / "torchrun")
    options = ("--standalone", "--nproc-per-node", "2", "--no-python")
    result = launch(torchrun, *options, str(SCRIPT), "--seed", "7", programs=tmp_path)
    assert result.returncode == 0, result.stderr
    rank = "runs examples/pretrain_phased_dmd.sh --config examples/recipes/tiny_wan.yaml --seed 7"
    assert sorted(result.stdout.splitlines()) == [f"rank 0 of 2 {rank}", f"rank 1 of 2 {rank}"]


@pytest.mark.parametrize(("given", "seconds"), [({}, "1800"), ({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60"}, "60")])
def test_torchrun_leaves_a_stopped_rank_time_to_save(given: dict[str, str], seconds: str, tmp_path: Path) -> None:
    program(tmp_path, "torchrun", "echo $TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    program(tmp_path, "python", "exit 0")
    result = launch("bash", str(SCRIPT), programs=tmp_path, **given)
    assert (result.returncode, result.stdout) == (0, f"{seconds}\n")


@pytest.mark.parametrize("flags", [["--dry-run", "4"], ["--dry-run=4"]])
def test_a_dry_run_is_one_process(flags: list[str], tmp_path: Path) -> None:
    program(tmp_path, "torchrun", "echo a job")
    program(tmp_path, "python", 'echo "$*"')
    result = launch("bash", str(SCRIPT), *flags, programs=tmp_path)
    expected = ["-m", "megatron_pdmd.pretrain", "--config", "examples/recipes/tiny_wan.yaml", *flags]
    assert result.stdout.split() == expected


@pytest.mark.parametrize(
    "flags",
    [["--micro-batchsize", "2"], ["--phase-steps", "2,3"], ["--teacher", "nowhere"], ["--config", "nowhere.yaml"]],
    ids=lambda flags: flags[0],
)
def test_bad_input_ends_before_torchrun(
    flags: list[str], tmp_path: Path, own_lines: Callable[[str], list[str]]
) -> None:
    result = launch("bash", str(SCRIPT), "--save", str(tmp_path / "run"), *flags)
    assert result.returncode == 2
    (line,) = own_lines(result.stderr)
    assert line.startswith("error: ")
    assert not (tmp_path / "run").exists()

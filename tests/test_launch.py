"""The launch script and the program as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "pretrain_phased_dmd.sh"
FLAGS = [
    "--train-iters", "1,1", "--fake-updates", "1", "--fake-warmup", "0", "--global-batch-size", "2",
    "--micro-batch-size", "1", "--teacher-steps", "2", "--sample-prompts", "2", "--clips", "8", "--log-interval", "1",
]  # fmt: skip


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        command, cwd=ROOT, env=environment | {"PATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )


def finished_run(folder: Path) -> None:
    assert (folder / "summary.json").is_file()
    assert (folder / "hf" / "model_index.json").is_file()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert (folder / "samples" / "iter_0000002.png").is_file()


def test_bash_launches_two_ranks(tmp_path: Path) -> None:
    result = launch("bash", str(SCRIPT), *FLAGS, "--save", str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    finished_run(tmp_path / "run")


def test_torchrun_runs_the_same_file_as_python(tmp_path: Path) -> None:
    result = launch(
        "torchrun", "--standalone", "--nproc-per-node", "2", str(SCRIPT), *FLAGS, "--save", str(tmp_path / "run")
    )
    assert result.returncode == 0, result.stderr
    finished_run(tmp_path / "run")


@pytest.mark.parametrize(
    "flags",
    [["--micro-batchsize", "2"], ["--phase-steps", "2,3"], ["--teacher", "nowhere"], ["--config", "nowhere.yaml"]],
    ids=lambda flags: flags[0],
)
def test_bad_input_ends_before_torchrun(flags: list[str], tmp_path: Path) -> None:
    result = launch("bash", str(SCRIPT), "--save", str(tmp_path / "run"), *flags)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ")
    assert not (tmp_path / "run").exists()

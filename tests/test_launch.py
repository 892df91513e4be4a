"""The launch script and the program as a user starts them."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from megatron_pdmd import pretrain
from megatron_pdmd.launch import Place
from megatron_pdmd.training.checkpoints.checkpointing import latest_checkpoint

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "pretrain_phased_dmd.sh"
FLAGS = [
    "--train-iters", "1,1", "--fake-updates", "1", "--fake-warmup", "0", "--global-batch-size", "2",
    "--micro-batch-size", "1", "--teacher-steps", "2", "--sample-prompts", "2", "--clips", "8", "--log-interval", "1",
]  # fmt: skip


def environment_with(programs: Path | None = None, **variables: str) -> dict[str, str]:
    """This environment, its programs hidden by those of a folder."""
    folders = [programs, Path(sys.executable).parent, os.environ["PATH"]]
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_ERROR_FILE")
    return {key: value for key, value in os.environ.items() if key not in ranks} | {
        "PATH": os.pathsep.join(str(folder) for folder in folders if folder),
        "VIRTUAL_ENV": sys.prefix,
        "OMP_NUM_THREADS": "1",
        **variables,
    }


def launch(
    *command: str, programs: Path | None = None, folder: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command in a folder."""
    environment = environment_with(programs, **variables)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


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
    torchrun = str(Path(sys.executable).parent / "torchrun")
    options = ("--standalone", "--nproc-per-node", "2", "--no-python")
    result = launch(torchrun, *options, str(SCRIPT), "--seed", "7", programs=tmp_path)
    assert result.returncode == 0, result.stderr
    rank = f"runs -m megatron_pdmd.pretrain --config {ROOT}/examples/recipes/tiny_wan.yaml --seed 7"
    assert sorted(result.stdout.splitlines()) == [f"rank 0 of 2 {rank}", f"rank 1 of 2 {rank}"]


def test_the_script_is_called_from_any_folder_with_any_recipe(tmp_path: Path) -> None:
    program(tmp_path, "python", 'echo "$PWD $*"')
    for given, recipe in (({}, ROOT / "examples" / "recipes" / "tiny_wan.yaml"), ({"RECIPE": "my.yaml"}, "my.yaml")):
        result = launch("bash", str(SCRIPT), "--save", "a b", programs=tmp_path, folder=tmp_path, **given)
        assert result.stdout == f"{tmp_path} -m megatron_pdmd.launch --config {recipe} --save a b\n"


def test_paths_on_the_command_line_are_taken_from_where_the_user_stands(tmp_path: Path) -> None:
    result = launch("bash", str(SCRIPT), "--save", "runs/x", "--print-config", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    config = yaml.safe_load(result.stdout)
    assert config["checkpoint"]["save"] == "runs/x"
    assert config["model"]["teacher"] == str(ROOT / "examples" / "tiny_wan")


@pytest.mark.parametrize(
    "flags",
    [["--micro-batchsize", "2"], ["--phase-steps", "2,3"], ["--teacher", "nowhere"], ["--config", "nowhere.yaml"]],
    ids=lambda flags: flags[0],
)
def test_bad_input_ends_before_any_rank_starts(
    flags: list[str], tmp_path: Path, own_lines: Callable[[str], list[str]]
) -> None:
    result = launch("bash", str(SCRIPT), "--save", str(tmp_path / "run"), *flags)
    assert result.returncode == 2
    (line,) = own_lines(result.stderr)
    assert line.startswith("error: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"RANKS_PER_NODE": "0"}, "RANKS_PER_NODE=0: "),
        ({"RANKS_PER_NODE": "-1"}, "RANKS_PER_NODE=-1: "),
        ({"NUM_NODES": "abc"}, "NUM_NODES=abc: "),
        ({"NUM_NODES": "1000000000000"}, "NUM_NODES=1000000000000: "),
        ({"NODE_RANK": "1"}, "NODE_RANK=1: "),
        ({"NUM_NODES": "2"}, "MASTER_ADDR: is not set, and NUM_NODES is 2"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT=x: "),
        ({"MASTER_PORT": "٣"}, "MASTER_PORT=٣: "),
        ({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "soon"}, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=soon: "),
    ],
    ids=str,
)
def test_a_bad_variable_of_the_launch_is_refused_by_its_name(variables, line, capsys, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as refused:
        Place.from_environment()
    assert str(refused.value).startswith(line)


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"RANK": "abc"}, "RANK=abc: this environment variable must be a whole number in [0, 0]"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2: this environment variable must be a whole number in [0, 1]"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc: "),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE=-1: "),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x: "),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536: "),
    ],
    ids=str,
)
def test_a_bad_variable_of_a_rank_is_refused_by_its_name(variables, line, capsys, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        pretrain.main([])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith(f"error: {line}")


def start_stubs(rank: str, **variables: str) -> subprocess.Popen[str]:
    """The launcher with two ranks that are a few lines of Python, and a check that is done at once."""
    program = f"""
import sys, megatron_pdmd.launch as launch
launch.SECONDS_AFTER_A_FAILURE = 1.0
rank = "import os, signal, sys, time\\nrank = os.environ['RANK']\\n" + {rank!r}
launch._program = lambda module, arguments: [sys.executable, "-u", "-c", rank if module == "pretrain" else "print(2)"]
sys.exit(launch.main([]))
"""
    command = [sys.executable, "-c", program]
    environment = environment_with(**variables)
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


STARTS = "checking the flags and the files they name\nstarting 2 ranks\n"
WAITS = "time.sleep(60)"
NO_MEMORY = f"""from megatron_pdmd.errors import user_errors
with user_errors():
    if rank == '1':
        raise MemoryError
    {WAITS}
"""
TOLD = (
    "error: out of memory (the machine has no more); take smaller batches, or for training more ranks or "
    "--recompute-granularity full\n"
)
FAILED = "error: rank 1 failed with exit code 1; its own error stands above\n"
KILLED = "error: rank 1 was killed by SIGKILL; the same command goes on from the last checkpoint\n"


@pytest.mark.parametrize(
    ("rank", "code", "told"),
    [
        ("pass", 0, ""),
        ("sys.exit(3)", 3, ""),
        (f"print('error: x', file=sys.stderr) or sys.exit(2) if rank == '1' else {WAITS}", 2, "error: x\n"),
        (f"sys.exit(1) if rank == '1' else {WAITS}", 1, FAILED),
        (NO_MEMORY, 1, TOLD),
        (f"os.kill(os.getpid(), signal.SIGKILL) if rank == '1' else {WAITS}", 1, KILLED),
        (
            f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            f"time.sleep(0.5)\nos.kill(os.getpid(), signal.SIGKILL) if rank == '1' else {WAITS}",
            1,
            KILLED,
        ),
    ],
    ids=["done", "stopped", "bad input", "failed", "told", "killed", "deaf to SIGTERM"],
)  # fmt: skip
def test_the_launcher_ends_as_its_ranks_ended(rank: str, code: int, told: str) -> None:
    process = start_stubs(rank)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (code, told)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("saves", [True, False], ids=["saves", "cannot save"])
def test_a_signal_to_the_launcher_reaches_the_ranks_once(number: signal.Signals, saves: bool) -> None:
    handler = "signal.signal(signal.SIGTERM, lambda *_: os.write(1, b'saved ') and sys.exit(3))\n" if saves else ""
    process = start_stubs(f"{handler}os.write(1, b'ready ')\n{WAITS}")
    assert process.stdout.read(len(STARTS) + 12) == f"{STARTS}ready ready "
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    if saves:
        assert (process.returncode, output, errors) == (3, "saved saved ", "")
    else:
        assert (process.returncode, output) == (128 + number, "")
        assert (
            errors.startswith(f"error: stopped by {number.name} before the ranks could save")
            and "\n" not in errors[:-1]
        )


def test_a_rank_that_does_not_save_in_time_is_killed() -> None:
    ignores = f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\nos.write(1, b'ready ')\n{WAITS}"
    process = start_stubs(ignores, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="0")
    assert process.stdout.read(len(STARTS) + 12) == f"{STARTS}ready ready "
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and "killed by SIGKILL" in errors and errors.count("\n") == 1


def test_ranks_know_their_place() -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    rank = f"print(*(os.environ[name] for name in {names}))"
    variables = {"NUM_NODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "1234"}
    output, _ = start_stubs(rank, **variables).communicate(timeout=30)
    assert sorted(output.splitlines()[2:]) == ["4 6 0 2 2 node0 1234", "5 6 1 2 2 node0 1234"]


def test_a_job_that_is_stopped_goes_on_and_what_all_ranks_refuse_is_one_line(tmp_path: Path, own_lines) -> None:
    run = tmp_path / "run"
    command = ["bash", str(SCRIPT), *FLAGS, "--task", "none", "--save", str(run)]
    command[command.index("--train-iters") + 1] = "50,50"
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment_with(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while "iteration        1/" not in process.stdout.readline():
        pass
    process.terminate()
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 3 and "stopped by SIGTERM" in output and own_lines(errors) == []

    wrong_world = launch(*command, RANKS_PER_NODE="3")
    assert wrong_world.returncode == 2
    assert own_lines(wrong_world.stderr) == [
        "error: --global-batch-size 2: not divisible by --micro-batch-size 1 times 3 data-parallel ranks; use 3"
    ]

    checkpoint = latest_checkpoint(run / "checkpoints").folder
    for part in checkpoint.rglob("*.distcp"):
        part.write_bytes(part.read_bytes()[:100])
    damaged = launch(*command)
    (line,) = own_lines(damaged.stderr)
    assert damaged.returncode == 2 and line.startswith(f"error: {checkpoint}"), line

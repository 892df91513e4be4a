"""Kills runs at random moments, lets them go on, and compares what they leave with an undisturbed run.

    python tests/faults/kill_runs.py --kills 50 --seed 0 [--json FILE]

Signals go to a random rank or to all of them, at a random time, while a checkpoint is written, just after one, at a
phase's change, or while the export is written. Every run must end soon after its signal, and when it has gone on to its
end its log, sheets, evaluations, export and last checkpoint must be those of the undisturbed run, to the bit.
"""

import contextlib
import hashlib
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from fault_world import built_world

from megatron_pdmd import pretrain
from megatron_pdmd.errors import parse_options, user_errors
from megatron_pdmd.files.whole import write_json

LAYOUTS = {
    "one rank": (1, ()),
    "data 2, distributed optimizer, async save": (
        2,
        ("--use-distributed-optimizer", "--overlap-param-gather", "--async-save"),
    ),
    "tensor 2, sequence parallel": (2, ("--tensor-model-parallel-size", "2", "--sequence-parallel")),
    "pipeline 2": (2, ("--pipeline-model-parallel-size", "2")),
}
OPTIONS = {
    "--train-iters": "3,3",
    "--fake-updates": 2,
    "--global-batch-size": 4,
    "--ema-decay": 0.9,
    "--save-interval": 1,
    "--sample-interval": 2,
    "--sample-prompts": 2,
    "--eval-interval": 2,
    "--eval-samples": 2,
}
ITERATIONS, PHASE_CHANGE = 6, 3
MOST_LAUNCHES = 12
_TIMES = ("milliseconds", "seconds", "throughput")  # what differs between two runs that are the same


@dataclass(frozen=True)
class KillOptions:
    """How many runs are disturbed, and how."""

    # Signals sent in all.
    kills: int = 50
    # Draws layouts, moments, signals and ranks.
    seed: int = 0
    # Seconds that a job may take to end after a signal.
    patience: float = 60.0
    # JSON file for every kill and what came of it.
    json: Path | None = None


@dataclass
class Kill:
    """A signal and what came of it."""

    layout: str
    moment: str
    signal: str
    rank: int | None
    codes: list[int] = field(default_factory=list)
    seconds: float = 0.0
    position: str = ""
    problems: list[str] = field(default_factory=list)


Moment = Callable[[float], bool]


def main() -> None:
    with user_errors():
        options = parse_options(KillOptions, __doc__.splitlines()[0])
    kills = kill_runs(options, tell=lambda line: print(line, flush=True))
    if options.json:
        write_json(options.json, [asdict(kill) for kill in kills])
    failed = [kill for kill in kills if kill.problems]
    print(f"{len(kills)} kills, {len(failed)} with problems")
    sys.exit(bool(failed))


def kill_runs(options: KillOptions, tell: Callable[[str], None]) -> list[Kill]:
    """Disturbs runs until there were as many kills; returns them all, those of a run that went wrong with problems."""
    draw, kills = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as parent:
        undisturbed = {}
        for number in itertools.count():
            if len(kills) >= options.kills:
                break
            name = draw.choice(list(LAYOUTS))
            if name not in undisturbed:
                undisturbed[name] = _undisturbed(name, Path(parent) / f"undisturbed_{len(undisturbed)}", options)
            content, seconds = undisturbed[name]
            folder = Path(parent) / f"run_{number}"
            wanted = min(draw.randint(1, 3), options.kills - len(kills))
            found = _disturbed(name, folder, draw, wanted, seconds, options)
            if found:
                found[-1].problems += _differences(_left(folder), content)
            for kill in found:
                tell(_told(kill))
            kills += found
    return kills


def _told(kill: Kill) -> str:
    where = "all ranks" if kill.rank is None else f"rank {kill.rank}"
    sent = f"{kill.layout}: {kill.signal} to {where}, {kill.moment} ({kill.position})"
    return f"{sent} -> {kill.codes}: {'; '.join(kill.problems) or 'fine'}"


def _undisturbed(name: str, folder: Path, options: KillOptions) -> tuple[dict[str, str], float]:
    """What a run leaves, and the seconds it took."""
    started = time.monotonic()
    with _job(name, folder) as ranks:
        codes = _wait(ranks, options.patience * 2)
    assert not any(codes), f"{name}: the undisturbed run ended with {codes}\n{_output(folder)}"
    return _left(folder), time.monotonic() - started


def _disturbed(
    name: str, folder: Path, draw: random.Random, wanted: int, seconds: float, options: KillOptions
) -> list[Kill]:
    """Launches a run again and again until it is done, and disturbs its first launches."""
    kills: list[Kill] = []
    for _ in range(MOST_LAUNCHES):
        before = len(_output(folder, "0"))
        with _job(name, folder) as ranks:
            kill = _strike(name, folder, ranks, draw, seconds) if len(kills) < wanted else None
            started = time.monotonic()
            codes = _wait(ranks, options.patience if kill else options.patience * 2)
        if kill:
            kill.codes, kill.seconds = codes, time.monotonic() - started
            kills.append(kill)
            trains = " of 2 (" in _output(folder, "0")[before:]  # the line with which a phase begins
            kill.problems += _bad_end(kill, folder, trains and _saved(folder) < ITERATIONS)
        elif set(codes) == {0}:
            return kills
        else:
            problem = f"a launch that nobody disturbed ended with {codes}: {_output(folder)[-1000:]}"
            return _with_problem(kills, name, problem)
        if set(codes) == {0}:
            return kills
    return _with_problem(kills, name, f"not done after {MOST_LAUNCHES} launches")


def _with_problem(kills: list[Kill], name: str, problem: str) -> list[Kill]:
    kills = kills or [Kill(name, "never", "none", None)]
    kills[-1].problems.append(problem)
    return kills


def _bad_end(kill: Kill, folder: Path, trains: bool) -> list[str]:
    """What is wrong with how a job ended after its signal; `trains`: it had something to save."""
    problems = ["hung"] if any(code == -signal.SIGALRM for code in kill.codes) else []
    if kill.signal != "SIGKILL" and trains:
        if not set(kill.codes) <= {0, 3}:
            problems.append(f"a polite signal must end in 0 or 3: {_output(folder)[-1000:]}")
        if len(set(kill.codes)) > 1:
            problems.append("ranks disagree")
    return problems


def _strike(name: str, folder: Path, ranks: dict[int, int], draw: random.Random, seconds: float) -> Kill | None:
    """Waits for a moment and sends a signal; None where the job ended before it came."""
    moments = _moments(folder, draw, seconds)
    moment = draw.choice(list(moments))
    reached, delay = moments[moment], draw.choice((0.0, draw.uniform(0, 0.1)))
    number = draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
    rank = draw.choice([None, *ranks])
    started = time.monotonic()
    while not reached(time.monotonic() - started):
        if all(_has_ended(pid) for pid in ranks.values()):
            return None
        time.sleep(0.001)
    time.sleep(delay)
    struck = [pid for own, pid in ranks.items() if rank in (None, own)]
    if all(_has_ended(pid) for pid in struck):
        return None
    kill = Kill(name, moment, signal.Signals(number).name, rank, position=f"iteration {_saved(folder)} saved")
    for pid in struck:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return kill


def _moments(folder: Path, draw: random.Random, seconds: float) -> dict[str, Moment]:
    """When a signal may be sent, given the seconds since the launch."""
    at, iteration, checkpoints = draw.uniform(0, seconds), draw.randint(1, ITERATIONS), folder / "checkpoints"
    return {
        "at a random time": lambda passed: passed >= at,
        "while saving": lambda passed: bool(list(checkpoints.glob("*.partial"))) and passed > at / 2,
        "just after saving": lambda passed: _saved(folder) >= iteration,
        "while a sheet is drawn": lambda passed: (folder / ".samples.partial").exists(),
        "at the phase's change": lambda passed: _saved(folder) == PHASE_CHANGE,
        "at the last iteration": lambda passed: _saved(folder) == ITERATIONS,
        "while exporting": lambda passed: (folder / ".hf.partial").exists(),
    }


def _saved(folder: Path) -> int:
    """The iteration that the tracker names."""
    with contextlib.suppress(OSError, ValueError):
        return int((folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    return 0


@contextlib.contextmanager
def _job(name: str, folder: Path) -> Iterator[dict[int, int]]:
    """The process of each rank of a launch; none is left when the block ends."""
    count, more = LAYOUTS[name]
    flags = [*built_world().flags(save=str(folder), more=OPTIONS), *more]
    with tempfile.TemporaryDirectory() as meeting:
        ranks = {rank: _start(rank, count, flags, Path(meeting) / "store", _log(folder, rank)) for rank in range(count)}
        try:
            yield ranks
        finally:
            for pid in ranks.values():
                with contextlib.suppress(ProcessLookupError, ChildProcessError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)


def _start(rank: int, count: int, flags: list[str], store: Path, log: Path) -> int:
    """Forks one rank, which writes to its log, and returns its process."""
    # One that came before the child is in its own block would unwind it through its parent's, and clear the folders.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return child
    code = 1
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        os.chdir(built_world().folder)
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background was started without
        if count > 1:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank))
            meeting = dist.FileStore(str(store), count)
            dist.init_process_group("gloo", store=meeting, rank=rank, world_size=count, timeout=timedelta(minutes=2))
        code = pretrain.main(flags)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(ranks: dict[int, int], patience: float) -> list[int]:
    """The exit codes by rank. As under torchrun, a rank that fails takes the others with it, politely at first."""
    codes: dict[int, int] = {}
    deadline, told = time.monotonic() + patience, False
    while len(codes) < len(ranks):
        for rank, pid in ranks.items():
            if rank not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(ended[1])
        left = [pid for rank, pid in ranks.items() if rank not in codes]
        if any(code not in (0, 3) for code in codes.values()) and not told:
            told = True
            for pid in left:
                os.kill(pid, signal.SIGTERM)
        if time.monotonic() > deadline:
            for rank, pid in ranks.items():
                if rank not in codes:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    codes[rank] = -signal.SIGALRM  # told from a SIGKILL of ours
        time.sleep(0.005)
    return [codes[rank] for rank in ranks]


def _has_ended(pid: int) -> bool:
    """Whether a child is done, without reaping it."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _left(folder: Path) -> dict[str, str]:
    """What a run left that must not depend on when it was disturbed: file -> digest."""
    found = {}
    last = folder / "checkpoints" / f"iter_{_saved(folder):07d}"
    files = [*folder.glob("samples/*"), *folder.rglob("hf/**/*"), *last.glob("*.distcp")]
    for path in files:
        if path.is_file():
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        found[name] = json.dumps([{key: row[key] for key in row if not key.endswith(_TIMES)} for row in rows])
    summary = json.loads((folder / "summary.json").read_text()) if (folder / "summary.json").exists() else {}
    found["summary.json"] = json.dumps({name: value for name, value in summary.items() if name != "train_seconds"})
    found["leftovers"] = str(sorted(str(path.relative_to(folder)) for path in folder.rglob("*partial*")))
    return found


def _differences(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """What differs from the undisturbed run."""
    return [f"{name} differs" for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]


def _log(folder: Path, rank: int) -> Path:
    return folder.with_name(f"{folder.name}.rank{rank}.log")


def _output(folder: Path, rank: str = "*") -> str:
    """What the ranks of all launches printed, or one of them."""
    logs = sorted(folder.parent.glob(f"{folder.name}.rank{rank}.log"))
    return "\n".join(f"{path.name}: {path.read_text(errors='replace')}" for path in logs)


if __name__ == "__main__":
    main()

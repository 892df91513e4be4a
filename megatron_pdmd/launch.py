"""Starts the ranks of this machine, waits for them, and ends as they ended.

    python -m megatron_pdmd.launch [flags of the trainer]

Bad input ends here, in one process, before any rank is started. Environment variables: RANKS_PER_NODE (all GPUs over
which the batch divides, or 2 ranks on CPU), and on several machines NUM_NODES, NODE_RANK (0 is where MASTER_ADDR is),
MASTER_ADDR and MASTER_PORT. SIGTERM, SIGINT and SIGHUP ask the ranks to save and stop, for which they have
TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (1800).

Exit codes: 0 done, 2 bad input, 3 stopped on request after saving, 130 and 143 interrupted before that, 1 all else.
"""

import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_pdmd.environment import MOST_PORTS, MOST_RANKS, whole_number
from megatron_pdmd.errors import BAD_INPUT, FAILED, INTERRUPTED, has_told, tell_once, user_errors

STOPPED_ON_REQUEST = 3
QUIET = (BAD_INPUT, INTERRUPTED)  # the rank has said it all
SECONDS_BETWEEN_LOOKS = 0.05
# A rank whose peer has failed cannot save: it needs time to say so, and no more.
SECONDS_AFTER_A_FAILURE = 30.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Place:
    """Where the ranks of this machine stand among all.

    Attributes:
        nodes: machines.
        node: this one's number.
        ranks: on each machine; 0 where preflight is to say how many.
        address, port: where the ranks meet.
        patience: seconds that a rank has to save after a signal.
    """

    nodes: int
    node: int
    ranks: int
    address: str
    port: int
    patience: int

    @classmethod
    def from_environment(cls) -> "Place":
        """Raises:
        ValueError: names the variable that is wrong.
        """
        nodes = whole_number("NUM_NODES", 1, 1, MOST_RANKS)
        given = "RANKS_PER_NODE" in os.environ and os.environ["RANKS_PER_NODE"] != ""
        address = os.environ.get("MASTER_ADDR", "")
        if nodes > 1 and not address:
            raise ValueError(f"MASTER_ADDR: is not set, and NUM_NODES is {nodes}; name the machine of NODE_RANK 0")
        return cls(
            nodes,
            whole_number("NODE_RANK", 0, 0, nodes - 1),
            whole_number("RANKS_PER_NODE", 1, 1, MOST_RANKS // nodes) if given else 0,
            address if nodes > 1 else "127.0.0.1",
            whole_number("MASTER_PORT", 29500, 1, MOST_PORTS - 1),
            whole_number("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 1800, 0, 10**6),
        )

    def variables(self, local_rank: int, folder: Path) -> dict[str, str]:
        """The environment of a rank."""
        rank = self.node * self.ranks + local_rank
        own = {
            "RANK": rank,
            "WORLD_SIZE": self.nodes * self.ranks,
            "LOCAL_RANK": local_rank,
            "LOCAL_WORLD_SIZE": self.ranks,
            "GROUP_RANK": self.node,
            "MASTER_ADDR": self.address,
            "MASTER_PORT": self.port,
            "TORCHELASTIC_ERROR_FILE": folder / str(local_rank) / "error.json",
        }
        return {"OMP_NUM_THREADS": "1", **os.environ, **{name: str(value) for name, value in own.items()}}


class _Signals:
    """Notes signals instead of ending the process."""

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: self.received.append(signal.Signals(number)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code.

    Args:
        arguments: the trainer's flags; those of the process where not given.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    names = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    if names & {"--help", "-h", "--print-config"}:
        return subprocess.call(_program("preflight", arguments))
    if "--dry-run" in names:
        return subprocess.call(_program("pretrain", arguments))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pdmd-launch-")))
        os.environ["TORCHELASTIC_ERROR_FILE"] = str(folder / "launch" / "error.json")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the check, too
        with user_errors():
            place = Place.from_environment()
            print("checking the flags and the files they name", flush=True)
            checked = _preflight(place, arguments)
            if isinstance(checked, int):
                return checked
            place = checked
            if place.nodes == 1:
                port = stack.enter_context(_reserved_port())
                place = replace(place, port=port.getsockname()[1])
            print(f"starting {place.ranks} rank{'s' * (place.ranks > 1)}", flush=True)
        signals = _Signals()
        return _end(place, signals, _run(place, arguments, folder, signals), told=has_told(folder))


def _program(module: str, arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-u", "-m", f"megatron_pdmd.{module}", *arguments]


def _preflight(place: Place, arguments: Sequence[str]) -> Place | int:
    """Checks the flags; the place with its number of ranks, or the exit code where they are wrong."""
    asked = []
    if not place.ranks:
        asked = ["--available-ranks", str(_gpus() or 2), str(place.nodes)]
    done = subprocess.run(_program("preflight", [*asked, *arguments]), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return done.returncode if done.returncode > 0 else 128 - done.returncode
    return place if place.ranks else replace(place, ranks=int(done.stdout))


def _gpus() -> int:
    """GPUs of this machine, without torch, which takes seconds to import."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return len(listed.stdout.splitlines()) if listed.returncode == 0 else 0


def _reserved_port() -> socket.socket:
    """A free port, which nobody else is given while the socket is open.

    A socket that is bound and does not listen keeps no other from it that says SO_REUSEADDR too, as rank 0's does.
    """
    port = socket.socket()
    port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    port.bind(("127.0.0.1", 0))
    return port


class _Ranks:
    """The ranks of this machine as processes.

    Attributes:
        running: those that have not ended, by local rank.
        codes: exit codes of those that have; negative for a signal.
        failure: local rank and exit code of the first that failed.
    """

    def __init__(self, place: Place, arguments: Sequence[str], folder: Path):
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self.codes: dict[int, int] = {}
        self.failure: tuple[int, int] | None = None
        self._kill_at = math.inf
        for rank in range(place.ranks):
            self.running[rank] = subprocess.Popen(
                _program("pretrain", arguments),
                env=place.variables(rank, folder),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches a rank through this process alone, once
            )

    def look(self) -> None:
        """Notes who has ended; where one failed the others are to end too."""
        for rank, code in [(rank, process.poll()) for rank, process in self.running.items()]:
            if code is None:
                continue
            del self.running[rank]
            self.codes[rank] = code
            if code not in (0, STOPPED_ON_REQUEST) and self.failure is None:
                self.failure = (rank, code)
                self.stop(SECONDS_AFTER_A_FAILURE)
        if time.monotonic() > self._kill_at:
            self.kill()

    def stop(self, patience: float) -> None:
        """Asks those that run to save and stop, and kills them after so many seconds."""
        self._kill_at = min(self._kill_at, time.monotonic() + patience)
        for process in self.running.values():
            process.terminate()

    def kill(self) -> None:
        """Ends those that run at once."""
        for process in self.running.values():
            process.kill()


def _run(place: Place, arguments: Sequence[str], folder: Path, signals: _Signals) -> _Ranks:
    """Starts the ranks and waits for them, passing signals on."""
    ranks, passed_on = _Ranks(place, arguments, folder), 0
    try:
        while ranks.running:
            ranks.look()
            if len(signals.received) > passed_on:
                passed_on = len(signals.received)
                ranks.stop(place.patience)
            time.sleep(SECONDS_BETWEEN_LOOKS)
    finally:
        ranks.kill()
    return ranks


def _end(place: Place, signals: _Signals, ranks: _Ranks, told: bool) -> int:
    """The exit code of the whole; what no rank could tell is told here.

    Args:
        place: of the ranks.
        signals: that this process received.
        ranks: which have ended.
        told: whether one has told an error in a line.
    """
    if ranks.failure is None:
        return STOPPED_ON_REQUEST if STOPPED_ON_REQUEST in ranks.codes.values() else 0
    local_rank, code = ranks.failure
    rank = place.node * place.ranks + local_rank
    if signals.received and code == -signal.SIGTERM:
        name = signals.received[0].name
        tell_once(f"error: stopped by {name} before the ranks could save; the same command goes on from what is saved")
        return 128 + signals.received[0]
    if code in QUIET:
        return code
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}; the same command goes on from the last checkpoint"
    else:
        how = f"failed with exit code {code}; its own error stands above"
    if code < 0 or not told:
        tell_once(f"error: rank {rank} {how}")
    return FAILED


if __name__ == "__main__":
    sys.exit(main())

"""Times iterations of the last phase whose updates share starts (`--phase-start-reuse`) against those that do not.

    python tools/benchmark_reuse.py
    python tools/benchmark_reuse.py --reuse 1,2,3,6 --fake-rollout full --repeats 20 --json runs/reuse.json

Each repeat runs the same iteration once with each reuse, one after the other in this process. Times are the CPU's, of
all threads together, so that other programs on the machine count little, and medians; `ratio` is the median over the
repeats of an iteration's time over that of the first reuse in the same repeat.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
from benchmark_step import ITERATION, SIZES, ObservedPhase, Setup, build_ours
from rich.console import Console
from rich.table import Table

from megatron_pdmd.config import Ints
from megatron_pdmd.errors import parse_options, user_errors
from megatron_pdmd.files.whole import check_file_destination, write_json
from megatron_pdmd.limits import LIMITS, check_range
from megatron_pdmd.parallel import destroy_topology


@dataclass(frozen=True, kw_only=True)
class ReuseOptions:
    """Times the last phase's iterations with each reuse."""

    size: Literal["tiny", "d512"] = "tiny"
    """The bundled teacher on a rank's share of the quickstart's batch, or 8 layers of width 512 on 480 tokens."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Numbers of the networks."""
    reuse: Ints = (1, 6)
    """Values of --phase-start-reuse; the first is what the others are compared with."""
    fake_updates: int = 5
    """For each generator update."""
    fake_rollout: Literal["same", "full"] = "same"
    """Samples the fake score learns from."""
    threads: int = 0
    """Threads; 0 takes torch's own choice."""
    repeats: int = 10
    """Iterations with each reuse that are timed, after one that is not."""
    json: Path | None = None
    """JSON file for the table."""

    def prepare(self) -> None:
        """Refuses counts that cannot be, and a file that cannot be written.

        Raises:
            ValueError: names the flag.
        """
        check_range("--repeats", self.repeats, 1, 10**6)
        check_range("--threads", self.threads, 0, 4096)
        check_range("--fake-updates", self.fake_updates, 1, LIMITS["fake_updates"].most)
        if not self.reuse:
            raise ValueError("--reuse: name at least one number")
        for reuse in self.reuse:
            check_range("--reuse", reuse, 1, LIMITS["phase_start_reuse"].most)
        if self.json is not None:
            check_file_destination(self.json, "--json")


@dataclass(frozen=True)
class ReuseTime:
    """A row of the table.

    Attributes:
        reuse: updates that share a start.
        passes: model evaluations of the iteration, a micro-batch each.
        frozen: those of them that are of earlier phases.
        cpu_ms: of the iteration, the median.
        ratio: to the first row.
    """

    reuse: int
    passes: int
    frozen: int
    cpu_ms: float
    ratio: float


def cpu_milliseconds(side: ObservedPhase) -> float:
    """What an iteration takes of the CPU."""
    started = time.process_time()
    side.run_iteration(ITERATION)
    return (time.process_time() - started) * 1000


def benchmark(options: ReuseOptions, folder: Path) -> list[ReuseTime]:
    """A row for each reuse."""
    size = replace(SIZES[options.size], fake_updates=options.fake_updates)
    setup = Setup.of(size, options.dtype, "lora", folder)
    sides: list[ObservedPhase] = []
    for reuse in options.reuse:
        method = replace(setup.config.method, phase_start_reuse=reuse, fake_rollout=options.fake_rollout)
        sides.append(build_ours(replace(setup, config=replace(setup.config, method=method)))[0])
    asked = [side.record(ITERATION)[1] for side in sides]
    repeats = [[cpu_milliseconds(side) for side in sides] for _ in range(options.repeats)]
    rows = []
    for reuse, side, passes, times in zip(options.reuse, sides, asked, zip(*repeats, strict=True), strict=True):
        frozen = sum(one.role == "generator" and one.key != side.index for one in passes)
        ratio = statistics.median(ms / one[0] for ms, one in zip(times, repeats, strict=True))
        rows.append(ReuseTime(reuse, len(passes), frozen, statistics.median(times), ratio))
        side.release()
    return rows


def table_of(rows: list[ReuseTime], title: str) -> Table:
    """The rows as a table for the terminal."""
    table = Table(title=title)
    for field in fields(ReuseTime):
        table.add_column(field.name, justify="right")
    for row in rows:
        table.add_row(str(row.reuse), str(row.passes), str(row.frozen), f"{row.cpu_ms:.1f}", f"{row.ratio:.3f}")
    return table


def main(arguments: list[str] | None = None) -> int:
    """Returns 0; exits with 2 for bad input."""
    with user_errors():
        options = parse_options(ReuseOptions, __doc__, arguments)
        options.prepare()
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = benchmark(options, Path(folder))
    destroy_topology()
    threads = torch.get_num_threads()
    if options.json is not None:
        write_json(options.json, {"threads": threads, "iterations": [asdict(row) for row in rows]})
    Console().print(table_of(rows, f"One iteration, {threads} thread{'s' * (threads > 1)}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

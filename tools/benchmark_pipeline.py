"""How busy pipeline stages are when an iteration's passes are interleaved, and when they run one after another.

    python tools/benchmark_pipeline.py --simulate
    python tools/benchmark_pipeline.py --simulate --recompute --json runs/pipeline.json --picture runs/pipeline.png
    python tools/benchmark_pipeline.py --run --repeats 7

--simulate runs both schedules on paper. The iteration: five fake updates, each on a rollout of two steps; one update
of the generator: one step without gradient, one with, the teacher's scores with and without prompt, the fake score.
A pass takes one second over all stages, backward two, with --recompute three; messages and optimizer take none. `busy`
is useful work over all stages' time, where the generator's second forward pass is not useful; `bound` is what no
schedule can beat: the work of a stage, or the longest way through the graph.

--run trains a network of eight layers of width 512 on gloo ranks of this machine, one process and one thread a stage;
the machine needs as many idle cores. Iterations of both schedules alternate, and are held against paper with the costs
that were measured in the first ones.
"""

import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pipeline_ranks import MODEL, RunRow, run_on_ranks
from rich.console import Console
from rich.table import Table

from megatron_pdmd.errors import parse_options, user_errors
from megatron_pdmd.files.whole import check_file_destination, write_json, written_whole
from megatron_pdmd.limits import check_range
from megatron_pdmd.parallel.pipeline.costs import Costs
from megatron_pdmd.parallel.pipeline.gantt import draw
from megatron_pdmd.parallel.pipeline.passes import ModelPass, Outline, build_graph
from megatron_pdmd.parallel.pipeline.schedule import Kind, live_limit, plan
from megatron_pdmd.parallel.pipeline.simulate import Timeline, bound, simulate

FAKE_UPDATES = 5
PICTURED = (4, 8)  # stages and micro-batches of the picture


@dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """Compares the schedules of a pipeline."""

    simulate: bool = False
    """Run them on paper."""
    run: bool = False
    """Run them on real ranks."""
    stages: tuple[int, ...] = ()
    """Pipeline stages; by default 2, 4 and 8 on paper, and 2 on ranks."""
    microbatches: tuple[int, ...] = ()
    """Micro-batches of every update; by default 1, 2, 4, 8 and 16 on paper, and 2 and 4 on ranks."""
    repeats: int = 5
    """Iterations of each schedule that are timed on ranks."""
    recompute: bool = False
    """Backward passes run the forward pass again."""
    json: Path | None = None
    """JSON file for the rows."""
    picture: Path | None = None
    """PNG file for a chart of both schedules on 4 stages with 8 micro-batches."""

    def prepare(self) -> None:
        """Refuses numbers that cannot be, and files that cannot be written.

        Raises:
            ValueError: names the flag.
        """
        if self.simulate == self.run:
            raise ValueError("--simulate, --run: give one of them")
        if self.run and (self.picture or self.recompute):
            raise ValueError("--picture, --recompute: go with --simulate")
        for stages in self.stages:
            check_range("--stages", stages, 2 if self.run else 1, MODEL.num_layers if self.run else 64)
        for microbatches in self.microbatches:
            check_range("--microbatches", microbatches, 1, 256)
        check_range("--repeats", self.repeats, 1, 10**6)
        if self.json is not None:
            check_file_destination(self.json, "--json")
        if self.picture is not None:
            check_file_destination(self.picture, "--picture", (".png",))


@dataclass(frozen=True)
class ScheduleRow:
    """Both schedules for a number of stages and micro-batches.

    Attributes:
        stages, microbatches: how many.
        busy_interleaved, busy_sequential: useful work over all stages' time.
        makespan_interleaved, makespan_sequential, bound: seconds.
        over_bound: how much longer the interleaved one is than the bound.
        limit: micro-batches whose activations may be held.
        peak_live, peak_live_sequential: the most that any stage holds; 1F1B holds as many as the sequential one.
        peak_latents: passes whose latents wait at once, interleaved.
        generator_again: whether the interleaved one runs the generator's forward pass twice.
        planned_in: seconds of a processor to find it.
    """

    stages: int
    microbatches: int
    busy_interleaved: float
    busy_sequential: float
    makespan_interleaved: float
    makespan_sequential: float
    bound: float
    over_bound: float
    limit: int
    peak_live: int
    peak_live_sequential: int
    peak_latents: int
    generator_again: bool
    planned_in: float


def outlines() -> list[Outline]:
    """The iteration."""
    step = (ModelPass("generator"),)
    fake = Outline("fake update", (step, step, (ModelPass("fake_score", gradient=True),)), "fake_score")
    scores = (ModelPass("teacher"), ModelPass("teacher"), ModelPass("fake_score"))
    generator = Outline("generator update", (step, (ModelPass("generator", gradient=True),), scores), "generator")
    return [fake] * FAKE_UPDATES + [generator]


def run_on_paper(stages: int, microbatches: int, costs: Costs, kind: Kind) -> Timeline:
    """A schedule's times."""
    graph, schedule = plan(outlines(), stages, microbatches, costs, kind)
    return simulate(schedule, graph, costs)


def compare(stages: int, microbatches: int, recompute: bool) -> ScheduleRow:
    """Both schedules."""
    costs = Costs.uniform(stages, recompute=recompute)
    started = time.process_time()
    plan(outlines(), stages, microbatches, costs)
    planned_in = time.process_time() - started
    interleaved = run_on_paper(stages, microbatches, costs, "interleaved")
    sequential = run_on_paper(stages, microbatches, costs, "sequential")
    graph = build_graph(outlines(), stages, microbatches)
    least = bound(graph, costs)
    return ScheduleRow(
        stages,
        microbatches,
        interleaved.busy,
        sequential.busy,
        interleaved.makespan,
        sequential.makespan,
        least,
        interleaved.makespan / least - 1,
        live_limit(graph),
        max(interleaved.peak_live),
        max(sequential.peak_live),
        interleaved.peak_latents,
        any(interleaved.graph.reruns),
        planned_in,
    )


def table_of(rows: Sequence[ScheduleRow | RunRow], title: str) -> Table:
    """The rows as a table for the terminal."""
    table = Table(title=title)
    for field in fields(rows[0]):
        table.add_column(field.name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in asdict(row).values()))
    return table


def main(arguments: list[str] | None = None) -> int:
    """Returns 0; exits with 2 for bad input."""
    with user_errors():
        options = parse_options(PipelineOptions, __doc__, arguments)
        options.prepare()
    if options.run:
        sizes = itertools.product(options.stages or (2,), options.microbatches or (2, 4))
        rows = [run_on_ranks(stages, microbatches, options.repeats) for stages, microbatches in sizes]
        title = "Iterations on ranks"
    else:
        sizes = itertools.product(options.stages or (2, 4, 8), options.microbatches or (1, 2, 4, 8, 16))
        rows = [compare(stages, microbatches, options.recompute) for stages, microbatches in sizes]
        title = f"One iteration on paper, {'with' if options.recompute else 'no'} recompute"
    if options.json is not None:
        write_json(options.json, [asdict(row) for row in rows])
    if options.picture is not None:
        costs = Costs.uniform(PICTURED[0], recompute=options.recompute)
        kinds: tuple[Kind, ...] = ("sequential", "interleaved")
        with written_whole(options.picture) as partial:
            draw({kind: run_on_paper(*PICTURED, costs, kind) for kind in kinds}, partial)
    Console().print(table_of(rows, title))
    return 0


if __name__ == "__main__":
    sys.exit(main())

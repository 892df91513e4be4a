"""Figure 1 of the paper in two dimensions: which methods keep the weights of the modes of a ring.

The data are 16 tight modes in 8 pairs of unequal weights; the teacher is their exact flow. Four methods distil it into
four steps with as many updates each: (a) few-step DMD through the whole graph, (b) DMD with stochastic gradient
truncation, (c) Phased DMD of one step a phase, (d) Phased DMD with truncation in two phases of two steps. Writes
toy_2d.png, a picture of every method's path from noise to samples, and toy_2d.json.

    python examples/toy_2d/run.py --save runs/toy_2d

Takes about six minutes on two free cores.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from statistics import fmean

import torch
from figures import Panel, draw_comparison, draw_path
from jobs import MEASURE_SEED, METHODS, NUM_STEPS, SHOWN, Job, Outcome, ToyOptions, measuring_samples, run_jobs
from report import Row, as_table, notes
from rich.console import Console
from ring import Ring, measure
from safetensors.torch import save_file
from student import PlaneFlow, pretrain
from torch import Tensor

from megatron_pdmd.diffusion import FlowMatchingSchedule, PhasePlan, sample_along
from megatron_pdmd.errors import parse_options, user_errors

MANY_STEPS = 40


def reference_rows(ring: Ring, start: PlaneFlow, options: ToyOptions) -> Iterator[Row]:
    """What true samples, the exact teacher and the undistilled network reach."""
    true, noise = measuring_samples(ring, options)
    again = ring.sample(options.samples, torch.Generator().manual_seed(MEASURE_SEED + 1))
    yield Row("reference", "true samples", None, [measure(again, true, ring)])
    for shift in options.shifts:
        schedule = FlowMatchingSchedule(shift=shift)

        def teacher(x_t: Tensor, t: Tensor, schedule: FlowMatchingSchedule = schedule) -> Tensor:
            return ring.flow(x_t, t, schedule)

        for flow, name, steps in (
            (teacher, "teacher", MANY_STEPS),
            (teacher, "teacher", NUM_STEPS),
            (start, "students' start", NUM_STEPS),
        ):
            times = PhasePlan.build(steps, (steps,), schedule).times
            metrics = measure(sample_along(flow, noise, times, schedule), true, ring)
            yield Row(f"reference, shift {shift:g}", f"{name}, {steps} steps", None, [metrics])


def draw(outcomes: Mapping[Job, Outcome], ring: Ring, options: ToyOptions) -> None:
    """toy_2d.png, and a picture of the path of every method in every setting."""
    panels: dict[str, list[Panel]] = {}
    true, _ = measuring_samples(ring, options)
    for job, outcome in outcomes.items():
        schedule, method = FlowMatchingSchedule(shift=job.shift), METHODS[job.method]
        levels = {t: torch.from_numpy(x) for t, x in outcome.levels.items()}
        energy, kl = (fmean(getattr(one, name) for one in outcome.metrics) for name in ("energy_distance", "mode_kl"))
        row = panels.setdefault(f"timestep {job.setting}", [Panel("true samples", true[:SHOWN], "weight of each mode")])
        row.append(Panel(method.title, levels[0.0], f"energy distance {energy:.3f}, mode KL {kl:.3f}"))
        name = f"{job.method}_shift{job.shift:g}_{job.weighting}.png"
        draw_path(levels, f"{method.title}, {job.setting}", ring, schedule, options.save / name)
    draw_comparison(panels, ring, FlowMatchingSchedule(), options.save / "toy_2d.png")


def main(options: ToyOptions) -> None:
    """Trains, measures, prints the table and its notes, and writes pictures and numbers."""
    options.check()
    torch.set_num_threads(1)
    console, ring = Console(), Ring.of_pairs()
    options.save.mkdir(parents=True, exist_ok=True)
    with console.status("teaching the network that everything starts from"):
        start = pretrain(ring, width=options.width, iterations=options.pretrain_iters, batch_size=512, lr=3e-3, seed=0)
    start_file = options.save / "start.safetensors"
    save_file(start.state_dict(), start_file)
    jobs = [
        Job(method, shift, weighting, options, start_file)
        for shift in options.shifts
        for weighting in options.weightings
        for method in METHODS
    ]
    outcomes = run_jobs(jobs, options.workers, console)
    rows = list(reference_rows(ring, start, options))
    for job, outcome in outcomes.items():
        method = METHODS[job.method]
        rows.append(Row(job.setting, method.title, len(method.phase_steps) > 1, outcome.metrics, outcome.seconds))
    console.print(as_table(rows))
    for note in notes(rows):
        console.print(f"- {note}")
    draw(outcomes, ring, options)
    result = {
        "rows": [{"setting": row.setting, "method": row.name, **row.summary(), "seconds": row.seconds} for row in rows],
        "notes": notes(rows),
        "options": asdict(options),
    }
    json_file = options.json or options.save / "toy_2d.json"
    json_file.write_text(json.dumps(result, indent=2, default=str) + "\n")
    console.print(f"Pictures and numbers: {options.save}")


if __name__ == "__main__":
    with user_errors():
        main(parse_options(ToyOptions, __doc__))

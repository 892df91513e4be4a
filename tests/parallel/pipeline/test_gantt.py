"""The picture of a schedule shows every stage's work where it is."""

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from drawn_iterations import iteration

from megatron_pdmd.parallel.pipeline.costs import Costs
from megatron_pdmd.parallel.pipeline.gantt import draw
from megatron_pdmd.parallel.pipeline.schedule import Kind, plan
from megatron_pdmd.parallel.pipeline.simulate import Timeline, simulate

COLOURS = {"teacher": (0, 158, 115), "rollout": (246, 229, 141), "fake score, backward": (11, 83, 148)}
AGAIN = (217, 160, 192)


def timeline(kind: Kind) -> Timeline:
    costs = Costs.uniform(2)
    graph, schedule = plan(iteration(2), 2, 4, costs, kind)
    return simulate(schedule, graph, costs)


def share(pixels: np.ndarray, colour: tuple[int, int, int]) -> float:
    return float((pixels == colour).all(-1).mean())


def test_each_kind_of_work_has_its_colour_in_proportion_to_its_time(tmp_path: Path) -> None:
    draw({"sequential": timeline("sequential")}, tmp_path / "one.png")
    pixels = iio.imread(tmp_path / "one.png")[..., :3]
    assert min(share(pixels, colour) for colour in (*COLOURS.values(), AGAIN)) > 0
    # Four micro-batches: 5 rollout passes of a second in all, two of the teacher, two backward passes of two seconds.
    assert share(pixels, COLOURS["rollout"]) > 2 * share(pixels, COLOURS["teacher"])
    assert share(pixels, COLOURS["fake score, backward"]) > 1.5 * share(pixels, COLOURS["teacher"])


@pytest.mark.parametrize("count", [1, 2])
def test_timelines_stand_above_each_other_in_a_small_file(count: int, tmp_path: Path) -> None:
    kinds: tuple[Kind, ...] = ("sequential", "interleaved")
    draw({kind: timeline(kind) for kind in kinds[:count]}, tmp_path / "both.png")
    height, width, _ = iio.imread(tmp_path / "both.png").shape
    assert width == 1400 and height > 180 * count
    assert (tmp_path / "both.png").stat().st_size < 100_000

"""Whole iterations of both phases on pipelines, against one rank and the plain baseline in fp64."""

import itertools
import json
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
from iterations import GENERATORS, Scene, logged, numbers, train

from megatron_pdmd.distillation.roles import Backward
from megatron_pdmd.distillation.step import Iteration
from megatron_pdmd.parallel.pipeline.costs import Costs
from megatron_pdmd.parallel.pipeline.execute import Executor
from megatron_pdmd.parallel.pipeline.simulate import simulate

LAYERS = 4
LATENTS = (3, 3, 2, 6)  # 9 tokens, which 2 ranks do not divide


@dataclass(frozen=True)
class Layout:
    """How the ranks are used."""

    pipeline: int = 1
    tensor: int = 1
    context: int = 1
    data: int = 1
    micro_batches: int = 1  # of each data rank
    samples: int = 8  # of the global batch
    schedule: str = "interleaved"
    more: tuple[str, ...] = ()

    @property
    def world(self) -> int:
        return self.pipeline * self.tensor * self.context * self.data

    @property
    def flags(self) -> list[str]:
        return [
            f"--pipeline-model-parallel-size={self.pipeline}",
            f"--pipeline-schedule={self.schedule}",
            f"--tensor-model-parallel-size={self.tensor}",
            f"--context-parallel-size={self.context}",
            f"--micro-batch-size={self.samples // (self.data * self.micro_batches)}",
            *(["--sequence-parallel"] if self.tensor > 1 else []),
            *self.more,
        ]

    def __str__(self) -> str:
        sizes = {"pp": self.pipeline, "tp": self.tensor, "cp": self.context, "dp": self.data, "m": self.micro_batches}
        named = [f"{axis}{size}" for axis, size in sizes.items() if size > 1 or axis in ("pp", "m")]
        return "-".join([*named, self.schedule, *(flag.strip("-") for flag in self.more)])


FULL_SHARD = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
LAYOUTS = [
    Layout(pipeline=2, micro_batches=8),
    Layout(pipeline=2, micro_batches=3, samples=3, schedule="sequential"),
    Layout(pipeline=4, micro_batches=1, schedule="sequential"),
    Layout(pipeline=4, micro_batches=2),
    Layout(pipeline=2, context=2, micro_batches=2, more=("--pipeline-layer-split=1,3", "--recompute-granularity=full")),
    Layout(pipeline=2, data=2, micro_batches=2, more=FULL_SHARD),
    Layout(pipeline=2, tensor=2, data=2, micro_batches=2, more=("--recompute-granularity=selective",)),
]
# Either kind of generator in turn.
CASES = [
    pytest.param(layout, generator, id=f"{layout}-{generator}")
    for layout, generator in zip(LAYOUTS, itertools.cycle(GENERATORS), strict=False)
]


@pytest.fixture(scope="module")
def scene(tmp_path_factory, load_tool, fp64_mode) -> Scene:
    folder, tool = tmp_path_factory.mktemp("scene"), load_tool("plain_iteration")
    return Scene(folder, tool, fp64_mode, layers=LAYERS, latents=LATENTS, samples=8)


@pytest.mark.parametrize(("layout", "generator"), CASES)
def test_iterations_of_both_phases_equal_the_plain_run(
    layout, generator, scene, run_ranks, tmp_path, assert_as_accurate_as_torch
):
    batch = f"--global-batch-size={layout.samples}"
    arguments = [*scene.flags, batch, *layout.flags, *GENERATORS[generator], f"--save={tmp_path / 'run'}"]
    ranks = run_ranks(train, layout.world, arguments)
    plain, exact = (scene.run_plainly(generator, torch.float32, is_exact, batch) for is_exact in (False, True))
    rows = numbers(logged(tmp_path / "run"))
    assert_as_accurate_as_torch(
        (rows / exact.numbers).float(), (plain.numbers / exact.numbers).float(), torch.ones_like(rows)
    )
    for ours in ranks:
        assert ours.keys() == exact.changes.keys()
        assert all(change.norm() > 0 for change in exact.changes.values())
        for name, change in exact.changes.items():
            assert_as_accurate_as_torch(ours[name], plain.changes[name], change)


def test_gradients_come_back_through_all_steps_of_a_phase(scene, run_ranks, tmp_path, assert_as_accurate_as_torch):
    """Few-step distillation without truncation: the latents' gradient goes from the first stage back to the last."""
    more = ["--gradient-truncation=none", "--global-batch-size=2"]
    plain, exact = (scene.run_plainly("full", torch.float32, is_exact, *more) for is_exact in (False, True))
    found = {}
    for schedule in ("interleaved", "sequential"):
        run, flags = tmp_path / schedule, Layout(pipeline=2, micro_batches=2, samples=2, schedule=schedule).flags
        ours, _ = run_ranks(train, 2, [*scene.flags, *flags, *more, *GENERATORS["full"], f"--save={run}"])
        found[schedule] = ours | {"numbers": numbers(logged(run))}
    for name, tensor in found["sequential"].items():
        assert torch.equal(tensor, found["interleaved"][name]), name
    rows = found["sequential"].pop("numbers")
    assert_as_accurate_as_torch(
        (rows / exact.numbers).float(), (plain.numbers / exact.numbers).float(), torch.ones_like(rows)
    )
    for name, change in exact.changes.items():
        assert_as_accurate_as_torch(found["sequential"][name], plain.changes[name], change)


# Without a norm to clip by, which stages sum in another order, all arithmetic is one rank's.
VARIANTS = {
    "shared starts": ["--phase-start-reuse=3", "--fake-warmup=2", *GENERATORS["lora"]],
    "one fake score": ["--fake-experts=single", "--ema-decay=0.5", *GENERATORS["full"]],
    "bf16 without guidance": ["--guidance-scale=1", "--weight-decay=0.1", "--bf16", *GENERATORS["full"]],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_whatever_the_method_stages_find_what_one_rank_finds_to_the_bit(variant, scene, run_ranks, tmp_path):
    layouts, found = (
        {
            "one rank": Layout(micro_batches=4, samples=4),
            "interleaved": Layout(pipeline=2, micro_batches=4, samples=4),
        },
        {},
    )
    if variant == "shared starts":
        layouts |= {
            "sequential": replace(layouts["interleaved"], schedule="sequential"),
            "few live": replace(layouts["interleaved"], more=("--pipeline-live-microbatches=1",)),
        }
    for name, layout in layouts.items():
        flags = [*scene.flags, "--train-iters=2", "--global-batch-size=4", "--clip-grad=0", *layout.flags]
        changes, *_ = run_ranks(train, layout.world, [*flags, *VARIANTS[variant], f"--save={tmp_path / name}"])
        losses = numbers(logged(tmp_path / name, iterations=2))[:, [0, 2, 3]]
        found[name] = changes | {"losses": losses}
    expected = found.pop("one rank")
    for name, ours in found.items():
        assert ours.keys() == expected.keys()
        for tensor, value in expected.items():
            assert torch.equal(ours[tensor], value), (name, tensor)


def train_with_a_gradient_that_is_not_finite(arguments: list[str]) -> dict[str, torch.Tensor]:
    """The same as `train`; an update in each phase's second iteration goes wrong."""
    healthy = Iteration.fake_update

    def fake_update(iteration, counter, batch, start=None):
        program, reply = healthy(iteration, counter, batch, start), None
        while True:
            try:
                request = program.send(reply)
            except StopIteration as finished:
                return finished.value
            if isinstance(request, Backward) and (counter.iteration, counter.update) == (1, 0):
                request = replace(request, output=torch.nan * request.output)
            reply = yield request

    with mock.patch.object(Iteration, "fake_update", fake_update):
        return train(arguments)


def test_an_update_that_is_not_finite_is_skipped_on_all_stages(scene, run_ranks, tmp_path):
    found = {}
    for name, layout in {"one rank": Layout(micro_batches=2), "stages": Layout(pipeline=2, micro_batches=2)}.items():
        run = tmp_path / name
        flags = [*scene.flags, "--train-iters=2", *layout.flags, *GENERATORS["full"], "--clip-grad=0", f"--save={run}"]
        changes, *_ = run_ranks(train_with_a_gradient_that_is_not_finite, layout.world, flags)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [row["skipped_updates"] for row in rows] == [0, 1, 1, 2]
        found[name] = changes
    for name, change in found["one rank"].items():
        assert torch.equal(found["stages"][name], change), name


def train_and_watch(arguments: list[str]) -> list[tuple[int, tuple[int, ...]]]:
    """One rank of a run; of each iteration the activations held at the peak, and what paper said of all stages."""
    seen, run = [], Executor.run

    def watched(executor: Executor) -> None:
        run(executor)
        assert not (executor._kept or executor._flows or executor._latents or executor._asked)
        assert all(inbox.is_empty for inbox in executor._inboxes.values() if inbox)
        paper = simulate(executor._schedule, executor._graph, Costs.uniform(executor._graph.stages))
        seen.append((executor.peak_live, paper.peak_live))

    with mock.patch.object(Executor, "run", watched):
        train(arguments)
    return seen


@pytest.mark.parametrize("limit", [0, 1])
def test_no_stage_keeps_more_activations_than_the_schedule_says(limit, scene, run_ranks, tmp_path):
    layout = Layout(pipeline=2, micro_batches=4, more=(f"--pipeline-live-microbatches={limit}",))
    flags = [*scene.flags, "--train-iters=2", *layout.flags, *GENERATORS["lora"], f"--save={tmp_path / 'run'}"]
    for stage, iterations in enumerate(run_ranks(train_and_watch, 2, flags)):
        assert len(iterations) == 4
        for kept, paper in iterations:
            assert kept == paper[stage] <= (limit or 2)

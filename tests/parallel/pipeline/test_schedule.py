"""Schedules: complete, in order, never stuck, within the limit, never longer than one pipeline after another."""

import json
import re
from itertools import pairwise

import pytest
from drawn_iterations import fake_update, generator_update, iteration, outlines
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pdmd.parallel.pipeline.costs import Costs, NetworkCosts
from megatron_pdmd.parallel.pipeline.passes import Graph, Message, Outline, Task, Work, build_graph
from megatron_pdmd.parallel.pipeline.schedule import Schedule, interleaved, plan, sequential, smallest_limit
from megatron_pdmd.parallel.pipeline.simulate import bound, simulate

SECONDS = st.one_of(st.just(0.0), st.floats(0.01, 10))


@st.composite
def costs_of(draw: st.DrawFn, stages: int) -> Costs:
    """Costs that are uneven, or nothing, with latencies."""
    per_stage = st.lists(SECONDS, min_size=stages, max_size=stages).map(tuple)
    one = st.builds(NetworkCosts, *([per_stage] * 6))
    latency = st.dictionaries(st.sampled_from(list(Message)), SECONDS)
    return draw(st.builds(Costs, one, st.fixed_dictionaries({"teacher": one}), SECONDS, latency))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Graph, Costs, int]:
    """A graph, its costs, and a limit that can be kept."""
    stages, microbatches = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    graph = build_graph(draw(outlines()), stages, microbatches, draw(st.booleans()))
    return graph, draw(costs_of(stages)), smallest_limit(graph) + draw(st.integers(0, 3))


def most_held(graph: Graph, own: tuple[Task, ...]) -> int:
    """The most micro-batches' passes of a stage whose backward pass stands later in its list."""
    again = {program for program, reruns in enumerate(graph.reruns) if reruns}
    held: set[tuple[int, int, int]] = set()
    most = 0
    for task in own:
        of = (task.program, task.place, task.microbatch)
        if task.work == Work.BACKWARD:
            held.remove(of)
        elif task.work == Work.FORWARD and task.again == (task.program in again):
            held |= {of} if graph.outlines[task.program].passes[task.place].gradient else set()
        most = max(most, len(held))
    assert not held
    return most


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(problems())
def test_any_iteration_is_scheduled_whole_in_order_within_the_limit_and_no_longer_than_sequentially(
    problem: tuple[Graph, Costs, int],
) -> None:
    graph, costs, limit = problem
    spans = []
    for schedule in (interleaved(graph, costs, limit), sequential(graph, limit)):
        assert sorted(task for own in schedule.stages for task in own) == sorted(graph.tasks)
        timeline = simulate(schedule, graph, costs)
        for index, edges in enumerate(graph.predecessors):
            for edge in edges:
                assert timeline.start[index] >= timeline.end[edge.task]
        for stage, own in enumerate(schedule.stages):
            assert all(task.stage == stage for task in own)
            assert all(timeline.end[graph.ids[a]] <= timeline.start[graph.ids[b]] for a, b in pairwise(own))
            assert timeline.peak_live[stage] == most_held(graph, own) <= limit
        spans.append(timeline.makespan)
        assert Schedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule
    assert bound(graph, costs) * (1 - 1e-12) <= spans[0] <= spans[1]


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(outlines(), st.integers(1, 3), st.integers(1, 4), st.data())
def test_a_plan_is_never_longer_than_the_sequential_one_and_holds_what_1f1b_holds(
    programs: list[Outline], stages: int, microbatches: int, data: st.DataObject
) -> None:
    costs = data.draw(costs_of(stages))
    spans = []
    for kind in ("interleaved", "sequential"):
        graph, schedule = plan(programs, stages, microbatches, costs, kind)
        timeline = simulate(schedule, graph, costs)
        assert max(timeline.peak_live) <= min(stages, microbatches)
        spans.append(timeline.makespan)
    assert spans[0] <= spans[1]


def test_the_sequential_schedule_is_written_out() -> None:
    graph = build_graph([fake_update(rollout=1)], stages=2, microbatches=2)
    assert str(sequential(graph)) == "\n".join(
        [
            "stage 0:",
            "  forward of program 0, pass 0, micro-batch 0",
            "  forward of program 0, pass 0, micro-batch 1",
            "  forward of program 0, pass 1, micro-batch 0",
            "  forward of program 0, pass 1, micro-batch 1",
            "  backward of program 0, pass 1, micro-batch 0",
            "  backward of program 0, pass 1, micro-batch 1",
            "  reduce of program 0",
            "  step of program 0",
            "stage 1:",
            "  advance of program 0, group 0, micro-batch 0",
            "  advance of program 0, group 0, micro-batch 1",
            "  forward of program 0, pass 0, micro-batch 0",
            "  forward of program 0, pass 0, micro-batch 1",
            "  advance of program 0, group 1, micro-batch 0",
            "  advance of program 0, group 1, micro-batch 1",
            "  forward of program 0, pass 1, micro-batch 0",
            "  advance of program 0, group 2, micro-batch 0",
            "  backward of program 0, pass 1, micro-batch 0",
            "  forward of program 0, pass 1, micro-batch 1",
            "  advance of program 0, group 2, micro-batch 1",
            "  backward of program 0, pass 1, micro-batch 1",
            "  reduce of program 0",
            "  step of program 0",
        ]
    )


def test_rollouts_fill_the_chain_of_fake_updates() -> None:
    graph, schedule = plan(iteration(), stages=4, microbatches=8, costs=Costs.uniform(4))
    timeline = simulate(schedule, graph, Costs.uniform(4))
    assert timeline.busy >= 0.94
    assert max(timeline.peak_live) <= 4
    apart, one_by_one = plan(iteration(), 4, 8, Costs.uniform(4), "sequential")
    assert simulate(one_by_one, apart, Costs.uniform(4)).busy < 0.72


def test_a_chain_that_is_held_needs_room_for_all_its_micro_batches() -> None:
    programs = [generator_update(chain=2)]
    held = build_graph(programs, stages=2, microbatches=3)
    told = "--pipeline-live-microbatches 5: no schedule of this iteration holds so few; use 6 or more"
    for make in (lambda: interleaved(held, Costs.uniform(2), 5), lambda: sequential(held, 5)):
        with pytest.raises(ValueError, match=re.escape(told)):
            make()
    graph, _ = plan(programs, 2, 3, Costs.uniform(2), limit=5)
    assert graph.reruns == (True,)
    with pytest.raises(ValueError, match=r"--pipeline-live-microbatches 0: .* use 1 or more"):
        plan(programs, 2, 3, Costs.uniform(2), limit=0)


def planned() -> tuple[Graph, list[list[Task]]]:
    graph, schedule = plan(iteration(2), 2, 2, Costs.uniform(2))
    return graph, [list(own) for own in schedule.stages]


def refusal(graph: Graph, lists: list[list[Task]]) -> str:
    with pytest.raises(ValueError) as told:
        Schedule(tuple(map(tuple, lists))).check(graph)
    return str(told.value)


def test_a_schedule_that_lacks_a_task_or_has_it_twice_or_elsewhere_is_refused_by_name() -> None:
    graph, lists = planned()
    task = lists[0][4]
    assert refusal(graph, [[one for one in lists[0] if one != task], lists[1]]).endswith(f"lacks a task: {task}")
    assert refusal(graph, [[*lists[0], task], lists[1]]).endswith(f"has a task twice: {task}")
    assert refusal(graph, [lists[0], [task, *lists[1]]]).endswith(f"in the list of stage 1: {task}")
    assert "stages for a graph of 2" in refusal(graph, [lists[0]])
    foreign = Task(0, Work.FORWARD, 9)
    assert refusal(graph, [[foreign, *lists[0]], lists[1]]).endswith(f"has what the iteration has not: {foreign}")


def test_a_schedule_in_which_stages_wait_for_each_other_is_refused_by_name() -> None:
    graph, lists = planned()
    assert "advance of program 0, group 0, micro-batch 0 on stage 1" in refusal(graph, [lists[0], lists[1][::-1]])
    (step,) = (task for task in lists[0] if task.work == Work.STEP and task.program == 0)
    early = [step, *(task for task in lists[0] if task != step)]
    assert "step of program 0 on stage 0 waits for" in refusal(graph, [early, lists[1]])


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"stages": 3},
        {"stages": [3]},
        {"stages": [], "more": 1},
        {"stages": [[["forward", 0, 0, 0]]]},
        {"stages": [[["sideward", 0, 0, 0, False]]]},
        {"stages": [[["forward", 0, True, 0, False]]]},
        {"stages": [[["forward", 0, -1, 0, False]]]},
        {"stages": [[["forward", 0, 0, 0.0, False]]]},
        {"stages": [[["forward", 0, 0, 0, 1]]]},
    ],
)
def test_json_that_is_no_schedule_is_refused(content: object) -> None:
    with pytest.raises(ValueError, match="a pipeline schedule"):
        Schedule.from_json(content)


def test_costs_are_the_same_after_json_and_anything_else_is_refused() -> None:
    one = NetworkCosts(*(((1.0, 2.0),) * 6))
    costs = Costs(one, {"teacher": one}, 0.5, {Message.SAMPLE: 3.0})
    content = json.loads(json.dumps(costs.to_json()))
    assert Costs.from_json(content) == costs
    for spoilt in (
        [],
        content | {"advance": -1},
        content | {"advance": None},
        content | {"latency": {"letter": 1.0}},
        content | {"networks": {"teacher": {}}},
        content | {"default": content["default"] | {"step": [1.0]}},
        content | {"default": content["default"] | {"step": [1.0, float("nan")]}},
        {**content, "more": 1},
    ):
        with pytest.raises(ValueError, match=r"pipeline|advance|latency|network|step"):
            Costs.from_json(spoilt)

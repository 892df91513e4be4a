"""A schedule on paper: closed forms of its time, what it holds, and what it says of one that gets stuck."""

import re

import pytest
from drawn_iterations import fake_update, generator_update, iteration

from megatron_pdmd.parallel.pipeline.costs import Costs, NetworkCosts
from megatron_pdmd.parallel.pipeline.passes import Message, ModelPass, Outline, Task, Work, build_graph
from megatron_pdmd.parallel.pipeline.schedule import Schedule, plan, sequential
from megatron_pdmd.parallel.pipeline.simulate import Timeline, bound, simulate

ROLLOUT = Outline("rollout", ((ModelPass("generator"),),))


def run_sequential(outlines: list[Outline], stages: int, microbatches: int, costs: Costs) -> Timeline:
    graph = build_graph(outlines, stages, microbatches, rerun=True)
    return simulate(sequential(graph), graph, costs)


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
@pytest.mark.parametrize("microbatches", [1, 3, 8])
def test_one_1f1b_pipeline_takes_m_plus_p_minus_one_turns_of_a_stage(stages: int, microbatches: int) -> None:
    forward, backward = 3.0 * stages, 5.0 * stages
    found = run_sequential([fake_update(0)], stages, microbatches, Costs.uniform(stages, forward, backward))
    assert found.makespan == (microbatches + stages - 1) * (3 + 5)
    assert found.busy == microbatches / (microbatches + stages - 1)
    assert found.peak_live == tuple(min(stages - stage, microbatches) for stage in range(stages))


@pytest.mark.parametrize("passes", [1, 3])
def test_passes_without_gradient_fill_and_drain_one_after_another(passes: int) -> None:
    rollout = Outline("rollout", ((ModelPass("generator"),),) * passes)
    found = run_sequential([rollout], 4, 6, Costs.uniform(4, forward=4.0))
    assert found.makespan == passes * (6 + 4 - 1)
    assert found.bubble == pytest.approx(3 / 9)
    assert found.peak_live == (0,) * 4


def test_what_runs_again_is_no_useful_work() -> None:
    costs = Costs.uniform(1)
    again = run_sequential([generator_update(rollout=0)], 1, 2, costs)
    assert again.makespan == 2 * (1 + 3 + 1 + 2)
    assert again.busy == 12 / 14
    held = build_graph([generator_update(rollout=0)], 1, 2)
    assert simulate(sequential(held), held, costs).busy == 1


def test_messages_take_their_latency_between_stages_alone() -> None:
    costs = Costs(
        NetworkCosts(*(((1.0, 10.0),) * 2), (100.0, 1000.0), (1.0, 1.0), (2.0, 3.0), (5.0, 7.0)),
        advance=0.5,
        latency={Message.SAMPLE: 0.25, Message.ACTIVATION: 20.0, Message.GRADIENT: 30.0, Message.NORM: 40.0},
    )
    found = run_sequential([fake_update(0)], 2, 1, costs)
    before_reduce = 0.5 + 0.25 + 1 + 20 + 10 + 0.5 + 1000 + 30 + 100
    assert found.makespan == before_reduce + 2 + 40 + 7
    assert found.end[found.graph.ids[Task(1, Work.REDUCE, 0)]] == before_reduce - 130 + 3
    times = [(task.work, start, end) for task, start, end in found.tasks(0)]
    assert times[:2] == [(Work.FORWARD, 0.75, 1.75), (Work.BACKWARD, before_reduce - 100, before_reduce)]


def test_bytes_are_counted_on_both_sides_of_a_message_until_it_is_taken_up() -> None:
    costs = Costs(
        NetworkCosts((1.0, 3.0), (1.0, 3.0), (1.0, 1.0), (16.0, 64.0), (0.0, 0.0), (0.0, 0.0)),
        message_bytes={Message.ACTIVATION: 1.0, Message.SAMPLE: 0.0, Message.GRADIENT: 0.0},
    )
    rollout = run_sequential([ROLLOUT], 2, 4, costs)
    # Stage 0 is done at 1, 2, 3, 4 and stage 1 begins at 1, 4, 7, 10: three wait from 4 on, less the one that begins.
    assert rollout.peak_bytes == (2.0, 2.0)
    assert rollout.peak_latents == 3
    learning = run_sequential([fake_update(0)], 2, 4, costs)
    assert learning.peak_live == (2, 1)
    assert learning.peak_bytes == (2 * 16.0 + 1, 64.0 + 1)


def test_the_bound_is_the_fullest_stage_or_the_longest_way() -> None:
    many = build_graph([ROLLOUT], 2, 16)
    uneven = Costs(NetworkCosts((1.0, 3.0), *(((0.0, 0.0),) * 5)))
    assert bound(many, uneven) == 48
    one = build_graph([fake_update(1)], 4, 1)
    assert bound(one, Costs.uniform(4)) == 1 + 1 + 2


def test_a_schedule_that_gets_stuck_names_who_waits_for_whom() -> None:
    graph, schedule = plan(iteration(2), 2, 2, Costs.uniform(2))
    first, last = map(list, schedule.stages)
    forward, backward = (Task(0, work, 0, 1, 2) for work in (Work.FORWARD, Work.BACKWARD))
    there, here = first.index(forward), first.index(backward)
    first[there], first[here] = backward, forward
    told = "backward of program 0, pass 2, micro-batch 1 on stage 0 waits for"
    with pytest.raises(ValueError, match=re.escape(told)):
        simulate(Schedule((tuple(first), tuple(last))), graph, Costs.uniform(2))

"""The graph of an iteration: which tasks there are, and what each of them waits for."""

from collections import Counter

import pytest
from drawn_iterations import fake_update, generator_update, iteration, outlines
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pdmd.parallel.pipeline.passes import (
    Graph,
    Message,
    ModelPass,
    Outline,
    Task,
    Work,
    build_graph,
    profits_from_rerun,
)

FORWARD, BACKWARD, ADVANCE, REDUCE, STEP = Work.FORWARD, Work.BACKWARD, Work.ADVANCE, Work.REDUCE, Work.STEP


def waits_for(graph: Graph, task: Task) -> set[tuple[Task, Message | None]]:
    edges = graph.predecessors[graph.ids[task]]
    assert len(set(edges)) == len(edges)
    return {(graph.tasks[edge.task], edge.message) for edge in edges}


def tasks_before(graph: Graph, task: Task) -> set[Task]:
    """All that must be done before a task."""
    found, left = set(), [graph.ids[task]]
    while left:
        for edge in graph.predecessors[left.pop()]:
            if edge.task not in found:
                found.add(edge.task)
                left.append(edge.task)
    return {graph.tasks[index] for index in found}


def test_a_pass_travels_from_the_program_through_all_stages_and_back_to_the_program() -> None:
    graph = build_graph([fake_update(rollout=1)], stages=3, microbatches=2)
    assert waits_for(graph, Task(2, ADVANCE, 0, 1, 0)) == set()
    assert waits_for(graph, Task(0, FORWARD, 0, 1, 0)) == {(Task(2, ADVANCE, 0, 1, 0), Message.SAMPLE)}
    assert waits_for(graph, Task(2, FORWARD, 0, 1, 0)) == {(Task(1, FORWARD, 0, 1, 0), Message.ACTIVATION)}
    assert waits_for(graph, Task(2, ADVANCE, 0, 1, 1)) == {
        (Task(2, ADVANCE, 0, 1, 0), None),
        (Task(2, FORWARD, 0, 1, 0), Message.ACTIVATION),
    }


def test_backward_goes_through_the_stages_the_other_way_and_adds_gradients_in_the_order_of_micro_batches() -> None:
    graph = build_graph([fake_update(rollout=1)], stages=3, microbatches=2)
    assert waits_for(graph, Task(2, BACKWARD, 0, 1, 1)) == {
        (Task(2, ADVANCE, 0, 1, 2), Message.GRADIENT),
        (Task(2, FORWARD, 0, 1, 1), None),
        (Task(2, BACKWARD, 0, 0, 1), None),
    }
    assert waits_for(graph, Task(0, BACKWARD, 0, 0, 1)) == {
        (Task(1, BACKWARD, 0, 0, 1), Message.GRADIENT),
        (Task(0, FORWARD, 0, 0, 1), None),
    }


def test_a_step_waits_for_the_norm_of_every_stage_and_for_who_needs_the_old_weights() -> None:
    graph = build_graph([generator_update(rollout=0), fake_update(rollout=0)], stages=2, microbatches=2)
    last_backward = Task(1, BACKWARD, 1, 1, 0)
    assert waits_for(graph, Task(1, REDUCE, 1)) == {(last_backward, None), (Task(1, REDUCE, 0), None)}
    norms = {(Task(stage, REDUCE, 1), Message.NORM) for stage in range(2)}
    needing = {(Task(1, FORWARD, 0, i, 3), None) for i in range(2)}  # the generator's update asks the fake score, too
    own = {(Task(1, work, 1, i, 0), None) for i in range(2) for work in (FORWARD, BACKWARD)}
    assert waits_for(graph, Task(1, STEP, 1)) == norms | needing | own


def test_a_pass_waits_for_the_latest_step_of_its_network_alone() -> None:
    graph = build_graph(iteration(fake_updates=3), stages=2, microbatches=1)
    for program in range(3):
        rollout = waits_for(graph, Task(1, FORWARD, program, 0, 0))
        assert rollout == {(Task(0, FORWARD, program, 0, 0), Message.ACTIVATION)}
        learning = waits_for(graph, Task(1, FORWARD, program, 0, 2))
        assert {task for task, _ in learning if task.work == STEP} == {
            Task(1, STEP, before) for before in range(program)[-1:]
        }
    scored = waits_for(graph, Task(1, FORWARD, 3, 0, 4))
    assert {task for task, _ in scored if task.work == STEP} == {Task(1, STEP, 2)}


def test_rollouts_and_teacher_depend_on_no_weight_that_the_iteration_moves() -> None:
    graph = build_graph(iteration(), stages=4, microbatches=2)
    for task in graph.tasks:
        free = task.work == FORWARD and graph.pass_of(task).network != "fake_score"
        if free:
            assert not {one for one in tasks_before(graph, task) if one.work == STEP}


def test_a_chain_goes_backward_pass_by_pass_over_its_latents() -> None:
    graph = build_graph([generator_update(rollout=1, chain=2)], stages=2, microbatches=2)
    assert waits_for(graph, Task(1, BACKWARD, 0, 0, 1)) == {
        (Task(1, ADVANCE, 0, 0, 4), Message.GRADIENT),
        (Task(0, BACKWARD, 0, 0, 2), Message.LATENT_GRADIENT),
        (Task(1, FORWARD, 0, 0, 1), None),
        (Task(1, BACKWARD, 0, 1, 2), None),  # all micro-batches of the later pass go first
    }


@pytest.mark.parametrize(
    ("outline", "expected"),
    [
        (fake_update(), False),
        (generator_update(), True),
        (generator_update(chain=3), True),
        (Outline("rollout", ((ModelPass("generator"),),)), False),
        (Outline("nothing", ()), False),
    ],
)
def test_a_program_runs_again_only_where_other_passes_stand_between(outline: Outline, expected: bool) -> None:
    assert profits_from_rerun(outline) is expected
    graph = build_graph([outline], stages=1, microbatches=1, rerun=True)
    assert graph.reruns == (expected,)
    assert any(task.again for task in graph.tasks) is expected


def test_a_pass_that_runs_again_keeps_nothing_the_first_time() -> None:
    graph = build_graph([generator_update(rollout=1)], stages=2, microbatches=1, rerun=True)
    first, again = (Task(0, FORWARD, 0, 0, 1, again) for again in (False, True))
    assert not graph.learns(first) and graph.learns(again)
    assert waits_for(graph, again) == {(Task(1, ADVANCE, 0, 0, 3), Message.SAMPLE)}
    assert (Task(0, FORWARD, 0, 0, 1, again=True), None) in waits_for(graph, Task(0, BACKWARD, 0, 0, 1))
    held = build_graph([generator_update(rollout=1)], stages=2, microbatches=1)
    assert held.learns(first) and again not in held.ids


def test_a_program_begins_when_the_one_whose_result_it_takes_has_ended() -> None:
    phases = [Outline("earlier phases", ((ModelPass("generator"),),)), Outline("a", (), start=0)]
    graph = build_graph(phases, stages=2, microbatches=2)
    assert waits_for(graph, Task(1, ADVANCE, 1, 1, 0)) == {(Task(1, ADVANCE, 0, 1, 1), None)}


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(outlines(), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_any_iteration_has_each_task_once_and_nothing_waits_for_what_comes_later(
    programs: list[Outline], stages: int, microbatches: int, rerun: bool
) -> None:
    graph = build_graph(programs, stages, microbatches, rerun)
    assert len(graph.ids) == len(graph.tasks)
    learning = sum(one.gradient for outline in programs for one in outline.passes)
    again = sum(
        one.gradient for outline, reruns in zip(programs, graph.reruns, strict=True) for one in outline.passes if reruns
    )
    trained = sum(outline.trains is not None for outline in programs)
    assert Counter(task.work for task in graph.tasks) == Counter(
        {
            ADVANCE: microbatches * sum(len(outline.groups) + 1 for outline in programs),
            FORWARD: microbatches * stages * (again + sum(len(outline.passes) for outline in programs)),
            BACKWARD: microbatches * stages * learning,
            REDUCE: stages * trained,
            STEP: stages * trained,
        }
    )
    for index, edges in enumerate(graph.predecessors):
        for edge in edges:
            assert edge.task < index
            if graph.tasks[edge.task].stage != graph.tasks[index].stage:
                assert edge.message is not None

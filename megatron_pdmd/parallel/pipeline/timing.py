"""When the tasks of instruction lists begin and end."""

from collections.abc import Sequence

from megatron_pdmd.parallel.pipeline.passes import Graph


def run_lists(
    graph: Graph, lists: Sequence[Sequence[int]], seconds: Sequence[float], delays: Sequence[Sequence[float]]
) -> tuple[list[float], list[float]]:
    """Runs each stage's list strictly in order; a task begins when all that it waits for is done and has arrived.

    Args:
        graph: what tasks wait for.
        lists: ids of each stage's tasks.
        seconds: of each task, by id.
        delays: of each edge of `graph.predecessors`.

    Returns:
        Beginning and end of each task by its id, in seconds; NaN for what is in no list.

    Raises:
        ValueError: tasks wait for each other, or for one that no list has; names them.
    """
    start, end = [float("nan")] * len(graph.tasks), [float("nan")] * len(graph.tasks)
    done = [False] * len(graph.tasks)
    position, free = [0] * len(lists), [0.0] * len(lists)
    left = sum(map(len, lists))
    blocked_by: dict[int, list[int]] = {}  # a task that is not done -> stages whose next task waits for it
    ready = list(range(len(lists)))
    while ready:
        stage = ready.pop()
        own = lists[stage]
        while position[stage] < len(own):
            task = own[position[stage]]
            edges = graph.predecessors[task]
            missing = next((edge.task for edge in edges if not done[edge.task]), None)
            if missing is not None:
                blocked_by.setdefault(missing, []).append(stage)
                break
            arrived = [end[edge.task] + delay for edge, delay in zip(edges, delays[task], strict=True)]
            start[task] = max([free[stage], *arrived])
            free[stage] = end[task] = start[task] + seconds[task]
            done[task] = True
            position[stage] += 1
            left -= 1
            ready += blocked_by.pop(task, [])
    if left:
        raise ValueError(_who_waits(graph, lists, position, done))
    return start, end


def _who_waits(graph: Graph, lists: Sequence[Sequence[int]], position: list[int], done: list[bool]) -> str:
    """Follows the stages from a waiting task to the one that it waits for, until a stage comes again."""
    stage_of = {task: stage for stage, own in enumerate(lists) for task in own}
    stage = next(stage for stage, own in enumerate(lists) if position[stage] < len(own))
    told: list[str] = []
    seen: set[int] = set()
    while stage not in seen:
        seen.add(stage)
        task = lists[stage][position[stage]]
        awaited = next(edge.task for edge in graph.predecessors[task] if not done[edge.task])
        told.append(f"{graph.tasks[task]} waits for {graph.tasks[awaited]}")
        if awaited not in stage_of:
            return f"a pipeline schedule gets stuck: {told[-1]}, which no stage does"
        stage = stage_of[awaited]
    return f"a pipeline schedule gets stuck: {'; '.join(told)}, which comes later there"

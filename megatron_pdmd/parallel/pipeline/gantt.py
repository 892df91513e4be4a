"""Schedules as a picture: what each stage does and when."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_pdmd.parallel.pipeline.passes import Graph, Task, Work
from megatron_pdmd.parallel.pipeline.simulate import Timeline

# Colours of Okabe and Ito, which people tell apart whatever their eyes; backward is the darker of a pair.
_FORWARD = {
    "teacher": "#009E73",
    "fake score": "#56B4E9",
    "generator": "#F0A830",
    "rollout": "#F6E58D",
    "other": "#BBBBBB",
}
_BACKWARD = {"fake score": "#0B5394", "generator": "#B34700", "other": "#666666"}
_AGAIN = "generator again"
_AGAIN_COLOUR = "#D9A0C0"


def draw(timelines: Mapping[str, Timeline], path: Path) -> None:
    """Writes a PNG of timelines above each other, on one axis of time.

    A stage is a row, the first on top. Colours tell the roles, dark ones are backward passes; white is idle, and a
    black stroke an optimizer step.

    Args:
        timelines: by title.
        path: the file.
    """
    rows = sum(len(one.schedule.stages) for one in timelines.values())
    figure = Figure(figsize=(14, 1.2 + 0.8 * len(timelines) + 0.3 * rows), dpi=100, layout="constrained")
    heights = [len(one.schedule.stages) + 1 for one in timelines.values()]
    axes = figure.subplots(len(timelines), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    drawn: dict[str, str] = {}
    for (title, timeline), panel in zip(timelines.items(), axes, strict=True):
        drawn |= _draw_timeline(panel, timeline)
        panel.set_title(
            f"{title}: {timeline.makespan:.4g} s, stages busy {timeline.busy:.1%} of it", fontsize=11, loc="left"
        )
    axes[-1].set_xlabel("seconds", fontsize=10)
    axes[-1].set_xlim(0, max(one.makespan for one in timelines.values()))
    ordered = [name for name in _colours() if name in drawn]
    handles = [Patch(facecolor=drawn[name], label=name) for name in ordered]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=10, frameon=False)
    figure.savefig(path, format="png", pil_kwargs={"optimize": True})


def _colours() -> dict[str, str]:
    backward = {f"{role}, backward": colour for role, colour in _BACKWARD.items()}
    return _FORWARD | {_AGAIN: _AGAIN_COLOUR} | backward


def _draw_timeline(panel: Axes, timeline: Timeline) -> dict[str, str]:
    """Draws a stage a row; returns the kinds of work that were drawn and their colours."""
    colours = _colours()
    spans: dict[tuple[str, int], list[tuple[float, float]]] = {}
    steps = []
    for stage in range(len(timeline.schedule.stages)):
        for task, start, end in timeline.tasks(stage):
            if task.work == Work.STEP:
                steps.append((stage, end))
            for kind in _kinds(timeline.graph, task):
                spans.setdefault((kind, stage), []).append((start, end - start))
    for (kind, stage), found in spans.items():
        panel.broken_barh(found, (stage - 0.42, 0.84), facecolors=colours[kind], edgecolors="white", linewidth=0.3)
    for stage, end in steps:
        panel.plot([end, end], [stage - 0.48, stage + 0.48], color="black", linewidth=1.2)
    panel.set_ylim(len(timeline.schedule.stages) - 0.5, -0.5)
    panel.set_yticks(range(len(timeline.schedule.stages)))
    panel.set_yticklabels([f"stage {stage}" for stage in range(len(timeline.schedule.stages))], fontsize=9)
    panel.tick_params(length=0)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    return {kind: colours[kind] for kind, _ in spans}


def _kinds(graph: Graph, task: Task) -> Iterator[str]:
    """The kind of a pass; none for other work, which is short."""
    if task.work not in (Work.FORWARD, Work.BACKWARD):
        return
    one = graph.pass_of(task)
    role = one.network.replace("_", " ")
    role = next((known for known in ("teacher", "fake score", "generator") if role.startswith(known)), "other")
    if task.work == Work.BACKWARD:
        yield f"{role if role in _BACKWARD else 'other'}, backward"
    elif role == "generator" and not one.gradient:
        yield "rollout"
    else:
        yield _AGAIN if task.again else role

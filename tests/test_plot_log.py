"""Figures of what runs logged, read back from the files."""

import json
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

RUNS = ("healthy", "collapsing")


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    """Two runs of two phases, with bins that are empty now and then."""
    for scale, name in enumerate(RUNS, start=1):
        (tmp_path / name / "samples").mkdir(parents=True)
        metrics, evaluations = [], []
        for i in range(1, 13):
            gaps = {f"score_gap_bin_{k}": None if (i + k) % 3 == 0 else 0.1 * scale + 0.01 * k for k in range(4)}
            metrics.append({"iteration": i, "phase": 1 + (i > 6), "score_gap": 0.1 * scale} | gaps)
            found = {"sample_distance": 0.2 * scale, "sample_change": None if i in (1, 7) else 0.1 / i}
            losses = {"eval_fake_loss": 0.3 * scale, "fake_loss_floor": 0.2, "generator_movement": 0.01 * i}
            evaluations.append({"iteration": i, "phase": 1 + (i > 6)} | found | losses)
        for file, rows in (("metrics.jsonl", metrics), ("evaluations.jsonl", evaluations)):
            (tmp_path / name / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        for i in (6, 12):
            picture = np.full((20, 30 + i, 3), 20 * i, dtype=np.uint8)
            iio.imwrite(tmp_path / name / "samples" / f"iter_{i:07d}.png", picture)
    return {name: tmp_path / name for name in RUNS}


def lines(panel) -> dict[str, list[tuple[float, float]]]:
    """Points of each labelled line; the later phases' lines, without a label, count to the one before."""
    found, label = {}, None
    for line in panel.lines:
        if (len(line.get_xdata()) == 2 and len(set(line.get_xdata())) == 1) or line.get_color() == "black":
            continue  # a border between phases, the floor
        label = label if line.get_label().startswith("_") else line.get_label()
        found.setdefault(label, []).extend(zip(line.get_xdata(), line.get_ydata(), strict=True))
    return found


def test_evaluations_of_runs_stand_in_one_panel_for_each_number(runs, load_tool):
    tool = load_tool("plot_log")
    figure = tool.evaluation_figure(runs)
    assert [panel.get_title() for panel in figure.axes] == list(tool.EVALUATION_PANELS)
    ratio, distance, change, movement = map(lines, figure.axes)
    assert set(ratio) == set(distance) == set(RUNS)
    assert [y for _, y in ratio["collapsing"]] == pytest.approx([3.0] * 12)
    assert [y for _, y in distance["healthy"]] == pytest.approx([0.2] * 12)
    assert [x for x, _ in change["healthy"]] == [2, 3, 4, 5, 6, 8, 9, 10, 11, 12], "the first of a phase has none"
    assert [y for _, y in movement["healthy"]] == pytest.approx([0.01 * i for i in range(1, 13)])


def test_score_gaps_have_a_panel_for_each_run_and_leave_empty_bins_out(runs, load_tool):
    figure = load_tool("plot_log").score_gap_figure(runs)
    assert [panel.get_title() for panel in figure.axes] == ["score gap: healthy", "score gap: collapsing"]
    found = lines(figure.axes[1])
    assert list(found) == ["bin 0, least noise", "bin 1", "bin 2", "bin 3, most noise"]
    assert [x for x, _ in found["bin 1"]] == [i for i in range(1, 13) if (i + 1) % 3]
    assert [y for _, y in found["bin 1"]] == pytest.approx([0.21] * 8)


def test_every_figure_is_written_by_the_program(runs, load_tool, tmp_path, capsys):
    for figure in ("evaluations", "score-gap", "sheets"):
        picture = tmp_path / "figures" / f"{figure}.png"
        named = [f"a={runs['healthy']}", str(runs["collapsing"])]
        load_tool("plot_log").main(["--figure", figure, "--runs", *named, "--save", str(picture)])
        assert iio.imread(picture).std() > 0
        assert f"wrote {picture}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("figure", "spoil", "told"),
    [
        ("evaluations", lambda run: (run / "evaluations.jsonl").unlink(), "trained with --eval-interval"),
        ("sheets", lambda run: [path.unlink() for path in (run / "samples").iterdir()], "--sample-prompts above 0"),
        ("score-gap", lambda run: (run / "metrics.jsonl").write_text(""), "no logged iteration yet"),
        ("score-gap", lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\xfe\n"), "is not UTF-8"),
        ("score-gap", lambda run: (run / "metrics.jsonl").write_text("{}\n"), "line 1: its iteration"),
        ("evaluations", lambda run: (run / "evaluations.jsonl").write_text("[1]\n"), "line 1: is not a JSON object"),
        ("sheets", lambda run: (run / "samples" / "iter_0000012.png").write_bytes(b"PNG"), "is no readable PNG"),
        ("sheets", lambda run: (run / "samples" / "iter_0000013.png").mkdir(), "is no readable PNG"),
    ],
)
def test_what_a_run_lacks_is_told_in_one_line(figure, spoil, told, runs, load_tool, tmp_path, capsys):
    spoil(runs["healthy"])
    arguments = ["--figure", figure, "--runs", str(runs["healthy"]), "--save", str(tmp_path / "x.png")]
    with pytest.raises(SystemExit) as stop:
        load_tool("plot_log").main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and told in error and error.count("\n") == 1


def test_values_that_are_no_numbers_leave_gaps(runs, load_tool, tmp_path, capsys):
    odd = ('"1"', "[1]", "{}", "true", "1e308", "1" * 400, "null")
    for file in ("metrics.jsonl", "evaluations.jsonl"):
        keys = ("score_gap_bin_1", "sample_distance", "eval_fake_loss", "fake_loss_floor")
        lines = (", ".join(f'"{key}": {value}' for key in keys) for value in odd)
        with (runs["healthy"] / file).open("a") as log:
            log.writelines(f'{{"iteration": {20 + i}, "phase": 2, {line}}}\n' for i, line in enumerate(lines))
    for figure in ("evaluations", "score-gap"):
        arguments = ["--figure", figure, "--runs", str(runs["healthy"]), "--save", str(tmp_path / "x.png")]
        load_tool("plot_log").main(arguments)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("save", ["x.xyz", "", "prompts/../x", "n" * 300 + ".png"])
def test_a_picture_that_cannot_be_written_is_refused(save, runs, load_tool, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        load_tool("plot_log").main(
            ["--figure", "sheets", "--runs", str(runs["healthy"]), "--save", str(tmp_path / save)]
        )
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--save" in error and error.count("\n") == 1

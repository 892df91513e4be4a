"""The run report, from folders written here."""

import io
import json
from pathlib import Path

import imageio.v3 as iio
import pytest
from rich.console import Console

from megatron_pdmd.evaluation.run_files import read_metrics
from megatron_pdmd.evaluation.run_report import evaluation_table, main, save_loss_curves, write_run_report

REAL = {
    "digit_accuracy": 0.98,
    "direction_accuracy": 1.0,
    "speed_error": 0.05,
    "diversity": 11.6,
    "frechet_distance": 1.4,
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two phases; a value that is missing, one that was not finite, and a line being written."""
    rows = [
        {"phase": phase, "iteration": i, "fake_loss": 1 / (i + 1), "generator_loss": None, "fake_grad_norm": 0.5 + i}
        for phase in (1, 2)
        for i in range(20)
    ]
    rows[3]["fake_loss"] = None
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"phase": 2, "itera')
    student = {**REAL, "diversity": None, "frechet_distance": 2.25}
    (tmp_path / "summary.json").write_text(json.dumps({"evaluation": {"real": REAL, "student_4": student}}))
    return tmp_path


def printed(table) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    return console.file.getvalue()


def test_logged_iterations_are_read_without_the_unfinished_line(run):
    rows = read_metrics(run)
    assert len(rows) == 40
    assert [row["phase"] for row in rows] == [1] * 20 + [2] * 20


def test_report_draws_a_row_for_each_phase_and_prints_the_table(run):
    console = Console(file=io.StringIO(), width=120)
    both = iio.imread(write_run_report(run, console))
    save_loss_curves([row for row in read_metrics(run) if row["phase"] == 1], run / "one.png")
    one = iio.imread(run / "one.png")
    assert both.shape[0] == 2 * one.shape[0] and both.shape[1] == one.shape[1]
    assert "student_4" in console.file.getvalue() and "2.25" in console.file.getvalue()


def test_curves_change_the_picture(run):
    rows = read_metrics(run)
    save_loss_curves(rows, run / "curves.png")
    save_loss_curves([{key: row[key] for key in ("phase", "iteration")} for row in rows], run / "empty.png")
    assert (iio.imread(run / "curves.png") != iio.imread(run / "empty.png")).any()


def test_table_has_the_known_metrics_first_and_a_dash_for_what_is_missing():
    table = evaluation_table({"real": {"extra": 3.0, **REAL}, "student": {"diversity": None}})
    headers = [str(column.header).split("\n")[0].replace(" ", "_") for column in table.columns]
    assert headers == ["samples", *REAL, "extra"]
    cells = {row[0]: row for row in zip(*(column.cells for column in table.columns), strict=True)}
    assert cells["real"][headers.index("diversity")] == "11.6" and cells["student"][headers.index("diversity")] == "-"
    assert "student" in printed(table)


def test_a_run_without_evaluation_has_curves_alone(run):
    (run / "summary.json").unlink()
    console = Console(file=io.StringIO())
    assert write_run_report(run, console).is_file()
    assert console.file.getvalue() == ""


ENTRY = '{"iteration": 1, "phase": 1, "fake_loss": 1.0}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no .*metrics.jsonl"),
        ("", "no logged iteration"),
        (ENTRY + "not json\n", "line 2: is not valid JSON"),
        ("[1]\n", "line 1: is not a JSON object"),
        (ENTRY + "\n", "line 2: is not valid JSON"),
        ("[" * 100_000 + "\n", "line 1: is nested too deeply"),
        ('{"iteration": 1, "phase": 1, "fake_loss": NaN}\n', "line 1: is not valid JSON"),
        ('{"iteration": 1, "iteration": 2, "phase": 1}\n', "'iteration' is given twice"),
        ('{"phase": 1}\n', "line 1: its iteration"),
        ('{"iteration": "1", "phase": 1}\n', "line 1: its iteration"),
        ('{"iteration": true, "phase": 1}\n', "line 1: its iteration"),
        ('{"iteration": 1.5, "phase": 1}\n', "line 1: its iteration"),
        ('{"iteration": -1, "phase": 1}\n', "line 1: its iteration"),
        ('{"iteration": 1}\n', "line 1: its phase"),
        ('{"iteration": 1, "phase": [1]}\n', "line 1: its phase"),
        ('{"iteration": 1, "phase": 1000000000}\n', "line 1: its phase"),
        ("\xff\xfe\n", "is not UTF-8"),
    ],
)
def test_broken_logs_exit_with_two(tmp_path, content, message, capsys):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        read_metrics(tmp_path)
    assert refused(tmp_path, capsys) and not (tmp_path / "loss_curves.png").exists()


def refused(run: Path, capsys) -> str:
    """The one line with which the report ends."""
    with pytest.raises(SystemExit) as stop:
        main([str(run)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    "value", ['"1.0"', "[1.0]", "{}", "true", "null", "1" * 5, "1e308", "1" * 400, "1e-320", '{"a": [{}]}']
)
def test_values_that_are_no_numbers_are_left_out_of_the_curves(run, value, capsys):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f'\n{{"iteration": 99, "phase": 2, "fake_loss": {value}, "fake_grad_norm": {value}}}\n')
    text = (run / "metrics.jsonl").read_text().replace('{"phase": 2, "itera\n', "")
    (run / "metrics.jsonl").write_text(text)
    main([str(run)])
    assert "loss curves" in capsys.readouterr().out
    assert len(read_metrics(run)) == 41


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"evaluation": 3}',
        '{"evaluation": {"real": 3}}',
        '{"evaluation": []}',
        '{"evaluation": NaN}',
        "\xff",
    ],
)
def test_a_broken_summary_exits_with_two(run, content, capsys):
    (run / "summary.json").write_bytes(content.encode("latin-1"))
    assert "summary.json" in refused(run, capsys)


def test_a_summary_may_hold_any_names_and_values(run, capsys):
    odd = {"[/bold]": "1", "a\nb": [1], "huge": 10**400, "true": True, "speed_error": None}
    (run / "summary.json").write_text(json.dumps({"evaluation": {"[red]x[/nothing]": odd, "\x1b[2J": {}}}))
    main([str(run)])
    told = capsys.readouterr().out
    assert "[red]x[/nothing]" in told and "\x1b" not in told

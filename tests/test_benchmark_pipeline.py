"""tools/benchmark_pipeline.py: what it compares on paper, and what it refuses."""

import json
import sys

import pytest

from megatron_pdmd.models import WanConfig


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("benchmark_pipeline")


def test_both_schedules_are_compared_and_written(tool, tmp_path, capsys):
    rows_at, picture = tmp_path / "new" / "rows.json", tmp_path / "new" / "chart.png"
    flags = ["--simulate", "--stages", "1", "2", "--microbatches", "4", "--recompute", "--json", str(rows_at)]
    assert tool.main([*flags, "--picture", str(picture)]) == 0
    assert "One iteration on paper, with recompute" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    alone, two = json.loads(rows_at.read_text())
    assert (alone["stages"], alone["microbatches"]) == (1, 4)
    # 5 fake updates of 2 + 1 + 3 seconds, and the generator's 1 + 1 + 3 + 3.
    assert alone["bound"] == 4 * 38 and alone["busy_interleaved"] == 1
    assert alone["busy_sequential"] == 38 / 39
    assert two["bound"] == 2 * 38
    assert two["busy_sequential"] < two["busy_interleaved"] <= 1
    assert two["peak_live"] <= two["limit"] == two["peak_live_sequential"] == 2
    assert two["makespan_interleaved"] == pytest.approx(two["bound"] * (1 + two["over_bound"]))


def test_both_schedules_run_on_ranks(tool, tmp_path, monkeypatch):
    small = WanConfig(num_attention_heads=2, attention_head_dim=12, ffn_dim=32, num_layers=2, text_dim=8)
    monkeypatch.setattr(sys.modules["pipeline_ranks"], "MODEL", small)
    rows_at = tmp_path / "rows.json"
    assert tool.main(["--run", "--microbatches", "2", "--repeats", "1", "--json", str(rows_at)]) == 0
    (row,) = json.loads(rows_at.read_text())
    assert (row["stages"], row["microbatches"]) == (2, 2) and row["peak_live"] <= 2
    assert row["ratio"] == pytest.approx(row["interleaved_ms"] / row["sequential_ms"])
    assert 0.5 < row["simulated_ratio"] < 1


def test_passes_that_are_not_run_again_in_backward_cost_less(tool):
    assert tool.compare(2, 1, recompute=False).bound < tool.compare(2, 1, recompute=True).bound


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--simulate, --run"),
        (["--run", "--recompute"], "--recompute"),
        (["--run", "--stages", "9"], "--stages"),
        (["--run", "--repeats", "0"], "--repeats"),
        (["--simulate", "--stages", "0"], "--stages"),
        (["--simulate", "--microbatches", "1000"], "--microbatches"),
        (["--simulate", "--picture", "chart.jpg"], "--picture"),
    ],
)
def test_bad_flags_end_in_one_line(tool, flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        tool.main(flags)
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert told.count("\n") == 1 and message in told

"""tools/benchmark_step.py: what it times, and what it refuses."""

import csv
import json

import pytest
import torch

from megatron_pdmd.models import WanConfig
from megatron_pdmd.parallel import destroy_topology


@pytest.fixture(scope="module")
def tool(load_tool):
    yield load_tool("benchmark_step")
    destroy_topology()


@pytest.fixture
def small(tool, monkeypatch):
    """Both sizes made small."""
    model = WanConfig(num_attention_heads=2, attention_head_dim=12, ffn_dim=32, num_layers=1, in_channels=1,
                      out_channels=1, text_dim=8, freq_dim=16, rope_max_seq_len=16)  # fmt: skip
    size = tool.Size(model, latents=(1, 2, 4, 4), text=(3, 8), batch=2, fake_updates=2)
    monkeypatch.setattr(tool, "SIZES", {"tiny": size, "d512": size})
    return size


@pytest.mark.parametrize("generator", ["lora", "full"])
def test_both_sides_are_timed_and_written(tool, small, generator, tmp_path, capsys):
    table, content = tmp_path / "new" / "step.csv", tmp_path / "new" / "step.json"
    threads = torch.get_num_threads()
    flags = ["--sizes", "d512", "--repeats", "2", "--threads", str(threads), "--generator", generator]
    assert tool.main([*flags, "--csv", str(table), "--json", str(content)]) == 0
    printed = capsys.readouterr().out
    assert "One iteration" in printed and "Its passes alone" in printed
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [(row["size"], row["dtype"]) for row in rows] == [("d512", "fp32"), ("d512", "bf16")]
    assert all(float(row[name]) > 0 for row in rows for name in ("ours_ms", "plain_ms", "ratio", "overhead"))
    written = json.loads(content.read_text())
    assert written["threads"] == threads and written["generator"] == generator
    counts = {row["kind"]: row["count"] for row in written["passes"] if row["dtype"] == "fp32"}
    # Two fake updates and one of the generator; both teacher passes are guidance's.
    assert counts["fake score learning pass"] == counts["fake score optimizer"] == 2
    assert counts["generator learning pass"] == counts["generator optimizer"] == 1
    assert counts["teacher pass"] == 2 and counts["fake score pass"] == 1
    optimizers = counts["fake score optimizer"] + counts["generator optimizer"]
    assert sum(counts.values()) - optimizers == int(rows[0]["passes"])


def test_sides_that_compute_something_else_are_not_compared(tool):
    ours = {"fake_loss": 1.0, "dmd_gradient": 2.0}
    tool.check_agreement(ours, {"fake_loss": 1.01, "dmd_gradient": 2.01})
    with pytest.raises(RuntimeError, match="dmd_gradient is 2 here and 3 plainly"):
        tool.check_agreement(ours, {"fake_loss": 1.0, "dmd_gradient": 3.0})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repeats", "0"], "--repeats 0: must lie in [1, 1000000]"),
        (["--threads", "1000000000000"], "--threads 1000000000000: must lie in [0, 4096]"),
        (["--sizes", "d7"], "d7"),
        (["--dtypes", "fp16"], "fp16"),
        (["--repeat", "3"], "--repeat"),
    ],
)
def test_bad_input_is_refused_in_one_line(tool, flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main(flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_table_that_cannot_be_written_is_refused_before_the_work(tool, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tool, "benchmark", lambda *arguments: pytest.fail("the work began"))
    occupied = tmp_path / "file"
    occupied.write_text("")
    with pytest.raises(SystemExit) as stop:
        tool.main(["--csv", str(occupied / "step.csv")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(occupied) in error and error.count("\n") == 1

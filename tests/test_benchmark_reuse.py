"""tools/benchmark_reuse.py: what it times, and what it refuses."""

import json

import pytest
import torch

from megatron_pdmd.models import WanConfig
from megatron_pdmd.parallel import destroy_topology


@pytest.fixture(scope="module")
def tool(load_tool):
    load_tool("benchmark_step")
    yield load_tool("benchmark_reuse")
    destroy_topology()


def test_each_reuse_is_timed_and_its_frozen_passes_are_counted(tool, load_tool, monkeypatch, tmp_path, capsys):
    model = WanConfig(num_attention_heads=2, attention_head_dim=12, ffn_dim=32, num_layers=1, in_channels=1,
                      out_channels=1, text_dim=8, freq_dim=16, rope_max_seq_len=16)  # fmt: skip
    size = load_tool("benchmark_step").Size(model, latents=(1, 2, 4, 4), text=(3, 8), batch=2, fake_updates=1)
    monkeypatch.setattr(tool, "SIZES", {"d512": size})
    flags = ["--size", "d512", "--reuse", "1,2,3", "--fake-updates", "2", "--repeats", "2"]
    threads = torch.get_num_threads()
    written = tmp_path / "new" / "reuse.json"
    assert tool.main([*flags, "--threads", str(threads), "--json", str(written)]) == 0
    assert "One iteration" in capsys.readouterr().out
    content = json.loads(written.read_text())
    rows = content["iterations"]
    assert content["threads"] == threads
    assert [(row["reuse"], row["frozen"]) for row in rows] == [(1, 6), (2, 4), (3, 2)]
    assert len({row["passes"] - row["frozen"] for row in rows}) == 1
    assert rows[0]["ratio"] == 1 and all(row["cpu_ms"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reuse", "0"], "--reuse 0: must lie in [1, 1000000]"),
        (["--repeats", "0"], "--repeats 0: must lie in [1, 1000000]"),
        (["--size", "d7"], "d7"),
    ],
)
def test_bad_input_is_refused_in_one_line(tool, flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main(flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1

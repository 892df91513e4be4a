"""tools/benchmark_kernels.py at its small sizes."""

import csv
import json

import pytest
import torch

import pdmd_kernels


@pytest.fixture(scope="module")
def tool(load_tool):
    yield load_tool("benchmark_kernels")
    torch.set_num_threads(1)


@pytest.mark.skipif("native" not in pdmd_kernels.available_backends(), reason="the native kernels are not built")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_quick_run_writes_a_row_for_each_op(tool, tmp_path, capsys, dtype):
    files = ["--save", str(tmp_path), "--json", str(tmp_path / "rows.json")]
    flags = ["--quick", "--no-compile", "--repeats", "1", "--threads", "1", "--dtype", dtype]
    assert tool.main([*flags, *files]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    names = [row["name"] for row in rows]
    assert all(any(name.startswith(op) for name in names) for op in tool.SETUPS)
    assert all(row["native_ms"] > 0 and row["compiled_ms"] is None for row in rows)
    with (tmp_path / "kernels.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == names
    assert (tmp_path / "kernels.png").stat().st_size > 0
    assert "gated_residual" in capsys.readouterr().out


@pytest.mark.skipif("native" not in pdmd_kernels.available_backends(), reason="the native kernels are not built")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_fused_objective_holds_nothing_beside_x_t_and_the_gradient(tool, monkeypatch, dtype):
    monkeypatch.setattr("kernel_cases.QUICK_LATENTS", (2, 16, 5, 30, 52))
    memory = tool.objective_memory(tool.BenchmarkOptions(quick=True, dtype=dtype))
    assert memory["minimum"] <= memory["fused"] <= 1.01 * memory["minimum"]
    assert memory["eager"] >= 2 * memory["minimum"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dtype", "fp8"], "--dtype fp8 does not exist"),
        (["--repeats", "0"], "--repeats 0: must lie in [1, 1000000]"),
        (["--seconds", "-1"], "--seconds -1.0: must lie in [0, 86400]"),
        (["--seconds", "nan"], "--seconds: expected a finite number"),
        (["--threads", "1000000000"], "--threads 1000000000: must lie in [1, 4096]"),
        (["--json", "/dev/null/a.json"], "--json /dev/null: /dev/null is a file"),
        (["--ops", "matmul"], "--ops matmul does not exist"),
    ],
)
def test_bad_flags_are_refused_in_one_line(tool, flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main(flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err

"""The compiler's output for the GPU kernels: no spills, 128-bit accesses, the least bytes per element."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "inspect_kernels.py"
# One forward and one backward kernel of each shape of loop; the tool itself compiles all.
OPS = ("subinterval_loss", "modulated_layer_norm_backward", "rms_rope", "adamw_beta1_zero")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("inspect_kernels", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_kernels_do_not_spill_and_move_the_minimum(tool: ModuleType, tmp_path: Path, target: str) -> None:
    pytest.importorskip("triton")
    table = tmp_path / "table.json"
    arguments = ["--targets", target, "--dtypes", "bf16", "--only", ",".join(OPS), "--json", str(table)]
    assert tool.main(arguments) == 0
    findings = json.loads(table.read_text())
    assert {finding["op"] for finding in findings} == set(OPS)
    for finding in findings:
        assert finding["spills"] == 0 and not finding["faults"]
        assert finding["widest_load"] >= 16
        moved, minimum = (finding["loaded"], finding["stored"]), (finding["minimum_loaded"], finding["minimum_stored"])
        assert moved == minimum
    by_kernel = {finding["kernel"]: (finding["loaded"], finding["stored"]) for finding in findings}
    assert by_kernel["modulated_layer_norm_backward_kernel"] == (8, 10)  # the last case: one scale per token
    assert by_kernel["adamw_beta1_zero_kernel"] == (10, 10)
    assert ("adamw_beta1_zero.cu with copy" in by_kernel) == (shutil.which("nvcc") is not None)


def test_a_kernel_that_reads_twice_fails(tool: ModuleType) -> None:
    finding = tool.Finding("op", "kernel", "fp32", "sm_90", registers=32, spills=0, shared=0)
    sass = ["LDG.E.128 R0, [R2.64] ;", "LDG.E.128 R4, [R2.64] ;", "STG.E.128 [R8.64], R0 ;"]
    tool.measure(finding, sass, tool.Minimum(loaded=4, stored=4, elements=512, in_loop=False), threads=128)
    assert (finding.loaded, finding.stored, finding.faults) == (8, 4, ["not the minimum"])


def test_narrow_accesses_do_not_count(tool: ModuleType) -> None:
    finding = tool.Finding("op", "kernel", "fp32", "sm_90", registers=32, spills=3, shared=0)
    sass = [".L_x_0:", *["LDG.E.64 R0, [R2.64] ;"] * 2, "STG.E.128 [R8.64], R0 ;", "@P0 BRA `(.L_x_0) ;"]
    tool.measure(finding, sass, tool.Minimum(loaded=4, stored=4, elements=512, in_loop=True), threads=128)
    assert (finding.loaded, finding.stored) == (0, 4)
    assert finding.faults == ["3 spills", "not the minimum"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--targets", "sm_42"], "--targets"),
        (["--only", "softmax"], "--only"),
        (["--dtypes", "fp8"], "--dtypes"),
        (["--json", "/no/such/folder/table.json"], "--json"),
        (["--tragets", "sm_90"], "--tragets"),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_code_two(
    tool: ModuleType, capsys: pytest.CaptureFixture, arguments: list[str], named: str
) -> None:
    assert tool.main(arguments) == 2
    message = capsys.readouterr().err
    assert named in message and message.count("\n") == 1


def test_every_operation_is_inspected(tool: ModuleType) -> None:
    import torch

    from pdmd_kernels.triton import OPERATIONS

    assert set(tool.cases(torch.float32)) == set(OPERATIONS) - {"random_words"}

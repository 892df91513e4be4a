"""The compiler's output for the GPU kernels: no spills, 128-bit accesses, the least bytes per element."""

import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch

# One forward and one backward kernel of each shape of loop; the tool itself compiles all.
OPS = ("subinterval_loss", "modulated_layer_norm_backward", "rms_rope", "adamw_beta1_zero")


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("inspect_kernels")


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


def smallest_arguments() -> list[tuple[str, tuple]]:
    """Ops and arguments of one sample, token, head or element, for which Triton turns sizes into constants."""

    def make(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    one, x, y, row, weight, rope = make(1), make(1, 1, 2), make(1, 1), make(1, 1), make(2), make(1, 1, 2)
    several, shared, rows, seeds = make(2, 3, 1), make(2, 1, 1), make(2, 3), torch.empty(1, dtype=int, device="meta")
    return [
        ("normal", (seeds, 1, 1)),
        ("random_words", (seeds, 1, 0)),
        ("subinterval_noise", (y, seeds, one, one, torch.bfloat16)),
        ("subinterval_loss", (y, y, y, one, one, one, one)),
        ("dmd_gradient", (y, y, 0.3, y, one, y, y, one, 1e-6)),
        ("euler_step", (y, y, one, one, None)),
        ("modulated_layer_norm", (x[..., :1], x[..., :1], x[..., :1], 1e-6)),
        ("modulated_layer_norm_backward", (x, x, x, row, row, (True, True))),
        ("modulated_layer_norm_backward", (several, several, shared, rows, rows, (False, True))),
        ("gated_residual", (x, x, x)),
        ("gated_residual_backward", (several, several, shared, (True, True))),
        ("sum_of_squares", (y,)),
        ("rms_rope", (x, weight, row, None, 1)),
        ("rms_rope_backward_dots", (x, x, weight, row, rope, 1)),
        ("rms_rope_backward_dx", (x, x, weight, row, row, rope, 1)),
        ("rms_norm_rope", (x, weight, rope, 1, 1e-6)),
        ("rms_norm_rope_backward", (x, x, weight, row, rope, 1)),
        ("adamw_beta1_zero", ([one], [one], [one], [], 1e-3, 0.9, 1e-8, 0.0, 1, None)),
    ]


def test_kernels_compile_for_the_smallest_sizes(tool: ModuleType, tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")

    from pdmd_kernels.triton import launcher
    from pdmd_kernels.triton.launching import recorded_launches

    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        for op, arguments in smallest_arguments():
            with recorded_launches() as launches:
                launcher(op)(*arguments)
            assert launches and all(tool.compiled(launch, "sm_90")[0] for launch in launches), op


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
        (["--json", "/dev/null/table.json"], "--json"),
        (["--tragets", "sm_90"], "--tragets"),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_code_two(
    tool: ModuleType, capsys: pytest.CaptureFixture, arguments: list[str], named: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        tool.main(arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert named in message and message.count("\n") == 1


def test_every_operation_is_inspected(tool: ModuleType) -> None:
    from pdmd_kernels.triton import OPERATIONS

    assert set(tool.cases(torch.float32)) == set(OPERATIONS) - {"random_words"}

"""The trainer's own run on fake CUDA tensors: every axis and option that changes what it does with devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_pdmd.models.layers.tensor_parallel import partition_dim
from megatron_pdmd.models.wan.config import WanConfig
from megatron_pdmd.models.wan.model import WanModel

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
CP2 = ["--context-parallel-size", "2"]
OVERLAPS = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]

CASES = {
    "tensor and sequence parallel": ["--dry-run", "4", *TP2, "--sequence-parallel", "--bf16"],
    "ulysses": ["--dry-run", "4", *CP2, "--context-parallel-method", "ulysses", "--bf16"],
    "ring": ["--dry-run", "4", *CP2, "--context-parallel-method", "ring", "--bf16"],
    "ring in fp32": ["--dry-run", "2", *CP2, "--context-parallel-method", "ring"],
    "distributed optimizer": ["--dry-run", "4", *OVERLAPS, "--bf16", "--async-save"],
    "full generator": ["--dry-run", "2", "--generator", "full", "--ema-decay", "0.9"],
    "full generator in bf16": ["--dry-run", "2", *TP2, "--generator", "full", "--ema-decay", "0", "--bf16"],
    "full recompute without sheets": [
        *["--dry-run", "2", "--recompute-granularity", "full", "--bf16", "--sample-prompts", "0"],
    ],
    "selective recompute": ["--dry-run", "2", "--recompute-granularity", "selective", "--bf16", "--async-save"],
    "one fake expert, shared starts": [
        *["--dry-run", "1", "--fake-experts", "single", "--bf16", "--phase-start-reuse", "6"],
    ],
    "through the graph": [
        *["--dry-run", "2", "--phase-steps", "4", "--train-iters", "1", "--gradient-truncation", "none"],
        "--no-export",
    ],
    "evaluations": ["--dry-run", "4", *TP2, "--eval-interval", "50", "--global-batch-size", "4", "--bf16"],
    "stages": [
        *["--dry-run", "2", "--dry-run-rank", "1", *PP2, "--teacher", "PLACE/two_blocks", "--bf16"],
        *[
            "--phase-steps",
            "4",
            "--train-iters",
            "1",
            "--fake-experts",
            "single",
            "--no-export",
            "--sample-prompts",
            "0",
        ],
    ],
    "plain kernels, everything timed and warmed up": [
        *["--dry-run", "1", "--kernel-backend", "reference", "--timing-log-level", "2", "--log-throughput"],
        *["--lr-decay-style", "cosine", "--lr-warmup-iters", "5"],
    ],
    "every axis, another rank": [
        *["--dry-run", "8", "--dry-run-rank", "3", *TP2, *CP2, *OVERLAPS],
        *["--sequence-parallel", "--bf16", "--kernel-backend", "triton"],
    ],
}

# What one line that breaks a device does, and where the dry run must say that it is.
BROKEN = {
    "times stay on the CPU": (
        "megatron_pdmd/distillation/step.py",
        "t = torch.full((len(batch.samples),), move.t, device=self.device)",
        't = torch.full((len(batch.samples),), move.t, device="cpu")',
    ),
    "frequencies on the CPU": (
        "megatron_pdmd/models/wan/embeddings.py",
        "torch.arange(half, dtype=exact, device=t.device)",
        'torch.arange(half, dtype=exact, device="cpu")',
    ),
    "positions on the CPU": (
        "megatron_pdmd/models/wan/model.py",
        "rope = self.rope(grid, device=hidden.tokens.device,",
        'rope = self.rope(grid, device="cpu",',
    ),
    "the host reads a gap": (
        "megatron_pdmd/distillation/step.py",
        '"score_gap": gap.mean()}',
        '"score_gap": gap.new_tensor(gap.mean().item())}',
    ),
    "losses are averaged on the CPU": (
        "megatron_pdmd/training/trained_network.py",
        "dist.all_reduce(values, group=",
        "dist.all_reduce(values.cpu(), group=",
    ),
}


def environment() -> dict[str, str]:
    """One thread for each of the processes that run side by side."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def rehearsed(tiny: list[str]) -> dict[str, list]:
    """Exit code, stderr and report of each case; one process imports for all."""
    place = str(Path(tiny[tiny.index("--teacher") + 1]).parent)
    flags = json.dumps([[flag.replace("PLACE", place) for flag in tiny + case] for case in CASES.values()])
    program = [sys.executable, str(HERE / "rehearse_cases.py")]
    ended = subprocess.run(program, input=flags, capture_output=True, text=True, timeout=900, env=environment())
    assert ended.returncode == 0, ended.stderr
    return dict(zip(CASES, json.loads(ended.stdout), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_runs_from_the_flags_to_the_export(case: str, rehearsed: dict[str, list]) -> None:
    code, errors, report = rehearsed[case]
    assert code == 0, errors[-2000:]
    assert report["peak_bytes"] == max(moment["peak_bytes"] for moment in report["moments"]) > 0
    assert report["checkpoint_bytes"] > 0


@pytest.mark.parametrize("case", BROKEN)
def test_names_the_line_that_breaks_a_device(case: str, tiny: list[str]) -> None:
    file, old, new = BROKEN[case]
    number = next(i for i, line in enumerate((ROOT / file).read_text().splitlines(), start=1) if old in line)
    program = [sys.executable, str(HERE / "rehearse_broken.py"), file, old, new, *tiny, "--dry-run", "4", "--bf16"]
    ended = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, timeout=300, env=environment())
    assert ended.returncode == 1
    told = ended.stderr.strip().splitlines()[-1]
    assert told.startswith("dry run: ")
    assert f"{file}:{number}" in told


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--dry-run", "3", *TP2], "a world of 3 is not divisible by --tensor-model-parallel-size 2"),
        (["--dry-run", "32"], "--global-batch-size 16: not divisible"),
        (["--dry-run", "2", "--teacher", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags: list[str], told: str, tiny: list[str]) -> None:
    program = [sys.executable, "-m", "megatron_pdmd.planning.fake_cuda", "megatron_pdmd.dry_run", *tiny, *flags]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=300, env=environment())
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ") and told in line


@pytest.mark.parametrize(("case", "tensor"), [("ulysses", 1), ("tensor and sequence parallel", 2)])
def test_counts_the_teacher_to_the_byte(case: str, tensor: int, rehearsed: dict[str, list], tiny: list[str]) -> None:
    """Two experts, of which tensor parallelism leaves each rank its share."""
    config = Path(tiny[tiny.index("--teacher") + 1]) / "transformer" / "config.json"
    with torch.device("meta"):
        model = WanModel(WanConfig.from_hf(json.loads(config.read_text())), dtype=torch.bfloat16)
    shares = [p.nbytes // (1 if partition_dim(p) is None else tensor) for p in model.parameters()]
    moments = {moment["name"]: moment for moment in rehearsed[case][2]["moments"]}
    assert moments["load the teacher"]["held_bytes"] == 2 * sum(shares)

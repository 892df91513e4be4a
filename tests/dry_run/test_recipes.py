"""A recipe for 64 GPUs at its full size: 40 layers, two experts, 32,760 tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_pdmd.models.layers.tensor_parallel import partition_dim
from megatron_pdmd.models.wan.config import WAN_PRESETS
from megatron_pdmd.models.wan.model import WanModel

ROOT = Path(__file__).parents[2]
RECIPE = "wan2.2_t2v_a14b_phased.yaml"
TENSOR, RANKS = 4, 64


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("recipe") / "report.json"
    program = [sys.executable, "tools/dry_run_recipes.py", "--ranks", str(RANKS), "--json", str(path)]
    command = [*program, "--recipes", f"examples/recipes/{RECIPE}"]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(path.read_text())[RECIPE]


@pytest.fixture(scope="module")
def expert() -> WanModel:
    with torch.device("meta"):
        return WanModel(WAN_PRESETS["wan2.2-t2v-a14b"], dtype=torch.bfloat16)


def share(expert: WanModel, itemsize: int | None = None) -> int:
    """Bytes of one expert's parameters on a rank."""
    sizes = (p.numel() * (itemsize or p.itemsize) // (partition_dim(p) is None or TENSOR) for p in expert.parameters())
    return sum(sizes)


def test_a_rank_holds_its_share_of_both_experts(report: dict, expert: WanModel) -> None:
    moments = {moment["name"]: moment for moment in report["moments"]}
    assert moments["load the teacher"]["held_bytes"] == 2 * share(expert)


def test_phase_two_holds_the_teacher_two_fake_experts_and_their_gradients(report: dict, expert: WanModel) -> None:
    """Beside them: masters and second moments over 16 ranks, adapters, and nothing of the size of another network."""
    moments = {moment["name"]: moment for moment in report["moments"]}
    networks, gradients, ranks = 4 * share(expert), 2 * share(expert, itemsize=4), RANKS // TENSOR
    rest = moments["phase 2: generator update"]["held_bytes"] - networks - gradients - 4 * gradients // (2 * ranks)
    assert 0 < rest < share(expert) / 2


def test_activations_with_full_recomputation_are_far_below_one_network(report: dict, expert: WanModel) -> None:
    moments = {moment["name"]: moment for moment in report["moments"]}
    for name in ("phase 1: fake update", "phase 1: generator update"):
        assert 0 < moments[name]["peak_bytes"] - moments[name]["held_bytes"] < share(expert) / 2

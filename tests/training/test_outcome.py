"""What a finished run leaves, and what it does not."""

import json
from dataclasses import replace

import pytest
import torch

from megatron_pdmd.conversion.few_step_sampling import read_sampling
from megatron_pdmd.models.lora import merged_weights
from megatron_pdmd.training import outcome

SHORT = ("--train-iters", "1", "--save-interval", "0", "--export")


def test_an_export_knows_the_size_that_was_trained(launch, tmp_path):
    assert launch(tmp_path / "run", *SHORT) == 0
    assert read_sampling(tmp_path / "run" / "hf").latent_size == (2, 4, 4)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_does_not_export_what_is_not_finite(ranks, launch, run_ranks, tmp_path, monkeypatch, capfd):
    def spoilt(model, adapter):
        weights = merged_weights(model, adapter)
        name, whole = list(weights.items())[3]
        return weights | {name: replace(whole, gather=lambda: whole.gather() * torch.nan)}

    def rank() -> object:
        with pytest.raises(SystemExit) as stop:
            launch(tmp_path / "run", *SHORT)
        return stop.value.code

    monkeypatch.setattr(outcome, "merged_weights", spoilt)
    assert run_ranks(rank, ranks) == [2] * ranks
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert all("holds NaN or infinity, so nothing is exported" in line for line in told) and len(told) >= 1
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert "checkpoints" in left and not any("hf" in name for name in left)
    assert "summary.json" not in left


def test_a_summary_is_valid_json(tmp_path):
    numbers = {"a": [1.5, float("nan")], "b": {"c": float("-inf"), "d": None, "e": "text"}}
    outcome.write_summary(tmp_path, numbers)
    written = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert written == {"a": [1.5, None], "b": {"c": None, "d": None, "e": "text"}}

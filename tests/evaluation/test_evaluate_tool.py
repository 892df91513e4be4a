"""tools/evaluate.py on folders as tools/generate.py writes them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_pdmd.evaluation.moving_digits import all_motions
from megatron_pdmd.evaluation.moving_digits_report import real_clips

TOOL = Path(__file__).resolve().parents[2] / "tools" / "evaluate.py"
KEYS = {"digit_accuracy", "direction_accuracy", "speed_error", "diversity", "frechet_distance"}
PROMPTS = [motion.prompt for motion in all_motions()] * 2


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("evaluate")


@pytest.fixture
def samples(tmp_path: Path, digits) -> Path:
    return write_samples(tmp_path / "samples", real_clips(PROMPTS, *digits, seed=7), PROMPTS)


def write_samples(folder: Path, latents: torch.Tensor, prompts: list[str]) -> Path:
    folder.mkdir()
    save_file({"latents": latents}, folder / "samples.safetensors")
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    return folder


def test_metrics_are_saved_and_printed(tool, samples, tmp_path, capsys):
    save, table = tmp_path / "new" / "metrics.json", tmp_path / "table.json"
    tool.main(["--samples", str(samples), "--save", str(save), "--json", str(table)])
    saved, rows = json.loads(save.read_text()), json.loads(table.read_text())
    assert rows.keys() == {"samples", "real"} and rows["samples"].keys() == rows["real"].keys() == KEYS
    assert saved == {**rows["samples"], "real": rows["real"]}
    assert saved["digit_accuracy"] > 0.9 and saved["direction_accuracy"] == 1
    printed = capsys.readouterr().out
    assert all(word in printed for key in KEYS for word in key.split("_"))


def test_reference_takes_the_place_of_real_clips(tool, samples, tmp_path, digits):
    frozen = real_clips(PROMPTS, *digits, seed=7)[:, :, :1].repeat(1, 1, 5, 1, 1)
    reference = write_samples(tmp_path / "reference", frozen, PROMPTS)
    save = tmp_path / "metrics.json"
    tool.main(["--samples", str(samples), "--reference", str(samples), "--save", str(save)])
    assert json.loads(save.read_text())["frechet_distance"] < 1e-6
    tool.main(["--samples", str(samples), "--reference", str(reference), "--save", str(save)])
    saved = json.loads(save.read_text())
    assert saved["frechet_distance"] > 1 and saved["reference"]["direction_accuracy"] == 0


def break_no_latents(folder: Path) -> None:
    (folder / "samples.safetensors").unlink()


def break_truncated(folder: Path) -> None:
    file = folder / "samples.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def break_other_tensor(folder: Path) -> None:
    save_file({"images": torch.zeros(2)}, folder / "samples.safetensors")


def break_shape(folder: Path) -> None:
    save_file({"latents": torch.zeros(160, 16, 4)}, folder / "samples.safetensors")


def break_prompt_count(folder: Path) -> None:
    (folder / "prompts.txt").write_text("a 7 moving left quickly\n")


def break_no_prompts(folder: Path) -> None:
    (folder / "prompts.txt").unlink()


def break_foreign_prompt(folder: Path) -> None:
    (folder / "prompts.txt").write_text("a cat on a mat\n" * 160)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_no_latents, "no such file"),
        (break_truncated, "is truncated"),
        (break_other_tensor, "no tensor 'latents'"),
        (break_shape, "not [N, C, F, H, W]"),
        (break_prompt_count, "1 lines for 160 samples"),
        (break_no_prompts, "prompts.txt: no such file"),
        (break_foreign_prompt, "not a prompt of the moving-digits task"),
    ],
)
def test_bad_samples_exit_with_two(tool, samples, tmp_path, capsys, damage, message):
    damage(samples)
    assert message in refused(tool, capsys, "--samples", str(samples), "--save", str(tmp_path / "metrics.json"))
    assert not (tmp_path / "metrics.json").exists()


def refused(tool, capsys, *arguments: str) -> str:
    """The one line with which the tool ends."""
    with pytest.raises(SystemExit) as stop:
        tool.main(list(arguments))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


def test_what_cannot_be_written_is_refused_before_measuring(tool, samples, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tool, "evaluate", pytest.fail)
    (tmp_path / "file").touch()
    for save in (tmp_path, tmp_path / "file" / "x.json", tmp_path / ("n" * 300)):
        assert "--save" in refused(tool, capsys, "--samples", str(samples), "--save", str(save))
    arguments = ("--samples", str(samples), "--save", str(tmp_path / "a.json"))
    assert "--json" in refused(tool, capsys, *arguments, "--json", str(tmp_path))
    for seed in (2**63, 2**64, -(2**64)):
        assert "--seed" in refused(tool, capsys, *arguments, "--seed", str(seed))


def test_metrics_that_are_not_finite_are_not_saved(tool, samples, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tool, "evaluate", lambda options: {"samples": {"diversity": float("nan")}, "real": {}})
    error = refused(tool, capsys, "--samples", str(samples), "--save", str(tmp_path / "metrics.json"))
    assert "a metric is not finite" in error and not (tmp_path / "metrics.json").exists()


def test_the_process_itself_exits_with_two_and_without_traceback(tmp_path):
    command = [sys.executable, str(TOOL), "--samples", str(tmp_path / "none"), "--save", str(tmp_path / "metrics.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "samples.safetensors" in done.stderr

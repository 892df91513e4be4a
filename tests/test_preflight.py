"""Bad input ends in one line that names the flag or the file, and exit code 2, before a network is built."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from megatron_pdmd import preflight
from megatron_pdmd.arguments import to_yaml
from megatron_pdmd.data.prompts import PromptEmbeddings
from megatron_pdmd.models import WanConfig
from megatron_pdmd.models.wan.weights import tensor_shapes

ROOT = Path(__file__).parents[1]
MODEL = WanConfig(
    in_channels=1, out_channels=1, num_attention_heads=4, attention_head_dim=6, text_dim=4, freq_dim=2, ffn_dim=8,
    num_layers=1, rope_max_seq_len=64,
)  # fmt: skip
ENCODER = {
    "model_type": "umt5", "vocab_size": 5, "d_model": 4, "d_kv": 2, "d_ff": 8, "num_layers": 1, "num_heads": 2,
    "relative_attention_num_buckets": 4,
}  # fmt: skip


def write_model(folder: Path, name: str, config: WanConfig) -> None:
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "config.json").write_text(json.dumps(config.to_hf()))
    tensors = {tensor: torch.zeros(shape) for tensor, shape in tensor_shapes(config).items()}
    save_file(tensors, folder / name / "diffusion_pytorch_model.safetensors")


def write_text_encoder(folder: Path) -> None:
    config = UMT5Config(**ENCODER, feed_forward_proj="gated-gelu")
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    ByT5Tokenizer(model_max_length=8).save_pretrained(folder / "tokenizer")


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A pipeline folder that looks whole; its weights are never read here."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    for name in ("transformer", "transformer_2"):
        write_model(folder, name, MODEL)
    write_text_encoder(folder)
    index = {
        "_class_name": "WanPipeline",
        "boundary_ratio": 0.75,
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "ByT5Tokenizer"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def flags(teacher: Path, tmp_path: Path) -> list[str]:
    """Flags of a run that can be started."""
    (tmp_path / "prompts.txt").write_text("a seven\na one\n")
    files = ["--teacher", str(teacher), "--prompts", str(tmp_path / "prompts.txt"), "--save", str(tmp_path / "run")]
    return [*files, "--timestep-shift", "3", "--frames", "2", "--height", "4", "--width", "8"]


@pytest.fixture
def refusal(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """The function ``refusal(*more_flags)``: runs the check, which must refuse, and returns its one line."""

    def run(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["preflight", *flags, *more])
        with pytest.raises(SystemExit) as stop:
            preflight.main()
        assert stop.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
        return captured.err

    return run


def test_good_input_passes_and_is_planned(flags, tmp_path, capsys):
    plan = preflight.prepare(flags)
    assert plan.latent_shape == (1, 2, 4, 8)
    assert plan.phases.boundary == 0.75
    assert [(phase.expert, phase.end) for phase in plan.phases.phases] == [("high_noise", 0.75), ("low_noise", 0.0)]
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "run").exists()


def test_print_config_shows_the_resolved_yaml_and_exits_with_zero(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        preflight.prepare([*flags, "--print-config", "--seed", "9"])
    assert stop.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["training"]["seed"] == 9 and shown["method"]["timestep_shift"] == 3.0


def test_bad_flags_and_keys(refusal, tmp_path):
    assert "unknown flag '--sead'; did you mean '--seed'?" in refusal("--sead", "1")
    (tmp_path / "a.yaml").write_text("training: {sead: 1}")
    assert f"{tmp_path / 'a.yaml'}: training: unknown key 'sead'; did you mean 'seed'?" in refusal(
        "--config", str(tmp_path / "a.yaml")
    )


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--num-steps", "5"], "--phase-steps 2,2: 2 positive numbers must add up to --num-steps 5"),
        (["--timestep-shift", "1e300"], "--timestep-shift 1e+300: must lie in (0, 1000]"),
        (["--noise-interval", "fixed", "--fixed-timestep", "0.5"], "--fixed-timestep is 0.5"),
        (["--phase-steps", "2,1,1"], "give --phase-steps one or two numbers to export there"),
        (["--height", "5"], "--height 5: the teacher's patches are 2 wide; give a multiple of it"),
        (["--tensor-model-parallel-size", "3"], "--tensor-model-parallel-size 3 does not divide the model's 4 heads"),
        (["--tensor-model-parallel-size", "0"], "--tensor-model-parallel-size 0: must lie in [1, 4096]"),
        (["--sequence-parallel"], "--tensor-model-parallel-size is 1; raise it or drop --sequence-parallel"),
        (
            [
                "--tensor-model-parallel-size",
                "2",
                "--context-parallel-size",
                "4",
                "--context-parallel-method",
                "ulysses",
            ],
            "use a context size of 1 or 2, or ring",
        ),
        (
            ["--pipeline-model-parallel-size", "2"],
            "--pipeline-model-parallel-size 2: the model has 1 layers and a stage needs one; use 1 or fewer",
        ),
        (["--pipeline-layer-split", "1,1"], "names 2 stages, --pipeline-model-parallel-size is 1"),
        (["--pipeline-layer-split", "2"], "--pipeline-layer-split 2: adds up to 2, the model has 1 layers; give each"),
        (["--task", "moving_digits", "--task-folder", "nowhere"], "--task-folder nowhere: has no classifier"),
    ],
)
def test_plans_that_cannot_work(refusal, more, words):
    assert words in refusal(*more)


def test_folders_that_are_no_whole_pipeline(refusal, teacher):
    weights = teacher / "transformer_2" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    assert f"{weights}: is truncated" in refusal()
    weights.write_bytes(whole[:5])
    assert f"{weights}: is truncated" in refusal()
    weights.unlink()
    assert f"{weights.parent}: neither {weights.name} nor" in refusal()
    weights.write_bytes(whole)
    config = teacher / "transformer" / "config.json"
    config.write_text("{}")
    assert f"{config}: config: missing entries num_attention_heads" in refusal()
    (teacher / "model_index.json").unlink()
    assert f"{teacher}: no model_index.json in it" in refusal()
    assert "nowhere: no such folder" in refusal("--teacher", "nowhere")


def test_prompts_that_cannot_be_used(refusal, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n \n")
    assert f"--prompts {path}: no prompt in it" in refusal()
    path.write_bytes("ok\nschön".encode("latin-1"))
    assert f"--prompts {path}: line 2 is not UTF-8" in refusal()
    path.unlink()
    assert f"--prompts {path}: no such file" in refusal()
    (tmp_path / "empty").mkdir()
    assert f"--prompts {tmp_path / 'empty'}/prompts.json: no such file" in refusal("--prompts", str(tmp_path / "empty"))


def test_encoded_prompts_of_another_length_or_negative_prompt(refusal, flags, tmp_path):
    folder = tmp_path / "encoded"
    PromptEmbeddings(("a",), (torch.zeros(1, 8, 4),), torch.zeros(8, 4), negative_prompt="bad").save(folder)
    more = ["--prompts", str(folder)]
    assert "was encoded to 8 tokens, but 512 are asked for" in refusal(*more)
    assert "has another negative prompt, 'bad'" in refusal(*more, "--prompt-length", "8", "--negative-prompt", "worse")
    preflight.prepare([*flags, *more, "--prompt-length", "8"])


def test_text_prompts_need_a_text_encoder(refusal, teacher, flags, tmp_path):
    index = json.loads((teacher / "model_index.json").read_text())
    index["text_encoder"] = [None, None]
    (teacher / "model_index.json").write_text(json.dumps(index))
    assert "is text, and" in refusal() and "tools/encode_prompts.py" in refusal()


def test_folders_of_other_runs(refusal, flags, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "thesis.tex").write_text("")
    assert f"--save {run}: not empty and not a run's folder; choose another" in refusal()
    (run / "config.yaml").write_text(yaml.safe_dump({"training": {"seed": 1}}))
    assert f"--save {run}: holds another run: " in refusal()
    assert "--seed is 42 here, 1 there" in refusal()
    new = ["--save", str(tmp_path / "new"), "--load"]
    assert f"--load {run}: holds another run: " in refusal(*new, str(run))
    assert f"--load {tmp_path / 'none'}: no run there" in refusal(*new, str(tmp_path / "none"))


def test_encoded_prompts_that_are_not_the_teachers(refusal, flags, tmp_path):
    folder, more = tmp_path / "encoded", ["--prompt-length", "8"]
    PromptEmbeddings(("a",), (torch.zeros(1, 8, 6),), torch.zeros(8, 6)).save(folder)
    told = f"{folder}: embeddings are 6 wide, the teacher reads 4"
    assert f"--prompts {told}" in refusal(*more, "--prompts", str(folder))
    assert f"--eval-prompts {told}" in refusal(*more, "--eval-prompts", str(folder))
    PromptEmbeddings(("a",), (torch.zeros(1, 8, 4),), torch.zeros(8, 4)).save(folder)
    preflight.prepare([*flags, *more, "--prompts", str(folder)])
    shard = folder / "prompts-00001-of-00001.safetensors"
    save_file(load_file(shard) | {"embeddings": torch.full((1, 8, 4), float("nan"))}, shard)
    assert f"--prompts {folder}: tensor 'embeddings of shard 1' holds" in refusal(*more, "--prompts", str(folder))


def test_teachers_that_cannot_be_trained(refusal, teacher):
    write_model(teacher, "transformer_2", dataclasses.replace(MODEL, text_dim=8))
    assert "text_dim is 4 in one transformer and 8 in the other" in refusal()
    for name in ("transformer", "transformer_2"):
        write_model(teacher, name, dataclasses.replace(MODEL, in_channels=3))
    assert f"--teacher {teacher}: transformer reads 3 channels and writes 1, as image-to-video" in refusal()
    for name in ("transformer", "transformer_2"):
        write_model(teacher, name, dataclasses.replace(MODEL, text_dim=8))
    assert "embeddings are 4 wide, the teacher reads 8; is" in refusal()
    edit_json(teacher / "transformer" / "config.json", num_layers=1000)
    assert "config.json says 1000 layers, the weights have 1" in refusal()
    edit_json(teacher / "transformer" / "config.json", num_layers=1, patch_size=None)
    assert "transformer/config.json: patch_size None: expected three positive integers" in refusal()


def test_small_models_with_values_that_are_not_finite(refusal, teacher):
    spoilt = {
        "transformer_2/diffusion_pytorch_model": "proj_out.bias",
        "transformer/diffusion_pytorch_model": "blocks.0.ffn.net.2.bias",
        "text_encoder/model": "shared.weight",
    }
    for file, tensor in spoilt.items():
        path = teacher / f"{file}.safetensors"
        tensors = load_file(path)
        tensors[tensor].view(-1)[1] = float("nan")
        save_file(tensors, path)
        assert f"{path}: tensor '{tensor}' holds values that are not finite" in refusal()


def test_samples_beyond_the_positions_that_the_teacher_knows(refusal, flags):
    assert "--frames 65: the teacher knows positions up to 64" in refusal("--frames", "65")
    assert "--width 130: the teacher knows positions up to 128" in refusal("--width", "130")
    preflight.prepare([*flags, "--width", "128"])


def test_text_encoders_that_cannot_encode(refusal, teacher, monkeypatch):
    weights = teacher / "text_encoder" / "model.safetensors"
    whole = load_file(weights)
    save_file({name: tensor for name, tensor in whole.items() if "SelfAttention.q" not in name}, weights)
    assert f"{teacher / 'text_encoder'}: 1 missing tensors" in refusal()
    save_file(whole, weights)
    config = teacher / "text_encoder" / "config.json"
    edit_json(config, num_layers=10**6)
    assert "config.json says 1000000 layers, the weights have 1" in refusal()
    edit_json(config, num_layers=1)
    (teacher / "tokenizer" / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json: is not valid JSON" in refusal()
    for path in (teacher / "tokenizer").iterdir():
        path.unlink()
    assert f"{teacher / 'tokenizer'}: is empty" in refusal()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "encoding prompts needs transformers: run `pip install transformers`" in refusal()


@pytest.mark.parametrize("flag", ["--teacher", "--prompts", "--save", "--load", "--eval-prompts", "--task-folder"])
def test_paths_that_no_disk_takes(refusal, flag):
    for path in ("x" * 256, "a/" + "é" * 128, "/".join(["x" * 200] * 30), "a\0b", ""):
        assert f"{flag}: expected a path, its names of up to 255 bytes, got '" in refusal(flag, path)


def test_a_vae_that_could_not_decode_the_samples(refusal, teacher, flags):
    edit_json(teacher / "model_index.json", vae=["diffusers", "AutoencoderKLWan"])
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=2, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 2, latents_std=[1.0] * 2
    )
    vae.save_pretrained(teacher / "vae")
    assert f"--teacher {teacher}: its VAE decodes 2 channels, its transformers write 1" in refusal()
    preflight.prepare([*flags, "--sample-prompts", "0"])
    edit_json(teacher / "vae" / "config.json", num_res_blocks=10**6)
    assert "vae/config.json: 'num_res_blocks' is 1000000, more than the weights have" in refusal()


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "megatron_pdmd.preflight"],
        [sys.executable, "-m", "megatron_pdmd.pretrain"],
        ["bash", "examples/pretrain_phased_dmd.sh"],
    ],
    ids=lambda command: command[-1],
)
def test_the_commands_end_with_one_line_and_exit_code_2(command, flags, own_lines):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"}
    more = [*flags, "--teacher", "nowhere"]
    done = subprocess.run([*command, *more], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "starting" not in done.stdout
    assert own_lines(done.stderr) == ["error: nowhere: no such folder; name a Hugging Face pipeline folder"]


@pytest.mark.parametrize("name", ["hf", ".hf.old", ".hf.partial"])
def test_what_is_in_the_exports_way_is_found_before_training(refusal, flags, tmp_path, name):
    config = preflight.prepare(flags).config
    (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "run" / name / "thesis.txt").write_text("mine")
    assert f"--save {tmp_path / 'run' / 'hf'}: " in refusal()
    assert (tmp_path / "run" / name / "thesis.txt").read_text() == "mine"
    preflight.prepare([*flags, "--no-export"])


def test_a_measurement_that_cannot_work_is_found_before_training(refusal, flags, tmp_path):
    task = ["--task", "moving_digits", "--task-folder", str(ROOT / "examples" / "tiny_wan")]
    assert "the run's are [1, 2, 4, 8]; give --frames 5 --height 16 --width 16" in refusal(*task)
    task += ["--frames", "5", "--height", "16", "--width", "16"]
    assert "--prompts: 'a seven' is not a prompt of the moving-digits task" in refusal(*task)
    (tmp_path / "prompts.txt").write_text("a 7 moving left slowly\n" * 3 + "a cat\n")
    assert "--prompts: 'a cat' is not a prompt" in refusal(*task)
    assert "--clips 1: the distance between two sets needs at least 2" in refusal(*task, "--clips", "1")
    preflight.prepare([*flags, *task, "--clips", "3"])

"""The text encoder against diffusers' own pipeline."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, UMT5EncoderModel

from megatron_pdmd.data.text_encoder import TextEncoder, clean_prompt, encode_prompts

PROMPTS = ["a 7 moving left quickly", "", "  two\n\tlines &amp;amp; an entity ", "long " * 30, "naïve 文字"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_diffusers(text_folder: Path, dtype: torch.dtype) -> None:
    encoder = UMT5EncoderModel.from_pretrained(text_folder / "text_encoder", dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(text_folder / "tokenizer")
    pipeline = WanPipeline(tokenizer=tokenizer, text_encoder=encoder, vae=None, scheduler=None)
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(
            PROMPTS, do_classifier_free_guidance=False, max_sequence_length=32, device="cpu", dtype=dtype
        )
    ours = encode_prompts(text_folder, PROMPTS, max_length=32, dtype=dtype)
    assert ours.dtype == dtype
    assert torch.equal(ours, expected)
    assert expected[1].count_nonzero(dim=-1).count_nonzero() == 1, "the empty prompt is its end token alone"


def test_batches_do_not_change_the_result(text_folder: Path) -> None:
    whole = encode_prompts(text_folder, PROMPTS, max_length=32, batch_size=5)
    single = encode_prompts(text_folder, PROMPTS, max_length=32, batch_size=1)
    torch.testing.assert_close(single, whole)


def test_length_is_the_tokenizers_own_by_default(text_folder: Path) -> None:
    assert TextEncoder(text_folder).max_length == 40


def test_clean_prompt_is_diffusers() -> None:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    for prompt in PROMPTS:
        assert clean_prompt(prompt) == prompt_clean(prompt)


def test_missing_transformers_is_told(text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install transformers"):
        TextEncoder(text_folder)


@pytest.fixture
def copy(text_folder: Path, tmp_path: Path) -> Path:
    """A folder to damage."""
    return Path(shutil.copytree(text_folder, tmp_path / "copy"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, {"format": "pt"})


BLOCK = "encoder.block.0.layer.0."


def test_bad_folders_are_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer/"):
        TextEncoder(tmp_path / "absent")
    weights = copy / "text_encoder" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors: is truncated"):
        TextEncoder(copy)
    weights.unlink()
    torch.save({}, copy / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
        TextEncoder(copy)
    (copy / "text_encoder" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="'llama'"):
        TextEncoder(copy)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: edit_weights(folder, **{f"{BLOCK}SelfAttention.q.weight": None}),
            "1 missing tensors .*q.weight",
        ),
        (lambda folder: edit_weights(folder, **{"shared.weight": None}), "1 missing tensors .*shared.weight"),
        (lambda folder: edit_weights(folder, extra=torch.zeros(1)), "1 unexpected tensors .'extra'"),
        (
            lambda folder: edit_weights(folder, **{f"{BLOCK}layer_norm.weight": torch.ones(63)}),
            r"is \[63\], the config",
        ),
        (
            lambda folder: edit_weights(folder, **{f"{BLOCK}layer_norm.weight": torch.full((64,), torch.nan)}),
            "not finite",
        ),
        (lambda folder: edit_weights(folder, **{"shared.weight": torch.ones(384, 64, dtype=torch.int32)}), "is I32"),
        (lambda folder: edit_config(folder, num_layers=1_000_000), "says 1000000 layers, the weights have 1"),
        (lambda folder: edit_config(folder, d_ff=10**6), r"the config asks for \[1000000, 64\]"),
        (lambda folder: edit_config(folder, num_labels=10**12), "'num_labels' is 1000000000000; no text encoder"),
        (lambda folder: edit_config(folder, d_model=None), "d_model is None; expected a positive integer"),
        (lambda folder: edit_config(folder, d_model=[64]), "d_model is"),
        (lambda folder: edit_config(folder, num_heads=True), "num_heads is True"),
        (lambda folder: edit_config(folder, dense_act_fn="nothing"), "text_encoder: cannot be loaded"),
        (lambda folder: (folder / "tokenizer" / "tokenizer_config.json").write_text("{"), "tokenizer: cannot be used"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "no tokenizer/ in it"),
    ],
)
def test_damaged_encoders_are_refused_in_one_line(copy: Path, damage, message: str, capfd) -> None:
    damage(copy)
    with pytest.raises(ValueError, match=message) as refused:
        TextEncoder(copy)
    assert str(copy) in str(refused.value) and len(str(refused.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")


def test_a_whole_umt5_serves_as_text_encoder(copy: Path, text_folder: Path) -> None:
    weights = load_file(copy / "text_encoder" / "model.safetensors")
    edit_weights(
        copy, **{"decoder.final_layer_norm.weight": torch.ones(64), "lm_head.weight": weights["shared.weight"]}
    )
    assert torch.equal(encode_prompts(copy, PROMPTS), encode_prompts(text_folder, PROMPTS))


def test_tokens_and_embeddings_that_cannot_be_are_refused(copy: Path) -> None:
    weights = load_file(copy / "text_encoder" / "model.safetensors")
    edit_weights(copy, **{"shared.weight": weights["shared.weight"] * 3e38})
    with pytest.raises(ValueError, match="not finite"):
        TextEncoder(copy).encode(["one"])
    edit_weights(copy, **{"shared.weight": weights["shared.weight"][:100].clone()})
    edit_config(copy, vocab_size=100)
    with pytest.raises(ValueError, match=r"the tokenizer has token 1\d\d, the text encoder 100 tokens"):
        TextEncoder(copy).encode(["one"])


@pytest.mark.parametrize("length", [0, -1, 10**12])
def test_lengths_that_cannot_be_are_refused(text_folder: Path, length: int) -> None:
    with pytest.raises(ValueError, match=f"prompts of {length} tokens: choose a length from 1 to 8192"):
        TextEncoder(text_folder, max_length=length)

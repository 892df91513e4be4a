"""The text encoder against diffusers' own pipeline."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
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


def test_bad_folders_are_refused(text_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer/"):
        TextEncoder(tmp_path / "absent")
    folder = tmp_path / "copy"
    shutil.copytree(text_folder, folder)
    weights = folder / "text_encoder" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="cannot be loaded"):
        TextEncoder(folder)
    weights.unlink()
    torch.save({}, folder / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be loaded"):
        TextEncoder(folder)
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="'llama'"):
        TextEncoder(folder)

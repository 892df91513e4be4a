"""Samples folders: what generate wrote is read, and what is damaged is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_pdmd.evaluation.samples import load_samples

LATENTS = torch.linspace(-1, 1, 2 * 5 * 16).view(2, 1, 5, 4, 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"latents": LATENTS.bfloat16()}, tmp_path / "samples.safetensors")
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    return tmp_path


def test_what_was_written_is_read(folder):
    latents, prompts = load_samples(folder)
    assert torch.equal(latents, LATENTS.bfloat16().float()) and prompts == ["one", "two"]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"latents": LATENTS.where(LATENTS < 0.5, torch.nan)}, "'latents' holds values that are not finite"),
        ({"latents": LATENTS.long()}, "expected floating point"),
        ({"latents": LATENTS[0]}, r"latents \[1, 5, 4, 4\], not \[N, C, F, H, W\]"),
        ({"latents": LATENTS[:, :, :0]}, r"latents \[2, 1, 0, 4, 4\], not"),
        ({"latents": LATENTS[:1]}, "2 lines for 1 samples"),
        ({"other": LATENTS}, "holds no tensor 'latents'"),
    ],
)
def test_samples_that_cannot_be_measured(folder, tensors, words):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "samples.safetensors")
    with pytest.raises(ValueError, match=words):
        load_samples(folder)


def test_prompts_that_cannot_be_read(folder):
    (folder / "prompts.txt").write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match=r"prompts.txt: is not UTF-8"):
        load_samples(folder)
    (folder / "prompts.txt").unlink()
    with pytest.raises(ValueError, match=r"prompts.txt: no such file"):
        load_samples(folder)

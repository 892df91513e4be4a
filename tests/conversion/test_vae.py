"""Decoding latents against diffusers' pipeline."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from safetensors.torch import load_file, save_file

from megatron_pdmd.conversion.pipeline_folder import read_pipeline
from megatron_pdmd.conversion.vae import decode_latents


@pytest.fixture
def folder(tmp_path: Path, one_expert: Path) -> Path:
    """A pipeline with a VAE."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=2, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.3, -0.2], latents_std=[1.5, 0.7]
    )
    folder = tmp_path / "pipeline"
    shutil.copytree(one_expert, folder)
    vae.save_pretrained(folder / "vae")
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"vae": ["diffusers", "AutoencoderKLWan"]}))
    return folder


def test_decodes_as_diffusers_pipeline_does(folder: Path) -> None:
    latents = torch.randn(2, 2, 2, 4, 6)
    pixels = decode_latents(read_pipeline(folder), latents)
    assert pixels.shape == (2, 3, 5, 32, 48)

    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.transformer.register_to_config(in_channels=2)
    pipeline.scheduler.set_timesteps = lambda *args, **kwargs: setattr(pipeline.scheduler, "timesteps", [])
    videos = pipeline(
        prompt_embeds=torch.zeros(2, 32, 64), latents=latents, height=32, width=64, num_frames=5,
        guidance_scale=1.0, output_type="pt",
    ).frames  # fmt: skip
    torch.testing.assert_close((pixels.transpose(1, 2) + 1) / 2, videos)


def test_another_vae_is_refused(one_expert: Path) -> None:
    with pytest.raises(ValueError, match="AutoencoderKLWan, not None"):
        decode_latents(read_pipeline(one_expert), torch.zeros(1, 1, 1, 8, 8))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


BIAS = "decoder.conv_out.bias"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: edit_weights(folder, **{BIAS: None}), f"1 missing tensors .'{BIAS}'"),
        (lambda folder: edit_weights(folder, extra=torch.zeros(1)), "1 unexpected tensors .'extra'"),
        (lambda folder: edit_weights(folder, **{BIAS: torch.zeros(7)}), r"is \[7\], the config asks for \[3\]"),
        (lambda folder: edit_weights(folder, **{BIAS: torch.full((3,), torch.inf)}), "conv_out.bias' holds .* not fin"),
        (lambda folder: edit_config(folder, num_res_blocks=1_000_000), "'num_res_blocks' is 1000000, more than"),
        (lambda folder: edit_config(folder, num_res_blocks=100), "num_res_blocks is 100, more than"),
        (lambda folder: edit_config(folder, base_dim=10**12), "'base_dim' is 1000000000000, more than"),
        (lambda folder: edit_config(folder, dim_mult=[1, 1, 1, 100]), "base_dim is 4, more than"),
        (lambda folder: edit_config(folder, dim_mult=[1] * 1000), "'dim_mult' is"),
        (lambda folder: edit_config(folder, dim_mult=None), "dim_mult is None"),
        (lambda folder: edit_config(folder, base_dim="wide"), "vae: cannot be loaded"),
        (lambda folder: edit_config(folder, latents_std=[1.0, 0.0]), "latents_std is .1.0, 0.0.; expected"),
        (lambda folder: edit_config(folder, latents_mean=[1.0]), "latents_mean has 1 numbers for z_dim 2"),
        (lambda folder: edit_config(folder, latents_mean="0"), "latents_mean is '0'; expected numbers"),
    ],
)  # fmt: skip
def test_damaged_vaes_are_refused_in_one_line(folder: Path, damage, message: str, capfd) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message) as refused:
        decode_latents(read_pipeline(folder), torch.zeros(1, 2, 2, 4, 6))
    assert str(folder / "vae") in str(refused.value) and len(str(refused.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")

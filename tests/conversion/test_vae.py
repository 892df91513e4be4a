"""Decoding latents against diffusers' pipeline."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline

from megatron_pdmd.conversion.pipeline_folder import read_pipeline
from megatron_pdmd.conversion.vae import decode_latents


def test_decodes_as_diffusers_pipeline_does(tmp_path: Path, one_expert: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=2, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.3, -0.2], latents_std=[1.5, 0.7]
    )
    folder = tmp_path / "pipeline"
    shutil.copytree(one_expert, folder)
    vae.save_pretrained(folder / "vae")
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"vae": ["diffusers", "AutoencoderKLWan"]}))
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

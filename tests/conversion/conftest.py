"""Tiny Wan pipelines with random weights, of one transformer and of two."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel


def new_transformer(seed: int) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        patch_size=(1, 4, 4),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        text_dim=64,
        freq_dim=256,
        ffn_dim=256,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )


@pytest.fixture(scope="session")
def make_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """Writes a pipeline folder with one expert or two, shift 3 and boundary 0.75."""

    def make(two_experts: bool) -> Path:
        torch.manual_seed(0)
        config = UMT5Config(
            vocab_size=384, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu"
        )
        pipeline = WanPipeline(
            tokenizer=ByT5Tokenizer(model_max_length=32),
            text_encoder=UMT5EncoderModel(config),
            vae=None,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=new_transformer(1),
            transformer_2=new_transformer(2) if two_experts else None,
            boundary_ratio=0.75 if two_experts else None,
        )
        folder = tmp_path_factory.mktemp("two" if two_experts else "one") / "tiny_wan"
        pipeline.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def two_experts(make_pipeline: Callable[[bool], Path]) -> Path:
    return make_pipeline(True)


@pytest.fixture(scope="session")
def one_expert(make_pipeline: Callable[[bool], Path]) -> Path:
    return make_pipeline(False)

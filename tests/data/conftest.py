"""A tiny text encoder with random weights in a pipeline folder."""

from pathlib import Path

import pytest
import torch
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text_pipeline")
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=384, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu"
    )
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    ByT5Tokenizer(model_max_length=40).save_pretrained(folder / "tokenizer")
    return folder

"""A teacher of one block and prompts for it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from megatron_pdmd.data.prompts import PromptEmbeddings
from megatron_pdmd.models.wan.config import WanConfig
from megatron_pdmd.planning.skeleton import preset_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> list[str]:
    """Flags of a run of two experts of one block each, of which nothing but the configuration is there.

    Beside their folder lies that of others of two blocks.
    """
    place = tmp_path_factory.mktemp("one_block")
    config = json.loads((ROOT / "examples/tiny_wan/transformer/config.json").read_text())
    model = dataclasses.replace(WanConfig.from_hf(config), num_layers=1)
    preset_folder(place / "teacher", model, boundary_ratio=0.75)
    preset_folder(place / "two_blocks", dataclasses.replace(model, num_layers=2), boundary_ratio=0.75)
    text = torch.zeros(2, 32, model.text_dim)
    PromptEmbeddings(("one", "another"), (text,), text[0]).save(place / "prompts")
    return [
        *["--config", str(ROOT / "examples/recipes/tiny_wan.yaml")],
        *["--teacher", str(place / "teacher"), "--prompts", str(place / "prompts"), "--task", "none"],
        *["--global-batch-size", "16", "--micro-batch-size", "2"],
    ]

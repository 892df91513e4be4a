"""The bundled classifier and held-out digits."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_pdmd.evaluation.clip_classifier import ClipClassifier, load_classifier
from megatron_pdmd.evaluation.heldout_digits import load_heldout_digits


@pytest.fixture(scope="session")
def tiny_wan() -> Path:
    return Path(__file__).resolve().parents[2] / "examples" / "tiny_wan"


@pytest.fixture(scope="session")
def classifier(tiny_wan: Path) -> ClipClassifier:
    return load_classifier(tiny_wan / "classifier.safetensors")


@pytest.fixture(scope="session")
def digits(tiny_wan: Path) -> tuple[torch.Tensor, torch.Tensor]:
    return load_heldout_digits(tiny_wan / "heldout_digits.png")


@pytest.fixture(scope="session")
def other_device() -> ModuleType:
    """The module other_device.py."""
    spec = importlib.util.spec_from_file_location("other_device", Path(__file__).parent / "other_device.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

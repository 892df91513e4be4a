"""What a request for samples needs, known from headers and configs alone, and refused where it cannot be had."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_pdmd.conversion.pipeline_folder import PipelineFolder
from megatron_pdmd.errors import is_out_of_memory
from megatron_pdmd.models.loading import read_model_folder
from megatron_pdmd.models.wan import WanConfig
from megatron_pdmd.models.wan.weights import tensor_shapes

LARGE_MODEL = 10**9  # numbers in a network from which on bfloat16 and one sample at a time are the defaults


def text_to_video_config(folder: PipelineFolder, subfolder: str) -> WanConfig:
    """The shape of one of a folder's transformers, whose headers are found to fit it.

    Raises:
        ValueError: config and weights are no Wan model's, or the model takes more than noise and text.
    """
    model = read_model_folder(folder.path / subfolder)
    if model.config.in_channels != model.config.out_channels:
        raise ValueError(f"{model.path}: takes an image besides noise; only text-to-video models are sampled")
    return model.config


def count_weights(config: WanConfig) -> int:
    """Numbers in a transformer."""
    return sum(math.prod(shape) for shape in tensor_shapes(config).values())


def check_latent_size(config: WanConfig, size: tuple[int, int, int]) -> None:
    """Refuses frames, rows and columns that a model's patches do not divide or its rotary embedding does not reach.

    Raises:
        ValueError: names the flag.
    """
    for flag, side, patch in zip(("--frames", "--height", "--width"), size, config.patch_size, strict=True):
        if side % patch:
            raise ValueError(f"{flag} {side}: the model's patches are {patch} wide; give a multiple of it")
        if side // patch > config.rope_max_seq_len:
            raise ValueError(f"{flag} {side}: the model knows up to {config.rope_max_seq_len * patch}; give fewer")


def check_text_width(width: object, text_dim: int, path: Path) -> None:
    """Refuses embeddings that a model cannot read.

    Args:
        width: of the embeddings.
        text_dim: what the model reads.
        path: where they, or their encoder, come from.

    Raises:
        ValueError: names the path.
    """
    if width != text_dim:
        raise ValueError(
            f"{path}: embeddings are {width} wide, the model reads {text_dim}; use the text encoder that it "
            "was trained with"
        )


def check_device(name: str) -> torch.device:
    """The device of a flag's `auto`, `cpu` or `cuda`.

    Raises:
        ValueError: there is no CUDA here.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no CUDA device here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def check_memory(needed: int, device: torch.device, what: str, mend: str) -> None:
    """Refuses what is larger than a device's whole memory.

    Args:
        needed: bytes.
        device: where they would be.
        what: what they are.
        mend: what to do instead.

    Raises:
        ValueError: says how much is needed and there.
    """
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(f"{what}: {needed / 2**30:.1f} GiB needed, {device.type} has {there / 2**30:.1f} GiB; {mend}")


@contextmanager
def memory_told(mend: str) -> Iterator[None]:
    """A device or machine without the memory that the block needs is told in one line, with what to do.

    Raises:
        ValueError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        text = " ".join(str(error).split())
        raise ValueError(f"not enough memory ({text[:160]}); {mend}") from None

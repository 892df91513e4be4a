"""The samples folder that `tools/generate.py` writes and `tools/evaluate.py` reads."""

from pathlib import Path

import torch

from megatron_pdmd.files.documents import read_text
from megatron_pdmd.files.safetensors_files import read_tensors, require_finite
from megatron_pdmd.limits import shown

LATENTS_FILE, PROMPTS_FILE = "samples.safetensors", "prompts.txt"


def load_samples(folder: Path) -> tuple[torch.Tensor, list[str]]:
    """Latents [N, C, F, H, W] from `samples.safetensors` and the N lines of `prompts.txt`.

    Raises:
        ValueError: a file is missing or unreadable, or the two do not fit together.
    """
    tensors = load_tensors(folder / LATENTS_FILE, "a folder written by tools/generate.py has it")
    prompts_file = folder / PROMPTS_FILE
    if "latents" not in tensors:
        raise ValueError(f"{folder / LATENTS_FILE} holds no tensor 'latents'; write it with tools/generate.py")
    latents = tensors["latents"]
    if latents.ndim != 5 or not latents.numel():
        shape = shown(list(latents.shape))
        raise ValueError(f"{folder / LATENTS_FILE} holds latents {shape}, not [N, C, F, H, W], all of them above 0")
    prompts = read_text(prompts_file).removesuffix("\n").split("\n")
    if len(prompts) != len(latents):
        raise ValueError(
            f"{prompts_file} has {len(prompts)} lines for {len(latents)} samples; one line per sample is needed"
        )
    return latents.float(), prompts


def load_tensors(path: Path, remedy: str) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, floating-point numbers and finite.

    Args:
        path: the file.
        remedy: what to do if it cannot be used, the end of the error's line.

    Raises:
        ValueError: the file is missing, damaged or holds other numbers.
    """
    try:
        tensors = read_tensors(path)
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise ValueError(f"{path}: tensor {shown(repr(name))} is {tensor.dtype}; expected floating point")
        require_finite(tensors.items(), path)
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from None
    return tensors

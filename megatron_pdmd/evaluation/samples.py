"""The samples folder that `tools/generate.py` writes and `tools/evaluate.py` reads."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

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
    if latents.ndim != 5 or not len(latents):
        raise ValueError(f"{folder / LATENTS_FILE} holds latents {list(latents.shape)}, not [N, C, F, H, W] with N > 0")
    try:
        prompts = prompts_file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {prompts_file}: it must be UTF-8 text, one prompt per sample") from error
    if len(prompts) != len(latents):
        raise ValueError(
            f"{prompts_file} has {len(prompts)} lines for {len(latents)} samples; one line per sample is needed"
        )
    return latents.float(), prompts


def load_tensors(path: Path, remedy: str) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file.

    Args:
        path: the file.
        remedy: what to do if it is missing, the end of the error's line.

    Raises:
        ValueError: the file is missing or not a whole safetensors file.
    """
    if not path.is_file():
        raise ValueError(f"no file {path}; {remedy}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); {remedy}") from error

"""Encodes prompts once, so that training and sampling need no text encoder.

python tools/encode_prompts.py --prompts prompts.txt --text-encoder Wan2.2-T2V-A14B-Diffusers --save data/prompts
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_pdmd.data.prompts import encode_shards, holds_prompts, read_prompts, write_prompts
from megatron_pdmd.data.text_encoder import LONGEST_PROMPT, TextEncoder
from megatron_pdmd.errors import parse_options, user_errors
from megatron_pdmd.files.whole import check_destination


@dataclass(frozen=True)
class EncodeOptions:
    """What is encoded, by what, and where it goes."""

    # Text file with a prompt in each line.
    prompts: Path
    # Hugging Face pipeline folder with text_encoder/ and tokenizer/.
    text_encoder: Path
    # Folder for the embeddings.
    save: Path
    # Tokens a prompt is padded or cut to; by default the tokenizer's own limit, at most 512.
    max_length: int | None = None
    # What the teacher's guidance leads away from.
    negative_prompt: str = ""
    # Prompts in one file.
    shard_size: int = 1024
    # Number format of encoder and embeddings.
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # Where the encoder runs; auto takes a GPU where there is one.
    device: Literal["auto", "cpu", "cuda"] = "auto"


def main() -> None:
    with user_errors():
        encode(parse_options(EncodeOptions, __doc__))


def encode(options: EncodeOptions) -> None:
    """Reads, encodes and writes, one shard at a time."""
    if options.shard_size < 1:
        raise ValueError(f"--shard-size {options.shard_size}: must be greater than 0")
    if options.max_length is not None and not 1 <= options.max_length <= LONGEST_PROMPT:
        raise ValueError(f"--max-length {options.max_length}: must lie between 1 and {LONGEST_PROMPT}")
    device, has_cuda = options.device, torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ValueError("--device cuda: torch finds no GPU here; choose cpu, or auto")
    if device == "auto":
        device = "cuda" if has_cuda else "cpu"
    prompts = read_prompts(options.prompts)
    check_destination(options.save, "--save", holds_prompts)
    try:
        encoder = TextEncoder(
            options.text_encoder, max_length=options.max_length, dtype=getattr(torch, options.dtype), device=device
        )
    except ValueError as error:
        raise ValueError(f"--text-encoder {error}") from None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        task = progress.add_task("prompts", total=len(prompts))
        shards = encode_shards(
            encoder, prompts, shard_size=options.shard_size, advance=lambda count: progress.advance(task, count)
        )
        write_prompts(
            options.save,
            prompts,
            (shard.cpu() for shard in shards),
            encoder.encode([options.negative_prompt])[0].cpu(),
            negative_prompt=options.negative_prompt,
            encoder=encoder.name,
            shard_size=options.shard_size,
        )
    print(f"{len(prompts)} prompts of {encoder.max_length} tokens in {options.save}")


if __name__ == "__main__":
    main()

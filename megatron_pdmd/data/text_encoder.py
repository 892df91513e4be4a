"""Prompts to embeddings, as Wan was trained on them. The one file that imports transformers, which only this needs."""

import html
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

MAX_TOKENS = 512  # what Wan's text input is padded to


class TextEncoder:
    """UMT5 and its tokenizer, read from a pipeline folder's `text_encoder/` and `tokenizer/`.

    Nothing is fetched from a network, no code of the folder is run, and only safetensors are read.

    Attributes:
        name: the folder's name and the encoder's class, to be kept beside embeddings.
        max_length: tokens that a prompt is padded or cut to.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_length: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        """Loads both.

        Args:
            folder: a pipeline folder.
            max_length: tokens; where not given, the tokenizer's own limit, at most Wan's 512.
            dtype: of the encoder's weights and of the embeddings.
            device: where the encoder runs.

        Raises:
            ValueError: transformers is missing, or the folder lacks a part, has a broken one or another encoder.
        """
        transformers = _transformers()
        transformers.utils.logging.disable_progress_bar()
        folder = Path(folder)
        _check_folder(folder)
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder / "tokenizer", local_files_only=True, trust_remote_code=False
            )
            self._encoder = transformers.UMT5EncoderModel.from_pretrained(
                folder / "text_encoder", local_files_only=True, use_safetensors=True, dtype=dtype
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"--text-encoder {folder}: tokenizer or text encoder cannot be loaded ({reason})"
            ) from None
        self._encoder = self._encoder.to(device).eval().requires_grad_(False)
        self._dtype = dtype
        self.max_length = max_length or min(MAX_TOKENS, self._tokenizer.model_max_length)
        if self.max_length < 1:
            raise ValueError(f"--max-length {self.max_length}: must be greater than 0")
        self.name = f"{folder.resolve().name}/UMT5EncoderModel"

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        """Embeddings [N, L, D]: padding is masked from attention, and zero in the result.

        The same as diffusers' `WanPipeline.encode_prompt`.
        """
        tokens = self._tokenizer(
            [clean_prompt(prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.max_length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask = tokens.attention_mask.to(self._encoder.device)
        hidden = self._encoder(tokens.input_ids.to(mask.device), mask).last_hidden_state
        return hidden.masked_fill(mask[..., None] == 0, 0).to(self._dtype)


def encode_prompts(
    folder: Path,
    prompts: Sequence[str],
    *,
    max_length: int | None = None,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 8,
) -> torch.Tensor:
    """Embeddings [N, L, D] of all prompts; see `TextEncoder`."""
    encoder = TextEncoder(folder, max_length=max_length, dtype=dtype)
    batches = [prompts[first : first + batch_size] for first in range(0, len(prompts), batch_size)]
    return torch.cat([encoder.encode(batch) for batch in batches])


def clean_prompt(text: str) -> str:
    """Mends encoding slips where ftfy is installed, resolves HTML entities twice and joins white space, as Wan does."""
    if importlib.util.find_spec("ftfy"):
        text = importlib.import_module("ftfy").fix_text(text)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()


def _transformers() -> ModuleType:
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError:
        raise ValueError(
            "encoding prompts needs transformers: run `pip install transformers`, or pass a folder of encoded prompts"
        ) from None


def _check_folder(folder: Path) -> None:
    for part in ("tokenizer", "text_encoder"):
        if not (folder / part).is_dir():
            raise ValueError(f"--text-encoder {folder}: no {part}/ in it; name a Hugging Face pipeline folder")
    config = folder / "text_encoder" / "config.json"
    try:
        content: Any = json.loads(config.read_text(encoding="utf-8"))
        model_type = content["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"--text-encoder: {config} is missing or not a model's configuration") from None
    if model_type != "umt5":
        raise ValueError(f"--text-encoder: {config} describes a '{model_type}' model; Wan's text encoder is 'umt5'")

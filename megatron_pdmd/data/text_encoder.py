"""Prompts to embeddings, as Wan was trained on them. The one file that imports transformers, which only this needs."""

import html
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from megatron_pdmd.data.umt5 import read_umt5_config
from megatron_pdmd.errors import library_reason
from megatron_pdmd.files.documents import read_json_object
from megatron_pdmd.files.safetensors_files import require_finite

MAX_TOKENS = 512  # what Wan's text input is padded to
_MISSING = "encoding prompts needs transformers: run `pip install transformers`, or pass a folder of encoded prompts"
LONGEST_PROMPT = 8192  # tokens; attention takes the square of them


class TextEncoder:
    """UMT5 and its tokenizer, read from a pipeline folder's `text_encoder/` and `tokenizer/`.

    Nothing is fetched from a network, no code of the folder is run, and only safetensors are read.

    Attributes:
        name: the folder's name and the encoder's class, to be kept beside embeddings.
        max_length: tokens that a prompt is padded or cut to.
        folder: the pipeline folder.
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
            ValueError: transformers is missing, or the folder lacks a part or a tensor, has a broken one, another
                encoder, or weights that are not finite.
        """
        if max_length is not None:
            _check_length(max_length)
        transformers = _transformers()
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        folder = Path(folder)
        self._vocabulary = read_umt5_config(folder)["vocab_size"]
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder / "tokenizer", local_files_only=True, trust_remote_code=False
            )
            self.max_length = max_length or min(MAX_TOKENS, int(self._tokenizer.model_max_length))
            self._tokens([""])  # fails where it cannot pad
        except Exception as error:
            raise ValueError(f"{folder / 'tokenizer'}: cannot be used ({library_reason(error)})") from None
        try:
            self._encoder, found = transformers.UMT5EncoderModel.from_pretrained(
                folder / "text_encoder",
                local_files_only=True,
                use_safetensors=True,
                dtype=dtype,
                output_loading_info=True,
            )
        except Exception as error:
            raise ValueError(f"{folder / 'text_encoder'}: cannot be loaded ({library_reason(error)})") from None
        if filled := sorted(found["missing_keys"]) + sorted(found["mismatched_keys"]):
            raise ValueError(f"{folder / 'text_encoder'}: has no {filled[0]}; is the download complete?")
        self._encoder = self._encoder.eval().requires_grad_(False)
        require_finite(self._encoder.named_parameters(), folder / "text_encoder")
        try:
            self._encoder = self._encoder.to(device)
        except torch.OutOfMemoryError:
            raise ValueError(
                f"{folder / 'text_encoder'}: has no room on {device}; encode the prompts beforehand with"
                " tools/encode_prompts.py --device cpu, or in bfloat16"
            ) from None
        self._dtype = dtype
        self.folder = folder
        self.name = f"{folder.resolve().name}/UMT5EncoderModel"

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        """Embeddings [N, L, D]: padding is masked from attention, and zero in the result.

        The same as diffusers' `WanPipeline.encode_prompt`.

        Raises:
            ValueError: the tokenizer's tokens are not the encoder's, or what comes out is not finite.
        """
        tokens = self._tokens(prompts)
        if int(tokens.input_ids.max()) >= self._vocabulary:
            raise ValueError(
                f"{self.folder}: the tokenizer has token {int(tokens.input_ids.max())}, the text encoder"
                f" {self._vocabulary} tokens; do they belong together?"
            )
        mask = tokens.attention_mask.to(self._encoder.device)
        hidden = self._encoder(tokens.input_ids.to(mask.device), mask).last_hidden_state
        embeddings = hidden.masked_fill(mask[..., None] == 0, 0).to(self._dtype)
        require_finite([("last_hidden_state", embeddings)], self.folder / "text_encoder")
        return embeddings

    def _tokens(self, prompts: Sequence[str]) -> Any:
        """Token numbers and attention mask, [N, L] each."""
        return self._tokenizer(
            [clean_prompt(prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.max_length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )


def check_text_encoder(folder: Path, max_length: int) -> int:
    """Refuses, before anything is loaded, an encoder that could not encode.

    Args:
        folder: a pipeline folder.
        max_length: tokens of a prompt.

    Returns:
        Width D of the embeddings.

    Raises:
        ValueError: transformers is missing, a part of the folder is missing or damaged, or the prompts are too long.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(_MISSING)
    _check_length(max_length)
    tokenizer = folder / "tokenizer"
    config = read_umt5_config(folder)
    if not any(tokenizer.iterdir()):
        raise ValueError(f"{tokenizer}: is empty; is the download complete?")
    if (tokenizer / "tokenizer_config.json").exists():
        read_json_object(tokenizer / "tokenizer_config.json")
    return config["d_model"]


def _check_length(max_length: int) -> None:
    if not 1 <= max_length <= LONGEST_PROMPT:
        raise ValueError(f"prompts of {max_length} tokens: choose a length from 1 to {LONGEST_PROMPT}")


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
        raise ValueError(_MISSING) from None

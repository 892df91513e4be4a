"""Prompts and their embeddings: read from text, saved as sharded safetensors, mapped back into memory."""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron_pdmd.data.text_encoder import TextEncoder

_INDEX = "prompts.json"
_FORMAT = "megatron-pdmd-prompts"
_SHARD = re.compile(r"prompts-(\d{5})-of-(\d{5})\.safetensors")
ENCODING_BATCH = 8


@contextmanager
def naming_flag(flag: str) -> Iterator[None]:
    """The errors of what reads prompts inside the block name another flag than --prompts."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("--prompts", flag)) from None


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one in each line; blank lines are skipped.

    Raises:
        ValueError: no such file, no prompt in it, or a line that is not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--prompts {path}: no such file; give a text file with a prompt in each line")
    prompts = []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        try:
            prompts.append(line.decode("utf-8").strip())
        except UnicodeDecodeError:
            raise ValueError(f"--prompts {path}: line {number} is not UTF-8; save the file in that encoding") from None
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ValueError(f"--prompts {path}: no prompt in it; write one in each line")
    return prompts


@dataclass(frozen=True)
class PromptEmbeddings:
    """Prompts with what the text encoder made of them.

    Attributes:
        prompts: N texts.
        shards: their embeddings in order, each [n, L, D]; those of a loaded folder stay memory-mapped, so that a large
            set costs no memory until it is read.
        negative: [L, D], the embedding of `negative_prompt`.
        negative_prompt: what guidance leads away from.
        encoder: which text encoder made them.
    """

    prompts: tuple[str, ...]
    shards: tuple[torch.Tensor, ...]
    negative: torch.Tensor
    negative_prompt: str = ""
    encoder: str = ""

    def __post_init__(self) -> None:
        shapes = {tuple(shard.shape[1:]) for shard in self.shards} | {tuple(self.negative.shape)}
        if len(shapes) != 1:
            raise ValueError(f"embeddings of different shapes: {sorted(shapes)}")
        if sum(len(shard) for shard in self.shards) != len(self.prompts):
            raise ValueError(f"{sum(len(shard) for shard in self.shards)} embeddings for {len(self.prompts)} prompts")

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def max_length(self) -> int:
        """L, the tokens of an embedding."""
        return self.negative.shape[0]

    @property
    def embeddings(self) -> torch.Tensor:
        """All of them in one tensor [N, L, D]."""
        return self.shards[0] if len(self.shards) == 1 else torch.cat(self.shards)

    def batch(self, indices: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """The embeddings of some prompts, [B, L, D]."""
        return torch.stack([self._row(int(index)) for index in indices])

    def _row(self, index: int) -> torch.Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        for shard in self.shards:
            if index < len(shard):
                return shard[index]
            index -= len(shard)
        raise AssertionError("the shards hold every prompt")

    def save(self, folder: Path, *, shard_size: int = 1024) -> None:
        """Writes the folder that `load` reads; see `write_prompts`."""
        rows = (
            self.batch(range(first, min(first + shard_size, len(self)))) for first in range(0, len(self), shard_size)
        )
        write_prompts(
            folder,
            self.prompts,
            rows,
            self.negative,
            negative_prompt=self.negative_prompt,
            encoder=self.encoder,
            shard_size=shard_size,
        )

    @classmethod
    def load(cls, folder: Path) -> "PromptEmbeddings":
        """Reads a folder of encoded prompts.

        Raises:
            ValueError: not such a folder, a shard missing or damaged, or embeddings that do not fit the texts.
        """
        folder = Path(folder)
        index = _read_index(folder)
        paths = _shard_paths(folder)
        contents = []
        for path in paths:
            try:
                contents.append(load_file(path))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"--prompts: {path} cannot be read ({error}); encode the prompts again") from None
        try:
            shards, negative = tuple(content["embeddings"] for content in contents), contents[0]["negative"]
            return cls(tuple(index["prompts"]), shards, negative, index["negative_prompt"], index["encoder"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"--prompts {folder}: texts and embeddings do not fit ({error}); encode again") from None


def write_prompts(
    folder: Path,
    prompts: Sequence[str],
    shards: Iterable[torch.Tensor],
    negative: torch.Tensor,
    *,
    negative_prompt: str,
    encoder: str,
    shard_size: int,
) -> None:
    """Writes embeddings shard by shard, so that only one has to be in memory; the index, last, marks the folder whole.

    Args:
        folder: a new or empty one, or one of encoded prompts, which is replaced.
        prompts: N texts.
        shards: ceil(N / shard_size) tensors [n, L, D]; all but the last have `shard_size` rows.
        negative: [L, D].
        negative_prompt: its text.
        encoder: name of the text encoder.
        shard_size: prompts in one file.

    Raises:
        ValueError: the folder holds something else.
    """
    folder = Path(folder)
    prepare_folder(folder)
    count = math.ceil(len(prompts) / shard_size)
    length = 0
    for number, shard in enumerate(shards, start=1):
        path = folder / f"prompts-{number:05d}-of-{count:05d}.safetensors"
        tensors = {"embeddings": shard.contiguous()} | ({"negative": negative.contiguous()} if number == 1 else {})
        save_file(tensors, path)
        length += len(shard)
    assert length == len(prompts), f"{length} embeddings for {len(prompts)} prompts"
    index = {
        "format": _FORMAT,
        "encoder": encoder,
        "max_length": negative.shape[0],
        "negative_prompt": negative_prompt,
        "prompts": list(prompts),
    }
    (folder / _INDEX).write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def prepare_folder(folder: Path) -> None:
    """Makes the folder, and removes encoded prompts that are in it.

    Raises:
        ValueError: something else is in it.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--save {folder}: is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    ours = [path for path in folder.iterdir() if path.name == _INDEX or _SHARD.fullmatch(path.name)]
    if len(ours) != len(list(folder.iterdir())):
        raise ValueError(f"--save {folder}: holds other files than encoded prompts; name a new or empty folder")
    for path in ours:
        path.unlink()


def load_prompts(
    path: Path,
    text_encoder: Path | None = None,
    *,
    max_length: int | None = None,
    negative_prompt: str = "",
    dtype: torch.dtype = torch.float32,
) -> PromptEmbeddings:
    """Embeddings of a folder of encoded prompts, or of a text file, which is encoded now.

    Args:
        path: folder or text file.
        text_encoder: pipeline folder with the text encoder; needed for a text file.
        max_length: tokens; where not given, what the folder has or the tokenizer says. A folder must agree with it.
        negative_prompt: encoded along with a text file; a folder has its own.
        dtype: of the embeddings of a text file.

    Raises:
        ValueError: see `read_prompts`, `PromptEmbeddings.load` and `TextEncoder`.
    """
    path = Path(path)
    if path.is_dir():
        loaded = PromptEmbeddings.load(path)
        if max_length not in (None, loaded.max_length):
            raise ValueError(
                f"--prompts {path}: was encoded to {loaded.max_length} tokens, but {max_length} are asked for"
            )
        if negative_prompt not in ("", loaded.negative_prompt):
            raise ValueError(f"--prompts {path}: has another negative prompt, '{loaded.negative_prompt}'; encode again")
        return loaded
    prompts = read_prompts(path)
    if text_encoder is None:
        raise ValueError(
            f"--prompts {path}: is text; name a pipeline folder that has a text encoder, or encode it first"
        )
    encoder = TextEncoder(text_encoder, max_length=max_length, dtype=dtype)
    shards = tuple(encode_shards(encoder, prompts, shard_size=len(prompts)))
    return PromptEmbeddings(tuple(prompts), shards, encoder.encode([negative_prompt])[0], negative_prompt, encoder.name)


def encode_shards(
    encoder: TextEncoder, prompts: Sequence[str], *, shard_size: int, advance: Callable[[int], None] | None = None
) -> Iterator[torch.Tensor]:
    """Embeddings [n, L, D] of `shard_size` prompts at a time; `advance` hears of every batch's number of prompts."""
    for first in range(0, len(prompts), shard_size):
        rows = []
        for start in range(first, min(first + shard_size, len(prompts)), ENCODING_BATCH):
            rows.append(encoder.encode(prompts[start : min(start + ENCODING_BATCH, first + shard_size)]))
            if advance:
                advance(len(rows[-1]))
        yield torch.cat(rows)


def _read_index(folder: Path) -> dict:
    path = folder / _INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(
            f"--prompts {folder}: no readable {_INDEX} in it; make the folder with encode_prompts.py"
        ) from None
    texts = index.get("prompts") if isinstance(index, dict) else None
    whole = isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)
    if not whole or index.get("format") != _FORMAT or not {"encoder", "negative_prompt"} <= index.keys():
        raise ValueError(f"--prompts: {path} is not an index of encoded prompts; make it with encode_prompts.py")
    return index


def _shard_paths(folder: Path) -> list[Path]:
    """The shards, found by their names alone: a path inside the index could lead out of the folder."""
    found = sorted((match.groups(), path) for path in folder.iterdir() if (match := _SHARD.fullmatch(path.name)))
    counts = {int(count) for (_, count), _ in found}
    expected = list(range(1, max(counts, default=0) + 1))
    if len(counts) != 1 or [int(number) for (number, _), _ in found] != expected:
        raise ValueError(f"--prompts {folder}: shards are missing or of different sets; encode the prompts again")
    return [path for _, path in found]

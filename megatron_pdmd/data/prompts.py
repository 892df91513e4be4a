"""Prompts and their embeddings: read from text, saved as sharded safetensors, mapped back into memory."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_pdmd.data.text_encoder import TextEncoder
from megatron_pdmd.files.documents import read_json_object
from megatron_pdmd.files.safetensors_files import READ_AT_LAUNCH, read_tensors, require_finite
from megatron_pdmd.files.whole import replaced_whole, write_json

_INDEX = "prompts.json"
_FORMAT = "megatron-pdmd-prompts"
_SHARD = re.compile(r"prompts-(\d{5})-of-(\d{5})\.safetensors")
_LARGEST_TEXT = 2**30  # bytes
ENCODING_BATCH = 8


def read_prompts(path: Path, flag: str = "--prompts") -> list[str]:
    """The prompts of a text file, one in each line; blank lines are skipped.

    Args:
        path: the file.
        flag: option that names it, for errors.

    Raises:
        ValueError: no such file, no prompt in it, or a line that is not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        problem = "not a file" if path.exists() else "no such file"
        raise ValueError(f"{flag} {path}: {problem}; give a text file with a prompt in each line")
    if path.stat().st_size > _LARGEST_TEXT:
        raise ValueError(
            f"{flag} {path}: has {path.stat().st_size} bytes; is it a text file with a prompt in each line?"
        )
    prompts = []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        try:
            prompts.append(line.decode("utf-8").strip())
        except UnicodeDecodeError:
            raise ValueError(f"{flag} {path}: line {number} is not UTF-8; save the file in that encoding") from None
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ValueError(f"{flag} {path}: no prompt in it; write one in each line")
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
        kinds = {(tuple(shard.shape[1:]), shard.dtype) for shard in self.shards}
        kinds |= {(tuple(self.negative.shape), self.negative.dtype)}
        if len(kinds) != 1:
            raise ValueError(f"embeddings of different shapes or dtypes: {', '.join(sorted(map(str, kinds)))}")
        if self.negative.ndim != 2 or not self.negative.numel() or not self.negative.is_floating_point():
            raise ValueError(f"embeddings of shape {list(self.negative.shape)} in {self.negative.dtype}")
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

    def require_finite(self, where: str, part: int = 0, parts: int = 1) -> None:
        """Refuses embeddings that are not finite; several ranks may share the work.

        Args:
            where: names the prompts in errors.
            part: index of this reader.
            parts: number of readers, who read shards in turn.

        Raises:
            ValueError: names the shard.
        """
        shards = enumerate(self.shards, start=1)
        require_finite([("negative", self.negative)], where)
        require_finite(((f"embeddings of shard {n}", shard) for n, shard in shards if n % parts == part), where)

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
    def load(cls, folder: Path, flag: str = "--prompts") -> "PromptEmbeddings":
        """Reads a folder of encoded prompts. The values of a large one are left to `require_finite`.

        Args:
            folder: as `write_prompts` made it.
            flag: option that names it, for errors.

        Raises:
            ValueError: not such a folder, a shard missing or damaged, embeddings that do not fit the texts or that are
                not finite.
        """
        folder = Path(folder)
        index = _read_index(folder, flag)
        paths = _shard_paths(folder, flag)
        try:
            contents = [read_tensors(path) for path in paths]
        except ValueError as error:
            raise ValueError(f"{flag} {error}") from None
        for number, (path, content) in enumerate(zip(paths, contents, strict=True)):
            if content.keys() != ({"embeddings", "negative"} if number == 0 else {"embeddings"}):
                raise ValueError(f"{flag} {path}: holds other tensors than embeddings; encode the prompts again")
        try:
            shards, negative = tuple(content["embeddings"] for content in contents), contents[0]["negative"]
            loaded = cls(tuple(index["prompts"]), shards, negative, index["negative_prompt"], index["encoder"])
        except ValueError as error:
            raise ValueError(f"{flag} {folder}: texts and embeddings do not fit ({error}); encode again") from None
        if index.get("max_length") != loaded.max_length:
            raise ValueError(
                f"{flag} {folder}: {_INDEX} says another max_length than {loaded.max_length}; encode again"
            )
        if sum(shard.nbytes for shard in shards) <= READ_AT_LAUNCH:
            loaded.require_finite(f"{flag} {folder}")
        return loaded


def write_prompts(folder: Path, *arguments: Any, **options: Any) -> None:
    """Writes all of `shards_written`."""
    for _ in shards_written(folder, *arguments, **options):
        pass


def shards_written(
    folder: Path,
    prompts: Sequence[str],
    shards: Iterable[torch.Tensor],
    negative: torch.Tensor,
    *,
    negative_prompt: str,
    encoder: str,
    shard_size: int,
    flag: str = "--save",
) -> Iterator[int]:
    """Writes embeddings shard by shard, so that only one has to be in memory. The folder is there whole or not at all.

    Args:
        folder: a new or empty one, or one of encoded prompts, which is replaced.
        prompts: N texts.
        shards: ceil(N / shard_size) tensors [n, L, D]; all but the last have `shard_size` rows.
        negative: [L, D].
        negative_prompt: its text.
        encoder: name of the text encoder.
        shard_size: prompts in one file.
        flag: option that names the folder, for errors.

    Yields:
        How many prompts have been written, after each shard. The folder is there when the last was asked for.

    Raises:
        ValueError: the folder holds something else, or a value is not finite.
    """
    count, length = math.ceil(len(prompts) / shard_size), 0
    with replaced_whole(Path(folder), flag, holds_prompts) as partial:
        for number, shard in enumerate(shards, start=1):
            name = f"prompts-{number:05d}-of-{count:05d}.safetensors"
            tensors = {"embeddings": shard.contiguous()} | ({"negative": negative.contiguous()} if number == 1 else {})
            require_finite(tensors.items(), name)
            save_file(tensors, partial / name)
            length += len(shard)
            yield length
        assert length == len(prompts), f"{length} embeddings for {len(prompts)} prompts"
        index = {
            "format": _FORMAT,
            "encoder": encoder,
            "max_length": negative.shape[0],
            "negative_prompt": negative_prompt,
            "prompts": list(prompts),
        }
        write_json(partial / _INDEX, index)


def holds_prompts(folder: Path) -> bool:
    """Whether there is nothing but encoded prompts in a folder, whole or not."""
    return all(path.name == _INDEX or _SHARD.fullmatch(path.name) for path in folder.iterdir())


def load_prompts(
    path: Path,
    text_encoder: Path | None = None,
    *,
    max_length: int | None = None,
    negative_prompt: str = "",
    dtype: torch.dtype = torch.float32,
    flag: str = "--prompts",
) -> PromptEmbeddings:
    """Embeddings of a folder of encoded prompts, or of a text file, which is encoded now.

    Args:
        path: folder or text file.
        text_encoder: pipeline folder with the text encoder; needed for a text file.
        max_length: tokens; where not given, what the folder has or the tokenizer says. A folder must agree with it.
        negative_prompt: encoded along with a text file; a folder has its own.
        dtype: of the embeddings of a text file.
        flag: option that names the path, for errors.

    Raises:
        ValueError: see `read_prompts`, `PromptEmbeddings.load` and `TextEncoder`.
    """
    path = Path(path)
    if path.is_dir():
        loaded = PromptEmbeddings.load(path, flag)
        if max_length not in (None, loaded.max_length):
            raise ValueError(
                f"{flag} {path}: was encoded to {loaded.max_length} tokens, but {max_length} are asked for"
            )
        if negative_prompt not in ("", loaded.negative_prompt):
            raise ValueError(f"{flag} {path}: has another negative prompt, '{loaded.negative_prompt}'; encode again")
        return loaded
    prompts = read_prompts(path, flag)
    if text_encoder is None:
        raise ValueError(f"{flag} {path}: is text; name a pipeline folder that has a text encoder, or encode it first")
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


def _read_index(folder: Path, flag: str) -> dict[str, Any]:
    path = folder / _INDEX
    try:
        index = read_json_object(path)
    except ValueError as error:
        raise ValueError(f"{flag} {error}; encode_prompts.py makes such a folder") from None
    texts, others = index.get("prompts"), (index.get("encoder"), index.get("negative_prompt"))
    whole = isinstance(texts, list) and texts and all(map(_is_text, (*texts, *others)))
    if not whole or index.get("format") != _FORMAT:
        raise ValueError(f"{flag} {path}: is not an index of encoded prompts; make it with encode_prompts.py")
    return index


def _is_text(value: Any) -> bool:
    """Whether a value out of JSON is a text that can be written again: JSON has halves of characters."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _shard_paths(folder: Path, flag: str) -> list[Path]:
    """The shards, found by their names alone: a path inside the index could lead out of the folder."""
    found = sorted((match.groups(), path) for path in folder.iterdir() if (match := _SHARD.fullmatch(path.name)))
    counts = {int(count) for (_, count), _ in found}
    numbers = [int(number) for (number, _), _ in found]
    if counts != {len(found)} or numbers != list(range(1, len(found) + 1)):
        raise ValueError(f"{flag} {folder}: shards are missing or of different sets; encode the prompts again")
    return [path for _, path in found]

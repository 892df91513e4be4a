"""What a run's inputs contain, in digests: a run goes on with the same teacher and prompts, wherever they lie now."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_pdmd.conversion.pipeline_folder import PipelineFolder
from megatron_pdmd.files.documents import read_json_object
from megatron_pdmd.files.whole import write_json

FINGERPRINTS = "fingerprints.json"

# Of a file of weights its header, its size and so many evenly spread blocks are digested: training changes all of a
# tensor, and a hundred GB cost a second.
_BLOCKS, _BLOCK = 64, 4096
_WHOLE = 2**20  # bytes; smaller files are digested whole
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit


@dataclass(frozen=True)
class Fingerprints:
    """Digests of a run's inputs.

    Attributes:
        teacher: of each file of the teacher that a run computes with, by its path in the pipeline folder.
        prompts: of the text file, or of each file of encoded prompts by its name.
    """

    teacher: Mapping[str, str]
    prompts: Mapping[str, str]

    @classmethod
    def of(cls, source: PipelineFolder, prompts: Path) -> "Fingerprints":
        """Reads what a run would.

        Raises:
            OSError: a file cannot be read.
        """
        folders = list(source.experts.values())
        if prompts.is_dir():
            texts = {path.name: _digest(path) for path in _files(prompts)}
        else:
            texts = {"text": _digest(prompts)}
            folders += [name for name in ("text_encoder", "tokenizer") if (source.path / name).is_dir()]
        return cls(_of_folders(source.path, folders) | {"boundary_ratio": str(source.boundary_ratio)}, texts)

    def write(self, folder: Path) -> None:
        """Puts them into a run's folder."""
        write_json(folder / FINGERPRINTS, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "Fingerprints | None":
        """Those of a run's folder; None where it has none.

        Raises:
            ValueError: the file is damaged.
        """
        path = folder / FINGERPRINTS
        if not path.exists():
            return None
        content = read_json_object(path)
        whole = content.keys() == {"teacher", "prompts"} and all(
            isinstance(part, dict) and all(isinstance(digest, str) for digest in part.values())
            for part in content.values()
        )
        if not whole:
            raise ValueError(f"{path}: holds no digests of a teacher and of prompts; remove it to go on without them")
        return cls(**content)

    def differences(self, other: "Fingerprints") -> list[str]:
        """What these inputs have otherwise than those a run began with, `other`."""
        found = []
        for flag, ours, theirs in (
            ("--teacher", self.teacher, other.teacher),
            ("--prompts", self.prompts, other.prompts),
        ):
            changed = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
            if changed:
                more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
                found.append(f"{flag} has another {changed[0]}{more} than the run began with")
        return found


def check_teacher(run: Path, source: PipelineFolder) -> None:
    """Refuses a teacher with other networks than the one a run was trained with, where the run has digests of it.

    Args:
        run: its folder.
        source: the teacher.

    Raises:
        ValueError: names a file that differs.
    """
    saved = Fingerprints.read(run)
    if saved is None:
        return
    ours = _of_folders(source.path, source.experts.values())
    theirs = {
        name: digest for name, digest in saved.teacher.items() if name.partition("/")[0] in source.experts.values()
    }
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(f"--load {run}: was trained with another {name} than {source.path} has; give its teacher")


def _of_folders(folder: Path, names: Iterable[str]) -> dict[str, str]:
    return {f"{name}/{path.name}": _digest(path) for name in names for path in _files(folder / name)}


def _files(folder: Path) -> Iterator[Path]:
    """What is read of a folder: settings, vocabularies and weights. An index of weights says only where they lie."""
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".txt", ".model", ".safetensors") and not path.name.endswith(".index.json"):
            yield path


def _digest(path: Path) -> str:
    if path.name == "config.json":
        content = {name: value for name, value in read_json_object(path).items() if not name.startswith("_")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    size = path.stat().st_size
    with path.open("rb") as file:
        if path.suffix != ".safetensors" or size <= _WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        header = file.read(min(int.from_bytes(file.read(8), "little"), _LONGEST_HEADER))
        digest.update(header)
        start = 8 + len(header)
        span = max(size - start - _BLOCK, 0)
        for block in range(_BLOCKS):
            file.seek(start + span * block // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK))
        return digest.hexdigest()

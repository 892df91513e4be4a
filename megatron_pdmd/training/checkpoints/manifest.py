"""`metadata.json`, the versioned manifest of a checkpoint: how far the run was, and whether that can be."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_pdmd.files.documents import read_json_object
from megatron_pdmd.files.whole import write_json
from megatron_pdmd.training.logs.interval import Sums

FORMAT_VERSION = 3
MANIFEST = "metadata.json"
_LARGEST = 2**53  # of a count; JSON's readers agree on whole numbers up to it
_ELSEWHERE = "go on from another checkpoint"


class CheckpointError(ValueError):
    """A checkpoint cannot be used."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        iteration: generator updates done in the whole run.
        phase: 1-based phase that the next iteration belongs to (or the last one, when it is done).
        phase_iteration: generator updates done in that phase.
        consumed_samples: samples that generator updates have used; where the run is in its data.
        skipped_updates: updates left out because a loss or a gradient norm was not finite.
        train_seconds: wall time of training in all launches: iterations, sample sheets, checkpoints.
    """

    iteration: int = 0
    phase: int = 1
    phase_iteration: int = 0
    consumed_samples: int = 0
    skipped_updates: int = 0
    train_seconds: float = 0.0


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint knows besides its tensors. With `Progress`, the seed is the whole state of the random counter.

    Attributes:
        progress: how far the run was.
        optimizer_steps: updates that each optimizer has made.
        seed: of the random counter.
        models: the network's shape for each of the teacher's experts, by the config's fields.
        layout: ranks along each axis that wrote it; for the reader's information.
        open_updates: what was to be logged of each fake update that was done of an unfinished iteration.
        log_interval_sums: what the next log entry's means have summed up; see `training.interval`.
        skipped_in_a_row: updates of each trained network that were skipped since its last one that was not.
    """

    progress: Progress
    optimizer_steps: dict[str, int] = field(default_factory=dict)
    seed: int = 0
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    layout: dict[str, int] = field(default_factory=dict)
    open_updates: list[dict[str, float]] = field(default_factory=list)
    log_interval_sums: Sums = field(default_factory=dict)
    skipped_in_a_row: dict[str, int] = field(default_factory=dict)

    def write(self, checkpoint: Path) -> None:
        """Puts it into a checkpoint's folder. A number that is not finite, of an update that was skipped, is null."""
        content = {"format_version": FORMAT_VERSION, "ckpt_format": "torch_dist"} | asdict(self)
        write_json(checkpoint / MANIFEST, _nulls_for_nans(content))

    @classmethod
    def read(cls, checkpoint: Path) -> "Manifest":
        """That of a checkpoint's folder.

        Raises:
            CheckpointError: it is missing, damaged, of another version, or says what cannot be.
        """
        path = checkpoint / MANIFEST
        if not path.is_file():
            raise CheckpointError(f"{checkpoint}: incomplete ({MANIFEST} is missing); {_ELSEWHERE}")
        try:
            content = read_json_object(path)
        except ValueError as error:
            raise CheckpointError(f"{path}: not a checkpoint's manifest ({error}); {_ELSEWHERE}") from None
        version = content.get("format_version")
        if type(version) is int and version != FORMAT_VERSION:
            raise CheckpointError(
                f"{checkpoint}: format version {version}; this program reads version {FORMAT_VERSION}; {_ELSEWHERE}"
            )
        if version != FORMAT_VERSION or not _is_manifest(content):
            raise CheckpointError(f"{path}: not a checkpoint's manifest; {_ELSEWHERE}")
        known = {one.name: content[one.name] for one in fields(cls) if one.name in content}
        numbers = {name: _nans_for_nulls(content[name]) for name in ("open_updates", "log_interval_sums")}
        manifest = cls(**known | numbers | {"progress": Progress(**content["progress"])})
        for words in _contradictions(manifest, checkpoint):
            raise CheckpointError(f"{path}: {words}, which cannot be; {_ELSEWHERE}")
        return manifest


def checkpoint_name(iteration: int) -> str:
    """Megatron's folder name of an iteration."""
    return f"iter_{iteration:07d}"


def _contradictions(manifest: Manifest, checkpoint: Path) -> Iterator[str]:
    """What cannot be about numbers that are numbers, in words."""
    at, steps = manifest.progress, manifest.optimizer_steps
    for name, count in [*asdict(at).items(), *steps.items(), *manifest.skipped_in_a_row.items()]:
        if not 0 <= count <= _LARGEST:
            yield f"{name} is {count}"
    if not 0 <= manifest.seed < 2**64:
        yield f"seed is {manifest.seed}"
    if checkpoint.with_suffix("").name != checkpoint_name(at.iteration):
        yield f"iteration is {at.iteration} in a folder of that name"
    before = at.iteration - at.phase_iteration
    if at.phase < 1 or before < at.phase - 1 or (at.phase == 1 and before):
        yield f"phase is {at.phase}, with {at.phase_iteration} of the run's {at.iteration} iterations"
    if steps.get("generator", 0) > at.phase_iteration:
        yield f"the generator made {steps['generator']} updates in {at.phase_iteration} iterations"
    if at.consumed_samples < at.iteration or bool(at.consumed_samples) != bool(at.iteration):
        yield f"{at.iteration} iterations consumed {at.consumed_samples} samples"


def _is_manifest(content: Mapping[str, Any]) -> bool:
    """Whether everything is there, with the types it has."""
    progress, types = content.get("progress"), {one.name: one.type for one in fields(Progress)}
    names = ("optimizer_steps", "models", "layout", "open_updates", "log_interval_sums")
    steps, models, layout, updates, sums = (content.get(name) for name in names)
    return (
        isinstance(progress, dict)
        and {name: type(value) for name, value in progress.items()} == types
        and type(content.get("seed")) is int
        and _are_counts(steps)
        and _are_counts(content.get("skipped_in_a_row", {}))  # older runs have none
        and isinstance(models, dict)
        and all(isinstance(shape, dict) for shape in models.values())
        and isinstance(layout, dict)
        and isinstance(updates, list)
        and all(isinstance(update, dict) for update in updates)
        and all(_is_number(number) for update in updates for number in update.values())
        and isinstance(sums, dict)
        and all(isinstance(pair, list) and len(pair) == 2 for pair in sums.values())
        and all(_is_number(number) for pair in sums.values() for number in pair)
    )


def _are_counts(content: Any) -> bool:
    return isinstance(content, dict) and all(type(count) is int for count in content.values())


def _is_number(value: Any) -> bool:
    return value is None or type(value) in (int, float)


def _nulls_for_nans(value: Any) -> Any:
    """The same for JSON, which has no number that is not finite."""
    if isinstance(value, dict):
        return {name: _nulls_for_nans(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_nulls_for_nans(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _nans_for_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _nans_for_nulls(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_nans_for_nulls(part) for part in value]
    return math.nan if value is None else value

"""The samples of a run's evaluations, kept so that a launch that goes on knows what the next one has moved from."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_pdmd.files.whole import written_whole
from megatron_pdmd.training.checkpoints.checkpointing import saved_folders

_NAME = re.compile(r"iter_(\d{7,18})\.safetensors", re.ASCII)


class EvaluatedSamples:
    """A run's `evaluations/`, with a file for each evaluation that a launch may go on from.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path):
        self._run = run
        self._folder = run / "evaluations"

    def write(self, iteration: int, phase: int, prompts: Sequence[str], samples: torch.Tensor) -> None:
        """Keeps an evaluation's samples, and drops those of which no checkpoint is old enough to need them.

        Args:
            iteration: iterations done.
            phase: the one they were drawn in.
            prompts: a sample's each.
            samples: of all replicas.
        """
        with written_whole(self._folder / f"iter_{iteration:07d}.safetensors") as partial:
            save_file({"samples": samples.contiguous()}, partial, {"of": _key(phase, prompts)})
        checkpoints = [int(path.name.removeprefix("iter_")) for path in saved_folders(self._run / "checkpoints")]
        older = [path for number, path in self._files() if number < min(checkpoints, default=0)]
        for path in older[:-1]:
            path.unlink()

    def read(self, before: int, phase: int, prompts: Sequence[str]) -> torch.Tensor | None:
        """The samples of the last evaluation before an iteration, where they are of this phase and these prompts."""
        earlier = [path for number, path in self._files() if number < before]
        if not earlier:
            return None
        try:
            with safe_open(earlier[-1], framework="pt") as file:
                if (file.metadata() or {}).get("of") != _key(phase, prompts):
                    return None
                samples = file.get_tensor("samples")
        except (SafetensorError, OSError):  # damaged: as if it were not there
            return None
        return samples if len(samples) == len(prompts) else None

    def _files(self) -> list[tuple[int, Path]]:
        found = ((_NAME.fullmatch(path.name), path) for path in self._folder.glob("iter_*.safetensors"))
        return sorted((int(match[1]), path) for match, path in found if match)


def _key(phase: int, prompts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join((str(phase), *prompts)).encode()).hexdigest()

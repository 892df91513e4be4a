"""How distilled experts are to be sampled: what a pipeline says in a file of its own, LoRA files in a manifest."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_pdmd.files.documents import read_json_object

SAMPLING_FILE = "few_step_sampling.json"
FORMAT = "megatron-pdmd-few-step"
MOST_STEPS = 1000  # the times that a Wan model knows
_LARGEST_SIDE, _LONGEST_PROMPT = 2**16, 2**16
_SIDES = ("frames", "height", "width")


@dataclass(frozen=True)
class FewStepSampling:
    """The steps of distilled experts and what else a sampler has to know.

    Attributes:
        steps: noise levels at which each expert is evaluated, first phase first; from 1, falling.
        timestep_shift: of the schedule.
        boundary_ratio: noise level that separates two experts.
        guidance_scale: of classifier-free guidance; 1 is none.
        prompt_length: tokens that the experts were trained with.
        latent_size: frames, rows and columns of the latents that they were trained with.
    """

    steps: tuple[tuple[float, ...], ...]
    timestep_shift: float
    boundary_ratio: float | None = None
    guidance_scale: float = 1.0
    prompt_length: int | None = None
    latent_size: tuple[int, int, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {
            "steps": [list(levels) for levels in self.steps],
            "timestep_shift": self.timestep_shift,
            "boundary_ratio": self.boundary_ratio,
            "guidance_scale": self.guidance_scale,
            "prompt_length": self.prompt_length,
            **dict(zip(_SIDES, self.latent_size or (None, None, None), strict=True)),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: Path) -> "FewStepSampling":
        """Reads a description and checks each of its entries.

        Args:
            content: a JSON object; entries besides ours are left alone.
            where: the file, for errors.

        Raises:
            ValueError: names the file and the entry that cannot be.
        """
        sides = [content.get(name) for name in _SIDES]
        boundary, length = content.get("boundary_ratio"), content.get("prompt_length")
        problems = {
            "steps": not _are_steps(content.get("steps")),
            "timestep_shift": not _is_number(content.get("timestep_shift"), above=0),
            "boundary_ratio": boundary is not None and not (_is_number(boundary, above=0) and boundary < 1),
            "guidance_scale": not _is_number(content.get("guidance_scale"), above=-math.inf),
            "prompt_length": length is not None and not _is_count(length, _LONGEST_PROMPT),
            "frames, height and width": sides != [None] * 3 and not all(_is_count(s, _LARGEST_SIDE) for s in sides),
        }
        if wrong := [name for name, is_wrong in problems.items() if is_wrong]:
            raise ValueError(f"{where}: {wrong[0]} cannot be what is there; export the run again")
        steps = tuple(tuple(float(t) for t in levels) for levels in content["steps"])
        if boundary is not None and (len(steps) != 2 or not steps[0][-1] >= boundary > steps[1][0]):
            raise ValueError(f"{where}: boundary_ratio {boundary} does not separate two experts' steps; export again")
        return cls(
            steps,
            float(content["timestep_shift"]),
            boundary,
            float(content["guidance_scale"]),
            length,
            None if sides[0] is None else tuple(sides),
        )


def read_sampling(folder: Path) -> FewStepSampling | None:
    """How an exported pipeline is to be sampled, or None where the folder is not an export.

    Raises:
        ValueError: the description is damaged.
    """
    path = Path(folder) / SAMPLING_FILE
    if not path.is_file():
        return None
    content = read_json_object(path)
    if content.get("format") != FORMAT:
        raise ValueError(f"{path}: format is not '{FORMAT}'; export the run again")
    return FewStepSampling.from_json(content, path)


def _are_steps(steps: Any) -> bool:
    """Whether these are lists of noise levels that fall from 1 and stay above 0."""
    if not isinstance(steps, list) or not all(isinstance(levels, list) and levels for levels in steps):
        return False
    levels = list(itertools.chain.from_iterable(steps))
    if not 1 <= len(levels) <= MOST_STEPS or not all(_is_number(t, above=0) for t in levels):
        return False
    return levels[0] == 1 and all(later < earlier for earlier, later in itertools.pairwise(levels))


def _is_number(value: Any, above: float) -> bool:
    """Whether this is a number of an ordinary size."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and above < value and -1e6 < value < 1e6


def _is_count(value: Any, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= largest

"""A Hugging Face pipeline folder of a Wan model, read and checked before anything large is loaded."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_pdmd.conversion.weight_files import DIFFUSERS_STEM, TRANSFORMERS_STEM, read_model_header

HIGH_NOISE, LOW_NOISE, SINGLE = "high_noise", "low_noise", "single"
TRANSFORMERS = ("transformer", "transformer_2")  # in the order in which sampling uses them
_LIBRARIES = ("diffusers", "transformers")
_STEM_OF_WEIGHTS = {
    "transformer": DIFFUSERS_STEM,
    "transformer_2": DIFFUSERS_STEM,
    "vae": DIFFUSERS_STEM,
    "text_encoder": TRANSFORMERS_STEM,
    "image_encoder": TRANSFORMERS_STEM,
}


@dataclass(frozen=True)
class PipelineFolder:
    """What a pipeline folder holds.

    Attributes:
        path: the folder.
        pipeline_class: diffusers' name for the pipeline, such as `WanPipeline`.
        model_classes: component -> class name, for the components that are there.
        experts: expert -> subfolder: `high_noise` and `low_noise`, or `single`.
        boundary_ratio: noise level at and above which the high-noise expert works; None with a single one.
        shift: timestep shift of the scheduler; None where it depends on the resolution.
        index: the content of `model_index.json`.
    """

    path: Path
    pipeline_class: str
    model_classes: Mapping[str, str]
    experts: Mapping[str, str]
    boundary_ratio: float | None
    shift: float | None
    index: Mapping[str, Any]

    @property
    def has_vae(self) -> bool:
        """Whether latents can be decoded; without a VAE they are pixels, or stay latents."""
        return "vae" in self.model_classes

    @property
    def has_text_encoder(self) -> bool:
        """Whether prompts can be encoded from this folder."""
        return {"text_encoder", "tokenizer"} <= self.model_classes.keys()

    def expert_at(self, t: float) -> str:
        """The expert that owns noise level t, by diffusers' rule: the high-noise one where t >= boundary."""
        if self.boundary_ratio is None:
            return SINGLE
        return HIGH_NOISE if t >= self.boundary_ratio else LOW_NOISE


def read_pipeline(folder: Path) -> PipelineFolder:
    """Reads `model_index.json` and checks that every component it names is there and whole.

    Raises:
        ValueError: no pipeline folder, a component missing, a weight file missing or truncated, an index that names
            files outside the folder, or experts and boundary that do not fit each other.
    """
    folder = Path(folder)
    index_path = folder / "model_index.json"
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; name a Hugging Face pipeline folder")
    if not index_path.is_file():
        raise ValueError(f"{folder}: no model_index.json in it; name a Hugging Face pipeline folder")
    index = _read_object(index_path)
    classes = {name: entry for name, entry in _components(index_path, index).items() if _is_present(folder, name)}
    for name in classes:
        if name in _STEM_OF_WEIGHTS:
            read_model_header(folder / name, _STEM_OF_WEIGHTS[name])
            _read_object(folder / name / "config.json")
    experts, boundary = _experts(index_path, index, classes)
    return PipelineFolder(
        path=folder,
        pipeline_class=str(index.get("_class_name")),
        model_classes=classes,
        experts=experts,
        boundary_ratio=boundary,
        shift=_shift(folder, classes),
        index=index,
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; the folder is not whole") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: is not readable JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _components(index_path: Path, index: Mapping[str, Any]) -> dict[str, str]:
    """Component -> class name; a component is a pair [library, class], and [null, null] is one that is left out."""
    components = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or entry == [None, None]:
            continue
        if len(entry) != 2 or entry[0] not in _LIBRARIES or not isinstance(entry[1], str):
            raise ValueError(f"{index_path}: '{name}' is {entry}; only {' and '.join(_LIBRARIES)} classes are read")
        if not name.isidentifier():
            raise ValueError(f"{index_path}: '{name}' is not a component's name; do not use this folder")
        components[name] = entry[1]
    return components


def _is_present(folder: Path, name: str) -> bool:
    if not (folder / name).is_dir():
        raise ValueError(f"{folder}: no {name}/ in it, which its model_index.json names; the folder is not whole")
    return True


def _experts(
    index_path: Path, index: Mapping[str, Any], classes: Mapping[str, str]
) -> tuple[dict[str, str], float | None]:
    first, second = TRANSFORMERS
    if first not in classes:
        raise ValueError(f"{index_path}: names no transformer")
    boundary = index.get("boundary_ratio")
    if second not in classes:
        if boundary is not None:
            raise ValueError(f"{index_path}: has boundary_ratio {boundary} but no {second}")
        return {SINGLE: first}, None
    if isinstance(boundary, bool) or not isinstance(boundary, int | float) or not 0 < boundary < 1:
        raise ValueError(f"{index_path}: boundary_ratio is {boundary}; with two transformers it must lie in (0, 1)")
    return {HIGH_NOISE: first, LOW_NOISE: second}, float(boundary)


def _shift(folder: Path, classes: Mapping[str, str]) -> float | None:
    if "scheduler" not in classes:
        return None
    path = folder / "scheduler" / "scheduler_config.json"
    config = _read_object(path)
    if config.get("use_dynamic_shifting"):
        return None
    shift = config.get("flow_shift", config.get("shift", 1.0))
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not shift > 0:
        raise ValueError(f"{path}: the shift is {shift}; it must be a number greater than 0")
    return float(shift)

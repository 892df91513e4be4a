"""A Hugging Face pipeline folder of a Wan model, read and checked before anything large is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_pdmd.files.documents import read_json_object
from megatron_pdmd.files.safetensors_files import DIFFUSERS_STEM, TRANSFORMERS_STEM, read_model_header
from megatron_pdmd.limits import shown
from megatron_pdmd.models.loading import read_model_folder
from megatron_pdmd.models.wan.config import WanConfig

HIGH_NOISE, LOW_NOISE, SINGLE = "high_noise", "low_noise", "single"
TRANSFORMERS = ("transformer", "transformer_2")  # in the order in which sampling uses them
_LIBRARIES = ("diffusers", "transformers")
_SHARED_SIZES = ("in_channels", "out_channels", "patch_size", "text_dim")  # what both experts of a teacher agree in
_LARGEST_SHIFT = 1000.0
_LONGEST_NAME = 100
_STEM_OF_WEIGHTS = {
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
        configs: expert -> its shape, which its weights have by their headers.
        boundary_ratio: noise level at and above which the high-noise expert works; None with a single one.
        shift: timestep shift of the scheduler; None where it depends on the resolution.
        index: the content of `model_index.json`.
    """

    path: Path
    pipeline_class: str
    model_classes: Mapping[str, str]
    experts: Mapping[str, str]
    configs: Mapping[str, WanConfig]
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
        ValueError: no pipeline folder, a component missing, a weight file missing or damaged, an index that names
            files outside the folder, weights that are not those of their config.json, or experts and boundary that do
            not fit each other.
    """
    folder = Path(folder)
    index_path = folder / "model_index.json"
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; name a Hugging Face pipeline folder")
    if not index_path.is_file():
        raise ValueError(f"{folder}: no model_index.json in it; name a Hugging Face pipeline folder")
    index = read_json_object(index_path)
    pipeline_class = index.get("_class_name")
    if not _is_name(pipeline_class):
        raise ValueError(
            f"{index_path}: _class_name is {shown(repr(pipeline_class))}; name a pipeline such as WanPipeline"
        )
    classes = {name: entry for name, entry in _components(index_path, index).items() if _is_present(folder, name)}
    for name in classes:
        if name in _STEM_OF_WEIGHTS:
            read_model_header(folder / name, _STEM_OF_WEIGHTS[name])
            read_json_object(folder / name / "config.json")
    experts, boundary = _experts(index_path, index, classes)
    return PipelineFolder(
        path=folder,
        pipeline_class=pipeline_class,
        model_classes=classes,
        experts=experts,
        configs=_configs(folder, experts),
        boundary_ratio=boundary,
        shift=_shift(folder, classes),
        index=index,
    )


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isascii() and value.isidentifier() and len(value) <= _LONGEST_NAME


def _components(index_path: Path, index: Mapping[str, Any]) -> dict[str, str]:
    """Component -> class name; a component is a pair [library, class], and [null, null] is one that is left out."""
    components = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or entry == [None, None]:
            continue
        if len(entry) != 2 or entry[0] not in _LIBRARIES or not _is_name(entry[1]):
            libraries = " and ".join(_LIBRARIES)
            raise ValueError(
                f"{index_path}: {shown(repr(name))} is {shown(repr(entry))}; only {libraries} classes are read"
            )
        if not _is_name(name):
            raise ValueError(f"{index_path}: {shown(repr(name))} is not a component's name; do not use this folder")
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
            raise ValueError(f"{index_path}: has boundary_ratio {shown(repr(boundary))} but no {second}")
        return {SINGLE: first}, None
    if isinstance(boundary, bool) or not isinstance(boundary, int | float) or not 0 < boundary < 1:
        raise ValueError(
            f"{index_path}: boundary_ratio is {shown(repr(boundary))}; with two transformers it must lie in (0, 1)"
        )
    return {HIGH_NOISE: first, LOW_NOISE: second}, float(boundary)


def _configs(folder: Path, experts: Mapping[str, str]) -> dict[str, WanConfig]:
    """The experts' shapes, which may differ in what they keep to themselves alone."""
    configs = {expert: read_model_folder(folder / subfolder).config for expert, subfolder in experts.items()}
    first, *others = configs.values()
    for name in _SHARED_SIZES:
        for other in others:
            one, two = getattr(first, name), getattr(other, name)
            if one != two:
                raise ValueError(
                    f"{folder}: {name} is {one} in one transformer and {two} in the other; take one teacher's"
                )
    return configs


def _shift(folder: Path, classes: Mapping[str, str]) -> float | None:
    if "scheduler" not in classes:
        return None
    path = folder / "scheduler" / "scheduler_config.json"
    config = read_json_object(path)
    dynamic = config.get("use_dynamic_shifting")
    if dynamic not in (None, False, True):
        raise ValueError(f"{path}: use_dynamic_shifting is {shown(repr(dynamic))}; it must be true or false")
    if dynamic:
        return None
    shift = config.get("flow_shift", config.get("shift", 1.0))
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 < shift <= _LARGEST_SHIFT:
        raise ValueError(
            f"{path}: the shift is {shown(repr(shift))}; it must be a number greater than 0, at most {_LARGEST_SHIFT:g}"
        )
    return float(shift)

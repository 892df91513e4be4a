"""A run's LoRA files in a folder of their own: `<expert>.safetensors`, `lora_files.json`, which says how they are to be
sampled, and a README.md, which says it to people."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file

from megatron_pdmd.conversion.few_step_sampling import FewStepSampling
from megatron_pdmd.conversion.lora_card import lora_card
from megatron_pdmd.conversion.lora_files import LoraFormat, lora_tensors
from megatron_pdmd.conversion.pipeline_folder import TRANSFORMERS, PipelineFolder
from megatron_pdmd.conversion.weight_files import check_exportable
from megatron_pdmd.errors import require_space
from megatron_pdmd.files.documents import read_json_object
from megatron_pdmd.files.safetensors_files import read_header
from megatron_pdmd.files.whole import replaced_whole, synchronise, write_json, write_text

MANIFEST = "lora_files.json"
_FORMAT = "megatron-pdmd-loras"


@dataclass(frozen=True)
class LoraFolder:
    """What a folder of LoRA files holds.

    Attributes:
        path: the folder.
        files: expert -> its file's name, first phase first.
        bases: for each of them the teacher's subfolder that it belongs to.
        lora_format: whose key names the files have.
        teacher: the pipeline folder that was distilled, as far as the run knew.
        sampling: how the experts are to be sampled.
    """

    path: Path
    files: Mapping[str, str]
    bases: tuple[str, ...]
    lora_format: LoraFormat
    teacher: Path
    sampling: FewStepSampling

    def to_json(self) -> dict[str, Any]:
        """The content of `lora_files.json`."""
        return {
            "format": _FORMAT,
            "lora_format": self.lora_format,
            "files": list(self.files.values()),
            "teacher": str(self.teacher),
            "teacher_transformers": list(self.bases),
            **self.sampling.to_json(),
        }


def is_lora_folder(folder: Path) -> bool:
    """Whether `export_loras` made a folder."""
    return (folder / MANIFEST).is_file()


def export_loras(
    destination: Path,
    adapters: Mapping[str, Mapping[str, torch.Tensor]],
    *,
    alpha: float,
    source: PipelineFolder,
    bases: tuple[str, ...],
    sampling: FewStepSampling,
    lora_format: LoraFormat = "diffusers",
    dtype: torch.dtype | None = None,
) -> dict[str, Path]:
    """Writes a LoRA file for each expert, their manifest and a README.md.

    Args:
        destination: a new or empty folder, or an earlier export of LoRA files, which is replaced.
        adapters: expert's name -> adapter, as `lora_tensors` takes it; first phase first.
        alpha: of all adapters.
        source: the teacher.
        bases: for each adapter the teacher's subfolder that it belongs to.
        sampling: how the experts are to be sampled.
        lora_format: see `lora_files`.
        dtype: of the files.

    Returns:
        The file of each expert.

    Raises:
        ValueError: an occupied destination, a tensor that is not finite, or no space on the disk.
    """
    destination = Path(destination)
    size = sum(t.numel() * t.element_size() for adapter in adapters.values() for t in adapter.values())
    require_space(destination, size, "--hf")
    files = {name: f"{name}.safetensors" for name in adapters}
    folder = LoraFolder(destination, files, bases, lora_format, source.path.absolute(), sampling)
    with replaced_whole(destination, "--hf", is_lora_folder) as partial:
        for name, adapter in adapters.items():
            tensors = lora_tensors(adapter, alpha=alpha, lora_format=lora_format, dtype=dtype)
            check_exportable(tensors, files[name])
            save_file(tensors, partial / files[name], metadata={"format": "pt"})
            synchronise(partial / files[name])
        write_text(partial / "README.md", lora_card(source, tuple(files.values()), bases, sampling))
        write_json(partial / MANIFEST, folder.to_json())
    return {name: destination / file for name, file in files.items()}


def read_lora_folder(path: Path) -> LoraFolder:
    """Reads the manifest and the headers of the files that it names.

    Raises:
        ValueError: no such folder, a manifest that cannot be, or a file that is missing or damaged.
    """
    manifest = path / MANIFEST
    if not path.is_dir():
        raise ValueError(f"--lora {path}: no such folder; name one that convert_checkpoint.py --weights lora wrote")
    if not manifest.is_file():
        raise ValueError(f"--lora {path}: no {MANIFEST} in it; export the run's LoRA files again")
    content = read_json_object(manifest)
    files, bases, teacher = (content.get(name) for name in ("files", "teacher_transformers", "teacher"))
    problems = {
        "format": content.get("format") != _FORMAT,
        "lora_format": content.get("lora_format") not in get_args(LoraFormat),
        "files": not _are_names(files),
        "teacher_transformers": not isinstance(bases, list) or any(base not in TRANSFORMERS for base in bases),
        "teacher": not isinstance(teacher, str) or "\0" in teacher,
    }
    if wrong := [name for name, is_wrong in problems.items() if is_wrong]:
        raise ValueError(f"{manifest}: {wrong[0]} cannot be what is there; export the run's LoRA files again")
    sampling = FewStepSampling.from_json(content, manifest)
    if not len(files) == len(bases) == len(sampling.steps):
        raise ValueError(f"{manifest}: files, teacher_transformers and steps have different lengths; export again")
    for name in files:
        read_header(path / name)
    experts = {Path(name).stem: name for name in files}
    return LoraFolder(path, experts, tuple(bases), content["lora_format"], Path(teacher), sampling)


def _are_names(files: Any) -> bool:
    """Whether these are different names of files in this folder: a path could lead out of it."""
    if not isinstance(files, list) or not files or not all(isinstance(name, str) for name in files):
        return False
    plain = all(name == Path(name).name and name.endswith(".safetensors") and "\0" not in name for name in files)
    return plain and len(set(files)) == len(files)

"""The trained experts as a Hugging Face pipeline folder that diffusers loads by itself."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_pdmd.conversion.few_step_sampling import FORMAT, SAMPLING_FILE, FewStepSampling
from megatron_pdmd.conversion.model_card import model_card
from megatron_pdmd.conversion.pipeline_folder import TRANSFORMERS, PipelineFolder, read_pipeline
from megatron_pdmd.conversion.weight_files import WeightFile, plan_files, write_index
from megatron_pdmd.conversion.writers import Writers
from megatron_pdmd.errors import require_space
from megatron_pdmd.files.safetensors_files import DIFFUSERS_STEM, read_model_header
from megatron_pdmd.files.whole import begin_folder, drop_folder, finish_folder, unfinished, write_json, write_text
from megatron_pdmd.models.lora import WholeTensor
from megatron_pdmd.parallel.agreement import together

_NEVER_COPIED = shutil.ignore_patterns("*.py", "*.pyc", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", ".*")


@dataclass(frozen=True)
class TrainedExpert:
    """The expert of one phase.

    Attributes:
        steps: noise levels at which sampling evaluates it, falling.
        base: the source's expert that it was trained from (`single`, `high_noise`, `low_noise`).
        tensors: its weights under diffusers' names, in memory or to be gathered file by file.
    """

    steps: tuple[float, ...]
    base: str
    tensors: Mapping[str, torch.Tensor | WholeTensor]


def export_pipeline(
    source: PipelineFolder,
    destination: Path,
    experts: Sequence[TrainedExpert],
    *,
    shift: float,
    boundary_ratio: float | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5_000_000_000,
    prompt_length: int | None = None,
    latent_size: tuple[int, int, int] | None = None,
) -> None:
    """Writes the experts with everything else that the source's pipeline has. Called on all ranks.

    The replicas of the experts share the work; every file is what a single rank would write. The folder is written
    under another name and renamed, so that it is there as a whole or not at all.

    Args:
        source: the teacher's folder.
        destination: a new or empty folder, or an earlier export, which is replaced.
        experts: one for each phase, first phase first; one becomes `transformer`, two also `transformer_2`, whether the
            teacher had one or two.
        shift: the schedule's timestep shift.
        boundary_ratio: noise level that separates two experts; their middle where not given.
        dtype: of the weights; None keeps what `experts` have.
        max_shard_size: bytes in one file.
        prompt_length: tokens that the experts were trained with.
        latent_size: frames, rows and columns of the latents that they were trained with.

    Raises:
        ValueError: more experts than a pipeline holds, a boundary that does not separate them, weights that do not fit
            the source's or are not finite, an occupied destination, or no space on the disk; on all ranks.
        Exception: what any rank met while writing, on all ranks.
    """
    destination, writers = Path(destination), Writers.current()
    with together(writers.group):
        boundary = _checked_boundary(experts, boundary_ratio)
        _check_weights(source, experts)
    steps = tuple(expert.steps for expert in experts)
    sampling = FewStepSampling(steps, shift, boundary, prompt_length=prompt_length, latent_size=latent_size)
    with shared_folder(destination, is_export, writers.group) as partial:
        models = [
            plan_files(partial / subfolder, expert.tensors, dtype=dtype, max_shard_size=max_shard_size)
            for subfolder, expert in zip(TRANSFORMERS, experts, strict=False)
        ]
        with together(writers.group):
            if writers.leads:
                _make_folders(source, destination, models)
        with together(writers.group):
            _require_shared(partial, destination)
        for number, file in enumerate(writers.rounds([file for files in models for file in files])):
            with together(writers.group):
                if file:
                    file.write(writers.writes)
                if number == 0 and writers.leads:
                    _write_rest(source, experts, models, sampling, partial)
        with together(writers.group):
            if writers.leads:
                read_pipeline(partial)


def is_export(folder: Path) -> bool:
    """Whether `export_pipeline` made a folder."""
    return (folder / SAMPLING_FILE).is_file()


@contextmanager
def shared_folder(
    destination: Path, is_ours: Callable[[Path], bool], group: dist.ProcessGroup | None = None
) -> Iterator[Path]:
    """`files.replaced_whole` for ranks that write into one folder; what the body raises, it raises on all of them.

    Args:
        destination: new, empty, or made by an earlier call.
        is_ours: tells whether a folder that is not empty may be replaced.
        group: the ranks.

    Raises:
        ValueError: the destination holds something else.
    """
    leads = not dist.is_initialized() or dist.get_rank() == 0
    with together(group):
        if leads:
            begin_folder(destination, "--hf", is_ours)
    try:
        yield unfinished(destination)
        with together(group):
            if leads:
                finish_folder(destination)
    except BaseException as error:
        if leads:
            drop_folder(destination)
        if isinstance(error, Exception):  # no rank ends the job before the folder is gone
            with together(group):
                pass
        raise


def _make_folders(source: PipelineFolder, destination: Path, models: Sequence[Sequence[WeightFile]]) -> None:
    """Makes the models' folders where the disk has room for everything."""
    copied = (source.path / name for name in _copied(source))
    parts = sum(path.stat().st_size for folder in copied for path in folder.rglob("*") if path.is_file())
    require_space(destination, sum(file.size for files in models for file in files) + parts, "--hf")
    for files in models:
        files[0].path.parent.mkdir()


def _require_shared(partial: Path, destination: Path) -> None:
    if not partial.is_dir():
        raise ValueError(f"--hf {destination}: is not the same folder on every node; name one on a shared disk")


def _write_rest(
    source: PipelineFolder,
    experts: Sequence[TrainedExpert],
    models: Sequence[Sequence[WeightFile]],
    sampling: FewStepSampling,
    partial: Path,
) -> None:
    """Everything but the weights: their indices, the other parts of the pipeline, and how it is to be sampled."""
    for name in _copied(source):
        shutil.copytree(source.path / name, partial / name, ignore=_NEVER_COPIED)
    for path in [*source.path.glob("LICENSE*"), *source.path.glob("NOTICE*")]:
        shutil.copyfile(path, partial / path.name)
    for expert, files in zip(experts, models, strict=True):
        shutil.copyfile(source.path / source.experts[expert.base] / "config.json", files[0].path.parent / "config.json")
        write_index(files)
    _write_scheduler(partial / "scheduler", sampling.timestep_shift)
    write_json(partial / "model_index.json", _model_index(source, len(experts), sampling.boundary_ratio))
    write_json(partial / SAMPLING_FILE, {"format": FORMAT, **sampling.to_json()})
    write_text(partial / "README.md", model_card(source, sampling))


def _copied(source: PipelineFolder) -> list[str]:
    """The components that an export takes over as they are."""
    return [name for name in source.model_classes if name not in (*TRANSFORMERS, "scheduler")]


def _checked_boundary(experts: Sequence[TrainedExpert], boundary: float | None) -> float | None:
    if not 1 <= len(experts) <= len(TRANSFORMERS):
        raise ValueError(
            f"{len(experts)} experts: a pipeline folder holds one or two; export LoRA files (--weights lora)"
        )
    assert all(expert.steps for expert in experts), "every expert owns a step"
    if len(experts) == 1:
        return None
    above, below = min(experts[0].steps), max(experts[1].steps)
    boundary = (above + below) / 2 if boundary is None else boundary
    if not below < boundary < above:
        raise ValueError(
            f"boundary_ratio {boundary}: must lie strictly between {below:.4f} and {above:.4f}, the steps it separates"
        )
    return boundary


def _check_weights(source: PipelineFolder, experts: Sequence[TrainedExpert]) -> None:
    """Refuses experts of other tensors than those they were trained from."""
    for subfolder, expert in zip(TRANSFORMERS, experts, strict=False):
        header = read_model_header(source.path / source.experts[expert.base], DIFFUSERS_STEM)
        expected = {name: tensor.shape for name, tensor in header.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in expert.tensors.items()}
        wrong = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
        if wrong:
            name = wrong[0]
            raise ValueError(
                f"{subfolder}: {len(wrong)} tensors do not fit the source's, such as '{name}': "
                f"{shapes.get(name, 'missing')} for {expected.get(name, 'none')}; name the teacher that was distilled"
            )


def _model_index(source: PipelineFolder, experts: int, boundary_ratio: float | None) -> dict[str, Any]:
    absent = [None, None]
    transformer = list(source.index[TRANSFORMERS[0]])
    return {
        **source.index,
        "boundary_ratio": boundary_ratio,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        TRANSFORMERS[0]: transformer,
        TRANSFORMERS[1]: transformer if experts == 2 else absent,
    }


def _write_scheduler(folder: Path, shift: float) -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": shift}
    write_json(folder / "scheduler_config.json", config)

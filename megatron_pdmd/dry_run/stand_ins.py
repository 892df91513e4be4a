"""What a rehearsal puts in place of disks, text encoders and picture files; everything else is the run's own code."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_pdmd import pretrain
from megatron_pdmd.conversion import export, weight_files
from megatron_pdmd.data import prompts
from megatron_pdmd.data.prompts import PromptEmbeddings
from megatron_pdmd.data.text_encoder import MAX_TOKENS
from megatron_pdmd.data.umt5 import read_umt5_config
from megatron_pdmd.distillation.roles import Roles
from megatron_pdmd.distillation.updates import Update
from megatron_pdmd.dry_run.repeated_passes import RepeatedPasses
from megatron_pdmd.models import loading
from megatron_pdmd.models.wan.model import WanModel
from megatron_pdmd.parallel.pipeline.execute import Executor
from megatron_pdmd.parallel.topology import current_topology
from megatron_pdmd.planning.device_checks import DeviceChecks
from megatron_pdmd.planning.skeleton import write_sparse
from megatron_pdmd.training import trainer
from megatron_pdmd.training.checkpoints import checkpointing
from megatron_pdmd.training.checkpoints.checkpointing import CheckpointWriter, Manifest, States
from megatron_pdmd.training.checkpoints.sharded_state import Shard
from megatron_pdmd.training.evaluated_samples import EvaluatedSamples
from megatron_pdmd.training.networks import Networks
from megatron_pdmd.training.phase import PhaseTrainer
from megatron_pdmd.training.pipelined.stage_work import StageWork
from megatron_pdmd.training.pipelined.task_costs import TaskCosts
from megatron_pdmd.training.sheets import SampleSheets
from megatron_pdmd.training.trained_network import TrainedNetwork
from megatron_pdmd.training.validation import Validation

# Parts of a run, by the functions that are them.
_MOMENTS: tuple[tuple[Any, str, str], ...] = (
    (pretrain, "load_networks", "load the teacher"),
    (Networks, "start_phase", "copy the experts"),
    (trainer.Trainer, "_phase_trainer", "wrap for training"),
    (CheckpointWriter, "save", "save a checkpoint"),
    (trainer.Trainer, "restore", "load a checkpoint"),
    (PhaseTrainer, "load_state", "load a checkpoint"),
    (SampleSheets, "draw", "sample sheet"),
    (Validation, "evaluate", "evaluation"),
    (PhaseTrainer, "release", "release"),
    (pretrain, "finish", "export"),
)


class StandIns:
    """Replaces, while `installed`, what reads or writes numbers.

    Args:
        checks: is told of a run's moments and of an update's passes.

    Attributes:
        written_bytes: what this rank would have written of the largest checkpoint.
    """

    def __init__(self, checks: DeviceChecks):
        self.written_bytes = 0
        self._checks = checks
        self._indices: dict[str, Metadata] = {}
        self._passes = RepeatedPasses(checks.memory)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The replacements are in place in this block."""
        replacements = [
            (loading, "WanModel", _really(WanModel)),  # its layers ask whether they are on meta, which fakes are not
            (loading, "_open", _unopened),
            (loading, "_read_slice", _unread_slice),
            (loading, "require_finite", _nothing),
            (prompts, "TextEncoder", _UnreadTextEncoder),
            (pretrain, "load_run_prompts", _load_prompts),
            (PromptEmbeddings, "load", _really(PromptEmbeddings.load)),
            (pretrain, "check_run_folder", _nothing),  # the two parts of a rehearsal have different batches
            (checkpointing, "write_shards", self._write_shards),
            (checkpointing, "read_index", lambda folder: self._indices[folder.name]),
            (checkpointing, "read_shards", _read_shards),
            (checkpointing, "require_space", _nothing),
            (checkpointing, "first_shard_not_finite", _nothing),
            (CheckpointWriter, "save", self._indexed(CheckpointWriter.save)),
            (export, "require_space", _nothing),
            (export, "_require_shared", _nothing),
            (export, "_check_weights", _without_stages(export._check_weights)),
            (export, "read_pipeline", _nothing),  # other ranks' files are not there
            (weight_files, "save_file", _save_sparse),
            (weight_files, "check_exportable", _nothing),
            (SampleSheets, "_write", _nothing),
            (EvaluatedSamples, "write", _nothing),
            (Roles, "run", self._passes.known(Roles.run)),
            (WanModel, "run_stage", self._passes.known_stage(WanModel.run_stage)),
            (TrainedNetwork, "accumulate", self._inside(self._checks.passes, TrainedNetwork.accumulate)),
            (TaskCosts, "measure", lambda *unused: nullcontext()),  # no GPU, no events
            (TaskCosts, "end_iteration", _nothing),
            (StageWork, "forward", self._inside(self._checks.passes, StageWork.forward)),
            (Executor, "_backward", self._inside(self._checks.passes, Executor._backward)),
            (PhaseTrainer, "_starts", self._inside(self._checks.passes, PhaseTrainer._starts)),
            (PhaseTrainer, "_update", self._update_moment(PhaseTrainer._update)),
            (PhaseTrainer, "_run_pipelined", self._iteration_moment(PhaseTrainer._run_pipelined)),
        ]
        with ExitStack() as stack:
            for owner, name, stand_in in replacements:
                stack.enter_context(mock.patch.object(owner, name, stand_in))
            for owner, name, moment in _MOMENTS:
                told = self._inside(functools.partial(self._checks.memory.moment, moment), getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, told))
            yield

    @staticmethod
    def _inside(block: Callable[[], AbstractContextManager], function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            with block():
                return function(*args, **options)

        return run

    def _update_moment(self, update: Callable[..., Any]) -> Callable[..., Any]:
        def run(trainer: PhaseTrainer, network: TrainedNetwork, one: Update, *args: Any) -> Any:
            with self._checks.memory.moment(f"phase {trainer.index}: {one.kind} update"):
                return update(trainer, network, one, *args)

        return run

    def _iteration_moment(self, run_pipelined: Callable[..., Any]) -> Callable[..., Any]:
        def run(trainer: PhaseTrainer, *args: Any) -> Any:
            with self._checks.memory.moment(f"phase {trainer.index}: iteration"):
                return run_pipelined(trainer, *args)

        return run

    def _indexed(self, save: Callable[..., None]) -> Callable[..., None]:
        """Remembers what all ranks together would have written; this rank knows every tensor's name and whole shape."""

        def run(writer: CheckpointWriter, manifest: Manifest, states: States) -> None:
            shards = {f"{state}.{name}": shard for state, own in states.items() for name, shard in own.items()}
            entries = {name: _entry(shard) for name, shard in shards.items()}
            self._indices[checkpointing.checkpoint_name(manifest.progress.iteration)] = Metadata(entries)
            own_bytes = sum(shard.written_bytes for shard in shards.values())
            self.written_bytes = max(self.written_bytes, own_bytes)
            save(writer, manifest, states)

        return run

    @staticmethod
    def _write_shards(folder: Path, shards: Mapping[str, Shard], group: dist.ProcessGroup) -> None:
        """What is still on the device goes to the CPU, as for a file."""
        folder.mkdir(parents=True, exist_ok=True)
        for shard in shards.values():
            for box in shard.boxes if shard.written else ():
                if box.tensor.is_cuda:  # a fake tensor knows one thread; what a background thread writes is staged
                    box.tensor.detach().cpu()


def _entry(shard: Shard) -> TensorStorageMetadata:
    size = torch.Size(shard.shape)
    whole = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
    return TensorStorageMetadata(TensorProperties(dtype=shard.dtype), size, [whole])


def _read_shards(folder: Path, index: Metadata, shards: Mapping[str, Shard]) -> None:
    with torch.no_grad():
        for shard in shards.values():
            for box in shard.boxes:
                box.tensor.copy_(torch.empty(box.tensor.shape, dtype=shard.dtype))


def _really(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function outside of the fake mode, for what cannot be done, or asked of tensors, in it."""

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **options)

    return run


def _without_stages(check: Callable[..., None]) -> Callable[..., None]:
    """A check of a whole model, left out where other stages, which are not there, hold a part of it."""

    @functools.wraps(check)
    def run(*args: Any) -> None:
        if current_topology().pipeline == 1:
            check(*args)

    return run


@contextmanager
def _unopened(path: Path) -> Iterator[SimpleNamespace]:
    """A safetensors file as `loading` opens it after its header was judged; it need not have data."""
    yield SimpleNamespace(get_slice=lambda name: name)


def _unread_slice(stored: Any, index: Sequence[slice], shape: torch.Size) -> Tensor:
    return torch.empty(shape)


def _save_sparse(tensors: Mapping[str, Tensor], path: Path, **unused: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)  # where another rank would have made it
    write_sparse(path, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})


def _nothing(*unused: Any) -> None:
    return None


def _load_prompts(path: Path, text_encoder: Path, *unused: Any, **options: Any) -> PromptEmbeddings:
    """Prompts without a folder that the ranks share."""
    return prompts.load_prompts(path, text_encoder, **options)


class _UnreadTextEncoder:
    """Embeddings of the right size without the encoder's weights."""

    def __init__(self, folder: Path, *, max_length: int | None = None, dtype: torch.dtype = torch.float32):
        config = read_umt5_config(folder)
        self.name = folder.name
        self._shape, self._dtype = (max_length or MAX_TOKENS, config["d_model"]), dtype

    def encode(self, texts: Sequence[str]) -> Tensor:
        return torch.zeros((), dtype=self._dtype).expand(len(texts), *self._shape)

"""Checkpoints, exports, samples and evaluations of a run whose layers are shared by pipeline stages."""

import functools
import json
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_pdmd import pretrain
from megatron_pdmd.conversion.weight_files import write_model
from megatron_pdmd.data.prompts import PromptEmbeddings
from megatron_pdmd.distillation.step import Iteration
from megatron_pdmd.models import WanConfig, WanModel, adapter_state_dict, to_hf_state_dict
from megatron_pdmd.parallel import destroy_topology, initialize_topology, without_cuda
from megatron_pdmd.preflight import Plan, prepare
from megatron_pdmd.training.checkpoints.checkpointing import CheckpointWriter, latest_checkpoint
from megatron_pdmd.training.checkpoints.manifest import CheckpointError, Manifest, Progress
from megatron_pdmd.training.checkpoints.sharded_state import Shard
from megatron_pdmd.training.checkpoints.start import find_start
from megatron_pdmd.training.networks import Networks, network_state
from megatron_pdmd.training.outcome import export_run
from megatron_pdmd.training.phase import PhaseTrainer
from megatron_pdmd.training.run_folders.run_folder import claim_run_folder
from megatron_pdmd.training.trainer import Trainer
from megatron_pdmd.training.validation import Validation

TINY = WanConfig(
    patch_size=(1, 2, 2),
    num_attention_heads=4,
    attention_head_dim=12,
    in_channels=1,
    out_channels=1,
    text_dim=16,
    freq_dim=32,
    ffn_dim=32,
    num_layers=4,
    rope_max_seq_len=16,
)
PROMPTS = ("a seven moves left", "a one moves up", "a three moves down")
FLAGS = (
    "--prompt-length 8 --frames 2 --height 4 --width 4 --timestep-shift 3 --guidance-scale 2 --lora-rank 4 "
    "--lora-alpha 4 --train-iters 4 --phase-steps 4 --micro-batch-size 1 --global-batch-size 4 --ema-decay 0.9 "
    "--no-tensorboard --eval-interval 1 --eval-samples 3 --teacher-steps 3 --sample-prompts 2"
)
STEPS = 3  # optimizer updates before the checkpoint
FULL = ("--generator", "full", "--bf16", "--ema-decay", "0")


@dataclass(frozen=True)
class Layout:
    """How the ranks are used."""

    pipeline: int = 1
    tensor: int = 1
    data: int = 1
    distributed_optimizer: bool = False

    @property
    def world(self) -> int:
        return self.pipeline * self.tensor * self.data

    @property
    def flags(self) -> tuple[str, ...]:
        sizes = ("--tensor-model-parallel-size", str(self.tensor), "--pipeline-model-parallel-size", str(self.pipeline))
        return (*sizes, *["--use-distributed-optimizer"] * self.distributed_optimizer)


ONE = Layout()
ZERO = Layout(pipeline=2, data=2, distributed_optimizer=True)
MOVES = [
    (Layout(pipeline=2, tensor=2), Layout(pipeline=4), FULL),
    (ZERO, ONE, FULL),
    (ONE, ZERO, ()),
    (Layout(pipeline=4), Layout(pipeline=2, tensor=2, distributed_optimizer=True), ()),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[str, ...]:
    """Flags of a one-expert teacher with random weights, and of prompts."""
    folder = tmp_path_factory.mktemp("inputs")
    teacher, prompts = folder / "teacher", folder / "prompts"
    (teacher / "transformer").mkdir(parents=True)
    (teacher / "transformer" / "config.json").write_text(json.dumps(TINY.to_hf()))
    torch.manual_seed(1)
    with without_cuda():
        write_model(teacher / "transformer", to_hf_state_dict(WanModel(TINY)).items(), max_shard_size=60000)
    destroy_topology()
    index = {
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": [None, None],
    }
    (teacher / "model_index.json").write_text(json.dumps(index))
    (teacher / "scheduler").mkdir()
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    (teacher / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    embeddings = torch.randn(len(PROMPTS), 8, 16, generator=torch.Generator().manual_seed(0))
    PromptEmbeddings(PROMPTS, (embeddings,), torch.zeros(8, 16)).save(prompts)
    return ("--teacher", str(teacher), "--prompts", str(prompts), *FLAGS.split())


@dataclass(frozen=True)
class Begun:
    """A rank of the program with its first phase ready."""

    plan: Plan
    networks: Networks
    trainer: Trainer
    iteration: Iteration
    phase: PhaseTrainer


def begin(inputs, run: Path, layout: Layout, *more: str) -> Begun:
    """This rank of the program up to its first pass; from the run's checkpoint where it has one."""
    plan = prepare([*inputs, *layout.flags, *more, "--save", str(run)])
    networks, trainer = pretrain.build(plan, pretrain.start_topology(plan.config.parallel))
    trainer.restore(find_start(plan.config))
    return Begun(plan, networks, trainer, *trainer._ready_phase(plan.phases.phases[0]))


def whole_value(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The numbers that a tensor of this name has in all layouts."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return (0.1 * torch.randn(shape, generator=generator)).to(dtype)


def parts(states: Mapping[str, Mapping[str, Shard]]):
    """(name, this rank's part, the same part of what it is to be) of every tensor."""
    for state, shards in states.items():
        for name, shard in shards.items():
            value = whole_value(f"{state}/{name}", shard.shape, shard.dtype)
            for box in shard.boxes:
                ends = zip(box.offsets, box.tensor.shape, strict=True)
                yield f"{state}/{name}", box.tensor, value[tuple(slice(start, start + size) for start, size in ends)]


def save_known_numbers(inputs, run: Path, layout: Layout, *more: str) -> int:
    """Writes a checkpoint after `STEPS` iterations whose every tensor is known; returns this rank's bytes of it."""
    started = begin(inputs, run, layout, *more)
    for network in started.phase._trained().values():
        network.optimizer.prepare_to_load(STEPS)
    states = started.trainer._states(started.phase)
    for _, tensor, value in parts(states):
        tensor.copy_(value)
    started.trainer.progress = Progress(STEPS, 1, STEPS, 4 * STEPS)
    writer = CheckpointWriter(run / "checkpoints")
    writer.save(started.trainer._manifest(started.phase), states)
    writer.close()
    if dist.get_rank() == 0:
        claim_run_folder(started.plan.config, started.plan.inputs)
    return sum(shard.written_bytes for shards in states.values() for shard in shards.values())


def load_and_compare(inputs, run: Path, layout: Layout, *more: str) -> tuple[list[str], set[str]]:
    """Goes on from a checkpoint of known numbers; returns what differs, and the names of what this rank has."""
    started = begin(inputs, run, layout, *more)
    states = started.trainer._states(started.phase)
    wrong = [name for name, tensor, value in parts(states) if not torch.equal(tensor, value)]
    # What the masters are not in the place of: the weights that compute, rounded from them.
    weights = {"generator_phase_1": started.networks.expert_state(1)}
    weights["fake_score_single"] = network_state(started.networks.fake_score["single"])
    for state, shards in weights.items():
        for name, tensor, value in parts(
            {state: {name: replace(s, dtype=torch.float32) for name, s in shards.items()}}
        ):
            if "average" not in name and not torch.equal(tensor, value.to(tensor.dtype)):
                wrong.append(f"rounded {name}")
    assert started.trainer.progress.iteration == STEPS
    assert set(started.phase.optimizer_steps().values()) == {STEPS}
    return wrong, {f"{state}/{name}" for state, shards in states.items() for name in shards}


@pytest.mark.parametrize(("saved", "loaded", "more"), MOVES)
def test_a_checkpoint_moves_between_layouts_to_the_bit(saved, loaded, more, inputs, run_ranks, tmp_path):
    """Every tensor is written once, is what it was in any other layout, and stands on one stage."""
    run = tmp_path / "run"
    written = run_ranks(save_known_numbers, saved.world, inputs, run, saved, *more)
    found = latest_checkpoint(run / "checkpoints")
    assert found.manifest.layout == {
        "tensor": saved.tensor,
        "context": 1,
        "data": saved.data,
        "pipeline": saved.pipeline,
    }
    tensors = found.index.state_dict_metadata
    assert sum(written) == sum(e.size.numel() * e.properties.dtype.itemsize for e in tensors.values())
    ranks = run_ranks(load_and_compare, loaded.world, inputs, run, loaded, *more)
    assert [wrong for wrong, _ in ranks] == [[]] * loaded.world
    stages = [held for _, held in ranks[:: loaded.tensor * loaded.data]]
    assert sum(map(len, stages)) == len(set.union(*stages)) == len(tensors)


def test_a_tensor_that_no_stage_needs_or_that_has_another_shape_is_refused_by_all(run_ranks, tmp_path):
    """What one stage lacks is no mistake where another one has it."""

    shapes = {"fits": 9, "missing": None, "unknown": 9, "shape": 3}

    def rank() -> list[str]:
        stage, told = initialize_topology(pipeline=2).pipeline_rank, []
        writer = CheckpointWriter(tmp_path)
        saved = {f"blocks.{stage}": Shard.of(torch.full((9,), stage + 1.0))}
        writer.save(Manifest(Progress(1, 1, 1, 1)), {"fake": saved})
        writer.close()
        for case, size in shapes.items():
            names = {f"blocks.{stage}": size if stage else 9} | ({"blocks.7": 2} if stage and case == "unknown" else {})
            own = {name: torch.zeros(size) for name, size in names.items() if size}
            try:
                latest_checkpoint(tmp_path).read("fake", {name: Shard.of(tensor) for name, tensor in own.items()})
                told.append(f"read {own[f'blocks.{stage}'].unique().item()}")
            except CheckpointError as refused:
                told.append(str(refused).rpartition("fake: ")[2].partition(";")[0])
        return told

    for stage, told in enumerate(run_ranks(rank, 2)):
        assert told == [
            f"read {stage + 1.0}",
            "'blocks.1' is on one side only",
            "'blocks.7' is on one side only",
            "'blocks.1' differs in shape ([9] saved, [3] needed)",
        ]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def half_trained(inputs, run_ranks, tmp_path_factory) -> Path:
    """A run saved at PP 2 x TP 2 whose adapters are not zero."""
    run = tmp_path_factory.mktemp("half") / "run"
    run_ranks(save_known_numbers, 4, inputs, run, Layout(pipeline=2, tensor=2))
    return run


def test_a_run_saved_by_stages_is_exported_by_one_rank(half_trained, inputs, load_tool, tmp_path, run_ranks):
    """convert_checkpoint.py, which knows nothing of the layout that saved, writes what the run's own stages do."""

    def convert() -> None:
        sys.argv = ["convert_checkpoint.py", "export", "--load", str(half_trained), "--hf", str(tmp_path / "one")]
        load_tool("convert_checkpoint").main()

    def export() -> None:
        started = begin(inputs, half_trained, Layout(pipeline=2))
        plan = started.plan
        export_run(plan.config, plan.source, plan.phases, started.networks, tmp_path / "stages")

    run_ranks(convert, 1)
    run_ranks(export, 2)
    assert files(tmp_path / "stages") == files(tmp_path / "one")


def test_every_stage_can_have_the_whole_adapter(half_trained, inputs, run_ranks):
    def whole_adapter() -> list[str]:
        delivered = begin(inputs, half_trained, Layout(pipeline=2, tensor=2)).networks.delivered(1)
        found = adapter_state_dict(delivered.model, delivered.adapter)
        wrong = [name for name, tensor in found.items() if not torch.equal(tensor, saved_average(name, tensor))]
        assert len(found) == 2 * 10 * TINY.num_layers
        return wrong

    def saved_average(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return whole_value(f"generator_phase_1/average.{name}", tuple(tensor.shape), tensor.dtype)

    assert run_ranks(whole_adapter, 4) == [[]] * 4


def sampled(inputs, run: Path, folder: Path, layout: Layout) -> tuple[dict[str, torch.Tensor | None], dict[str, float]]:
    """What all ranks gather of a run's samples, and what an evaluation finds; its files are in `folder`."""
    started = begin(inputs, run, layout)
    config, sampler = started.plan.config, started.trainer._fixed_sampler()
    chosen = [0, 1, 2, 1, 0]
    samples = {
        "student": sampler.gather(sampler.student(chosen), len(chosen)),
        "teacher": sampler.gather(sampler.teacher(chosen, 3, lambda expert: 2.0), len(chosen)),
    }
    validation = Validation(replace(config, checkpoint=replace(config.checkpoint, save=folder)))
    return samples, validation.evaluate(sampler, started.iteration, STEPS)


def test_stages_sample_and_evaluate_as_one_rank_does(half_trained, inputs, run_ranks, tmp_path):
    """The same arithmetic, so to the bit; what is gathered and found is on rank 0 alone."""
    layout = Layout(pipeline=2, data=2)
    draw = functools.partial(run_ranks, sampled)
    ((expected, evaluated),) = draw(1, inputs, half_trained, tmp_path / "one", ONE)
    (first, found), *others = draw(layout.world, inputs, half_trained, tmp_path / "stages", layout)
    assert {name: torch.equal(first[name], expected[name]) for name in expected} == {"student": True, "teacher": True}
    assert found == pytest.approx(evaluated, rel=0, abs=0, nan_ok=True) and found["sample_distance"] > 0
    assert others == [({"student": None, "teacher": None}, {})] * (layout.world - 1)
    drawn = files(tmp_path / "stages")
    assert drawn == files(tmp_path / "one")
    assert {Path(name).suffix for name in drawn} == {".png", ".gif", ".safetensors"}

"""Runs that are saved in one layout of ranks and go on in another, and saving that goes wrong on some rank."""

import contextlib
import io
import json
import os
import shutil
import signal
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_pdmd import pretrain
from megatron_pdmd.conversion.weight_files import write_model
from megatron_pdmd.data.prompts import PromptEmbeddings
from megatron_pdmd.errors import NoSpaceError, OtherRankError, require_space
from megatron_pdmd.models import WanConfig, WanModel, to_hf_state_dict
from megatron_pdmd.parallel import destroy_topology, initialize_topology, together, without_cuda
from megatron_pdmd.training.checkpoints import torch_dist
from megatron_pdmd.training.checkpoints.checkpointing import CheckpointWriter, Manifest, Progress, latest_checkpoint
from megatron_pdmd.training.checkpoints.sharded_state import Shard
from megatron_pdmd.training.optimizers.optimizer import RoleOptimizer
from megatron_pdmd.training.phase import PhaseTrainer

TINY = WanConfig(
    patch_size=(1, 2, 2),
    num_attention_heads=4,
    attention_head_dim=12,
    in_channels=1,
    out_channels=1,
    text_dim=16,
    freq_dim=32,
    ffn_dim=32,
    num_layers=1,
    rope_max_seq_len=16,
)
PROMPTS = ("a seven moves left", "a one moves up", "a three moves down")
FLAGS = (
    "--prompt-length 8 --frames 2 --height 4 --width 4 --timestep-shift 3 --guidance-scale 2 --fake-updates 2 "
    "--lora-rank 4 --lora-alpha 4 --lr 0.01 --fake-lr 0.01 --train-iters 4 --phase-steps 4 --micro-batch-size 1 "
    "--global-batch-size 4 --log-interval 1 --ema-decay 0.9 --no-export --no-tensorboard"
)
LOSSES = ("fake_loss", "fake_grad_norm", "dmd_gradient", "score_gap", "generator_grad_norm")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[str, ...]:
    """Flags of a one-expert teacher with random weights, and of prompts."""
    folder = tmp_path_factory.mktemp("inputs")
    teacher, prompts = folder / "teacher", folder / "prompts"
    (teacher / "transformer").mkdir(parents=True)
    (teacher / "transformer" / "config.json").write_text(json.dumps(TINY.to_hf()))
    torch.manual_seed(1)
    with without_cuda():
        write_model(teacher / "transformer", to_hf_state_dict(WanModel(TINY)).items())
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


def launch(inputs, run: Path, *more: str) -> int:
    """One rank of the program, without sample sheets."""
    try:
        return pretrain.main([*inputs, "--save", str(run), "--sample-prompts", "0", *more])
    except SystemExit as stop:
        return stop.code
    finally:
        destroy_topology()


def logged(run: Path) -> torch.Tensor:
    """[iterations, losses and norms], fp64."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([[row[name] for name in LOSSES] for row in rows], dtype=torch.float64)


def saved(run: Path) -> dict[str, torch.Tensor]:
    """Every whole tensor of the last checkpoint."""
    found, tensors = latest_checkpoint(run / "checkpoints"), {}
    for state in found.states:
        own = {name: torch.empty(shape) for name, shape in found.shapes(state).items()}
        found.read(state, {name: Shard.of(tensor) for name, tensor in own.items()})
        tensors |= {f"{state}/{name}": tensor for name, tensor in own.items()}
    return tensors


SAVED = ("--tensor-model-parallel-size", "2", "--sequence-parallel", "--use-distributed-optimizer")
LAYOUTS = {
    "tp2 dp2": (4, SAVED),
    "tp4": (4, ("--tensor-model-parallel-size", "4")),
    "cp2": (2, ("--context-parallel-size", "2")),
    "dp4": (4, ("--use-distributed-optimizer", "--overlap-param-gather", "--overlap-grad-reduce")),
}


@pytest.fixture(scope="module")
def whole(inputs, run_ranks, tmp_path_factory) -> Path:
    """The uninterrupted run, at TP 2 x DP 2."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert run_ranks(launch, 4, inputs, run, *SAVED) == [0] * 4
    return run


@pytest.fixture(scope="module")
def half(inputs, run_ranks, tmp_path_factory) -> Path:
    """The same run, stopped after two of its four iterations."""
    run = tmp_path_factory.mktemp("half") / "run"
    assert run_ranks(launch, 4, inputs, run, *SAVED, "--exit-interval", "2", "--async-save") == [3] * 4
    return run


@pytest.fixture(scope="module")
def rounding(inputs, half, run_ranks, tmp_path_factory) -> float:
    """Largest relative difference that two micro-batch sizes make on one rank."""
    parts, together = (tmp_path_factory.mktemp("one_rank") / "run" for _ in range(2))
    for run, size in ((parts, "1"), (together, "4")):
        assert run_ranks(launch, 1, inputs, run, "--load", str(half), "--micro-batch-size", size) == [0]
    return relative_errors(parts, logged(together)).max().item()


def relative_errors(run: Path, expected: torch.Tensor) -> torch.Tensor:
    return (logged(run) - expected).norm(dim=0) / expected.norm(dim=0)


@pytest.mark.parametrize("generator", ["lora", "full"])
def test_what_another_layout_loads_and_saves_again_is_the_same_to_the_bit(generator, inputs, run_ranks, tmp_path):
    """fp32 main weights, the bf16 weights they round to, second moments; the second launch takes no optimizer step."""
    first, second = tmp_path / "first", tmp_path / "second"
    flags = ("--bf16", "--exit-interval", "1", "--ema-decay", "0", "--generator", generator)

    def launch_without_steps() -> int:
        load_state = PhaseTrainer.load_state

        def load_and_compare(self, checkpoint, **options) -> None:
            load_state(self, checkpoint, **options)
            masters, network = saved(first), self._fake_score["single"].module
            for name, weight in network.named_parameters():
                assert torch.equal(weight, masters[f"fake_score_single/{name}"].to(weight.dtype)), name

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PhaseTrainer, "load_state", load_and_compare)
            patch.setattr(RoleOptimizer, "step", lambda self, norm: None)
            return launch(inputs, second, *flags, "--load", str(first), "--use-distributed-optimizer")

    assert run_ranks(launch, 4, inputs, first, *SAVED, *flags) == [3] * 4
    assert run_ranks(launch_without_steps, 2) == [3] * 2
    ours, theirs = saved(second), saved(first)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    kinds = {name.rpartition(".")[2] for name in ours}
    assert {"exp_avg_sq", "weight"} <= kinds
    assert latest_checkpoint(second / "checkpoints").manifest.optimizer_steps == {
        "generator": 1,
        "fake_score_single": 2,
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_goes_on_in_any_layout(layout, inputs, whole, half, rounding, run_ranks, tmp_path):
    """Its losses and norms follow the uninterrupted run's: to the bit in the same layout, else to twice the rounding of
    plain micro-batches, plus one eps."""
    run, (ranks, flags) = tmp_path / "run", LAYOUTS[layout]
    assert run_ranks(launch, ranks, inputs, run, "--load", str(half), *flags) == [0] * ranks
    assert len(logged(run)) == 2
    if layout == "tp2 dp2":
        assert torch.equal(logged(run), logged(whole)[2:])
        ours, theirs = saved(run), saved(whole)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    else:
        errors = relative_errors(run, logged(whole)[2:])
        assert errors.max() <= 2 * rounding + torch.finfo(torch.float32).eps, (errors, rounding)


def test_every_element_is_written_once_and_reads_back_to_the_bit_in_another_layout(half, inputs, run_ranks, tmp_path):
    """Four ranks read rows of every tensor, whoever wrote them, and write those again."""

    def copy() -> int:
        topology = initialize_topology(tensor=2)
        found = latest_checkpoint(half / "checkpoints")
        states = {}
        for state in found.states:
            shards = {}
            for name, shape in found.shapes(state).items():
                rows = torch.empty(shape).chunk(topology.world_size)
                rank = min(topology.rank, len(rows) - 1)
                offset = sum(len(part) for part in rows[:rank])
                shard = Shard.of(rows[rank].clone())
                box = replace(shard.boxes[0], offsets=(offset, *shard.boxes[0].offsets[1:]))
                written = topology.rank < len(rows)
                shards[name] = replace(shard, shape=shape, boxes=(box,), written=written)
            found.read(state, shards)
            states[state] = shards
        writer = CheckpointWriter(tmp_path / "run" / "checkpoints")
        writer.save(found.manifest, states)
        writer.close()
        return sum(shard.written_bytes for shards in states.values() for shard in shards.values())

    written = run_ranks(copy, 4)
    ours, theirs = saved(tmp_path / "run"), saved(half)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert sum(written) == sum(tensor.numel() * tensor.element_size() for tensor in theirs.values())


def test_an_export_at_tp2_is_that_of_one_rank(whole, inputs, run_ranks, tmp_path):
    for name, ranks in (("one", 1), ("two", 2)):
        flags = ("--load", str(whole), "--export", "--tensor-model-parallel-size", str(ranks))
        assert run_ranks(launch, ranks, inputs, tmp_path / name, *flags) == [0] * ranks
    one, two = (
        load_file(tmp_path / name / "hf" / "transformer" / "diffusion_pytorch_model.safetensors")
        for name in ("one", "two")
    )
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert (two[name] - tensor).norm() <= torch.finfo(torch.float32).eps * tensor.norm(), name


def test_a_missing_shard_ends_every_rank_with_2_and_one_line_before_they_meet(half, inputs, run_ranks, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(half, run)
    next(run.rglob("__3_0.distcp")).unlink()

    def rank() -> tuple[int, str]:
        with contextlib.redirect_stderr(io.StringIO()) as told:
            return launch(inputs, run, "--tensor-model-parallel-size", "2"), told.getvalue()

    (first, told), *others = run_ranks(rank, 2)
    assert (first, told.count("\n")) == (2, 1) and "__3_0.distcp is missing" in told
    assert others == [(2, told)], "without a launcher each tells it"


def test_damage_that_one_rank_meets_while_training_goes_on_ends_all(half, inputs, run_ranks, tmp_path):
    """The file is there in full length, but one of its tensors is not."""
    run = tmp_path / "run"
    shutil.copytree(half, run)
    index = torch_dist.read_index(next(run.rglob("iter_0000002")))
    key = next(key for key in index.storage_data if key.fqn.startswith("fake_score_single.proj_out.weight"))
    place = index.storage_data[key]
    path = next(run.rglob(place.relative_path))
    content = bytearray(path.read_bytes())
    content[place.offset : place.offset + place.length] = bytes(place.length)
    path.write_bytes(content)

    def rank() -> tuple[int, str]:
        with contextlib.redirect_stderr(io.StringIO()) as told:
            return launch(inputs, run), told.getvalue()

    (first, told), *others = run_ranks(rank, 2)
    assert (first, told.count("\n")) == (2, 1) and "damaged" in told
    assert others == [(2, told)], "without a launcher each tells it"


def test_a_disk_that_is_full_for_one_node_stops_all_before_anything_is_written(run_ranks, tmp_path):
    def rank() -> str:
        initialize_topology()
        writer = CheckpointWriter(tmp_path / "checkpoints")
        with pytest.MonkeyPatch.context() as patch:
            # Rank 1 is the first of its node, and that node's disk is the full one.
            patch.setenv("LOCAL_RANK", "0")
            if dist.get_rank() == 1:
                patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
            with pytest.raises(ValueError) as refused:
                writer.save(Manifest(Progress(1, 1, 1, 1)), {"fake": {"a": Shard.of(torch.zeros(9))}})
        writer.close()
        return str(refused.value)

    assert all("--save" in told and "no space on disk" in told for told in run_ranks(rank, 2))
    assert not (tmp_path / "checkpoints").exists()


def test_a_mistake_of_one_rank_is_raised_on_all(run_ranks, tmp_path):
    def rank() -> str:
        with pytest.raises(NoSpaceError) as raised, together():
            if dist.get_rank() == 1:
                require_space(tmp_path, 2**70, "--save")
        return str(raised.value)

    one, other = run_ranks(rank, 2)
    assert one == other and one.startswith(f"--save {tmp_path}: no space on disk")


def test_a_bug_of_one_rank_ends_all_and_says_where(run_ranks):
    def rank() -> str:
        with pytest.raises((KeyError, OtherRankError)) as raised, together():
            if dist.get_rank() == 1:
                raise KeyError("a bug")
        return str(raised.value)

    assert run_ranks(rank, 2) == ["rank 1 failed: KeyError: 'a bug'", "'a bug'"]


def test_a_value_error_of_a_library_is_no_mistake_of_the_users_on_any_rank(run_ranks):
    def rank() -> type[Exception]:
        with pytest.raises((ValueError, OtherRankError)) as raised, together():
            if dist.get_rank() == 1:
                int("x")
        return raised.type

    assert run_ranks(rank, 2) == [OtherRankError, ValueError]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_rank_killed_while_it_saves_takes_the_others_down_and_leaves_the_last_good_checkpoint(
    asynchronous, run_ranks, tmp_path
):
    """Plain processes, which nobody watches; they are the stages of a pipeline, each with tensors of its own."""

    def rank() -> None:
        stage = initialize_topology(pipeline=2).pipeline_rank
        writer = CheckpointWriter(tmp_path / "checkpoints", asynchronous=asynchronous)
        state = {"fake": {f"blocks.{stage}": Shard.of(torch.full((9,), stage + 1.0))}}
        writer.save(Manifest(Progress(1, 1, 1, 1)), state)
        writer.wait()
        write = torch_dist.dcp.FileSystemWriter.write_data

        def dying(self, *arguments):
            if dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return write(self, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch_dist.dcp.FileSystemWriter, "write_data", dying)
            writer.save(Manifest(Progress(2, 1, 2, 2)), state)
            writer.close()

    start = time.monotonic()
    codes = plain_processes(rank, 2, tmp_path / "store")
    assert time.monotonic() - start < 60
    assert codes == [1, -signal.SIGKILL]
    found = latest_checkpoint(tmp_path / "checkpoints")
    assert found.progress.iteration == 1
    tensors = {f"blocks.{stage}": torch.zeros(9) for stage in range(2)}
    found.read("fake", {name: Shard.of(tensor) for name, tensor in tensors.items()})
    assert [tensor.unique().item() for tensor in tensors.values()] == [1, 2]


def plain_processes(function, count: int, store: Path) -> list[int]:
    """Exit codes of gloo ranks that each live and die on their own: 1 after an exception, minus a signal."""
    pids = []
    for rank in range(count):
        pids.append(os.fork())
        if pids[-1] == 0:
            signal.alarm(120)
            try:
                os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank))
                limit = timedelta(seconds=50)
                rendezvous = dist.FileStore(str(store), count)
                dist.init_process_group("gloo", store=rendezvous, rank=rank, world_size=count, timeout=limit)
                function()
                os._exit(0)
            finally:
                os._exit(1)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]

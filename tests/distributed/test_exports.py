"""Ranks that share the writing of an export write what one rank writes, wait for each other, and fail together."""

import json
import os
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_pdmd.conversion import export, weight_files
from megatron_pdmd.conversion.export import TrainedExpert, export_pipeline
from megatron_pdmd.conversion.pipeline_folder import read_pipeline
from megatron_pdmd.models import WanModel, from_hf, to_hf_state_dict
from megatron_pdmd.models.lora import adapter_parameters, add_adapter, merged_weights
from megatron_pdmd.models.wan.config import WAN_PRESETS
from megatron_pdmd.parallel import destroy_topology, initialize_topology, without_cuda
from megatron_pdmd.parallel.pipeline.stages import Stage, layer_split

SIZES = {"num_attention_heads": 4, "attention_head_dim": 12, "ffn_dim": 64, "num_layers": 2, "text_dim": 16}
SMALL = replace(WAN_PRESETS["wan2.1-t2v-1.3b"], freq_dim=32, **SIZES)
LAYOUTS = {
    "dp4": (4, {}),
    "cp2": (2, {"context": 2}),
    "tp2 dp2": (4, {"tensor": 2}),
    "tp4": (4, {"tensor": 4}),
    "pp2 dp2": (4, {"pipeline": 2}),
    "pp2 tp2": (4, {"pipeline": 2, "tensor": 2}),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A one-expert pipeline with random weights in several files, and a part that is copied."""
    folder = tmp_path_factory.mktemp("teacher") / "wan"
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps(SMALL.to_hf()))
    torch.manual_seed(1)
    with without_cuda():
        weight_files.write_model(
            folder / "transformer", to_hf_state_dict(WanModel(SMALL)).items(), max_shard_size=90000
        )
    destroy_topology()
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocabulary.txt").write_text("seven")
    index = {
        "_class_name": "WanPipeline",
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "tokenizer": ["transformers", "ByT5Tokenizer"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def export_two(teacher: Path, destination: Path, layout: dict[str, int], *, adapted: bool = False) -> list[str]:
    """Exports two experts in files of 20 kB on this rank and the others; returns the files that this rank writes."""
    topology = initialize_topology(**layout)
    source, written, save = read_pipeline(teacher), [], weight_files.save_file
    stage = Stage.of(topology.pipeline_rank, layer_split(SMALL.num_layers, topology.pipeline))
    models = [from_hf(teacher, dtype=torch.bfloat16, stage=stage) for _ in range(2)]
    for seed, model in enumerate(models):
        add_adapter(model, "trained", rank=4, alpha=4, seed=seed)
        for parameter in adapter_parameters(model, "trained"):
            torch.nn.init.constant_(parameter.data, 0.1 * (seed + 1))

    def record(tensors, path, **options):
        written.append(f"{path.parent.name}/{path.name}")
        save(tensors, path, **options)

    name = "trained" if adapted else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_files, "save_file", record)
        experts = [
            TrainedExpert(steps, "single", merged_weights(model, name))
            for steps, model in zip(((1.0, 0.9), (0.75, 0.5)), models, strict=True)
        ]
        export_pipeline(source, destination, experts, shift=3.0, max_shard_size=20000)
    return written


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_replicas_share_the_files_and_write_what_one_rank_writes(layout, teacher, run_ranks, tmp_path):
    ranks, sizes = LAYOUTS[layout]
    # Merged alone: another split of the adapters' product rounds otherwise.
    adapted = "tensor" not in sizes
    (whole,) = run_ranks(lambda: export_two(teacher, tmp_path / "one", {}, adapted=adapted), 1)
    shares = run_ranks(lambda: export_two(teacher, tmp_path / "shared", sizes, adapted=adapted), ranks)
    assert files(tmp_path / "shared") == files(tmp_path / "one")
    assert sorted(name for share in shares for name in share) == sorted(whole) and len(whole) > 8
    first_stage = ranks // sizes.get("pipeline", 1)
    writers = shares[: first_stage : sizes.get("tensor", 1)]
    counts = [len(share) for share in writers]
    assert sum(counts) == len(whole) and max(counts) - min(counts) <= 1
    read_pipeline(tmp_path / "shared")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "shared"]


@pytest.mark.parametrize(
    ("rank", "owner", "name"),
    [
        (0, weight_files, "save_file"),
        (2, weight_files, "save_file"),
        (0, shutil, "copytree"),
        (0, export, "write_index"),
        (3, export, "read_model_header"),
        (0, export, "read_pipeline"),
    ],
    ids=lambda value: value if isinstance(value, int | str) else "",
)
def test_what_fails_on_one_rank_ends_all_and_leaves_no_folder(rank, owner, name, teacher, run_ranks, tmp_path):
    """On the second call, where there is one: others write and gather then."""

    def fails() -> str:
        real, calls = getattr(owner, name), []

        def full(*arguments, **options):
            calls.append(name)
            if dist.get_rank() == rank and (len(calls) == 2 or name in ("copytree", "read_pipeline")):
                raise OSError(28, "No space left on device")
            return real(*arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(OSError, match="No space left") as raised:
                export_two(teacher, tmp_path / "hf", {"tensor": 2})
        # Gone before any rank could end the job.
        return f"{raised.value} {[path.name for path in tmp_path.iterdir()]}"

    assert run_ranks(fails, 4) == ["[Errno 28] No space left on device []"] * 4


def test_a_tensor_that_is_not_finite_is_named_on_all_ranks(teacher, run_ranks, tmp_path):
    def refused() -> str:
        initialize_topology(tensor=2)
        model = from_hf(teacher)
        model.blocks["1"].attn1.to_q.weight.data[2, 3] = float("nan")
        expert = TrainedExpert((1.0,), "single", merged_weights(model, None))
        with pytest.raises(ValueError, match="NaN or infinity") as raised:
            export_pipeline(read_pipeline(teacher), tmp_path / "hf", [expert], shift=3.0, max_shard_size=20000)
        return f"{str(raised.value).split(' holds')[0].split(': ')[1]} {[path.name for path in tmp_path.iterdir()]}"

    assert run_ranks(refused, 4) == ["tensor 'blocks.1.attn1.to_q.weight' []"] * 4


def test_a_slow_disk_is_waited_for_longer_than_a_rank_that_hangs(teacher, run_ranks, tmp_path):
    """The second file takes three times what the other groups wait."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def rank() -> int:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        initialize_topology(tensor=2, timeout_minutes=1 / 60)
        save, waited = weight_files.save_file, []

        def slow(tensors, path, **options):
            if "-00002-of-" in path.name:
                waited.append(time.sleep(3.0))
            save(tensors, path, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weight_files, "save_file", slow)
            model = from_hf(teacher)
            expert = TrainedExpert((1.0,), "single", merged_weights(model, None))
            export_pipeline(read_pipeline(teacher), tmp_path / "hf", [expert], shift=3.0, max_shard_size=150_000)
        return len(waited)

    assert run_ranks(rank, 2, rendezvous=False) == [1, 0]

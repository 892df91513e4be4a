"""Counts what each rank holds of the trained roles, weights, gradient buffers, optimizer states, and a checkpoint.

    python tools/count_bytes.py --model wan2.1-t2v-14b [--json FILE]

The real networks, wrappers and optimizers are built for rank 0 of a group of ranks that do not exist, on the meta
device: tensors have sizes and no memory. Networks are bf16 with fp32 main weights. GB are 10^9 bytes.
"""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megatron_pdmd.config import Ints
from megatron_pdmd.errors import parse_options, user_errors
from megatron_pdmd.files.whole import check_file_destination, write_json
from megatron_pdmd.limits import check_limits, check_range, shown
from megatron_pdmd.models import lora
from megatron_pdmd.models.layers.tensor_parallel import partition_dim
from megatron_pdmd.models.wan.config import WAN_PRESETS
from megatron_pdmd.models.wan.model import WanModel
from megatron_pdmd.parallel import data_parallel, destroy_topology, initialize_topology, without_cuda
from megatron_pdmd.training.checkpoints.sharded_state import Shard, parameter_shard
from megatron_pdmd.training.optimizers.optimizer import build_optimizer

MOST_RANKS = 1024  # along an axis; every one of their groups is made


@dataclass(frozen=True, kw_only=True)
class CountOptions:
    """Prints bytes for each rank by tensor-parallel size, with and without the distributed optimizer."""

    # Preset whose networks are counted.
    model: str = "wan2.1-t2v-14b"
    # Tensor-parallel sizes.
    tensor_model_parallel_sizes: Ints = (1, 2, 4, 8)
    # Data-parallel ranks, over which the distributed optimizer splits.
    data_parallel_size: int = 8
    # Rank of the generator's adapters.
    lora_rank: int = 64
    # JSON file for the same numbers.
    json: Path | None = field(default=None)


@dataclass(frozen=True)
class RoleBytes:
    """Bytes of one role on one rank.

    Attributes:
        tensor: tensor-parallel ranks.
        distributed: whether the distributed optimizer splits over the data-parallel ranks.
        role: `fake_score` (all weights train) or `generator` (adapters on frozen weights, which the teacher shares).
        weights: all parameters.
        split: those of them that tensor parallelism splits, trained or not.
        trained: those of them that train.
        gradients: the gradient buffer.
        optimizer: fp32 main weights and second moments.
        first_moment: what a first moment would add.
        checkpoint: a checkpoint's bytes of what the role trains, all ranks together.
        implied: bytes of the bf16 weights that it leaves out, for their fp32 main weights are there.
    """

    tensor: int
    distributed: bool
    role: str
    weights: int
    split: int
    trained: int
    gradients: int
    optimizer: int
    first_moment: int
    checkpoint: int
    implied: int


def main() -> None:
    with user_errors():
        options = parse_options(CountOptions, __doc__.splitlines()[0])
        _check(options)
        rows = [
            row
            for distributed in (False, True)
            for tensor in options.tensor_model_parallel_sizes
            for row in count_bytes(options, tensor, distributed=distributed)
        ]
        Console(width=120).print(table_of(options, rows))
        if options.json:
            write_json(options.json, [asdict(row) for row in rows])


def _check(options: CountOptions) -> None:
    """Refuses options that cannot be counted.

    Raises:
        ValueError: names the flag.
    """
    if options.model not in WAN_PRESETS:
        raise ValueError(f"--model {shown(options.model)}: unknown; choose one of {', '.join(WAN_PRESETS)}")
    for size in options.tensor_model_parallel_sizes:
        check_range("--tensor-model-parallel-sizes", size, 1, MOST_RANKS)
    check_range("--data-parallel-size", options.data_parallel_size, 1, MOST_RANKS)
    check_limits(options)
    if options.json:
        check_file_destination(options.json, "--json")


def count_bytes(options: CountOptions, tensor: int, *, distributed: bool) -> list[RoleBytes]:
    """The roles' bytes on rank 0 of `tensor` x `data_parallel_size` ranks.

    Raises:
        ValueError: the model's heads do not divide over so many ranks.
    """
    os.environ["WORLD_SIZE"] = str(tensor * options.data_parallel_size)
    topology = initialize_topology(tensor=tensor, backend="fake")
    try:
        with without_cuda(), torch.device("meta"):
            fake_score = WanModel(WAN_PRESETS[options.model], dtype=torch.bfloat16, topology=topology)
            generator = WanModel(WAN_PRESETS[options.model], dtype=torch.bfloat16, topology=topology)
            generator.requires_grad_(False)
            lora.add_adapter(generator, "phase_1", rank=options.lora_rank, alpha=float(options.lora_rank))
            networks = {"fake_score": fake_score, "generator": generator}
            return [_count_role(tensor, role, network, distributed) for role, network in networks.items()]
    finally:
        destroy_topology()


def _count_role(tensor: int, role: str, network: WanModel, distributed: bool) -> RoleBytes:
    parameters = list(network.parameters())
    weights = _bytes(parameters)
    split = _bytes(p for p in parameters if partition_dim(p) is not None)
    trained = _bytes(p for p in parameters if p.requires_grad)
    wrapped = data_parallel(network, bf16=True, use_distributed_optimizer=distributed)
    optimizer = build_optimizer([wrapped], lr=1e-4, bf16=True)
    optimizer.prepare_to_load(step_count=1)
    masters, moments = optimizer.master_weights(), optimizer.sharded_state()
    saved = {name: parameter_shard(name, p) for name, p in network.named_parameters() if p.requires_grad} | masters
    second_moments = _held(moments)
    return RoleBytes(
        tensor=tensor,
        distributed=distributed,
        role=role,
        weights=weights,
        split=split,
        trained=trained,
        gradients=sum(buffer.grad_data.numel() * buffer.grad_data.element_size() for buffer in wrapped.buffers),
        optimizer=_held(masters) + second_moments,
        first_moment=second_moments,
        checkpoint=_whole(saved) + _whole(moments),
        implied=_whole(masters) // 2,
    )


def _held(shards: Mapping[str, Shard]) -> int:
    """Bytes of fp32 tensors' parts on this rank."""
    return sum(box.tensor.numel() * 4 for shard in shards.values() for box in shard.boxes)


def _whole(shards: Mapping[str, Shard]) -> int:
    """Bytes of the tensors in full."""
    return sum(math.prod(shard.shape) * shard.dtype.itemsize for shard in shards.values())


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def table_of(options: CountOptions, rows: list[RoleBytes]) -> Table:
    """The numbers in GB; the split part times TP is 1 where every rank holds exactly its share of it."""
    title = f"{options.model}, GB on each rank, {options.data_parallel_size} data-parallel ranks"
    table = Table(title=title)
    numbers = ("TP", "weights", "split part x TP", "gradients", "states", "first moment saved")
    for name in ("role", "optimizer", *numbers, "checkpoint", "left out of it"):
        table.add_column(name, justify="left" if name in ("role", "optimizer") else "right")
    for role in ("fake_score", "generator"):
        own = [row for row in rows if row.role == role]
        for row in own:
            split = row.split * row.tensor / (own[0].split * own[0].tensor)
            counted = (row.gradients, row.optimizer, row.first_moment, row.checkpoint, row.implied)
            sizes = [f"{size / 1e9:.3f}" for size in counted]
            kind = "distributed" if row.distributed else "plain"
            table.add_row(role, kind, str(row.tensor), f"{row.weights / 1e9:.3f}", f"{split:.4f}", *sizes)
    return table


if __name__ == "__main__":
    main()

"""Process groups: which rank does what.

Ranks are laid out as megatron-core lays them out, tensor parallelism innermost: rank = tensor + T (context + C (data
+ D pipeline)). Whatever the tensor, context and pipeline sizes leave of the world is data parallel.
"""

import math
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_pdmd.environment import MOST_RANKS, whole_number
from megatron_pdmd.parallel.cpu import without_cuda
from megatron_pdmd.parallel.patience import forget_patient_group, patient_group

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

BACKENDS = ("nccl", "gloo", "fake")


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The sizes of every parallel axis and this rank's place on each of them.

    Attributes:
        rank: this process's number in [0, world_size).
        world_size: processes in all; tensor * pipeline * context * data.
        tensor, pipeline, context, data: ranks along each axis.
        tensor_rank, pipeline_rank, context_rank, data_rank: this rank's coordinate along each axis.
        sequence_parallel: activations between the tensor-parallel linears are split over the tensor ranks.
        backend: "nccl", "gloo" or "fake" (no communication: for dry runs that only need shapes).
        device: where this rank's tensors live.
        groups: megatron-core's process groups, by their names there (``tp``, ``pp``, ``cp``, ``dp``, ``dp_cp``,
            ``mp`` ...).
    """

    rank: int
    world_size: int
    tensor: int
    pipeline: int
    context: int
    data: int
    tensor_rank: int
    pipeline_rank: int
    context_rank: int
    data_rank: int
    sequence_parallel: bool
    backend: str
    device: torch.device
    groups: "ProcessGroupCollection"


# One per process, as are torch.distributed's default group and megatron-core's parallel_state.
_current: Topology | None = None


def initialize_topology(
    tensor: int = 1,
    pipeline: int = 1,
    context: int = 1,
    sequence_parallel: bool = False,
    backend: str | None = None,
    timeout_minutes: float = 10.0,
) -> Topology:
    """Create the process groups of this run. A second call with the same arguments returns the same topology.

    Under torchrun the environment says how many ranks there are; a process group that the caller already created is
    used as it is; a process on its own becomes a world of one without opening a rendezvous port.

    Args:
        tensor: ranks that share each linear layer (``--tensor-model-parallel-size``).
        pipeline: ranks that share the layers (``--pipeline-model-parallel-size``).
        context: ranks that share each sequence (``--context-parallel-size``).
        sequence_parallel: split activations between linears over the tensor ranks (``--sequence-parallel``).
        backend: "nccl", "gloo" or "fake"; nccl where there is a CUDA device, else gloo, if not given
            (``--distributed-backend``).
        timeout_minutes: how long a rank waits for another before it gives up (``--distributed-timeout-minutes``).

    Raises:
        ValueError: the sizes do not divide the world, sequence parallelism without tensor parallelism, a backend that
            cannot work here, or a topology with other arguments exists.
    """
    global _current
    backend = backend or (dist.get_backend() if dist.is_initialized() else _default_backend())
    if _current is not None:
        asked = (tensor, pipeline, context, sequence_parallel, backend)
        has = (_current.tensor, _current.pipeline, _current.context, _current.sequence_parallel, _current.backend)
        if asked != has:
            raise ValueError(
                f"a topology with (tensor, pipeline, context, sequence_parallel, backend) = {has} exists and "
                f"{asked} is asked for; call destroy_topology() first"
            )
        return _current
    world_size = dist.get_world_size() if dist.is_initialized() else whole_number("WORLD_SIZE", 1, 1, MOST_RANKS)
    check_world(world_size, tensor, pipeline, context, sequence_parallel)
    device = _select_device(backend)
    if not dist.is_initialized():
        _initialize_process_group(backend, world_size, timedelta(minutes=timeout_minutes))
    elif dist.get_backend() != backend:
        raise ValueError(
            f"torch.distributed runs on {dist.get_backend()} and --distributed-backend is {backend}; give the same one"
        )
    _current = _build_groups(tensor, pipeline, context, sequence_parallel, backend, device, timeout_minutes)
    patient_group()  # made here, where all ranks are, and not where the first of them needs it
    return _current


def current_topology() -> Topology:
    """Return the topology that ``initialize_topology`` made.

    Raises:
        RuntimeError: there is none.
    """
    if _current is None:
        raise RuntimeError("there is no topology; call megatron_pdmd.parallel.initialize_topology() first")
    return _current


def existing_topology() -> Topology | None:
    """Return the topology that ``initialize_topology`` made, or None where there is none yet."""
    return _current


def destroy_topology() -> None:
    """Take the process groups down, so that another topology can be made. Does nothing when there is none."""
    global _current
    if _current is None:
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    # megatron-core forgets some of its groups there. A later fork that replaced them would wait in their destructor for
    # threads that only the parent has.
    for name, value in vars(parallel_state).items():
        if isinstance(value, dist.ProcessGroup):
            setattr(parallel_state, name, None)
    forget_patient_group()
    dist.destroy_process_group()
    _current = None


def _build_groups(
    tensor: int,
    pipeline: int,
    context: int,
    sequence_parallel: bool,
    backend: str,
    device: torch.device,
    timeout_minutes: float,
) -> Topology:
    # Imported here: megatron-core takes seconds to import, which a mistyped size should not cost.
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    with without_cuda():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            context_parallel_size=context,
            create_gloo_process_groups=False,
            # No weight stands on two stages, so there are no gradients of embeddings to sum over the first and last.
            get_embedding_ranks=lambda ranks: ranks[:1],
            distributed_timeout_minutes=timeout_minutes,
        )
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        data=parallel_state.get_data_parallel_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        context_rank=parallel_state.get_context_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        sequence_parallel=sequence_parallel,
        backend=backend,
        device=device,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
    )


def _default_backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def _select_device(backend: str) -> torch.device:
    if backend not in BACKENDS:
        raise ValueError(f"--distributed-backend {backend} is unknown; choose one of {', '.join(BACKENDS)}")
    if not torch.cuda.is_available():
        if backend == "nccl":
            raise ValueError("--distributed-backend nccl needs a CUDA device and there is none; use gloo")
        return torch.device("cpu")
    local_rank = whole_number("LOCAL_RANK", 0, 0, MOST_RANKS)
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no device, this machine has {torch.cuda.device_count()}; "
            "lower torchrun's --nproc-per-node"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _initialize_process_group(backend: str, world_size: int, timeout: timedelta) -> None:
    if backend == "fake":
        from torch.testing._internal.distributed.fake_pg import FakeStore

        store = FakeStore()
    elif "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        _meet(backend, timeout)
        return
    elif world_size == 1:
        store = dist.HashStore()
    else:
        raise ValueError(
            f"WORLD_SIZE is {world_size} but RANK or MASTER_ADDR is not set; "
            "start the ranks with torchrun or unset WORLD_SIZE"
        )
    rank = whole_number("RANK", 0, 0, world_size - 1)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _meet(backend: str, timeout: timedelta) -> None:
    """Joins the other ranks where the environment says.

    Raises:
        ValueError: they cannot be reached there.
    """
    try:
        dist.init_process_group(backend, timeout=timeout)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        place = f"MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={os.environ.get('MASTER_PORT', '29500')}"
        told = str(error).partition("\n")[0]
        raise ValueError(
            f"{place}: the ranks cannot meet there ({told}); name rank 0's machine and a free port"
        ) from None


def check_sizes(tensor: int, pipeline: int, context: int, sequence_parallel: bool) -> None:
    """Refuses sizes that no number of ranks can satisfy.

    Raises:
        ValueError: a size below 1, or sequence parallelism without tensor parallelism.
    """
    for flag, size in _by_flag(tensor, pipeline, context).items():
        if size < 1:
            raise ValueError(f"{flag} is {size}; it must be at least 1")
    if sequence_parallel and tensor == 1:
        raise ValueError(
            "--sequence-parallel splits activations over tensor-parallel ranks and --tensor-model-parallel-size is 1; "
            "raise it or drop --sequence-parallel"
        )


def _by_flag(tensor: int, pipeline: int, context: int) -> dict[str, int]:
    return {
        "--tensor-model-parallel-size": tensor,
        "--pipeline-model-parallel-size": pipeline,
        "--context-parallel-size": context,
    }


def check_world(world_size: int, tensor: int, pipeline: int, context: int, sequence_parallel: bool) -> None:
    """Refuses sizes that do not divide a world.

    Raises:
        ValueError: names the sizes and the worlds that would.
    """
    check_sizes(tensor, pipeline, context, sequence_parallel)
    sizes = _by_flag(tensor, pipeline, context)
    product = math.prod(sizes.values())
    if world_size % product == 0:
        return
    layout = " x ".join(f"{flag} {size}" for flag, size in sizes.items())
    raise ValueError(
        f"a world of {world_size} is not divisible by {layout} = {product}; "
        f"{_sizes_that_work(world_size, sizes, product)}"
    )


def _sizes_that_work(world_size: int, sizes: dict[str, int], product: int) -> str:
    """Name, per flag, the nearest sizes that divide the world with the others left alone, and the nearest world
    sizes."""
    options = []
    for flag, size in sizes.items():
        share, rest = divmod(world_size, product // size)
        if size == 1 or rest:
            continue
        divisors = [n for n in range(1, share + 1) if share % n == 0]
        nearest = {*[n for n in divisors if n < size][-1:], *[n for n in divisors if n > size][:1]}
        options.append(f"{flag} {' or '.join(map(str, sorted(nearest)))}")
    below = world_size // product * product
    worlds = [str(n) for n in (below, below + product) if n > 0]
    options.append(f"start {' or '.join(worlds)} ranks")
    return "use " + ", or ".join(options)

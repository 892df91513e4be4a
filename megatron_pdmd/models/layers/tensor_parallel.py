"""Where activations and parameters meet the tensor-parallel group.

A region between `enter` and `leave` computes on shards of the hidden units with the whole sequence. Outside of it the
activations are replicated, or, with sequence parallelism, split over the sequence. All activations are [B, S, d].
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import mappings
from torch import Tensor, nn

from megatron_pdmd.parallel.topology import Topology


@dataclass(frozen=True)
class TensorParallel:
    """One rank's view of its tensor-parallel group.

    Attributes:
        group: the process group; None stands for a single rank.
        size: number of ranks the hidden units are split over.
        rank: this rank's index in the group.
        sequence_parallel: activations outside the parallel regions are split along the sequence.
    """

    group: dist.ProcessGroup | None = None
    size: int = 1
    rank: int = 0
    sequence_parallel: bool = False

    @classmethod
    def of(cls, topology: Topology | None) -> "TensorParallel":
        """The group of a topology; without one, a single rank."""
        if topology is None:
            return cls()
        return cls(topology.groups.tp, topology.tensor, topology.tensor_rank, topology.sequence_parallel)

    def linear_config(self, dtype: torch.dtype) -> ModelParallelConfig:
        """What megatron-core's linears want to know: our layout, no fused paths, weights on the default device."""
        return ModelParallelConfig(
            tensor_model_parallel_size=self.size,
            sequence_parallel=self.sequence_parallel,
            params_dtype=dtype,
            use_cpu_initialization=True,
            perform_initialization=False,
            gradient_accumulation_fusion=False,
        )

    def enter(self, x: Tensor) -> Tensor:
        """Activations on their way into a parallel region; gradients are summed over the group on the way back."""
        if self.size == 1:
            return x
        if self.sequence_parallel:
            gathered = mappings.gather_from_sequence_parallel_region(_sequence_first(x), group=self.group)
            return gathered.transpose(0, 1)
        return self.enter_replicated(x)

    def enter_replicated(self, x: Tensor) -> Tensor:
        """The same for what every rank holds whole, such as text embeddings."""
        return x if self.size == 1 else mappings.copy_to_tensor_model_parallel_region(x, group=self.group)

    def leave(self, x: Tensor) -> Tensor:
        """Sums the partial results of a parallel region over the group."""
        if self.size == 1:
            return x
        if self.sequence_parallel:
            scattered = mappings.reduce_scatter_to_sequence_parallel_region(_sequence_first(x), group=self.group)
            return scattered.transpose(0, 1)
        return mappings.reduce_from_tensor_model_parallel_region(x, group=self.group)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sums x over the group in place, outside autograd."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def mark_replicated(self, module: nn.Module) -> None:
        """Tells the optimizer to sum the gradients of a module that each rank applies to its part of the sequence."""
        for parameter in module.parameters():
            self.mark_replicated_parameter(parameter)

    def mark_replicated_parameter(self, parameter: nn.Parameter) -> None:
        """The same for a single parameter."""
        parameter.sequence_parallel = self.sequence_parallel

    def mark_partial_parameter(self, parameter: nn.Parameter) -> None:
        """Tells the optimizer to sum the gradients of a parameter that meets only this rank's part of the units."""
        parameter.sequence_parallel = self.size > 1

    def shard(self, tensor: Tensor, dim: int | None) -> Tensor:
        """This rank's slice of a whole tensor, or the tensor itself where `dim` is None (it is replicated)."""
        return tensor if dim is None or self.size == 1 else tensor.chunk(self.size, dim)[self.rank]

    def unshard(self, tensor: Tensor, dim: int | None) -> Tensor:
        """The whole of a tensor that is sharded along `dim`; a collective call where it is sharded."""
        if dim is None or self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.cat(parts, dim)


def partition_dim(parameter: Tensor) -> int | None:
    """The dim along which a parameter is sharded over the tensor-parallel group; None if it is replicated."""
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None


def mark_sharded(parameter: nn.Parameter, dim: int) -> None:
    """Marks a parameter as sharded along `dim`, as megatron-core does for its own."""
    parameter.tensor_model_parallel = True
    parameter.partition_dim = dim
    parameter.partition_stride = 1


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, modulation and time embeddings in a model of `dtype`: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def _sequence_first(x: Tensor) -> Tensor:
    """megatron-core splits and gathers the first dim; for one sample this is a view."""
    return x.transpose(0, 1).contiguous()

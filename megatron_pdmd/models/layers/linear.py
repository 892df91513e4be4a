"""Column- and row-parallel linears that carry low-rank adapters.

y = x W^T + b + (alpha / rank) (x A^T) B^T with the adapter named in the call; "Low-Rank Adaptation",
https://arxiv.org/abs/2106.09685. Parameters and sharded checkpoints are megatron-core's. The collectives are not:
`TensorParallel.enter` runs once for all the column-parallel linears that share an input.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from megatron_pdmd.models.layers.tensor_parallel import TensorParallel, mark_sharded

# The bound of torch.nn.Linear's weights, 1 / sqrt(inputs), as Kaiming's rule writes it.
linear_init = partial(nn.init.kaiming_uniform_, a=math.sqrt(5))


class _Adaptable(nn.Module):
    """The adapters of one linear, by name: A is [rank, inputs], B is [outputs, rank], both fp32."""

    weight: nn.Parameter
    parallel: TensorParallel
    # The sharded dims of A and of B; None for the one that every rank holds whole.
    adapter_partition_dims: tuple[int | None, int | None]

    def _init_parameters(self, parallel: TensorParallel, dim: int) -> None:
        """Draws the whole weight and keeps this rank's part, the same numbers for every layout; the bias is zero."""
        self.parallel = parallel
        mark_sharded(self.weight, dim)
        if not self.weight.is_meta:
            whole = torch.empty(self.output_size, self.input_size)
            linear_init(whole)
            with torch.no_grad():
                self.weight.copy_(parallel.shard(whole, dim))
                self.bias.zero_()
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.lora_scale: dict[str, float] = {}

    def add_adapter(self, name: str, a: Tensor, b: Tensor, scale: float) -> None:
        """Adds an adapter from its whole A and B; this rank keeps its part of the sharded one."""
        a_dim, b_dim = self.adapter_partition_dims
        for parameters, tensor, dim in ((self.lora_A, a, a_dim), (self.lora_B, b, b_dim)):
            local = self.parallel.shard(tensor, dim).to(device=self.weight.device, dtype=torch.float32, copy=True)
            parameters[name] = nn.Parameter(local)
            if dim is None:
                self.parallel.mark_partial_parameter(parameters[name])
            else:
                mark_sharded(parameters[name], dim)
        self.lora_scale[name] = scale

    def remove_adapter(self, name: str) -> None:
        """Forgets an adapter."""
        del self.lora_A[name], self.lora_B[name], self.lora_scale[name]

    def adapter_delta(self, name: str) -> Tensor:
        """What an adapter adds to this rank's weight, (alpha / rank) B A, in fp32."""
        return self.lora_scale[name] * (self.lora_B[name] @ self.lora_A[name])

    def _linear(self, x: Tensor, bias: Tensor | None, adapter: str | None) -> Tensor:
        if adapter is None or adapter not in self.lora_scale:
            return F.linear(x, self.weight, bias)
        a, b = self.lora_A[adapter].to(x.dtype), self.lora_B[adapter].to(x.dtype)
        x_2d = x.reshape(-1, x.shape[-1])
        y = F.linear(x_2d, self.weight, bias)
        y = y.addmm_(F.linear(x_2d, a), b.t(), alpha=self.lora_scale[adapter])
        return y.view(*x.shape[:-1], -1)


class ColumnLinear(_Adaptable, ColumnParallelLinear):
    """A linear whose outputs are split over the tensor-parallel group.

    Args:
        inputs: features in.
        outputs: features out, over all ranks.
        parallel: the group.
        dtype: of weight and bias.
    """

    adapter_partition_dims = (None, 0)

    def __init__(self, inputs: int, outputs: int, *, parallel: TensorParallel, dtype: torch.dtype):
        ColumnParallelLinear.__init__(
            self,
            inputs,
            outputs,
            config=parallel.linear_config(dtype),
            init_method=linear_init,
            tp_group=parallel.group,
        )
        self._init_parameters(parallel, dim=0)

    def forward(self, x: Tensor, adapter: str | None = None) -> Tensor:
        """From what has entered the parallel region, [..., inputs], to this rank's [..., outputs / size]."""
        return self._linear(x, self.bias, adapter)


class RowLinear(_Adaptable, RowParallelLinear):
    """A linear whose inputs are split over the tensor-parallel group; it leaves the parallel region.

    Args:
        inputs: features in, over all ranks.
        outputs: features out.
        parallel: the group.
        dtype: of weight and bias.
    """

    adapter_partition_dims = (1, None)

    def __init__(self, inputs: int, outputs: int, *, parallel: TensorParallel, dtype: torch.dtype):
        RowParallelLinear.__init__(
            self,
            inputs,
            outputs,
            config=parallel.linear_config(dtype),
            init_method=linear_init,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=parallel.group,
        )
        self._init_parameters(parallel, dim=1)

    def forward(self, x: Tensor, adapter: str | None = None) -> Tensor:
        """From this rank's [B, S, inputs / size] to the sum over ranks, [B, S or its share, outputs]."""
        if self.parallel.size == 1:
            return self._linear(x, self.bias, adapter)
        return self.parallel.leave(self._linear(x, None, adapter)) + self.bias

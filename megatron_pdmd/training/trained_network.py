"""A network that learns in a phase: its gradient buffer, its optimizer, and how an update of it ends."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pdmd.config import Config
from megatron_pdmd.parallel.data_parallel import data_parallel, no_sync, release_data_parallel
from megatron_pdmd.parallel.topology import Topology
from megatron_pdmd.training.optimizers.optimizer import RoleOptimizer, build_optimizer


class TrainedNetwork:
    """A network that learns in this phase, with its gradient buffer and its optimizer."""

    def __init__(self, module: torch.nn.Module, config: Config, lr: float):
        options = config.optimizer
        self.module = module
        bf16, parallel = config.training.bf16, config.parallel
        self._parallel = data_parallel(
            module,
            bf16=bf16,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            overlap_param_gather=parallel.overlap_param_gather,
        )
        self.optimizer: RoleOptimizer = build_optimizer(
            [self._parallel],
            lr=lr,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_eps,
            weight_decay=options.weight_decay,
            clip_grad=options.clip_grad,
            bf16=bf16,
        )

    def accumulate(self, programs: list[Callable[[], dict[str, torch.Tensor]]]) -> list[dict[str, torch.Tensor]]:
        """Runs the micro-batches of one update; gradients add up without communication until the last."""
        self.optimizer.zero_grad()
        results = []
        for run in programs:
            with self.backward(last=run is programs[-1]):
                results.append(run())
        return results

    @contextmanager
    def backward(self, *, last: bool) -> Iterator[None]:
        """Around a backward pass; only the last of an update may communicate."""
        with no_sync([] if last else [self._parallel]):
            yield

    def release(self) -> None:
        """Gives the buffers back, so that the network can be wrapped again."""
        release_data_parallel(self._parallel)


def not_finite(metrics: Mapping[str, float]) -> list[str]:
    """Names of an update's numbers for which all ranks leave its step out."""
    return [name for name, value in metrics.items() if not math.isfinite(value)]


def means_of(results: Sequence[Mapping[str, Tensor]], topology: Topology) -> Tensor:
    """Each number's mean over an update's micro-batches and the data-parallel ranks, in the order of its names."""
    values = torch.stack([torch.stack([result[name] for result in results]).mean() for name in results[0]])
    if topology.data > 1:
        dist.all_reduce(values, group=topology.groups.dp)
        values /= topology.data
    return values

"""Data parallelism: megatron-core's DistributedDataParallel around one trainable model.

Gradients are accumulated in fp32 (or the parameter's dtype) in one contiguous buffer, ``param.main_grad``, and
averaged over the data- and context-parallel ranks. The hooks sit on the parameters, not on the module, so callers go
on calling the bare module.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch

from megatron_pdmd.parallel.cpu import without_cuda
from megatron_pdmd.parallel.topology import current_topology

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel


def data_parallel(
    module: torch.nn.Module, *, bf16: bool = False, overlap_grad_reduce: bool = False
) -> "DistributedDataParallel":
    """Wrap what is trainable in `module` for data parallelism in the current topology.

    Only parameters with ``requires_grad`` at the time of the call take part, so LoRA adapters on a frozen base cost a
    buffer of their own size. Call `module` itself, not the wrapper; gradients land in ``param.main_grad`` and
    ``param.grad`` stays None.

    The mean is over data and context ranks together. With context parallelism each rank computes the gradient of its
    own tokens, so the gather that gives every rank the whole output must sum over the context ranks in its backward.

    Args:
        module: the bare model, on its device, with ``requires_grad`` set as it will be trained.
        bf16: accumulate and reduce the gradients in fp32 although the parameters are bf16.
        overlap_grad_reduce: reduce each bucket as soon as its last gradient is there. Every backward but the last of
            an update must then run in ``no_sync``, and every trainable parameter must take part in the last.

    Raises:
        ValueError: nothing in `module` is trainable, or a parameter belongs to another wrapper that was not released.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(
            "no parameter of the module requires a gradient; unfreeze what is to be trained before wrapping it"
        )
    for name, parameter in trainable.items():
        if hasattr(parameter, "main_grad"):
            raise ValueError(
                f"parameter {name} belongs to another data-parallel wrapper; call release_data_parallel() on that first"
            )

    topology = current_topology()
    # Megatron-core writes onto this object, so each wrapper has its own. Only its parallel sizes matter; one head and
    # one channel per tensor rank satisfy its checks.
    config = TransformerConfig(
        num_layers=1,
        hidden_size=topology.tensor,
        num_attention_heads=topology.tensor,
        tensor_model_parallel_size=topology.tensor,
        sequence_parallel=topology.sequence_parallel,
    )
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=bf16, overlap_grad_reduce=overlap_grad_reduce)
    with without_cuda():
        return DistributedDataParallel(config, ddp_config, module)


@contextmanager
def no_sync(ddp_modules: Sequence["DistributedDataParallel"]) -> Iterator[None]:
    """Accumulate gradients without communication: for every backward of an update but the last."""
    with ExitStack() as stack:
        for ddp in ddp_modules:
            stack.enter_context(ddp.no_sync())
        yield


def finish_gradient_sync(ddp_modules: Sequence["DistributedDataParallel"]) -> None:
    """Average the accumulated gradients over data and context ranks; sum what sequence-parallel ranks hold in parts.

    Call it once per update, after the last backward: a second call would average again.
    """
    from megatron.core.distributed import finalize_model_grads

    for ddp in ddp_modules:
        finalize_model_grads([ddp])


def release_data_parallel(ddp: "DistributedDataParallel") -> None:
    """Undo ``data_parallel``: free the gradient buffers and unhook the parameters, for another wrapper to take them.

    No autograd graph through the parameters may be alive. The wrapper is of no use afterwards.
    """
    for parameter in ddp.params_with_grad:
        del parameter.main_grad
        parameter.grad = None
    for held in (ddp.params_with_grad, ddp.buffers, ddp.bucket_groups, ddp.grad_accs, ddp.param_to_bucket_group):
        held.clear()

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
    module: torch.nn.Module,
    *,
    bf16: bool = False,
    overlap_grad_reduce: bool = False,
    use_distributed_optimizer: bool = False,
    overlap_param_gather: bool = False,
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
        use_distributed_optimizer: each rank gets the reduced gradients of its share only, for an optimizer that updates
            that share; the parameters move into one contiguous buffer, from which they are gathered.
        overlap_param_gather: with that, an optimizer's step only starts to gather its result, and the next call of
            `module` waits for it; so does ``finish_param_gather``, for who reads the parameters before.

    Raises:
        ValueError: nothing in `module` is trainable, or a parameter belongs to another wrapper that was not released.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    _check_trainable(module)
    topology = current_topology()
    # Megatron-core writes onto this object, so each wrapper has its own. Only its parallel sizes matter; one head and
    # one channel per tensor rank satisfy its checks.
    config = TransformerConfig(
        num_layers=1,
        hidden_size=topology.tensor,
        num_attention_heads=topology.tensor,
        tensor_model_parallel_size=topology.tensor,
        # Not whether activations are split: it lets the ranks sum the gradients of parameters that are marked.
        sequence_parallel=topology.tensor > 1,
    )
    assert use_distributed_optimizer or not overlap_param_gather, "there is nothing to gather"
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=bf16,
        overlap_grad_reduce=overlap_grad_reduce,
        use_distributed_optimizer=use_distributed_optimizer,
        overlap_param_gather=overlap_param_gather,
    )
    with without_cuda():
        ddp = DistributedDataParallel(config, ddp_config, module)
    if overlap_param_gather:
        _wait_at_root(ddp, module)
    return ddp


def _wait_at_root(ddp: "DistributedDataParallel", module: torch.nn.Module) -> None:
    """Wait for gathered parameters when the whole module is called.

    megatron-core waits module by module, but never for adapters, whose container is not called. Between a role's step
    and its next pass there are passes of other roles: one wait there hides as much.
    """
    ddp.disable_forward_pre_hook(param_sync=False)
    ddp.remove_forward_pre_hook_handles[module] = module.register_forward_pre_hook(
        lambda *unused: finish_param_gather([ddp])
    )


def _check_trainable(module: torch.nn.Module) -> None:
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


def start_param_gather(ddp_modules: Sequence["DistributedDataParallel"]) -> None:
    """Start to gather what an optimizer's step changed, where ``overlap_param_gather`` left that to be done."""
    for ddp in ddp_modules:
        if ddp.ddp_config.overlap_param_gather:
            ddp.start_param_sync()


def finish_param_gather(ddp_modules: Sequence["DistributedDataParallel"]) -> None:
    """Wait until every rank has the parameters of the last step; at once where nothing is on its way."""
    for ddp in ddp_modules:
        for group in ddp.bucket_groups:
            if group.param_gather_handle is not None:
                group.param_gather_handle.wait()
                group.param_gather_handle = None


def release_data_parallel(ddp: "DistributedDataParallel") -> None:
    """Undo ``data_parallel``: free the gradient buffers, main weights and hooks, for another wrapper to take the
    parameters, which keep their memory.

    No autograd graph through the parameters may be alive. The wrapper and its optimizer are of no use afterwards.
    """
    finish_param_gather([ddp])
    for handle in ddp.remove_forward_pre_hook_handles.values():
        handle.remove()
    ddp.remove_forward_pre_hook_handles.clear()
    for parameter in ddp.params_with_grad:
        parameter.grad = None
        for name in ("main_grad", "main_param", "main_param_sharded", "grad_added_to_main_grad"):
            parameter.__dict__.pop(name, None)
    for held in (ddp.params_with_grad, ddp.buffers, ddp.bucket_groups, ddp.grad_accs, ddp.param_to_bucket_group):
        held.clear()

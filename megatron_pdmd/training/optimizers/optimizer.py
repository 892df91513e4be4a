"""One role's optimizer: AdamW on megatron-core's optimizer, in the two halves a distillation trainer needs.

``gradient_norm`` finishes the gradients and measures them; ``step`` clips by that norm and moves the weights. Between
the two, every rank can decide to skip an update whose norm is not finite. Each role has its own instance; any number
of them coexist.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_pdmd.parallel import finish_gradient_sync, finish_param_gather, start_param_gather, without_cuda
from megatron_pdmd.training.checkpoints.sharded_state import Shard, empty_shard, parameter_shard
from megatron_pdmd.training.optimizers.adamw import FusedAdamW, moment_names

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer


class RoleOptimizer:
    """The optimizer of one role; made by ``build_optimizer``.

    One update is ``zero_grad``, forward and backward passes (all but the last in ``no_sync``), ``gradient_norm``,
    then ``step`` unless the update is skipped.
    """

    def __init__(
        self, optimizer: "MegatronOptimizer", ddp_modules: Sequence["DistributedDataParallel"], *, clip_grad: float
    ) -> None:
        self._optimizer = optimizer
        self._modules = tuple(ddp_modules)
        self._clip_grad = clip_grad
        self._named_params = dict(_named_trainable(self._modules))
        self._device = next(iter(self._named_params.values())).device
        self._step_count = 0
        self._main_shards = optimizer.main_shards() if ddp_modules[0].ddp_config.use_distributed_optimizer else None

    @property
    def step_count(self) -> int:
        """Updates made so far; skipped ones are not among them."""
        return self._step_count

    def zero_grad(self) -> None:
        """Forget all gradients; to be called before the first backward of an update."""
        for ddp in self._modules:
            ddp.zero_grad_buffer()
        self._optimizer.zero_grad()

    def gradient_norm(self) -> torch.Tensor:
        """Reduce the accumulated gradients over the ranks and return their global L2 norm, an fp32 scalar.

        To be called once per update, after the last backward. Nothing is stepped. The value is the same on every rank,
        and inf or nan if any gradient is.
        """
        squared, sums = self.start_gradient_norm()
        for work in sums:
            work.wait()
        return squared.sqrt()

    @torch.no_grad()
    def start_gradient_norm(self) -> tuple[torch.Tensor, list[dist.Work]]:
        """Reduce the accumulated gradients over the replicas, and start to sum the squares over all that share them.

        Returns:
            The squared global L2 norm, an fp32 scalar, and what to wait for before it is read.
        """
        finish_gradient_sync(self._modules)
        self._optimizer.prepare_grads()
        grads = self._optimizer.get_main_grads_for_grad_norm()
        if grads:
            squared = torch.nn.utils.get_total_norm(grads).float().square()
        else:
            squared = torch.zeros((), device=self._device)
        group = self._optimizer.get_grad_stats_parallel_group()
        return squared, [dist.all_reduce(squared, group=group, async_op=True)] if group.size() > 1 else []

    @torch.no_grad()
    def step(self, gradient_norm: torch.Tensor) -> None:
        """Scale the gradients by min(1, clip_grad / norm) and update the weights.

        With ``overlap_param_gather`` the other ranks' shares are still on their way; see ``finish_param_gather``.

        Args:
            gradient_norm: what ``gradient_norm()`` returned for this update. It is never read on the host.
        """
        fused = self._optimizer.optimizer
        if self._clip_grad > 0 and isinstance(fused, FusedAdamW):
            fused.gradient_scale = (self._clip_grad / (gradient_norm + 1e-6)).clamp(max=1.0)
        elif self._clip_grad > 0:
            torch.nn.utils.clip_grads_with_norm_(self._optimizer.get_parameters(), self._clip_grad, gradient_norm)
        self._optimizer.step_with_ready_grads()
        start_param_gather(self._modules)
        self._step_count += 1

    def finish_param_gather(self) -> None:
        """Wait until this rank has the weights that the others updated; for who reads them without a forward pass."""
        finish_param_gather(self._modules)

    def set_lr(self, lr: float) -> None:
        """Use this learning rate from the next step on."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def reload_master_weights(self) -> None:
        """Copy the model's weights into the fp32 master weights, after the weights were changed from outside."""
        self._optimizer.reload_model_params()

    def master_weights(self) -> dict[str, Shard]:
        """The fp32 weights of the bf16 parameters, by the parameters' names, as this rank holds them.

        Rounded to bf16 they are the parameters, to the bit. With several wrapped modules the names start with the
        module's position, "0." and so on. The tensors are the live ones: the next step changes them, and loading into
        them restores the masters, but not the parameters.
        """
        named = self._named_params.items()
        return {name: self._shard(name, p) for name, p in named if p.dtype != torch.float32}

    def sharded_state(self) -> dict[str, Shard]:
        """What a bit-exact resume needs besides the weights, the masters and ``step_count``, as this rank holds it.

        For each trainable parameter there are ``<name>.exp_avg_sq`` and ``<name>.exp_avg``, unless beta_1 is 0; before
        the first step there are none. Names and tensors are as in ``master_weights``.
        """
        keys = self._moment_names() if self._step_count else ()
        named = self._named_params.items()
        return {f"{name}.{key}": self._shard(f"{name}.{key}", p, key) for name, p in named for key in keys}

    def prepare_to_load(self, step_count: int) -> None:
        """Make room for the state of an optimizer that has made so many updates; ``sharded_state`` then names it all.

        The learning rate is not part of it, nor are the model's weights.
        """
        self._step_count = step_count
        for group in self._optimizer.param_groups:
            group["step"] = step_count
            for main in group["params"]:
                self._optimizer.state.pop(main, None)
                if step_count:
                    self._optimizer.state[main] = {key: torch.zeros_like(main) for key in self._moment_names()}

    def _moment_names(self) -> tuple[str, ...]:
        return moment_names(self._optimizer.config.adam_beta1)

    def _shard(self, name: str, parameter: torch.nn.Parameter, moment: str | None = None) -> Shard:
        """A moment of a parameter, or its main weights."""
        if self._main_shards is None:
            main, start = parameter if parameter.dtype == torch.float32 else parameter.main_param, None
        elif parameter in self._main_shards:
            main, where = self._main_shards[parameter]
            start = where.start
        else:
            return empty_shard(parameter, torch.float32)
        return parameter_shard(name, parameter, self._optimizer.state[main][moment] if moment else main, start=start)


def build_optimizer(
    ddp_modules: Sequence["DistributedDataParallel"],
    *,
    lr: float,
    betas: tuple[float, float] = (0.0, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    clip_grad: float = 1.0,
    bf16: bool = False,
) -> RoleOptimizer:
    """Build the AdamW of one role.

    As in Megatron, biases and other one-dimensional parameters (norms) are not decayed.

    Args:
        ddp_modules: what ``data_parallel`` returned for each of the role's modules; they share no trainable parameter.
        lr: learning rate.
        betas: decay rates of the moments. With beta_1 = 0, the paper's choice, no first moment is kept. With beta_1 >
            0 on a CUDA device, Transformer Engine's or apex's FusedAdam is used where installed.
        eps: added to the root of the second moment.
        weight_decay: decoupled, times the learning rate.
        clip_grad: the largest global gradient norm a step uses; 0 does not clip.
        bf16: bf16 parameters get fp32 master weights; fp32 parameters among them stay their own.
    """
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    beta1, beta2 = map(float, betas)
    distributed = ddp_modules[0].ddp_config.use_distributed_optimizer
    config = OptimizerConfig(
        optimizer="adam",
        lr=lr,
        adam_beta1=beta1,
        adam_beta2=beta2,
        adam_eps=eps,
        weight_decay=weight_decay,
        clip_grad=clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=distributed,
        overlap_param_gather=ddp_modules[0].ddp_config.overlap_param_gather,
    )
    names = [name for name, _ in _named_trainable(ddp_modules)]
    distinct = {id(p) for _, p in _named_trainable(ddp_modules)}
    assert len(distinct) == len(names), "two of the modules share a trainable parameter"
    for name, parameter in _named_trainable(ddp_modules):
        if parameter.dtype not in ((torch.float32, torch.bfloat16) if bf16 else (torch.float32,)):
            raise ValueError(f"parameter {name} is {parameter.dtype}; train it in fp32, or in bf16 with --bf16")
    # Without gradients the fp32 shards of the distributed optimizer are leaves, whose `grad` can be set and read.
    with torch.no_grad(), without_cuda(), _our_classes(beta1, distributed=distributed):
        chained = get_megatron_optimizer(config, list(ddp_modules), use_gloo_process_groups=False)
    (optimizer,) = chained.chained_optimizers
    for group in optimizer.param_groups:
        # Megatron leaves this product to its learning-rate scheduler.
        group["weight_decay"] = weight_decay * group["wd_mult"]
    return RoleOptimizer(optimizer, ddp_modules, clip_grad=clip_grad)


def _named_trainable(ddp_modules: Sequence["DistributedDataParallel"]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for position, ddp in enumerate(ddp_modules):
        prefix = f"{position}." if len(ddp_modules) > 1 else ""
        for name, parameter in ddp.module.named_parameters():
            if parameter in ddp.param_to_bucket_group:
                yield prefix + name, parameter


@contextmanager
def _our_classes(beta1: float, *, distributed: bool) -> Iterator[None]:
    """Let megatron-core build ``FusedAdamW``, unless it has a native FusedAdam and a first moment is wanted anyway,
    and in the distributed optimizer always."""
    from megatron.core import optimizer as megatron_optimizer
    from megatron.core.optimizer import distrib_optimizer

    from megatron_pdmd.training.optimizers.distributed_adamw import DistributedAdamW

    has_native = torch.cuda.is_available() and not megatron_optimizer.USING_PYTORCH_OPTIMIZER
    if has_native and beta1 > 0 and not distributed:
        yield
        return
    replaced = (
        (megatron_optimizer, "Adam", FusedAdamW),
        (megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False),
        (megatron_optimizer, "DistributedOptimizer", DistributedAdamW),
        (distrib_optimizer, "Adam", FusedAdamW),
    )
    before = [getattr(module, name) for module, name, _ in replaced]
    for module, name, ours in replaced:
        setattr(module, name, ours)
    try:
        yield
    finally:
        for (module, name, _), theirs in zip(replaced, before, strict=True):
            setattr(module, name, theirs)

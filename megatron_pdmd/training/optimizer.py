"""One role's optimizer: AdamW on megatron-core's optimizer, in the two halves a distillation trainer needs.

``gradient_norm`` finishes the gradients and measures them; ``step`` clips by that norm and moves the weights. Between
the two, every rank can decide to skip an update whose norm is not finite. Each role has its own instance; any number
of them coexist.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_pdmd.parallel import finish_gradient_sync, without_cuda

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer


class FusedAdamW(torch.optim.Optimizer):
    """AdamW with the interface that megatron-core expects of Transformer Engine's and apex's FusedAdam, on any device.

    ``step`` is kept once per parameter group, and one fused kernel updates all tensors of a group. With beta_1 = 0
    the first moment is the gradient itself, so none is kept: the state of a parameter is ``exp_avg_sq`` alone. The
    result is that of ``torch.optim.AdamW(fused=True)`` to the bit, beta_1 = 0 or not.

    Args:
        params: parameters or parameter groups; gradients have the dtype and device of their parameters.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        adam_w_mode: must be true; accepted because megatron-core passes it.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adam_w_mode: bool = True,
    ) -> None:
        assert adam_w_mode, "only decoupled weight decay is implemented"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        assert closure is None, "the loss is never evaluated again"
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group)

    def _update(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        for p in params:
            if not self.state[p]:
                names = ("exp_avg_sq",) if beta1 == 0 else ("exp_avg", "exp_avg_sq")
                self.state[p] = {name: torch.zeros_like(p) for name in names}
        grads = [p.grad for p in params]
        # The kernel computes m <- g + beta_1 (m - g) element by element. With beta_1 = 0 and m the gradient's own
        # memory, that leaves the gradient as it was.
        first_moments = grads if beta1 == 0 else [self.state[p]["exp_avg"] for p in params]
        step = torch.full((), float(group["step"]), dtype=torch.float32, device=params[0].device)
        torch._fused_adamw_(
            params,
            grads,
            first_moments,
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [step] * len(params),
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


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

    @property
    def step_count(self) -> int:
        """Updates made so far; skipped ones are not among them."""
        counts = {int(group.get("step", 0)) for group in self._optimizer.param_groups if group["params"]}
        assert len(counts) == 1, f"parameter groups disagree about the step: {counts}"
        return counts.pop()

    def zero_grad(self) -> None:
        """Forget all gradients; to be called before the first backward of an update."""
        for ddp in self._modules:
            ddp.zero_grad_buffer()
        self._optimizer.zero_grad()

    @torch.no_grad()
    def gradient_norm(self) -> torch.Tensor:
        """Reduce the accumulated gradients over the ranks and return their global L2 norm, an fp32 scalar.

        To be called once per update, after the last backward. Nothing is stepped. The value is the same on every rank,
        and inf or nan if any gradient is.
        """
        finish_gradient_sync(self._modules)
        self._optimizer.prepare_grads()
        grads = self._optimizer.get_main_grads_for_grad_norm()
        if grads:
            squared = torch.nn.utils.get_total_norm(grads).float().square()
        else:
            squared = torch.zeros((), device=self._device)
        group = self._optimizer.get_grad_stats_parallel_group()
        if group.size() > 1:
            dist.all_reduce(squared, group=group)
        return squared.sqrt()

    @torch.no_grad()
    def step(self, gradient_norm: torch.Tensor) -> None:
        """Scale the gradients by min(1, clip_grad / norm) and update the weights.

        Args:
            gradient_norm: what ``gradient_norm()`` returned for this update. It is never read on the host.
        """
        if self._clip_grad > 0:
            torch.nn.utils.clip_grads_with_norm_(self._optimizer.get_parameters(), self._clip_grad, gradient_norm)
        self._optimizer.step_with_ready_grads()

    def set_lr(self, lr: float) -> None:
        """Use this learning rate from the next step on."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def reload_master_weights(self) -> None:
        """Copy the model's weights into the fp32 master weights, after the weights were changed from outside."""
        self._optimizer.reload_model_params()

    def named_state(self) -> dict[str, torch.Tensor]:
        """Return everything a bit-exact resume needs besides the model's own weights, as this rank holds it.

        ``step`` is the number of updates made; for each trainable parameter there are ``<name>.exp_avg_sq``,
        ``<name>.exp_avg`` unless beta_1 is 0, and ``<name>.master`` (fp32) if the parameter is bf16. With several
        wrapped modules the names start with the module's position, "0." and so on. Before the first step there are no
        moments. The tensors are the live ones: the next step changes them.
        """
        state = {"step": torch.tensor(self.step_count)}
        for name, parameter in self._named_params.items():
            main = self._main(parameter)
            if main is not parameter:
                state[f"{name}.master"] = main.detach()
            for key, tensor in self._optimizer.state.get(main, {}).items():
                state[f"{name}.{key}"] = tensor
        return state

    @torch.no_grad()
    def load_named_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what ``named_state`` returned, here or in an earlier run with the same layout. The tensors are
        copied.

        The learning rate is not part of it, nor are the model's weights.

        Raises:
            ValueError: the names or shapes are not those of this optimizer; nothing was changed then.
        """
        step = int(state["step"]) if "step" in state else 0
        expected = self._expected_shapes(with_moments=step > 0)
        _check_state({name: tensor.shape for name, tensor in state.items()}, expected)
        for group in self._optimizer.param_groups:
            group["step"] = step
        for name, parameter in self._named_params.items():
            main = self._main(parameter)
            if main is not parameter:
                main.copy_(state[f"{name}.master"])
            self._optimizer.state.pop(main, None)
            if step:
                self._optimizer.state[main] = {
                    key: state[f"{name}.{key}"].to(device=main.device, dtype=main.dtype, copy=True)
                    for key in self._moment_names()
                }

    def _expected_shapes(self, *, with_moments: bool) -> dict[str, torch.Size]:
        shapes = {"step": torch.Size()}
        for name, parameter in self._named_params.items():
            keys = list(self._moment_names()) if with_moments else []
            if self._main(parameter) is not parameter:
                keys.append("master")
            shapes |= {f"{name}.{key}": parameter.shape for key in keys}
        return shapes

    def _moment_names(self) -> tuple[str, ...]:
        beta1 = self._optimizer.param_groups[0]["betas"][0]
        return ("exp_avg_sq",) if beta1 == 0 else ("exp_avg", "exp_avg_sq")

    def _main(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Return the fp32 tensor that the optimizer updates for this parameter: its master copy or the parameter
        itself."""
        return parameter if parameter.dtype == torch.float32 else parameter.main_param


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
    )
    names = [name for name, _ in _named_trainable(ddp_modules)]
    distinct = {id(p) for _, p in _named_trainable(ddp_modules)}
    assert len(distinct) == len(names), "two of the modules share a trainable parameter"
    for name, parameter in _named_trainable(ddp_modules):
        if parameter.dtype not in ((torch.float32, torch.bfloat16) if bf16 else (torch.float32,)):
            raise ValueError(f"parameter {name} is {parameter.dtype}; train it in fp32, or in bf16 with --bf16")
    with without_cuda(), _adam_class(beta1):
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
def _adam_class(beta1: float) -> Iterator[None]:
    """Let megatron-core build ``FusedAdamW``, unless it has a native FusedAdam and a first moment is wanted anyway."""
    from megatron.core import optimizer as megatron_optimizer

    has_native = torch.cuda.is_available() and not megatron_optimizer.USING_PYTORCH_OPTIMIZER
    if has_native and beta1 > 0:
        yield
        return
    before = megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER
    megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER = FusedAdamW, False
    try:
        yield
    finally:
        megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER = before


def _check_state(found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]) -> None:
    """Refuse optimizer state that belongs to another model or another set of options, in one line."""
    missing = sorted(expected.keys() - found.keys())
    unknown = sorted(found.keys() - expected.keys())
    reshaped = sorted(name for name in expected.keys() & found.keys() if found[name] != expected[name])
    problems = [
        f"{len(names)} {what} (first: {names[0]})"
        for names, what in ((missing, "missing"), (unknown, "unknown"), (reshaped, "of another shape"))
        if names
    ]
    if problems:
        raise ValueError(
            f"the optimizer state does not fit this optimizer: {', '.join(problems)}; "
            "resume with the options it was saved with, or use --no-load-optim"
        )

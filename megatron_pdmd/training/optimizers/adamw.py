"""AdamW as megatron-core wants it: one step count for each group, and no first moment where beta_1 is 0."""

from typing import Any

import torch

from pdmd_kernels import adamw_beta1_zero


def moment_names(beta1: float) -> tuple[str, ...]:
    """The state that AdamW keeps of a parameter."""
    return ("exp_avg_sq",) if beta1 == 0 else ("exp_avg", "exp_avg_sq")


class FusedAdamW(torch.optim.Optimizer):
    """AdamW with the interface that megatron-core expects of Transformer Engine's and apex's FusedAdam, on any device.

    ``step`` is kept once per parameter group, and one fused kernel updates all tensors of a group. With beta_1 = 0
    the first moment is the gradient itself, so none is kept: the state of a parameter is ``exp_avg_sq`` alone, and the
    kernel is ours. The numbers are those of ``torch.optim.AdamW``.

    Args:
        params: parameters or parameter groups; gradients have the dtype and device of their parameters.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        adam_w_mode: must be true; accepted because megatron-core passes it.

    Attributes:
        gradient_scale: a scalar tensor that the next step multiplies the gradients by (clipping); None is 1.
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
        self.gradient_scale: torch.Tensor | None = None
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
        self.gradient_scale = None

    @torch.no_grad()
    def initialize_state(self) -> None:
        """Give every parameter that has no moments yet zeros for them, as the first step would."""
        for group in self.param_groups:
            for p in group["params"]:
                self._initialize(p, group)

    def _initialize(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        if not self.state[p]:
            self.state[p] = {name: torch.zeros_like(p) for name in moment_names(group["betas"][0])}

    def _update(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        for p in params:
            self._initialize(p, group)
        grads, second_moments = [p.grad for p in params], [self.state[p]["exp_avg_sq"] for p in params]
        if beta1 == 0:
            adamw_beta1_zero(
                params,
                grads,
                second_moments,
                lr=group["lr"],
                beta2=beta2,
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                step=group["step"],
                grad_scale=self.gradient_scale,
            )
            return
        if self.gradient_scale is not None:
            torch._foreach_mul_(grads, self.gradient_scale)
        step = torch.full((), float(group["step"]), dtype=torch.float32, device=params[0].device)
        torch._fused_adamw_(
            params,
            grads,
            [self.state[p]["exp_avg"] for p in params],
            second_moments,
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

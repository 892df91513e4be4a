"""AdamW as megatron-core wants it: one step count for each group, and no first moment where beta_1 is 0."""

from typing import Any

import torch


def moment_names(beta1: float) -> tuple[str, ...]:
    """The state that AdamW keeps of a parameter."""
    return ("exp_avg_sq",) if beta1 == 0 else ("exp_avg", "exp_avg_sq")


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

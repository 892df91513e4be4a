"""Learning rates over the iterations of a phase: megatron-core's schedules, one for each trained role.

Each phase trains a new expert and a new fake score, so each begins its schedule anew. A rate is a function of the
iteration alone; a resumed run has nothing to restore.
"""

from types import SimpleNamespace
from typing import Literal

from megatron_pdmd.config import OptimizerConfig


class LearningRateSchedule:
    """Warm-up, then decay; `megatron.core.optimizer_param_scheduler` without an optimizer of its own.

    Args:
        max_lr: the rate that warm-up reaches and decay starts from.
        style: `constant`, `linear`, `cosine` or `inverse-square-root`.
        warmup_init: the rate of iteration 0, where there is a warm-up.
        warmup_iters: iterations until `max_lr`.
        decay_iters: iterations, warm-up included, until `min_lr`.
        min_lr: never decays below.
    """

    def __init__(
        self,
        max_lr: float,
        *,
        style: str,
        warmup_init: float,
        warmup_iters: int,
        decay_iters: int,
        min_lr: float,
    ):
        # Imported here: megatron-core takes seconds to import, which a mistyped flag should not cost.
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        self._scheduler = OptimizerParamScheduler(
            SimpleNamespace(param_groups=[]),
            init_lr=warmup_init if warmup_iters else max_lr,
            max_lr=max_lr,
            min_lr=min_lr,
            lr_warmup_steps=warmup_iters,
            lr_decay_steps=decay_iters,
            lr_decay_style=style,
            start_wd=0.0,
            end_wd=0.0,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )

    @classmethod
    def of(
        cls, role: Literal["generator", "fake_score"], options: OptimizerConfig, iterations: int
    ) -> "LearningRateSchedule":
        """The rates of a trained role, `--lr...` or `--fake-lr...`, in a phase of so many iterations."""
        prefix = "fake_" if role == "fake_score" else ""
        return cls(
            getattr(options, f"{prefix}lr"),
            style=getattr(options, f"{prefix}lr_decay_style"),
            warmup_init=getattr(options, f"{prefix}lr_warmup_init"),
            warmup_iters=getattr(options, f"{prefix}lr_warmup_iters"),
            decay_iters=getattr(options, f"{prefix}lr_decay_iters") or iterations,
            min_lr=getattr(options, f"{prefix}min_lr"),
        )

    def at(self, iteration: int) -> float:
        """The rate of a phase's iteration, counted from 0."""
        self._scheduler.num_steps = iteration
        return self._scheduler.get_lr({})

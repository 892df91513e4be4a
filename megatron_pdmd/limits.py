"""The range of every number that a user gives: wide enough for any real use, narrow enough that nothing can overflow,
hang or ask for more memory than there is in the world."""

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

LONGEST_SHOWN = 80  # characters of a user's value that an error repeats


@dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most`, both allowed unless `open_below` or `open_above` says otherwise."""

    least: float
    most: float
    open_below: bool = False
    open_above: bool = False

    def __contains__(self, value: float) -> bool:
        above = self.least < value if self.open_below else self.least <= value
        below = value < self.most if self.open_above else value <= self.most
        return above and below

    def __str__(self) -> str:
        return f"{'(' if self.open_below else '['}{self.least}, {self.most}{')' if self.open_above else ']'}"


_ITERATIONS = 10**7
_MINUTES = 10**7
_RATE = Range(0, 10, open_below=True)
_SHARE = Range(0, 1, open_above=True)

# By the name of the option in config.py.
LIMITS = {
    "num_steps": Range(1, 1000),
    "phase_steps": Range(1, 1000),
    "phase": Range(0, 1000),
    "fixed_timestep": Range(0, 1, open_below=True, open_above=True),
    "timestep_shift": Range(0, 1000, open_below=True),
    "timestep_margin": Range(0, 0.5, open_above=True),
    "clamp_max": Range(0, 10**6, open_below=True),
    "guidance_scale": Range(0, 100),
    "fake_updates": Range(1, 10**4),
    "fake_warmup": Range(0, 10**6),
    "phase_start_reuse": Range(1, 10**6),
    "lora_rank": Range(1, 8192),
    "lora_alpha": Range(0, 10**6, open_below=True),
    "ema_decay": _SHARE,
    "lr": _RATE,
    "fake_lr": _RATE,
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_eps": Range(0, 1),
    "weight_decay": Range(0, 100),
    "clip_grad": Range(0, 10**12),
    "lr_warmup_iters": Range(0, _ITERATIONS),
    "lr_warmup_init": Range(0, 1),
    "lr_decay_iters": Range(0, _ITERATIONS),
    "min_lr": Range(0, 1),
    "fake_lr_warmup_iters": Range(0, _ITERATIONS),
    "fake_lr_warmup_init": Range(0, 1),
    "fake_lr_decay_iters": Range(0, _ITERATIONS),
    "fake_min_lr": Range(0, 1),
    "train_iters": Range(1, _ITERATIONS),
    "micro_batch_size": Range(1, 4096),
    "global_batch_size": Range(1, 2**20),
    "seed": Range(0, 2**63 - 1),  # a word of the counter that everything random is drawn from
    "exit_duration_in_mins": Range(0, _MINUTES),
    "exit_interval": Range(0, _ITERATIONS),
    "max_skipped_updates": Range(0, _ITERATIONS),
    "tensor_model_parallel_size": Range(1, 4096),
    "pipeline_model_parallel_size": Range(1, 4096),
    "pipeline_layer_split": Range(1, 4096),
    "pipeline_live_microbatches": Range(0, 2**20),
    "context_parallel_size": Range(1, 4096),
    "distributed_timeout_minutes": Range(0, 10080, open_below=True),  # a week
    "prompt_length": Range(1, 8192),
    "frames": Range(1, 1024),
    "height": Range(1, 4096),
    "width": Range(1, 4096),
    "save_interval": Range(0, _ITERATIONS),
    "save_interval_minutes": Range(0, _MINUTES),
    "keep_last": Range(0, 10**6),
    "log_interval": Range(1, _ITERATIONS),
    "sample_interval": Range(0, _ITERATIONS),
    "sample_prompts": Range(0, 1024),
    "eval_interval": Range(0, _ITERATIONS),
    "eval_samples": Range(1, 10**5),
    "clips": Range(1, 10**6),
    "teacher_steps": Range(1, 10**4),
    "batch_size": Range(1, 2**16),
    "dry_run": Range(0, 2**14),
    "dry_run_rank": Range(0, 2**14 - 1),
}


def check_range(
    flag: str, value: float, least: float, most: float, *, open_below: bool = False, open_above: bool = False
) -> None:
    """Refuses a number outside of a range; NaN lies in none.

    Args:
        flag: names the number in the error, such as `--frames`.
        value: what the user gave.
        least, most: the range.
        open_below, open_above: `least` or `most` itself is refused too.

    Raises:
        ValueError: names the flag, the value and the range.
    """
    allowed = Range(least, most, open_below, open_above)
    if value not in allowed:
        raise ValueError(f"{flag} {shown(value)}: must lie in {allowed}")


def check_limits(options: Any) -> None:
    """Refuses numbers out of `LIMITS` in a dataclass of options and in those in it; None gives no number.

    Raises:
        ValueError: names the flag, the value and the range.
    """
    for field in fields(options):
        value = getattr(options, field.name)
        if is_dataclass(value):
            check_limits(value)
        elif field.name in LIMITS:
            allowed = LIMITS[field.name]
            values = value if isinstance(value, tuple) else (value,)
            if any(one is not None and one not in allowed for one in values):
                each = "each must" if len(values) > 1 else "must"
                written = shown(",".join(map(str, values)))
                raise ValueError(f"--{field.name.replace('_', '-')} {written}: {each} lie in {allowed}")


def shown(value: object, longest: int = LONGEST_SHOWN) -> str:
    """A user's value as an error repeats it: in one line of bounded length."""
    text = str(value)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."

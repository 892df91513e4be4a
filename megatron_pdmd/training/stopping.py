"""Stopping a run between two updates: at a signal or a limit on any rank, agreed by all of them."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from megatron_pdmd.config import CheckpointConfig, TrainingConfig
from megatron_pdmd.parallel.patience import patient_group

# What may stop a run, the weightiest first: where ranks have several reasons, that is the one they agree on.
_REASONS = ("SIGTERM", "SIGINT", "--exit-duration-in-mins", "--exit-interval")
_WISHES = (*_REASONS, "--save-interval-minutes")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether to stop or to save now, the same on all ranks.

    What a rank meets by itself, a signal or a time that is up, it keeps to itself until `agree`. All ranks call that
    between the same two updates, and act on what they agreed alone, so none goes where the others do not follow.

    Attributes:
        reason: why the ranks agreed to stop, or None.
        save_is_due: whether they agreed that it is time to save (`--save-interval-minutes`).
    """

    def __init__(self, training: TrainingConfig, checkpoint: CheckpointConfig):
        self._training = training
        self._save_minutes = checkpoint.save_interval_minutes
        self._started = self._saved = time.monotonic()
        self._signals: set[str] = set()
        self.reason: str | None = None
        self.save_is_due = False

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Inside the block SIGTERM and SIGINT ask for a stop and end no process (`--exit-signal-handler`)."""
        if not self._training.exit_signal_handler:
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.reason is None:  # a signal after the last agreement ends the process, as one after the block does
            for name in sorted(self._signals):
                os.kill(os.getpid(), signal.Signals[name])

    def agree(self, iterations: int | None) -> None:
        """Sets `reason` and `save_is_due` to what any rank wants. Called on all ranks, between updates.

        It is one all-reduce of a number in CPU memory: no device is waited for, and a rank that still writes or draws
        is waited for with patience.

        Args:
            iterations: done in this launch; None where nothing is left to train, so that only signals stop it.
        """
        own = self._wanted(iterations)
        wanted = torch.tensor(sum(1 << bit for bit, name in enumerate(_WISHES) if name in own))
        if dist.get_world_size() > 1:
            dist.all_reduce(wanted, op=dist.ReduceOp.BOR, group=patient_group())
        bits = wanted.item()
        *reasons, self.save_is_due = (bool(bits >> bit & 1) for bit in range(len(_WISHES)))
        self.reason = next((name for name, agreed in zip(_REASONS, reasons, strict=True) if agreed), None)

    def saved(self) -> None:
        """A checkpoint was saved: the minutes to the next one count from here."""
        self._saved = time.monotonic()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signals.add(signal.Signals(number).name)

    def _wanted(self, iterations: int | None) -> set[str]:
        """What this rank wants."""
        if iterations is None:
            return set(self._signals)
        training, now = self._training, time.monotonic()
        limits = {
            "--exit-duration-in-mins": (training.exit_duration_in_mins, (now - self._started) / 60),
            "--exit-interval": (training.exit_interval, iterations),
            "--save-interval-minutes": (self._save_minutes, (now - self._saved) / 60),
        }
        return self._signals | {name for name, (limit, reached) in limits.items() if limit and reached >= limit}

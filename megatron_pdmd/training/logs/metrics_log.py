"""What a run tells: Megatron's log line, metrics.jsonl, TensorBoard and, where asked for, Weights & Biases."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from megatron_pdmd.distillation.step import is_binned
from megatron_pdmd.training.logs.wandb_log import WandbLog

# How the line has what --log-throughput measures.
_THROUGHPUT = {
    "tflops_per_gpu": "throughput per GPU (TFLOP/s/GPU): {:.4g}",
    "tokens_per_second_per_gpu": "tokens per second per GPU: {:.1f}",
    "peak_memory_gb": "peak memory (GB): {:.2f}",
}


@dataclass
class MetricsLog:
    """Writes log entries, each the mean over the iterations since the last one. Only one rank has one.

    Attributes:
        folder: the run's folder.
        total: iterations of the whole run.
        first: iteration the launch starts after.
        tensorboard: whether to write TensorBoard events.
        wandb: where entries go too, if anywhere.
    """

    folder: Path
    total: int
    first: int
    tensorboard: bool
    wandb: WandbLog | None = None
    _writer: SummaryWriter | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.tensorboard:
            self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.first + 1)

    def write(self, entry: Mapping[str, float | int]) -> None:
        """Logs one entry; a number that is not finite is null in metrics.jsonl, for JSON has none.

        Args:
            entry: `iteration`, `phase`, `consumed_samples`, `milliseconds`, `learning_rate`, `fake_learning_rate`,
                `global_batch_size`, `skipped_updates`, any losses and gradient norms, and what `Instruments` measured.
        """
        self._append("metrics.jsonl", entry)
        if self._writer:
            for name, value in entry.items():
                if name != "iteration":
                    self._writer.add_scalar(name, value, entry["iteration"])
        if self.wandb:
            self.wandb.write(entry)
        print("\n".join([self.line(entry), *timer_lines(entry)]), flush=True)

    def line(self, entry: Mapping[str, float | int]) -> str:
        """Megatron's log line, with the phase after the iteration."""
        parts = [
            f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] iteration {entry['iteration']:8d}/{self.total:8d}",
            f"phase: {entry['phase']}",
            f"consumed samples: {entry['consumed_samples']:12d}",
            f"elapsed time per iteration (ms): {entry['milliseconds']:.1f}",
            *(text.format(entry[name]) for name, text in _THROUGHPUT.items() if name in entry),
            f"learning rate: {entry['learning_rate']:.6E}",
            f"fake learning rate: {entry['fake_learning_rate']:.6E}",
            f"global batch size: {entry['global_batch_size']:5d}",
        ]
        for name, value in entry.items():
            if name.endswith(("loss", "gap", "gradient", "grad_norm")):
                parts.append(f"{name.replace('_', ' ')}: {value:.6E}")
        parts.append(f"number of skipped updates: {entry['skipped_updates']:3d}")
        return " " + " | ".join(parts) + " |"

    def write_evaluation(self, entry: Mapping[str, float | int]) -> None:
        """Logs what an evaluation on fixed samples found, in evaluations.jsonl.

        Args:
            entry: `iteration` and `phase` of the iterations done, and any numbers. Those of single bins of noise are
                left out of the line.
        """
        self._append("evaluations.jsonl", entry)
        values = {name: value for name, value in entry.items() if name not in ("iteration", "phase")}
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(name, value, entry["iteration"])
        told = [f"{name.replace('_', ' ')}: {value:.6E}" for name, value in values.items() if not is_binned(name)]
        head = f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] evaluation after iteration {entry['iteration']}"
        print(" " + " | ".join([head, f"phase: {entry['phase']}", *told]) + " |", flush=True)

    def _append(self, file_name: str, entry: Mapping[str, float | int]) -> None:
        with (self.folder / file_name).open("a", encoding="utf-8") as file:
            file.write(json.dumps({k: v if math.isfinite(v) else None for k, v in entry.items()}) + "\n")

    def close(self) -> None:
        if self._writer:
            self._writer.close()
        if self.wandb:
            self.wandb.close()


def timer_lines(entry: Mapping[str, float | int]) -> list[str]:
    """Megatron's second line: the timers' milliseconds an iteration, each with its slowest rank; none without any."""
    parts = []
    for name, value in entry.items():
        timer = name.removesuffix("_milliseconds")
        if timer != name:
            rank = f" (rank {entry[f'{timer}_slowest_rank']})" if f"{timer}_slowest_rank" in entry else ""
            parts.append(f"{timer.replace('_', ' ')}: {value:.1f}{rank}")
    return [" times of the slowest rank (ms): " + " | ".join(parts) + " |"] if parts else []

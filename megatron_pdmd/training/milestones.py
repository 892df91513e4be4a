"""What a run measures and draws after an iteration, and what of it a launch that ended early left out."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_pdmd.config import Config
from megatron_pdmd.parallel.patience import patient_group
from megatron_pdmd.training.run_folders.run_log import entries_of

EVALUATIONS = "evaluations.jsonl"


@dataclass(frozen=True)
class Milestones:
    """What is due after an iteration.

    Attributes:
        evaluation: an entry in evaluations.jsonl. At a phase's end the sheet is drawn after it, else along with it.
        sheet: a sample sheet.
    """

    evaluation: bool = False
    sheet: bool = False

    @classmethod
    def after(cls, config: Config, iteration: int, *, ends_phase: bool) -> "Milestones":
        """What an undisturbed run does.

        Args:
            config: of the run.
            iteration: iterations done; at least one.
            ends_phase: whether it is its phase's last.
        """
        every, drawn_every = config.evaluation.eval_interval, config.logging.sample_interval
        evaluation = bool(every) and iteration % every == 0
        drawn = evaluation or ends_phase or (bool(drawn_every) and iteration % drawn_every == 0)
        return cls(evaluation, drawn and bool(config.logging.sample_prompts))

    def missing(self, folder: Path, iteration: int) -> "Milestones":
        """Those of them that a run's folder does not have. All ranks call it and are told what the first one finds.

        Args:
            folder: of the run.
            iteration: iterations done.
        """
        if not (self.evaluation or self.sheet):
            return self
        found = torch.zeros(2, dtype=torch.int64)
        if dist.get_rank() == 0:
            evaluated = any(number == iteration for number, _ in entries_of(folder / EVALUATIONS))
            drawn = all(path.is_file() for path in sheet_files(folder, iteration))
            found = torch.tensor([evaluated, drawn], dtype=torch.int64)
        dist.broadcast(found, 0, group=patient_group())
        evaluated, drawn = found.tolist()
        return Milestones(self.evaluation and not evaluated, self.sheet and not drawn)


def sheet_files(folder: Path, iteration: int) -> tuple[Path, Path]:
    """The PNG and the GIF of an iteration's sheet."""
    name = f"iter_{iteration:07d}"
    return folder / "samples" / f"{name}.png", folder / "samples" / f"{name}.gif"

"""Log entries to Weights & Biases, beside TensorBoard. The only place that imports wandb, which is optional."""

import importlib.util
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_pdmd.config import LoggingConfig


def check_wandb(options: LoggingConfig) -> None:
    """Refuses `--wandb-project` without the package.

    Raises:
        ValueError: it is not installed.
    """
    if options.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"--wandb-project {options.wandb_project}: wandb is not installed; pip install wandb, or drop the flag"
        )


class WandbLog:
    """One run at Weights & Biases, which the launches of a run folder continue. wandb reads WANDB_MODE=offline itself.

    Args:
        options: names project and run.
        folder: the run's folder; keeps the id under which wandb knows the run.
        settings: the resolved options, shown beside the curves.

    Raises:
        ValueError: wandb refuses, for want of a key for example.
    """

    def __init__(self, options: LoggingConfig, folder: Path, settings: Mapping[str, Any]):
        import wandb

        files = options.wandb_save_dir or folder
        files.mkdir(parents=True, exist_ok=True)
        known = folder / "wandb_run_id.txt"
        if not known.exists():
            known.write_text(f"{secrets.token_hex(4)}\n", encoding="utf-8")
        try:
            self._run = wandb.init(
                project=options.wandb_project,
                name=options.wandb_exp_name or folder.resolve().name,
                dir=str(files),
                config=dict(settings),
                allow_val_change=True,
                id=known.read_text(encoding="utf-8").strip(),
                resume="allow",
            )
        except wandb.Error as error:
            raise ValueError(f"--wandb-project {options.wandb_project}: {error}") from None
        # A resumed run logs iterations again that wandb has; by its own step it would drop them.
        self._run.define_metric("*", step_metric="iteration")

    def write(self, entry: Mapping[str, float | int]) -> None:
        """Logs one entry."""
        self._run.log(dict(entry))

    def close(self) -> None:
        """Sends what is left."""
        self._run.finish()

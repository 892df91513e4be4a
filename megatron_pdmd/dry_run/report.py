"""What a rehearsal found: bytes on the device by moment."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_pdmd.config import LaunchConfig
from megatron_pdmd.planning.device_memory import DeviceMemory, Moment


@dataclass(frozen=True)
class Report:
    """A rehearsal that came to its end.

    Attributes:
        ranks: of the job.
        rank: the rehearsed one.
        layout: ranks along each axis.
        peak_bytes: the most bytes of tensors that the device held at once.
        moments: parts of the run, in the order in which they first came.
        checkpoint_bytes: what this rank writes of a checkpoint.
        seconds: that the rehearsal took.
    """

    ranks: int
    rank: int
    layout: dict[str, int]
    peak_bytes: int
    moments: tuple[Moment, ...]
    checkpoint_bytes: int
    seconds: float = 0.0

    @classmethod
    def of(
        cls, launch: LaunchConfig, layout: Mapping[str, int], memory: DeviceMemory, checkpoint_bytes: int
    ) -> "Report":
        """Takes what was counted."""
        moments = tuple(memory.moments.values())
        return cls(launch.dry_run, launch.dry_run_rank, dict(layout), memory.peak_bytes, moments, checkpoint_bytes)


def write_report(report: Report, path: Path | None) -> None:
    """Prints a report as a table in GB (10^9 bytes), and writes it to a JSON file where one is named."""
    axes = ", ".join(f"{axis} {size}" for axis, size in report.layout.items())
    table = Table(title=f"rank {report.rank} of {report.ranks} ({axes}): GB of tensors on the device")
    for name in ("moment", "calls", "peak", "held after"):
        table.add_column(name, justify="left" if name == "moment" else "right")
    for moment in report.moments:
        sizes = (f"{size / 1e9:.3f}" for size in (moment.peak_bytes, moment.held_bytes))
        table.add_row(moment.name, str(moment.calls), *sizes)
    table.add_section()
    table.add_row("the whole run", "1", f"{report.peak_bytes / 1e9:.3f}", "")
    Console(width=100).print(table)
    print(f"this rank's part of a checkpoint: {report.checkpoint_bytes / 1e9:.3f} GB")
    print(f"dry run passed in {report.seconds:.0f} s: nothing was computed, sent, read or written")
    if path:
        path.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")

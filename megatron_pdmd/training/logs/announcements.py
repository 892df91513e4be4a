"""What a run says before its first iteration is done: each thing once, in a line, from rank 0."""

from collections.abc import Mapping

from megatron_pdmd.diffusion.phases import Phase, PhasePlan
from megatron_pdmd.parallel.topology import Topology
from megatron_pdmd.training.checkpoints.checkpointing import Checkpoint
from megatron_pdmd.training.checkpoints.manifest import Progress


def tell(topology: Topology, line: str) -> None:
    """Prints a line, at once."""
    if topology.rank == 0:
        print(line, flush=True)


def layout_line(topology: Topology) -> str:
    """How many ranks there are, and how the work is split over them."""
    split = f"tensor {topology.tensor} x context {topology.context} x data {topology.data}"
    if topology.pipeline > 1:
        split += f" x pipeline {topology.pipeline}"
    sequence = ", sequence parallel" if topology.sequence_parallel else ""
    ranks = "1 rank" if topology.world_size == 1 else f"{topology.world_size} ranks"
    return f"{ranks} on {topology.device.type} over {topology.backend}: {split}{sequence}"


def resume_line(checkpoint: Checkpoint, position: str) -> str:
    """Where a run goes on."""
    remark = f" ({checkpoint.remark})" if checkpoint.remark else ""
    return f"going on from {checkpoint.folder}, after {position}{remark}"


def phase_line(
    plan: PhasePlan, phase: Phase, progress: Progress, iterations: int, trained_parameters: Mapping[str, int]
) -> str:
    """Which phase begins or goes on, and what learns in it."""
    begins = f"goes on after iteration {progress.phase_iteration}" if progress.phase_iteration else "begins"
    steps = ", ".join(f"{t:.3f}" for t in phase.steps)
    learning = ", ".join(f"{name} {count:,}" for name, count in trained_parameters.items())
    return (
        f"phase {phase.index} of {len(plan.phases)} ({phase.expert}) {begins}: {iterations} iterations, sampling steps "
        f"at t = {steps}, then {phase.end:.3f}; trained parameters: {learning}"
    )

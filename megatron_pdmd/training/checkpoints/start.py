"""Where a launch begins: anew, or from a checkpoint that this run could have saved."""

from dataclasses import dataclass

from megatron_pdmd.config import Config
from megatron_pdmd.training.checkpoints.checkpointing import Checkpoint, latest_checkpoint
from megatron_pdmd.training.checkpoints.manifest import MANIFEST, CheckpointError


@dataclass(frozen=True)
class Start:
    """What a launch takes up instead of beginning anew.

    Attributes:
        checkpoint: where from.
        optimizers: their states too (not with `--no-load-optim`, nor with `finetune`).
        finetune: the weights alone, to begin with iteration 0 of phase 1.
        own: it is the run's own, whose folder has what was drawn and measured until then.
    """

    checkpoint: Checkpoint
    optimizers: bool = True
    finetune: bool = False
    own: bool = False


def find_start(config: Config) -> Start | None:
    """Where to go on from: the run's own last checkpoint, else that of `--load`.

    Raises:
        ValueError: the checkpoint is damaged or of another run, or `--load` names a run without one.
    """
    options = config.checkpoint
    own = latest_checkpoint(options.save / "checkpoints")
    if own:
        check_progress(own, config)
        return Start(own, own=True)
    if options.load is None:
        return None
    loaded = latest_checkpoint(options.load / "checkpoints")
    if loaded is None:
        raise ValueError(f"--load {options.load}: has no checkpoint yet")
    if not options.finetune:
        check_progress(loaded, config)
    return Start(loaded, optimizers=options.load_optim, finetune=options.finetune)


def check_progress(checkpoint: Checkpoint, config: Config) -> None:
    """Refuses a checkpoint that a run of this configuration cannot have saved.

    Raises:
        CheckpointError: names what contradicts what.
    """
    progress, seed = checkpoint.progress, config.training.seed
    if checkpoint.manifest.seed != seed:
        raise CheckpointError(
            f"--seed {seed}: {checkpoint.folder} was saved with --seed {checkpoint.manifest.seed}; give that, or "
            "--finetune to take its weights alone"
        )
    saved = sorted(name for name in checkpoint.states if name.startswith("generator_phase_"))
    expected = sorted(f"generator_phase_{phase}" for phase in range(1, min(progress.phase, 100) + 1))
    wrong = None
    if progress.phase > len(config.method.phase_steps):
        wrong = f"phase is {progress.phase}, and --phase-steps names {len(config.method.phase_steps)}"
    elif saved != expected:
        wrong = f"phase is {progress.phase}, and its tensors are of {', '.join(saved) or 'no phase'}"
    elif progress.consumed_samples != progress.iteration * config.training.global_batch_size:
        batch = config.training.global_batch_size
        wrong = f"{progress.consumed_samples} samples are not {progress.iteration} batches of {batch}"
    if wrong:
        raise CheckpointError(f"{checkpoint.folder / MANIFEST}: {wrong}; go on from another checkpoint")

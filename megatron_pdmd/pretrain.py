"""The program: config -> models -> phases -> trainer -> what the run leaves.

    python -m megatron_pdmd.pretrain --config FILE [flags]        one rank, or every rank under torchrun

Exit codes: 0 done, 2 bad input, 3 stopped on request after saving, 1 all else.
"""

import sys

import torch

from megatron_pdmd.config import Config
from megatron_pdmd.data.prompts import load_prompts
from megatron_pdmd.errors import NoSpaceError, user_errors
from megatron_pdmd.models import from_hf
from megatron_pdmd.parallel.topology import Topology, destroy_topology, initialize_topology
from megatron_pdmd.preflight import Plan, prepare
from megatron_pdmd.training.checkpointing import Checkpoint, latest_checkpoint
from megatron_pdmd.training.networks import Networks
from megatron_pdmd.training.outcome import evaluate_moving_digits, export_run, phase_summaries, write_summary
from megatron_pdmd.training.phase import check_batch
from megatron_pdmd.training.run_folder import claim_run_folder, cut_metrics
from megatron_pdmd.training.trainer import Trainer

STOPPED_ON_REQUEST = 3


def main(arguments: list[str] | None = None) -> int:
    """Runs one rank to the end and returns its exit code.

    Args:
        arguments: flags; those of the process where not given.
    """
    with user_errors():
        plan = prepare(sys.argv[1:] if arguments is None else arguments)
        backend = plan.config.parallel.distributed_backend
        topology = initialize_topology(backend=None if backend == "auto" else backend)
        check_batch(plan.config, topology.data)
        checkpoint = find_checkpoint(plan.config)
        networks, trainer = build(plan, topology)
        trainer.restore(checkpoint)
        if topology.rank == 0:
            claim_run_folder(plan.config)
            cut_metrics(
                plan.config.checkpoint.save / "metrics.jsonl", checkpoint.progress.iteration if checkpoint else 0
            )
    with user_errors(NoSpaceError):
        reason = trainer.run()
        if trainer.finished:
            reason = None
            finish(plan, topology, networks, trainer)
    if reason and topology.rank == 0:
        print(f"stopped by {reason} after iteration {trainer.progress.iteration}, saved; the same command continues")
    destroy_topology()
    return STOPPED_ON_REQUEST if reason else 0


def find_checkpoint(config: Config) -> Checkpoint | None:
    """Where to go on from: the run's own last checkpoint, else that of `--load`.

    Raises:
        ValueError: the checkpoint is damaged, or `--load` names a run without one.
    """
    own = latest_checkpoint(config.checkpoint.save / "checkpoints")
    if own or config.checkpoint.load is None:
        return own
    loaded = latest_checkpoint(config.checkpoint.load / "checkpoints")
    if loaded is None:
        raise ValueError(f"--load {config.checkpoint.load}: has no checkpoint yet")
    return loaded


def build(plan: Plan, topology: Topology) -> tuple[Networks, Trainer]:
    """Loads prompts and teacher and makes the trainer."""
    config, source = plan.config, plan.source
    data = config.data
    prompts = load_prompts(
        data.prompts, source.path, max_length=data.prompt_length, negative_prompt=data.negative_prompt
    )
    dtype = torch.bfloat16 if config.training.bf16 else torch.float32
    recompute = config.model.recompute_granularity
    options = {
        "attention_backend_name": config.model.attention_backend,
        "recompute_granularity": None if recompute == "none" else recompute,
    }
    teacher = {
        expert: from_hf(source.path, subfolder, dtype=dtype, device=topology.device, **options)
        for expert, subfolder in source.experts.items()
    }
    networks = Networks(teacher, config.method, config.training.seed)
    trainer = Trainer(config, topology, networks, plan.phases, plan.schedule, prompts, plan.latent_shape)
    return networks, trainer


def finish(plan: Plan, topology: Topology, networks: Networks, trainer: Trainer) -> None:
    """Exports the experts, measures the task, and writes summary.json."""
    config = plan.config
    if config.checkpoint.export and topology.rank == 0:
        export_run(config, plan.source, plan.phases, networks, config.checkpoint.save / "hf")
        print(f"exported to {config.checkpoint.save / 'hf'}")
    summary = {
        "train_seconds": trainer.progress.train_seconds,
        "world_size": topology.world_size,
        "phases": phase_summaries(plan.phases, [trainer.phase_iterations(p.index) for p in plan.phases.phases]),
        "skipped_updates": trainer.progress.skipped_updates,
    }
    if config.evaluation.task == "moving_digits":
        summary["evaluation"] = evaluate_moving_digits(config, trainer.sampler())
    if topology.rank == 0:
        write_summary(config.checkpoint.save, summary)
        print(f"wrote {config.checkpoint.save / 'summary.json'}")


if __name__ == "__main__":
    sys.exit(main())

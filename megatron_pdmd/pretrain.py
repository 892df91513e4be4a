"""The program: config -> models -> phases -> trainer -> what the run leaves.

    python -m megatron_pdmd.pretrain --config FILE [flags]        one rank, or every rank under torchrun

Exit codes: 0 done, 2 bad input, 3 stopped on request after saving, 1 all else.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from megatron_pdmd.arguments import parse_arguments, to_plain
from megatron_pdmd.config import Config, ParallelConfig
from megatron_pdmd.data.prompts import PromptEmbeddings
from megatron_pdmd.data.run_prompts import load_run_prompts
from megatron_pdmd.environment import check_rank_variables
from megatron_pdmd.errors import NoSpaceError, user_errors
from megatron_pdmd.models import from_hf
from megatron_pdmd.parallel.agreement import together
from megatron_pdmd.parallel.pipeline.stages import Stage, layer_split
from megatron_pdmd.parallel.topology import Topology, destroy_topology, initialize_topology
from megatron_pdmd.preflight import Plan, prepare
from megatron_pdmd.training.checkpoints.checkpointing import latest_checkpoint
from megatron_pdmd.training.checkpoints.manifest import CheckpointError
from megatron_pdmd.training.checkpoints.start import find_start
from megatron_pdmd.training.logs.announcements import layout_line, resume_line, tell
from megatron_pdmd.training.logs.wandb_log import WandbLog
from megatron_pdmd.training.networks import Networks
from megatron_pdmd.training.not_finite import NotFiniteError
from megatron_pdmd.training.outcome import evaluate_moving_digits, export_run, phase_summaries, write_summary
from megatron_pdmd.training.phase import check_batch
from megatron_pdmd.training.run_folders.run_folder import RunFolder, check_run_folder, claim_run_folder
from megatron_pdmd.training.run_folders.run_log import cut_log
from megatron_pdmd.training.trainer import Trainer
from pdmd_kernels import use_backend

STOPPED_ON_REQUEST = 3
FAILED = 1

# A program of its own, for it decides what CUDA is before torch is imported.
REHEARSAL = ("megatron_pdmd.planning.fake_cuda", "megatron_pdmd.dry_run")


def main(arguments: list[str] | None = None) -> int:
    """Runs one rank to the end and returns its exit code.

    Args:
        arguments: flags; those of the process where not given.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    with user_errors():
        check_rank_variables()
        if parse_arguments(arguments)[1].dry_run:
            return subprocess.call([sys.executable, "-m", *REHEARSAL, *arguments])
        plan = prepare(arguments)
    with use_backend(plan.config.model.kernel_backend):
        return run(plan)


def run(plan: Plan) -> int:
    """Trains, exports and measures what was prepared; returns the rank's exit code."""
    with ExitStack() as held:
        with user_errors(foreign=False):
            topology = start_topology(plan.config.parallel)
            check_batch(plan.config, topology.data)
            held.enter_context(held_folder(plan, topology))
            for line in (layout_line(topology), *plan.remarks):
                tell(topology, line)
            with together():
                start = find_start(plan.config)
                networks, trainer = build(plan, topology)
            trainer.restore(start)
            trainer.begin()
            wandb = claim(plan, trainer, topology)
            if start and not start.finetune:
                tell(topology, resume_line(start.checkpoint, trainer.position))
        with user_errors(NoSpaceError), user_errors(CheckpointError):
            try:
                reason = trainer.run(wandb)
            except NotFiniteError as error:
                return tell_not_finite(error, plan.config, topology)
            if trainer.finished and not reason:
                with user_errors(foreign=False):
                    finish(plan, topology, networks, trainer)
    if reason and topology.rank == 0:
        print(f"stopped by {reason} after {trainer.position}, saved; the same command continues")
    destroy_topology()
    return STOPPED_ON_REQUEST if reason else 0


def start_topology(options: ParallelConfig) -> Topology:
    """The process groups of this run.

    Raises:
        ValueError: the layout does not fit the world, or the backend cannot work here.
    """
    return initialize_topology(
        tensor=options.tensor_model_parallel_size,
        pipeline=options.pipeline_model_parallel_size,
        context=options.context_parallel_size,
        sequence_parallel=options.sequence_parallel,
        backend=None if options.distributed_backend == "auto" else options.distributed_backend,
        timeout_minutes=options.distributed_timeout_minutes,
    )


def open_wandb(config: Config) -> WandbLog | None:
    """The run at Weights & Biases, where `--wandb-project` asks for one.

    Raises:
        ValueError: wandb refuses.
    """
    options = config.logging
    return WandbLog(options, config.checkpoint.save, to_plain(config)) if options.wandb_project else None


@contextmanager
def held_folder(plan: Plan, topology: Topology) -> Iterator[None]:
    """The run's folder is this launch's alone inside the block. Called on all ranks; the first one holds it.

    Raises:
        ValueError: another launch has it, or made it another run's meanwhile.
    """
    folder = None
    try:
        with together():
            if topology.rank == 0:
                folder = RunFolder(plan.config.checkpoint.save)
                check_run_folder(plan.config, plan.inputs)
        if folder and folder.remark:
            tell(topology, folder.remark)
        yield
    finally:
        if folder:
            folder.release()


def claim(plan: Plan, trainer: Trainer, topology: Topology) -> WandbLog | None:
    """Makes the folder this run's, once all that can fail at its start has worked, and opens its logs.

    Called on all ranks; what the first one meets, all do.
    """
    wandb, folder = None, plan.config.checkpoint.save
    with together():
        if topology.rank == 0:
            wandb = open_wandb(plan.config)
            for name in ("metrics.jsonl", "evaluations.jsonl"):
                if told := cut_log(folder / name, trainer.progress.iteration):
                    tell(topology, told)
            claim_run_folder(plan.config, plan.inputs)
    return wandb


def build(plan: Plan, topology: Topology) -> tuple[Networks, Trainer]:
    """Loads prompts and teacher and makes the trainer."""
    prompts, eval_path = load_prompts(plan, topology, plan.config.data.prompts), plan.config.evaluation.eval_prompts
    tell(topology, f"prompts: {len(prompts)} of {plan.config.data.prompts}")
    eval_prompts = load_prompts(plan, topology, eval_path, "--eval-prompts") if eval_path else None
    tell(topology, f"loading the teacher {plan.source.path}: {', '.join(plan.source.experts)}")
    networks = load_networks(plan, topology)
    trainer = Trainer(
        plan.config,
        topology,
        networks,
        plan.phases,
        plan.schedule,
        prompts,
        plan.latent_shape,
        eval_prompts=eval_prompts,
    )
    return networks, trainer


def load_prompts(plan: Plan, topology: Topology, path: Path, flag: str = "--prompts") -> PromptEmbeddings:
    """Prompts in any form that `--prompts` takes, in what the networks compute in."""
    data = plan.config.data
    return load_run_prompts(
        path,
        plan.source.path,
        plan.config.checkpoint.save,
        topology,
        max_length=data.prompt_length,
        negative_prompt=data.negative_prompt,
        dtype=_dtype(plan.config),
        flag=flag,
    )


def _dtype(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.training.bf16 else torch.float32


def load_networks(plan: Plan, topology: Topology) -> Networks:
    """The teacher's networks, sharded, and what will be made of them."""
    config, source = plan.config, plan.source
    recompute = config.model.recompute_granularity
    options = {
        "attention_backend_name": config.model.attention_backend,
        "context_parallel_method": config.parallel.context_parallel_method,
        "recompute_granularity": None if recompute == "none" else recompute,
    }
    teacher = {}
    for expert, subfolder in source.experts.items():
        layers = source.configs[expert].num_layers
        split = layer_split(layers, topology.pipeline, config.parallel.pipeline_layer_split)
        options["stage"] = Stage.of(topology.pipeline_rank, split)
        teacher[expert] = from_hf(source.path, subfolder, dtype=_dtype(config), device=topology.device, **options)
    return Networks(teacher, config.method, config.training.seed)


def tell_not_finite(error: NotFiniteError, config: Config, topology: Topology) -> int:
    """Says why the run has ended and what is left of it; returns the exit code."""
    if topology.rank == 0:
        found = latest_checkpoint(config.checkpoint.save / "checkpoints")
        left = f"the last checkpoint is {found.folder}" if found else "no checkpoint was saved"
        mend = "lower --lr and --fake-lr, or look for what is wrong in the teacher and the prompts"
        sys.stderr.write(f"error: {error}; {left}; {mend}\n")
    destroy_topology()
    return FAILED


def finish(plan: Plan, topology: Topology, networks: Networks, trainer: Trainer) -> None:
    """Exports the experts, measures the task, and writes summary.json."""
    config = plan.config
    if config.checkpoint.export:
        export_run(config, plan.source, plan.phases, networks, config.checkpoint.save / "hf")
        if topology.rank == 0:
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

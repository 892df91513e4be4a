"""A rehearsal: the trainer's own run for many GPUs, on one machine without any, from the flags to the export.

    python -m megatron_pdmd.pretrain --config FILE --dry-run RANKS [--dry-run-rank R] [--json FILE] [flags]

One rank of so many runs on fake CUDA tensors (`planning.fake_cuda`) and fake process groups: every operation is
dispatched with its device, dtype and shape, and nothing is computed, sent or read. The run is shortened where only
repetition is lost, stopped and saved after its first update, and continued from there. It fails, with file and line,
where a GPU would; else it tells what the device held, moment by moment.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_pdmd import pretrain
from megatron_pdmd.arguments import parse_arguments
from megatron_pdmd.config import Config, LaunchConfig
from megatron_pdmd.distillation.randomness import Counter
from megatron_pdmd.distillation.step import Iteration
from megatron_pdmd.dry_run.report import Report, write_report
from megatron_pdmd.dry_run.stand_ins import StandIns
from megatron_pdmd.errors import user_errors
from megatron_pdmd.parallel.topology import check_world
from megatron_pdmd.planning.device_checks import DeviceChecks, DeviceError
from megatron_pdmd.planning.fake_ranks import FakeRanks
from megatron_pdmd.planning.skeleton import complete_folder
from megatron_pdmd.planning.source_lines import frames_of_error, lines_of_error, summary_of_error
from megatron_pdmd.preflight import Plan, check
from megatron_pdmd.training.phase import check_batch
from pdmd_kernels import available_backends, use_backend

FAULT = 1


def main(arguments: Sequence[str]) -> int:
    """Rehearses the run that the flags describe.

    Returns:
        The exit code: 0, or 1 where a GPU would fail. Bad input ends the process with 2.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pdmd-dry-run-") as name:
        with user_errors():
            config, launch = parse_arguments(arguments)
            _require_kernels(config)
            layout = config.parallel
            sizes = (layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size)
            check_world(launch.dry_run, *sizes, layout.context_parallel_size, layout.sequence_parallel)
            plan = check(_in_folder(config, Path(name)), writes=False)
            check_batch(plan.config, _data_ranks(plan.config, launch.dry_run))
            plan = replace(plan, config=_shortened(plan, launch.dry_run))
        ranks = FakeRanks(launch.dry_run, launch.dry_run_rank)
        checks = DeviceChecks(ranks)
        try:
            report = rehearse(plan, launch, ranks, checks)
        except Exception as error:
            print(f"dry run: {fault(error, checks)}", file=sys.stderr)
            return FAULT
    write_report(replace(report, seconds=time.monotonic() - started), launch.json)
    return 0


def rehearse(plan: Plan, launch: LaunchConfig, ranks: FakeRanks, checks: DeviceChecks) -> Report:
    """Runs to the first update, saves, and goes on from there to the end, in a process with fake CUDA.

    Args:
        plan: a shortened run in a folder of its own.
        launch: number of ranks, and which one this is.
        ranks: the ranks.
        checks: what is checked and counted.

    Raises:
        Exception: what the run met where a GPU would fail.
    """
    stand_ins = StandIns(checks)
    layout = plan.config.parallel
    first = replace(plan, config=_interrupted(plan.config))
    with ranks.joined(), stand_ins.installed(), use_backend(plan.config.model.kernel_backend):
        for part, code in ((first, pretrain.STOPPED_ON_REQUEST), (plan, 0)):
            topology = ranks.initialize(
                tensor=layout.tensor_model_parallel_size,
                pipeline=layout.pipeline_model_parallel_size,
                context=layout.context_parallel_size,
                sequence_parallel=layout.sequence_parallel,
            )
            with FakeTensorMode(allow_non_fake_inputs=True), checks:
                ended = pretrain.run(part)
            assert ended == code, f"the run ended with exit code {ended}"
    sizes = {axis: getattr(topology, axis) for axis in ("tensor", "context", "data", "pipeline")}
    return Report.of(launch, sizes, checks.memory, stand_ins.written_bytes)


def fault(error: BaseException, checks: DeviceChecks) -> str:
    """The lines of this project that an error came up in, what it says, and where a tensor on the CPU comes from."""
    text = summary_of_error(error)
    if not isinstance(error, DeviceError):
        found = (checks.origin_among(frame.f_locals.values()) for frame in frames_of_error(error.__traceback__))
        origin = next(filter(None, found), "")
        text += f" (a tensor on the CPU comes from {origin})" if origin else ""
    return f"{lines_of_error(error.__traceback__)}: {text}"


def _require_kernels(config: Config) -> None:
    """A GPU would run our operations in plain torch where Triton is missing; that is not what is rehearsed.

    Raises:
        ValueError: the kernels are not there.
    """
    if config.model.kernel_backend in ("auto", "triton") and "triton" not in available_backends("cuda"):
        raise ValueError("--dry-run: triton is not installed; install it, or rehearse with --kernel-backend reference")


def _in_folder(config: Config, folder: Path) -> Config:
    """The run with a folder of its own, and with weights that need not be there."""
    teacher = config.model.teacher
    if teacher.is_dir():
        config = _replaced(config, "model", teacher=complete_folder(teacher, folder / "teacher"))
    return _replaced(config, "checkpoint", save=folder / "run", load=None, finetune=False, load_optim=True)


def _data_ranks(config: Config, ranks: int) -> int:
    layout = config.parallel
    share = layout.tensor_model_parallel_size * layout.context_parallel_size * layout.pipeline_model_parallel_size
    return ranks // share


def _shortened(plan: Plan, ranks: int) -> Config:
    """The run with nothing left out but repetitions: one iteration of each phase, of one micro-batch, with as many fake
    updates as meet every expert, and few samples of few steps.

    Stages of a pipeline hold a micro-batch each, and only stop between two iterations.
    """
    config, data = plan.config, _data_ranks(plan.config, ranks)
    training, logging, evaluation = config.training, config.logging, config.evaluation
    share, stages = training.global_batch_size // data, config.parallel.pipeline_model_parallel_size
    micro_batch = min(training.micro_batch_size, share)
    batch = micro_batch * min(stages, share // micro_batch)
    config = _replaced(
        config,
        "training",
        train_iters=(1 if stages == 1 else 2,),
        micro_batch_size=micro_batch,
        global_batch_size=batch * data,
        exit_duration_in_mins=0.0,
        exit_interval=0,
        exit_signal_handler=False,
    )
    config = _replaced(config, "parallel", distributed_backend="auto")
    config = _replaced(config, "checkpoint", save_interval=0)
    config = _replaced(config, "method", fake_updates=_updates_of_all_experts(plan), fake_warmup=0, phase=0)
    config = _replaced(config, "optimizer", lr_warmup_iters=0, fake_lr_warmup_iters=0)  # longer than an iteration
    config = _replaced(
        config,
        "logging",
        log_interval=1,
        timing_log_level=0,  # no GPU, no events
        log_throughput=False,
        tensorboard=False,
        wandb_project="",
        sample_prompts=min(logging.sample_prompts, data),
    )
    return _replaced(
        config,
        "evaluation",
        task="none",
        teacher_steps=2,
        batch_size=1,
        eval_interval=min(evaluation.eval_interval, 1),
        eval_samples=min(evaluation.eval_samples, data),
    )


def _interrupted(config: Config) -> Config:
    """The same run, of two micro-batches where it has one, stopped as soon as it can be."""
    size = config.training.global_batch_size * (2 if config.parallel.pipeline_model_parallel_size == 1 else 1)
    return _replaced(config, "training", global_batch_size=size, exit_duration_in_mins=1e-9)


def _updates_of_all_experts(plan: Plan) -> int:
    """Fake updates of an iteration after which each of a phase's experts has learnt, if it does at all."""
    method, wanted = plan.config.method, 1
    if method.fake_experts == "single":
        return wanted
    for phase in plan.phases.phases:
        iteration = Iteration(method, plan.phases, phase, plan.schedule, plan.latent_shape, torch.device("cpu"))
        missing = set(iteration.experts())
        for update in range(method.fake_updates):
            missing.discard(iteration.expert(Counter(plan.config.training.seed, phase.index, 0, update)))
            if not missing:
                wanted = max(wanted, update + 1)
                break
    return wanted


def _replaced(config: Config, section: str, **changes: object) -> Config:
    return replace(config, **{section: replace(getattr(config, section), **changes)})

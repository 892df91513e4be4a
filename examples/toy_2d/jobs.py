"""The work of the 2-D toy, cut into jobs for processes: one of Fig. 1's methods in one setting, for all seeds."""

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from ring import Metrics, Ring, measure
from safetensors.torch import load_file
from student import PlaneFlow, distill
from torch import Tensor

from megatron_pdmd.config import Config, MethodConfig, OptimizerConfig, TrainingConfig

NUM_STEPS = 4
SHOWN = 2000  # samples in a picture, of the first seed
MEASURE_SEED = 1 << 20  # of the noise and the true samples that all methods are measured with


@dataclass(frozen=True)
class Method:
    """One of Fig. 1's methods.

    Attributes:
        title: with its letter in Fig. 1.
        phase_steps: steps of each phase.
        gradient_truncation: as in the method's options.
        shares: the phases' shares of the iterations. The noisier half of the steps needs less than the other.
    """

    title: str
    phase_steps: tuple[int, ...]
    gradient_truncation: Literal["sgts", "none"]
    shares: tuple[int, ...]

    def train_iters(self, iterations: int) -> tuple[int, ...]:
        """Iterations of each phase, that sum to the given number."""
        marks = [iterations * sum(self.shares[:count]) // sum(self.shares) for count in range(len(self.shares) + 1)]
        return tuple(end - begin for begin, end in pairwise(marks))


METHODS = {
    "dmd": Method("(a) DMD", (4,), "none", (1,)),
    "dmd_sgts": Method("(b) DMD, SGTS", (4,), "sgts", (1,)),
    "phased": Method("(c) Phased DMD", (1, 1, 1, 1), "none", (1, 1, 2, 2)),
    "phased_sgts": Method("(d) Phased DMD, SGTS", (2, 2), "sgts", (1, 2)),
}


@dataclass(frozen=True)
class ToyOptions:
    """How the toy is run."""

    # Folder of the pictures and the numbers.
    save: Path = Path("runs/toy_2d")
    # File of the numbers; toy_2d.json in the folder where not given.
    json: Path | None = None
    # Timestep shifts.
    shifts: tuple[float, ...] = (1.0,)
    # Weightings of the generator's gradient.
    weightings: tuple[Literal["score", "mean_abs"], ...] = ("score", "mean_abs")
    # Independent students of each method.
    seeds: int = 4
    # Generator updates of a student, over all its phases.
    train_iters: int = 1200
    # Samples of an update of one student.
    batch_size: int = 256
    # Of the three hidden layers.
    width: int = 96
    # Learning rate of the generator.
    lr: float = 5e-4
    # Learning rate of the fake score.
    fake_lr: float = 1e-3
    # Decay of the generator's moving average, which is what is measured.
    ema_decay: float = 0.99
    # Samples the fake score learns from: truncated like the generator's, or run through all steps of the phase.
    fake_rollout: Literal["same", "full"] = "same"
    # Fake updates before a phase's first generator update.
    fake_warmup: int = 0
    # Updates of the network that generator and fake score start from, of 512 samples each.
    pretrain_iters: int = 2000
    # Samples of each student that are measured.
    samples: int = 4096
    # Processes, one thread each.
    workers: int = 2

    def check(self) -> None:
        """Refuses options that cannot be measured.

        Raises:
            ValueError: names the flag.
        """
        if self.seeds < 2:
            raise ValueError(f"--seeds {self.seeds}: a spread needs at least 2")
        if self.train_iters < 2 * NUM_STEPS:
            raise ValueError(f"--train-iters {self.train_iters}: give the phases at least {2 * NUM_STEPS} together")
        if self.samples < SHOWN:
            raise ValueError(f"--samples {self.samples}: the pictures show {SHOWN}; give at least as many")
        if self.workers < 1:
            raise ValueError(f"--workers {self.workers}: the work needs at least 1 process")
        for name in ("shifts", "weightings"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is empty; give at least one")


@dataclass(frozen=True)
class Job:
    """One method in one setting, all seeds; plain data, for another process.

    Attributes:
        method: a key of the methods.
        shift: of the timesteps.
        weighting: of the generator's gradient.
        options: all else.
        start: file of the network to start from.
    """

    method: str
    shift: float
    weighting: Literal["score", "mean_abs"]
    options: ToyOptions
    start: Path

    @property
    def setting(self) -> str:
        """Shift and weighting, in words."""
        return f"shift {self.shift:g}, {self.weighting}"

    def config(self) -> Config:
        """The options of the library."""
        method, options = METHODS[self.method], self.options
        return Config(
            method=MethodConfig(
                num_steps=NUM_STEPS,
                phase_steps=method.phase_steps,
                gradient_truncation=method.gradient_truncation,
                timestep_shift=self.shift,
                dmd_weighting=self.weighting,
                guidance_scale=(1.0,),
                fake_rollout=options.fake_rollout,
                fake_warmup=options.fake_warmup,
                generator="full",
                ema_decay=options.ema_decay,
            ),
            optimizer=OptimizerConfig(lr=options.lr, fake_lr=options.fake_lr),
            training=TrainingConfig(
                train_iters=method.train_iters(options.train_iters), global_batch_size=options.batch_size
            ),
        )


@dataclass(frozen=True)
class Outcome:
    """What a job hands back.

    Attributes:
        metrics: of each seed.
        levels: samples of the first seed at every noise level of the sampler, numpy [N, 2].
        seconds: time of the training.
    """

    metrics: list[Metrics]
    levels: dict[float, np.ndarray]
    seconds: float


def run_job(job: Job) -> Outcome:
    """Trains one method's students and measures them."""
    torch.set_num_threads(1)
    ring, options = Ring.of_pairs(), job.options
    start = PlaneFlow(options.width)
    start.load_state_dict(load_file(job.start))
    began = time.perf_counter()
    student = distill(ring, start, job.config(), options.seeds)
    seconds = time.perf_counter() - began
    true, noise = measuring_samples(ring, options)
    levels = {t: x.unflatten(0, (options.seeds, -1)) for t, x in student.path(noise.repeat(options.seeds, 1)).items()}
    return Outcome(
        metrics=[measure(x, true, ring) for x in levels[0.0]],
        levels={t: x[0, :SHOWN].numpy() for t, x in levels.items()},
        seconds=seconds,
    )


def measuring_samples(ring: Ring, options: ToyOptions) -> tuple[Tensor, Tensor]:
    """True samples to compare with, and the noise that all samplers start from: [N, 2] each."""
    draws = torch.Generator().manual_seed(MEASURE_SEED)
    return ring.sample(options.samples, draws), torch.randn(options.samples, 2, generator=draws)


def run_jobs(jobs: Sequence[Job], workers: int, console: Console) -> dict[Job, Outcome]:
    """Runs the jobs in processes of one thread each; fork is unsafe once torch has threads."""
    outcomes: dict[Job, Outcome] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    spawn = multiprocessing.get_context("spawn")
    with Progress(*columns, console=console) as progress, ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        task = progress.add_task("distilling", total=len(jobs))
        running = {pool.submit(run_job, job): job for job in jobs}
        for future in as_completed(running):
            outcomes[running[future]] = future.result()
            progress.advance(task)
    return {job: outcomes[job] for job in jobs}

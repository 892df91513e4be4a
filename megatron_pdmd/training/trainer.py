"""The run: phases one after another, each trained, logged, saved, and handed on to the next."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from megatron_pdmd.config import Config
from megatron_pdmd.data.prompts import PromptEmbeddings
from megatron_pdmd.diffusion.noise_schedule import NoiseSchedule
from megatron_pdmd.diffusion.phases import Phase, PhasePlan
from megatron_pdmd.distillation.randomness import Counter
from megatron_pdmd.distillation.step import Iteration, is_binned
from megatron_pdmd.parallel.pipeline.channels import PipelineGroups
from megatron_pdmd.parallel.topology import Topology
from megatron_pdmd.training.checkpoints.checkpointing import Checkpoint, CheckpointWriter, check_models
from megatron_pdmd.training.checkpoints.manifest import Manifest, Progress
from megatron_pdmd.training.checkpoints.sharded_state import Shard
from megatron_pdmd.training.checkpoints.start import Start
from megatron_pdmd.training.logs.announcements import phase_line, tell
from megatron_pdmd.training.logs.instruments import Instruments
from megatron_pdmd.training.logs.interval import IntervalMeans, closes_interval
from megatron_pdmd.training.logs.metrics_log import MetricsLog
from megatron_pdmd.training.logs.wandb_log import WandbLog
from megatron_pdmd.training.milestones import Milestones
from megatron_pdmd.training.networks import Networks
from megatron_pdmd.training.not_finite import NotFiniteError
from megatron_pdmd.training.phase import Metrics, PhaseTrainer
from megatron_pdmd.training.sampling import SAMPLING_PHASE, Sampler
from megatron_pdmd.training.stopping import StopRequest
from megatron_pdmd.training.validation import Validation


class Trainer:
    """Trains the phases of a run on this rank.

    Attributes:
        progress: how far the run is.
    """

    def __init__(
        self,
        config: Config,
        topology: Topology,
        networks: Networks,
        plan: PhasePlan,
        schedule: NoiseSchedule,
        prompts: PromptEmbeddings,
        latent_shape: tuple[int, ...],
        eval_prompts: PromptEmbeddings | None = None,
    ):
        self._config = config
        self._topology = topology
        self._networks = networks
        self._plan = plan
        self._schedule = schedule
        self._prompts = prompts
        self._latent_shape = latent_shape
        self._eval_prompts = eval_prompts or prompts
        self._validation = Validation(config)
        self._means = IntervalMeans()
        self._instruments = Instruments(config.logging, topology)
        timeout = config.parallel.distributed_timeout_minutes
        self._stages = PipelineGroups.of(topology, timeout) if topology.pipeline > 1 else None
        self._done_here = 0
        self._open_updates: list[Metrics] = []
        self._clock = time.monotonic()
        self._start: Start | None = None
        self._left = Milestones()  # what the launch before left out of what was due where this one begins
        self._begun: tuple[Iteration, PhaseTrainer] | None = None  # by `begin`
        self.progress = Progress()

    def phase_iterations(self, phase: int) -> int:
        """Iterations of a phase, by its 1-based index."""
        return self._config.training.iterations_of(phase)

    def restore(self, start: Start | None) -> None:
        """Takes up a run where a checkpoint left it, or at its start. Called on all ranks.

        Raises:
            ValueError: the checkpoint does not fit, or `--phase` asks for one whose predecessors are not trained.
        """
        self._start = start
        if start:
            check_models(start.checkpoint, self._models())
        if start and not start.finetune:
            self.progress, saved = start.checkpoint.progress, start.checkpoint.manifest
            self._open_updates = list(saved.open_updates)
            self._means = IntervalMeans(saved.log_interval_sums)
        alone = self._config.method.phase
        if alone and alone > self.progress.phase + self._phase_is_done(self.progress.phase):
            raise ValueError(
                f"--phase {alone}: phase {alone - 1} is not trained yet; train it first, or leave --phase out"
            )
        if start and start.own and self.progress.iteration and not self._open_updates:
            number, done = self.progress.iteration, self._phase_is_done(self.progress.phase)
            due = Milestones.after(self._config, number, ends_phase=done)
            self._left = due.missing(self._config.checkpoint.save, number)
        for phase in self._plan.phases:
            if self._is_behind(phase):
                self._networks.add_expert(phase.index, phase.expert)
                self._load_expert(phase, start.checkpoint)
            elif start and start.finetune and phase.index > 1:  # read when its phase begins, perhaps days from now
                start.checkpoint.check_readable(_expert_state(phase.index))

    def run(self, wandb: WandbLog | None = None) -> str | None:
        """Trains what is left of the run.

        Args:
            wandb: where log entries go too; on rank 0.

        Returns:
            Why it was stopped on request after saving, or None when every asked phase is done.

        Raises:
            NotFiniteError: its numbers are not finite any more; what was saved is.
        """
        alone, options = self._config.method.phase, self._config.checkpoint
        writer = CheckpointWriter(
            options.save / "checkpoints", keep_last=options.keep_last, asynchronous=options.async_save
        )
        total = sum(self.phase_iterations(phase.index) for phase in self._plan.phases)
        log = None
        if self._topology.rank == 0:
            logging = self._config.logging
            log = MetricsLog(options.save, total, self.progress.iteration, logging.tensorboard, wandb)
        stop = StopRequest(self._config.training, options)
        try:
            with stop.on_signals(), self._instruments.bar.shown():
                for phase in self._plan.phases:
                    if self._is_behind(phase):
                        if phase.index == self.progress.phase and self._left.sheet:
                            self._draw_sheet()
                            self._left = Milestones()
                        continue
                    if alone and phase.index > alone:
                        break
                    if phase.index > self.progress.phase:
                        self.progress = replace(self.progress, phase=phase.index, phase_iteration=0)
                        self._open_updates = []
                    self._clock = time.monotonic()
                    self._train_phase(phase, writer, log, stop)
                    if not stop.reason:  # when the phase's memory is free again, and its weights are saved
                        self._draw_sheet()
                    self._count_time()
                    if stop.reason:
                        break
                writer.close()
                if log:
                    log.close()
                if not stop.reason:  # a signal during the last sheet: what comes after training is another launch's
                    stop.agree(None)
        except NotFiniteError:
            writer.close()  # a checkpoint that is on its way is written to its end
            raise
        return stop.reason

    @property
    def position(self) -> str:
        """How far the run is, in words."""
        updates = len(self._open_updates)
        return f"iteration {self.progress.iteration}" + (f" and {updates} updates of the next" if updates else "")

    @property
    def finished(self) -> bool:
        """Whether every phase of the run is trained."""
        return self._phase_is_done(len(self._plan.phases))

    def sampler(self) -> Sampler:
        """Samples from what the phases deliver; phases not trained yet are left out."""
        trained = self.progress.phase if self.progress.phase_iteration else self.progress.phase - 1
        plan = replace(self._plan, phases=self._plan.phases[:trained])
        return Sampler(
            roles=self._networks.roles(len(self._plan.phases) + 1),
            plan=plan,
            schedule=self._schedule,
            prompts=self._prompts,
            latent_shape=self._latent_shape,
            counter=Counter(self._config.training.seed, SAMPLING_PHASE, 0, 0),
            topology=self._topology,
            batch_size=self._config.evaluation.batch_size,
        )

    def _phase_is_done(self, phase: int) -> bool:
        ahead = phase < self.progress.phase
        return ahead or (phase == self.progress.phase and self.progress.phase_iteration >= self.phase_iterations(phase))

    def _is_behind(self, phase: Phase) -> bool:
        """Whether nothing of a phase is left but perhaps its sheet; an evaluation needs its fake score."""
        evaluates = phase.index == self.progress.phase and self._left.evaluation
        return self._phase_is_done(phase.index) and not evaluates

    def begin(self) -> None:
        """Makes the phase ready that is trained first, so that what fails in that fails before a folder is claimed.

        Where a sheet is to be made up before, whose samples need the memory, the folder is the run's already.
        """
        alone = self._config.method.phase
        first = next((phase for phase in self._plan.phases if not self._is_behind(phase)), None)
        if first and not (alone and first.index > alone) and not self._left.sheet:
            self._begun = self._ready_phase(first)

    def _ready_phase(self, phase: Phase) -> tuple[Iteration, PhaseTrainer]:
        """The phase's networks and what trains them, with what the launch's checkpoint has of it."""
        iteration = Iteration(
            self._config.method, self._plan, phase, self._schedule, self._latent_shape, self._topology.device
        )
        self._networks.start_phase(phase.index, phase.expert, iteration.experts())
        return iteration, self._phase_trainer(phase, iteration)

    def _train_phase(self, phase: Phase, writer: CheckpointWriter, log: MetricsLog | None, stop: StopRequest) -> None:
        iteration, trainer = self._begun or self._ready_phase(phase)
        self._begun = None
        count, every = self.phase_iterations(phase.index), self._config.checkpoint.save_interval
        tell(self._topology, phase_line(self._plan, phase, self.progress, count, trainer.trained_parameters()))

        def between_updates(save: bool = False) -> bool:
            stop.agree(self._done_here)
            if save or stop.reason or stop.save_is_due:
                self._count_time()
                tell(self._topology, f"iteration {self.progress.iteration}: saving a checkpoint")
                with self._instruments.between("save", self.progress.iteration):
                    writer.save(self._manifest(trainer), self._states(trainer))
                stop.saved()
            return stop.reason is not None

        self._make_up(iteration, log)
        while self.progress.phase_iteration < count and not stop.reason:
            if self._train_iteration(trainer, log, between_updates):
                last = self.progress.phase_iteration == count
                between_updates(save=last or bool(every and self.progress.iteration % every == 0))
                if not stop.reason:
                    due = Milestones.after(self._config, self.progress.iteration, ends_phase=last)
                    self._evaluate(iteration, log, due, last)
        trainer.release()
        self._networks.finish_phase(phase.index)

    def _train_iteration(
        self, trainer: PhaseTrainer, log: MetricsLog | None, between_updates: Callable[[], bool]
    ) -> bool:
        """What is left of an iteration; whether it was finished and not stopped between two updates."""
        with self._instruments.iteration():
            metrics = trainer.run_iteration(self.progress.phase_iteration, self._open_updates, between_updates)
        if metrics is None:
            return False
        self._open_updates = []
        before, size = self.progress, self._config.training.global_batch_size
        skipped = metrics.pop("skipped_updates")
        self.progress = replace(
            before,
            iteration=before.iteration + 1,
            phase_iteration=before.phase_iteration + 1,
            consumed_samples=before.consumed_samples + size,
            skipped_updates=before.skipped_updates + skipped,
        )
        self._count_time()
        self._done_here += 1
        if skipped and self._topology.rank == 0:
            wrong = (name for name, value in metrics.items() if not (math.isfinite(value) or is_binned(name)))
            names = ", ".join(wrong)
            print(f"iteration {self.progress.iteration}: {skipped} update skipped on all ranks, not finite: {names}")
        self._means.add(metrics)
        self._log(trainer, log)
        return True

    def _log(self, trainer: PhaseTrainer, log: MetricsLog | None) -> None:
        """Writes an entry of the iterations since the last one, if one is due."""
        progress, options = self.progress, self._config
        count = self.phase_iterations(trainer.index)
        if not closes_interval(progress.iteration, progress.phase_iteration, count, options.logging.log_interval):
            return
        measured, means = self._instruments.take(), self._means.take()
        if log:
            entry = {
                "iteration": progress.iteration,
                "phase": trainer.index,
                "consumed_samples": progress.consumed_samples,
                "global_batch_size": options.training.global_batch_size,
                "skipped_updates": progress.skipped_updates,
            }
            log.write(entry | trainer.learning_rates | measured | means)

    def _count_time(self) -> None:
        now = time.monotonic()
        self.progress = replace(self.progress, train_seconds=self.progress.train_seconds + now - self._clock)
        self._clock = now

    def _phase_trainer(self, phase: Phase, iteration: Iteration) -> PhaseTrainer:
        """The phase's trainer, with what the launch's checkpoint has of this phase."""
        start, name = self._start, _expert_state(phase.index)
        saved_phase = start.checkpoint.progress.phase if start else 0
        if phase.index == saved_phase or (start and start.finetune and name in start.checkpoint.states):
            self._load_expert(phase, start.checkpoint)
        trainer = PhaseTrainer(
            self._config,
            iteration,
            self._networks,
            self._prompts,
            self._topology,
            self._instruments,
            self._stages,
        )
        if phase.index == saved_phase:
            trainer.load_state(start.checkpoint, optimizers=start.optimizers and not start.finetune)
        return trainer

    def _load_expert(self, phase: Phase, checkpoint: Checkpoint) -> None:
        checkpoint.read(_expert_state(phase.index), self._networks.expert_state(phase.index))

    def _states(self, trainer: PhaseTrainer) -> dict[str, dict[str, Shard]]:
        """This rank's part of everything that a checkpoint holds."""
        earlier = {_expert_state(k): self._networks.expert_state(k) for k in range(1, trainer.index)}
        return earlier | trainer.state()

    def _manifest(self, trainer: PhaseTrainer) -> Manifest:
        topology = self._topology
        return Manifest(
            progress=self.progress,
            optimizer_steps=trainer.optimizer_steps(),
            seed=self._config.training.seed,
            models=self._models(),
            layout={axis: getattr(topology, axis) for axis in ("tensor", "context", "data", "pipeline")},
            open_updates=list(self._open_updates),
            log_interval_sums=self._means.sums,
            skipped_in_a_row=dict(trainer.skipped_in_a_row),
        )

    def _models(self) -> dict[str, dict[str, Any]]:
        return {expert: asdict(model.config) for expert, model in self._networks.teacher.items()}

    def _fixed_sampler(self) -> Sampler:
        """For evaluations and sheets: one prompt at a time, dealt to the replicas."""
        return replace(self.sampler(), prompts=self._eval_prompts, batch_size=1)

    def _make_up(self, iteration: Iteration, log: MetricsLog | None) -> None:
        """What the launch before this one left out of what was due in this phase where this one begins."""
        left, self._left = self._left, Milestones()
        self._evaluate(iteration, log, left, self._phase_is_done(iteration.phase.index))

    def _evaluate(self, iteration: Iteration, log: MetricsLog | None, due: Milestones, last: bool) -> None:
        """The evaluation or the sheet that is due; the sheet of a phase's end is drawn after it."""
        number, phase = self.progress.iteration, iteration.phase.index
        if due.evaluation:
            with self._instruments.between("evaluation", number):
                found = self._validation.evaluate(self._fixed_sampler(), iteration, number, draw=not last)
                movement = self._networks.movement(phase).item()
            if log:
                log.write_evaluation({"iteration": number, "phase": phase, "generator_movement": movement} | found)
        elif due.sheet and not last:
            self._draw_sheet()

    def _draw_sheet(self) -> None:
        with self._instruments.between("sheet", self.progress.iteration):
            self._validation.sheets.draw(self._fixed_sampler(), self.progress.iteration)


def _expert_state(phase: int) -> str:
    """The state of a checkpoint that holds a phase's expert."""
    return f"generator_phase_{phase}"

"""The training of one phase: gradient buffers and optimizers of its trained roles, and its iterations on this rank."""

import functools
import math
from collections.abc import Callable, Mapping
from collections.abc import Generator as Coroutine

import torch

from megatron_pdmd.config import Config
from megatron_pdmd.data.prompts import PromptEmbeddings
from megatron_pdmd.distillation.randomness import Counter, Purpose
from megatron_pdmd.distillation.step import Iteration, MicroBatch, Reply, Request, Result, quotients, walk
from megatron_pdmd.distillation.updates import Update, updates_of
from megatron_pdmd.models.layers.tensor_parallel import partition_dim
from megatron_pdmd.parallel.pipeline.channels import PipelineGroups
from megatron_pdmd.parallel.topology import Topology
from megatron_pdmd.training.checkpoints.checkpointing import Checkpoint
from megatron_pdmd.training.checkpoints.sharded_state import Shard, with_prefix
from megatron_pdmd.training.logs.instruments import Instruments
from megatron_pdmd.training.networks import Networks, network_state
from megatron_pdmd.training.not_finite import NotFiniteError, first_of_network
from megatron_pdmd.training.optimizers.learning_rate import LearningRateSchedule
from megatron_pdmd.training.pipelined.iterations import PipelinedIterations
from megatron_pdmd.training.pipelined.parts import StageNetworks, StagePhase
from megatron_pdmd.training.trained_network import TrainedNetwork, means_of, not_finite

Metrics = dict[str, float]


class PhaseTrainer:
    """Runs the iterations of one phase.

    Attributes:
        index: the phase's, 1-based.
        learning_rates: `learning_rate` of the generator and `fake_learning_rate`, in the last iteration run.
        skipped_in_a_row: updates of each network that were skipped since its last one that was not.
        pipeline: what runs the iterations where stages share the layers.
    """

    def __init__(
        self,
        config: Config,
        iteration: Iteration,
        networks: Networks,
        prompts: PromptEmbeddings,
        topology: Topology,
        instruments: Instruments | None = None,
        stages: PipelineGroups | None = None,
    ):
        self._config = config
        self._iteration = iteration
        self._networks = networks
        self._prompts = prompts
        self._topology = topology
        self._instruments = instruments or Instruments(config.logging, topology)
        self.index = iteration.phase.index
        share = config.training.global_batch_size // topology.data
        self._samples = min(config.training.micro_batch_size, share)  # of a micro-batch
        self._count = share // self._samples  # micro-batches of an update on this rank
        networks.start_training(self.index)
        self._roles = networks.roles(self.index)
        self._generator = TrainedNetwork(networks.trained_network(self.index), config, config.optimizer.lr)
        wrap = functools.cache(lambda module: TrainedNetwork(module, config, config.optimizer.fake_lr))
        self._fake_score: Mapping[str, TrainedNetwork] = {
            expert: wrap(module) for expert, module in networks.fake_score.items()
        }
        options, iterations = config.optimizer, config.training.iterations_of(self.index)
        self._generator_rates = LearningRateSchedule.of("generator", options, iterations)
        self._fake_rates = LearningRateSchedule.of("fake_score", options, iterations)
        self.learning_rates: dict[str, float] = {}
        self.skipped_in_a_row: dict[str, int] = {}
        self.pipeline = self._pipelined(stages) if stages else None

    def run_iteration(
        self, index: int, logged: list[Metrics] | None = None, pause: Callable[[], bool] = lambda: False
    ) -> Metrics | None:
        """n fake updates, then one generator update.

        Args:
            index: 0-based iteration of the phase.
            logged: the numbers of each fake update that was done before; those of the others are appended.
            pause: called between two updates; whether to stop there. The same answer on all ranks.

        Returns:
            What to log: losses averaged over the updates and all ranks, gradient norms, `skipped_updates`; a number of
            a bin of noise (`is_binned`) is NaN where no sample fell into it. None where it was stopped; called again
            with `logged` it goes on, to the bit.

        Raises:
            NotFiniteError: `--max-skipped-updates` of a network were skipped in a row.
        """
        config, logged = self._config, [] if logged is None else logged
        *fakes, last = updates_of(config.method, config.training.seed, self.index, index)
        self._start_iteration(index, len(logged), len(fakes) + 1)
        if self.pipeline:
            *told, generator = self._run_pipelined([*fakes[len(logged) :], last])
            logged += told
        else:
            starts: dict[int, list[torch.Tensor]] = {}
            for update in fakes[len(logged) :]:
                logged.append(self._update(self._fake_score[self._iteration.expert(update.counter)], update, starts))
                if pause():
                    return None
            generator = self._update(self._generator, last, starts)
        fake = {name: math.fsum(entry[name] for entry in logged) / len(fakes) for name in logged[0]}
        if not generator["skipped_updates"]:
            self._generator.optimizer.finish_param_gather()
            self._networks.update_average(self.index)
        skipped = sum(entry["skipped_updates"] for entry in logged) + generator["skipped_updates"]
        return fake | generator | {"skipped_updates": skipped}

    def _start_iteration(self, index: int, done: int, updates: int) -> None:
        """Sets both learning rates, and shows how far the iteration is."""
        rate, fake_rate = self._generator_rates.at(index), self._fake_rates.at(index)
        self._generator.optimizer.set_lr(rate)
        for network in self._fake_score.values():
            network.optimizer.set_lr(fake_rate)
        self.learning_rates = {"learning_rate": rate, "fake_learning_rate": fake_rate}
        self._instruments.bar.begin(f"phase {self.index}, iteration {index + 1}", done, updates)

    def trained_parameters(self) -> dict[str, int]:
        """How many numbers of each network learn, over all ranks that share it. Called on all of them."""
        topology, counts = self._topology, {}
        for name, network in self._trained().items():
            learning = [p for p in network.module.parameters() if p.requires_grad]
            split = sum(p.numel() for p in learning if partition_dim(p) is not None)
            own = split * topology.tensor + sum(p.numel() for p in learning if partition_dim(p) is None)
            counts[name] = torch.tensor(own, device=topology.device)
            if topology.pipeline > 1:
                torch.distributed.all_reduce(counts[name], group=topology.groups.pp)
        return {name: int(count) for name, count in counts.items()}

    def state(self) -> dict[str, dict[str, Shard]]:
        """Weights of what learns in this phase and states of the optimizers, for a checkpoint to write.

        Of a bf16 weight it is the fp32 master that is written, in the weight's place: rounding it gives the weight.
        """
        states = {}
        for name, network in self._trained().items():
            network.optimizer.finish_param_gather()
            states[f"{name}_optimizer"] = network.optimizer.sharded_state()
            state, weights = self._weights(name, network, masters=True)
            states[state] = weights
        return states

    def optimizer_steps(self) -> dict[str, int]:
        """Updates that each optimizer has made."""
        return {name: network.optimizer.step_count for name, network in self._trained().items()}

    def load_state(self, checkpoint: Checkpoint, *, optimizers: bool = True) -> None:
        """Restores `state`; without `optimizers` these start anew from the loaded weights.

        The generator's weights are to be loaded before.

        Raises:
            CheckpointError: the checkpoint does not fit, or is damaged.
        """
        for name, network in self._trained().items():
            if network is not self._generator:
                checkpoint.read(*self._weights(name, network))
            network.optimizer.reload_master_weights()
            if optimizers:
                network.optimizer.prepare_to_load(checkpoint.manifest.optimizer_steps.get(name, 0))
                checkpoint.read(f"{name}_optimizer", network.optimizer.sharded_state())
                if network.optimizer.master_weights():
                    checkpoint.read(*self._weights(name, network, masters=True))
        self.skipped_in_a_row = dict(checkpoint.manifest.skipped_in_a_row) if optimizers else {}

    def release(self) -> None:
        """Frees buffers and optimizer states at the phase's end."""
        for network in self._trained().values():
            network.release()

    def _trained(self) -> dict[str, TrainedNetwork]:
        """What learns in this phase, by the names in a checkpoint; experts that share a network have the first's."""
        found = {"generator": self._generator}
        for expert, network in self._fake_score.items():
            if network not in found.values():
                found[f"fake_score_{expert}"] = network
        return found

    def _weights(self, name: str, network: TrainedNetwork, *, masters: bool = False) -> tuple[str, dict[str, Shard]]:
        """The state of a checkpoint that holds a network's weights, and this rank's part of them."""
        precise = network.optimizer.master_weights() if masters else {}
        if network is self._generator:
            state = f"generator_phase_{self.index}"
            return state, self._networks.expert_state(self.index) | with_prefix("expert", precise)
        return name, network_state(network.module) | precise

    def _update(self, network: TrainedNetwork, update: Update, starts: dict[int, list[torch.Tensor]]) -> Metrics:
        """One optimizer update over the global batch, or none, on all ranks, if a loss or the norm is not finite.

        Args:
            network: who learns.
            update: which one.
            starts: the latents at the phase's start of the present group's micro-batches, by its index; another
                group's are replaced.
        """
        batches, instruments = self._micro_batches(update.shared), self._instruments
        with instruments.update(update.kind):
            programs = [
                update.program(self._iteration, batch, start)
                for batch, start in zip(batches, self._starts(update, batches, starts), strict=True)
            ]
            runs = [functools.partial(self._run, program, 1 / len(batches)) for program in programs]
            results = network.accumulate(runs)
            with instruments.part("sync"):
                norm = network.optimizer.gradient_norm()
            values = means_of(results, self._topology).tolist()
            metrics = dict(zip(results[0], values, strict=True)) | {f"{update.kind}_grad_norm": norm.item()}
            if not not_finite(metrics):
                with instruments.part("optimizer"):
                    network.optimizer.step(norm)
        return self._entry(network, metrics)

    def _run_pipelined(self, updates: list[Update]) -> list[Metrics]:
        """The same for the updates of an iteration, whose passes the stages share."""
        trained = self._trained()
        return [self._entry(trained[name], metrics) for name, metrics in self.pipeline.run(updates)]

    def _pipelined(self, stages: PipelineGroups) -> PipelinedIterations:
        trained = self._trained()
        names = {network: name for name, network in trained.items()}
        fake_score = {expert: names[network] for expert, network in self._fake_score.items()}
        phase = StagePhase(
            iteration=self._iteration,
            networks=StageNetworks(self._roles, trained, fake_score, self.index),
            micro_batch=self._micro_batch,
            count=self._count,
            samples=self._samples,
            text_tokens=len(self._prompts.negative),
            groups=stages,
            topology=self._topology,
            instruments=self._instruments,
        )
        return PipelinedIterations(self._config.parallel, phase)

    def _entry(self, network: TrainedNetwork, metrics: Metrics) -> Metrics:
        """What to log of an update.

        Raises:
            NotFiniteError: too many of this network's were skipped in a row.
        """
        wrong = not_finite(metrics)
        self._count_skipped(network, wrong)
        return quotients(metrics) | {"skipped_updates": int(bool(wrong))}

    def _count_skipped(self, network: TrainedNetwork, wrong: list[str]) -> None:
        """Counts an update that was skipped for numbers of these names, or one that was not.

        Raises:
            NotFiniteError: it was one too many; on all ranks.
        """
        name = next(name for name, trained in self._trained().items() if trained is network)
        self.skipped_in_a_row[name] = count = self.skipped_in_a_row.get(name, 0) + 1 if wrong else 0
        limit = self._config.training.max_skipped_updates
        if limit and count >= limit:
            found = first_of_network(network.module)
            raise NotFiniteError(
                f"{name}: {count} updates in a row were skipped, for {', '.join(wrong)} was not finite"
                f"{f' (first of its tensors: {found})' if found else ''}"
            )

    def _starts(
        self, update: Update, batches: list[MicroBatch], starts: dict[int, list[torch.Tensor]]
    ) -> list[torch.Tensor] | list[None]:
        """What each micro-batch of an update begins with: the group's latents, made where they are not at hand."""
        if update.start is None:
            return [None] * len(batches)
        if update.start not in starts:
            starts.clear()
            starts[update.start] = [self._run(self._iteration.phase_start(update.shared, one)) for one in batches]
        return starts[update.start]

    def _run(self, program: Coroutine[Request, Reply, Result], share: float = 1.0) -> Result:
        return walk(program, self._roles, share, functools.partial(self._instruments.request, self._roles))

    def _micro_batches(self, counter: Counter) -> list[MicroBatch]:
        """This rank's share of the global batch: consecutive samples, cut into micro-batches."""
        return [self._micro_batch(counter, index) for index in range(self._count)]

    def _micro_batch(self, counter: Counter, index: int) -> MicroBatch:
        """One of them."""
        start = self._topology.data_rank * self._count * self._samples + index * self._samples
        samples = range(start, start + self._samples)
        chosen = counter.integers(Purpose.PROMPT, len(self._prompts), samples)
        text = self._prompts.batch(chosen).to(self._topology.device)
        negative = self._prompts.negative.to(text).expand_as(text)
        return MicroBatch(samples, text, negative)


def check_batch(config: Config, data_parallel_size: int) -> None:
    """Refuses a global batch that ranks and micro-batches do not divide.

    Raises:
        ValueError: names the flag and the nearest sizes that work.
    """
    size, micro = config.training.global_batch_size, config.training.micro_batch_size
    if not _divides(size, micro, data_parallel_size):
        reach = range(1, micro * data_parallel_size + 1)
        below = [size - i for i in reach if i < size and _divides(size - i, micro, data_parallel_size)]
        above = [size + i for i in reach if _divides(size + i, micro, data_parallel_size)]
        raise ValueError(
            f"--global-batch-size {size}: not divisible by --micro-batch-size {micro} times {data_parallel_size} "
            f"data-parallel ranks; use {' or '.join(map(str, (*below[:1], *above[:1])))}"
        )


def fitting_ranks(config: Config, available: int, nodes: int = 1) -> int:
    """The most ranks of a node, at most `available`, over which the layout and the global batch divide.

    Where no number fits it is `available`: the error that the ranks then meet says what to change.
    """
    parallel, training = config.parallel, config.training
    replica = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    replica *= parallel.pipeline_model_parallel_size
    for ranks in range(available, 0, -1):
        replicas, rest = divmod(ranks * nodes, replica)
        if not rest and _divides(training.global_batch_size, training.micro_batch_size, replicas):
            return ranks
    return available


def _divides(global_batch: int, micro_batch: int, replicas: int) -> bool:
    """Whether each replica gets as many samples, in whole micro-batches or in one that is smaller."""
    share, rest = divmod(global_batch, replicas)
    return not rest and share > 0 and share % min(micro_batch, share) == 0

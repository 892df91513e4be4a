"""Counts what one iteration communicates on this rank, by kind, and holds it against the formulas.

    torchrun --nproc-per-node 4 tools/count_communication.py --config examples/recipes/tiny_wan.yaml \\
        --tensor-model-parallel-size 2 --sequence-parallel [further flags of the trainer] [--json FILE]

Takes the trainer's flags and runs the first iteration of the first phase (or of --phase) on real ranks; nothing is
saved. The formulas are megatron_pdmd/planning/communication.py's; payload is the whole tensor that is gathered,
scattered or summed, or what is sent.
"""

import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megatron_pdmd.config import Config
from megatron_pdmd.distillation.step import Iteration
from megatron_pdmd.environment import check_rank_variables
from megatron_pdmd.errors import user_errors
from megatron_pdmd.files.whole import check_file_destination, write_json
from megatron_pdmd.models import WanModel
from megatron_pdmd.options import convert
from megatron_pdmd.parallel.communication import CommunicationCounter, Volume
from megatron_pdmd.parallel.topology import Topology, destroy_topology
from megatron_pdmd.planning.communication import ModelLayout, PassShape, backward_volume, forward_volume
from megatron_pdmd.preflight import Plan, prepare
from megatron_pdmd.pretrain import load_networks, load_prompts, start_topology
from megatron_pdmd.training.phase import PhaseTrainer, check_batch


class PassFormulas:
    """Adds up the formulas of the passes that networks run."""

    def __init__(self, config: Config, topology: Topology, text: int):
        self.volume = Volume()
        self._text = text
        self._recompute = config.model.recompute_granularity != "none"
        self._topology = topology

    def watch(self, model: WanModel) -> None:
        """Notes every pass of a network from now on."""
        model.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, model: WanModel, arguments: tuple, keywords: dict[str, Any], flow: torch.Tensor) -> None:
        topology = self._topology
        layout = ModelLayout(topology.tensor, topology.context, topology.sequence_parallel, model.context.method)
        tokens = math.prod(flow.shape[2:]) // math.prod(model.config.patch_size)
        shape = PassShape(len(flow), tokens, self._text, model.dtype.itemsize)
        self.volume += forward_volume(model.config, layout, shape)
        if torch.is_grad_enabled():
            adapter = keywords.get("adapter") is not None
            self.volume += backward_volume(model.config, layout, shape, adapter=adapter, recompute=self._recompute)


def update_formula(config: Config, topology: Topology, model: torch.nn.Module, losses: int) -> Volume:
    """What one optimizer update communicates beside its passes: gradients, weights, the norm, the losses."""
    volume, trained = Volume(), [p for p in model.parameters() if p.requires_grad]
    gradients = 4 * sum(p.numel() for p in trained)
    if topology.data * topology.context > 1 and config.parallel.use_distributed_optimizer:
        volume.add("reduce-scatter", gradients)
        volume.add("all-gather", sum(p.numel() * p.element_size() for p in trained))
    elif topology.data * topology.context > 1:
        volume.add("all-reduce", gradients)
    if topology.tensor > 1:
        volume.add("all-reduce", 4 * sum(p.numel() for p in trained if getattr(p, "sequence_parallel", False)))
    if topology.tensor > 1 or (config.parallel.use_distributed_optimizer and topology.world_size > 1):
        volume.add("all-reduce", 4)
    volume.add("all-reduce", 4 * losses * (topology.data > 1))
    return volume


def count(plan: Plan, topology: Topology) -> tuple[Volume, Volume]:
    """One iteration, counted and by formula."""
    config, phase = plan.config, plan.phases.phases[max(plan.config.method.phase, 1) - 1]
    networks, prompts = load_networks(plan, topology), load_prompts(plan, topology, plan.config.data.prompts)
    for earlier in plan.phases.phases[: phase.index - 1]:
        networks.add_expert(earlier.index, earlier.expert)
    iteration = Iteration(config.method, plan.phases, phase, plan.schedule, plan.latent_shape, topology.device)
    networks.start_phase(phase.index, phase.expert, iteration.experts())
    trainer = PhaseTrainer(config, iteration, networks, prompts, topology)
    formulas = PassFormulas(config, topology, config.data.prompt_length)
    generator = networks.trained_network(phase.index)
    fakes = list(networks.fake_score.values())
    for model in dict.fromkeys((*networks.teacher.values(), generator, *fakes)):
        formulas.watch(model)
    with CommunicationCounter() as counter:
        trainer.run_iteration(0)
    updates = config.method.fake_updates + config.method.fake_warmup
    expected = formulas.volume + update_formula(config, topology, fakes[0], 1) * updates
    return counter.volume, expected + update_formula(config, topology, generator, 2)


def table_of(counted: Volume, expected: Volume) -> Table:
    """A row for each kind."""
    table = Table("kind", "calls", "by formula", "MB", "by formula")
    for kind in sorted(expected.bytes | counted.bytes):
        calls = [str(volume.calls[kind]) for volume in (counted, expected)]
        table.add_row(kind, *calls, *(f"{volume.bytes[kind] / 1e6:.3f}" for volume in (counted, expected)))
    return table


def split_json(arguments: list[str]) -> tuple[list[str], Path | None]:
    """The trainer's flags and the last `--json`, which means something else there.

    Raises:
        ValueError: it names no file that can be written.
    """
    flags, path, rest = [], None, iter(arguments)
    for argument in rest:
        name, equals, text = argument.partition("=")
        if name != "--json":
            flags.append(argument)
            continue
        path = convert(text if equals else next(rest, ""), Path, "--json")
        check_file_destination(path, "--json")
    return flags, path


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with user_errors():
        check_rank_variables()
        flags, json = split_json(arguments)
        plan = prepare(flags)
        topology = start_topology(plan.config.parallel)
        check_batch(plan.config, topology.data)
        counted, expected = count(plan, topology)
        if topology.rank == 0:
            Console().print(table_of(counted, expected))
            if json:
                write_json(json, {"counted": asdict(counted), "formula": asdict(expected)})
    destroy_topology()
    return 0


if __name__ == "__main__":
    sys.exit(main())

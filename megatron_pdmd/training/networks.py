"""A run's networks: the frozen teacher, the generator's expert of each phase, the fake score of the present one."""

import copy
from collections.abc import Iterable, Mapping

import torch

from megatron_pdmd.config import MethodConfig
from megatron_pdmd.distillation.roles import Generator, Roles
from megatron_pdmd.models import lora
from megatron_pdmd.models.wan.model import WanModel
from megatron_pdmd.training.checkpoints.sharded_state import Shard, parameter_shard, with_prefix


class Networks:
    """Owns every network of a run and says which of them a phase needs.

    With `--generator lora` a phase's expert is an adapter on the teacher's own network and its moving average is a
    second adapter beside it; with `full` both are networks of their own.

    Attributes:
        teacher: frozen network of each expert.
        fake_score: trained network of each expert in the present phase's range.
    """

    def __init__(self, teacher: Mapping[str, WanModel], method: MethodConfig, seed: int):
        self.teacher = dict(teacher)
        self.fake_score: dict[str, WanModel] = {}
        self._method = method
        self._seed = seed
        self._experts: dict[int, Generator] = {}
        self._origins: dict[int, str] = {}
        self._averages: dict[int, Generator] = {}
        for model in self.teacher.values():
            model.requires_grad_(False)

    def start_phase(self, phase: int, expert: str, fake_experts: Iterable[str]) -> None:
        """Makes the phase's generator expert and initialises the fake score from the teacher.

        Args:
            phase: 1-based index.
            expert: the teacher's expert that the generator's expert starts from.
            fake_experts: the teacher's experts that the phase's noise interval meets.
        """
        self.add_expert(phase, expert)
        if self._method.fake_experts == "single":
            shared = self._copy_of(expert)
            self.fake_score = dict.fromkeys(fake_experts, shared)
        else:
            self.fake_score = {name: self._copy_of(name) for name in fake_experts}
        for model in self.fake_score.values():
            model.requires_grad_(True)

    def add_expert(self, phase: int, expert: str) -> None:
        """Makes a phase's expert, equal to the teacher's, and its moving average where one is kept."""
        self._experts[phase], self._origins[phase] = self._new_expert(f"phase_{phase}", expert), expert
        if self._method.ema_decay:
            self._averages[phase] = self._new_expert(f"phase_{phase}_average", expert)
            self._copy_expert(self._experts[phase], self._averages[phase])

    def finish_phase(self, phase: int) -> None:
        """Frees the fake score and freezes the phase's expert."""
        self.fake_score = {}
        for parameter in self._parameters(self._experts[phase]):
            parameter.requires_grad_(False)

    def start_training(self, phase: int) -> None:
        """Makes the phase's expert, and nothing else of its network, trainable."""
        for parameter in self._parameters(self._experts[phase]):
            parameter.requires_grad_(True)

    def trained_network(self, phase: int) -> WanModel:
        """The network that holds the phase's trained parameters."""
        return self._experts[phase].model

    @torch.no_grad()
    def update_average(self, phase: int) -> None:
        """One step of the generator's moving average."""
        if phase in self._averages:
            mean, value = self._parameters(self._averages[phase]), self._parameters(self._experts[phase])
            torch._foreach_lerp_(mean, value, 1 - self._method.ema_decay)

    def movement(self, phase: int) -> torch.Tensor:
        """How far the phase's trained expert is from the teacher's it started from: |W - W0| / |W0|, a scalar."""
        expert = self._experts[phase]
        if expert.adapter is None:
            return lora.weight_movement(expert.model, self.teacher[self._origins[phase]])
        return lora.adapter_movement(expert.model, expert.adapter)

    def roles(self, phase: int) -> Roles:
        """Who answers a pass while `phase` trains: earlier phases answer with what they deliver."""
        generator = {k: self.delivered(k) if k < phase else self._experts[k] for k in self._experts if k <= phase}
        return Roles(self.teacher, self.fake_score, generator)

    def delivered(self, phase: int) -> Generator:
        """What a phase hands on: the moving average where one is kept, else the trained expert."""
        return self._averages.get(phase, self._experts[phase])

    def expert_state(self, phase: int) -> dict[str, Shard]:
        """The phase's expert and its moving average, for a checkpoint to write, or to read into."""
        state = with_prefix("expert", self._state(self._experts[phase]))
        if phase in self._averages:
            state |= with_prefix("average", self._state(self._averages[phase]))
        return state

    def _new_expert(self, name: str, expert: str) -> Generator:
        if self._method.generator == "full":
            return Generator(self._copy_of(expert), None)
        model = self.teacher[expert]
        lora.add_adapter(model, name, rank=self._method.lora_rank, alpha=self._method.lora_alpha, seed=self._seed)
        for parameter in lora.adapter_parameters(model, name):
            parameter.requires_grad_(False)
        return Generator(model, name)

    def _copy_of(self, expert: str) -> WanModel:
        """The teacher's network without any adapter, in memory of its own."""
        model = copy.deepcopy(self.teacher[expert])
        for name in list(model.adapters):
            lora.remove_adapter(model, name)
        return model.requires_grad_(False)

    @staticmethod
    def _parameters(generator: Generator) -> list[torch.nn.Parameter]:
        if generator.adapter is None:
            return list(generator.model.parameters())
        return lora.adapter_parameters(generator.model, generator.adapter)

    @staticmethod
    def _state(generator: Generator) -> dict[str, Shard]:
        if generator.adapter is None:
            return network_state(generator.model)
        named = lora.named_adapter_parameters(generator.model, generator.adapter)
        return {name: parameter_shard(name, parameter) for name, parameter in named}

    @torch.no_grad()
    def _copy_expert(self, source: Generator, target: Generator) -> None:
        torch._foreach_copy_(self._parameters(target), self._parameters(source))


def network_state(model: WanModel) -> dict[str, Shard]:
    """The network's own weights by name, without adapters, for a checkpoint to write, or to read into."""
    return {name: parameter_shard(name, parameter) for name, parameter in lora.base_parameters(model)}

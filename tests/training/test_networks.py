"""Who shares weights with whom, who trains, and what a checkpoint of them restores."""

import copy
from dataclasses import replace

import pytest
import torch

from megatron_pdmd.config import MethodConfig
from megatron_pdmd.models import adapter_parameters, base_parameters
from megatron_pdmd.training.networks import Networks, network_state

METHOD = MethodConfig(lora_rank=4, lora_alpha=4.0, ema_decay=0.9)
EXPERTS = ("high_noise", "low_noise")


def make(teachers, phase: int = 1, **method) -> Networks:
    networks = Networks(copy.deepcopy(teachers), replace(METHOD, **method), seed=5)
    for index in range(1, phase + 1):
        networks.start_phase(index, EXPERTS[index - 1], EXPERTS[:index])
        networks.start_training(index)
        if index < phase:
            networks.finish_phase(index)
    return networks


def flow(model, adapter=None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 1, 2, 4, 4, generator=generator), torch.randn(2, 8, 16, generator=generator)
    with torch.no_grad():
        return model(x, torch.tensor([0.3, 0.9]), text, adapter=adapter)


def trained(networks: Networks, phase: int) -> list[torch.nn.Parameter]:
    return [p for p in networks.trained_network(phase).parameters() if p.requires_grad]


def tensors(state) -> dict[str, torch.Tensor]:
    """A state's live tensors; on one rank each is whole."""
    return {name: shard.boxes[0].tensor for name, shard in state.items()}


def disturb(parameters, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def storages(model) -> set[int]:
    return {parameter.data_ptr() for parameter in model.parameters()}


@pytest.mark.parametrize("phase", [1, 2])
def test_a_lora_expert_is_the_teachers_network_and_starts_as_the_teacher(teachers, phase):
    networks = make(teachers, phase)
    name = EXPERTS[phase - 1]
    expert = networks.roles(phase).generator[phase]
    assert expert.model is networks.teacher[name] is networks.trained_network(phase)
    base = {key: p.data_ptr() for key, p in base_parameters(expert.model)}
    assert base.keys() == dict(teachers[name].named_parameters()).keys()
    assert torch.equal(flow(expert.model, expert.adapter), flow(teachers[name]))
    assert torch.equal(flow(expert.model), flow(teachers[name]))


def test_only_the_phases_own_adapter_trains(teachers):
    networks = make(teachers, 2)
    assert not any(p.requires_grad for p in networks.teacher["high_noise"].parameters())
    adapter = networks.roles(2).generator[2].adapter
    own = adapter_parameters(networks.teacher["low_noise"], adapter)
    assert {id(p) for p in own} == {id(p) for p in trained(networks, 2)}
    networks.finish_phase(2)
    assert trained(networks, 2) == [] and networks.fake_score == {}


def test_the_fake_score_is_a_copy_of_the_teacher_without_adapters(teachers):
    networks = make(teachers, 2)
    disturb(trained(networks, 2))
    assert networks.fake_score.keys() == {"high_noise", "low_noise"}
    for name, model in networks.fake_score.items():
        state, expected = dict(model.named_parameters()), dict(teachers[name].named_parameters())
        assert state.keys() == expected.keys() and model.adapters == {}
        assert all(torch.equal(state[key], expected[key]) for key in state)
        assert not storages(model) & storages(networks.teacher[name])
        assert all(p.requires_grad for p in model.parameters())
        assert torch.equal(flow(model), flow(teachers[name]))


def test_every_phase_starts_with_a_fresh_fake_score(teachers):
    networks = make(teachers, 1)
    disturb(networks.fake_score["high_noise"].parameters())
    networks.finish_phase(1)
    networks.start_phase(2, "low_noise", EXPERTS)
    assert torch.equal(flow(networks.fake_score["high_noise"]), flow(teachers["high_noise"]))


def test_a_single_fake_score_starts_from_the_phases_expert_and_answers_for_both(teachers):
    networks = make(teachers, 2, fake_experts="single")
    assert networks.fake_score["high_noise"] is networks.fake_score["low_noise"]
    assert torch.equal(flow(networks.fake_score["high_noise"]), flow(teachers["low_noise"]))


def test_a_full_generator_is_a_network_of_its_own(teachers):
    networks = make(teachers, 1, generator="full", ema_decay=0.0)
    expert = networks.roles(1).generator[1]
    assert expert.adapter is None
    assert not storages(expert.model) & (
        storages(networks.teacher["high_noise"]) | storages(networks.fake_score["high_noise"])
    )
    assert torch.equal(flow(expert.model), flow(teachers["high_noise"]))
    assert len(trained(networks, 1)) == len(list(expert.model.parameters()))
    disturb(expert.model.parameters())
    assert torch.equal(flow(networks.teacher["high_noise"]), flow(teachers["high_noise"]))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_moving_average_follows_its_recurrence(teachers, kind):
    decay = 0.9
    networks = make(teachers, 1, generator=kind, ema_decay=decay)
    state = tensors(networks.expert_state(1))
    names = [name.removeprefix("expert.") for name in state if name.startswith("expert.")]
    assert all(torch.equal(state[f"expert.{name}"], state[f"average.{name}"]) for name in names)
    expected = {name: state[f"average.{name}"].double().clone() for name in names}
    for step in range(4):
        disturb(trained(networks, 1), seed=step)
        networks.update_average(1)
        live = tensors(networks.expert_state(1))
        expected = {n: decay * mean + (1 - decay) * live[f"expert.{n}"].double() for n, mean in expected.items()}
    for name, mean in expected.items():
        torch.testing.assert_close(live[f"average.{name}"], mean.float())
        assert not torch.equal(live[f"average.{name}"], live[f"expert.{name}"])


def test_without_a_decay_there_is_no_average(teachers):
    networks = make(teachers, 1, ema_decay=0.0)
    networks.update_average(1)
    assert all(name.startswith("expert.") for name in networks.expert_state(1))
    assert networks.delivered(1) == networks.roles(1).generator[1]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_earlier_phases_answer_with_their_average_and_the_present_one_with_itself(teachers, kind):
    networks = make(teachers, 2, generator=kind)
    roles = networks.roles(2)
    assert roles.generator.keys() == {1, 2}
    assert roles.generator[1] == networks.delivered(1) != networks.roles(1).generator[1]
    assert networks.roles(3).generator == {1: networks.delivered(1), 2: networks.delivered(2)}


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_checkpoint_restores_expert_and_average(teachers, kind, decay):
    first, second = (make(teachers, 1, generator=kind, ema_decay=decay) for _ in range(2))
    disturb(trained(first, 1))
    first.update_average(1)
    saved = {name: tensor.clone() for name, tensor in tensors(first.expert_state(1)).items()}
    assert second.expert_state(1).keys() == saved.keys()
    with torch.no_grad():
        for name, tensor in tensors(second.expert_state(1)).items():
            tensor.copy_(saved[name])
    for ours, theirs in (
        (first.delivered(1), second.delivered(1)),
        (first.roles(1).generator[1], second.roles(1).generator[1]),
    ):
        assert torch.equal(flow(ours.model, ours.adapter), flow(theirs.model, theirs.adapter))
    assert not torch.equal(flow(theirs.model, theirs.adapter), flow(teachers["high_noise"]))
    disturb(trained(second, 1), seed=1)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in tensors(first.expert_state(1)).items())


def test_the_fake_score_is_restored_from_its_state(teachers):
    source, target = make(teachers).fake_score["high_noise"], make(teachers).fake_score["high_noise"]
    disturb(source.parameters())
    for name, tensor in tensors(network_state(target)).items():
        tensor.copy_(tensors(network_state(source))[name])
    assert torch.equal(flow(source), flow(target))
    assert not storages(source) & storages(target)

"""Adapters against peft's, and their life in a model."""

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig

from megatron_pdmd.models import (
    WanConfig,
    WanModel,
    adapter_parameters,
    adapter_state_dict,
    add_adapter,
    base_parameters,
    load_adapter_state_dict,
    merged_state_dict,
    remove_adapter,
    to_hf_state_dict,
)
from megatron_pdmd.models.lora import DEFAULT_TARGETS, adapter_movement, weight_movement

CONFIG = WanConfig(
    num_attention_heads=2, attention_head_dim=12, in_channels=3, out_channels=3, text_dim=6, freq_dim=8, ffn_dim=20,
    num_layers=2, rope_max_seq_len=16,
)  # fmt: skip
RANK, ALPHA = 3, 8.0


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 3, 3, 4, 6), torch.rand(2), torch.randn(2, 5, 6)


def model_with_adapter(name: str = "phase_1") -> WanModel:
    torch.manual_seed(0)
    model = WanModel(CONFIG)
    add_adapter(model, name, rank=RANK, alpha=ALPHA, seed=3)
    for parameter in adapter_parameters(model, name)[1::2]:
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def peft_twin(model: WanModel) -> WanTransformer3DModel:
    twin = WanTransformer3DModel(**{name: value for name, value in CONFIG.to_hf().items() if not name.startswith("_")})
    twin.load_state_dict(to_hf_state_dict(model))
    twin.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(DEFAULT_TARGETS)))
    state = {
        key.replace(".weight", ".default.weight"): value for key, value in adapter_state_dict(model, "phase_1").items()
    }
    assert set(state) == {name for name, _ in twin.named_parameters() if ".lora_" in name}
    twin.load_state_dict(state, strict=False)
    return twin


def test_output_and_gradients_equal_peft(fp64_mode, assert_as_exact):
    model = model_with_adapter()
    plain = peft_twin(model)
    with fp64_mode:
        exact = peft_twin(model).double()
    x_t, t, text = inputs()
    ours = model(x_t, t, text, adapter="phase_1")
    theirs = plain(x_t, t * 1000, text, return_dict=False)[0]
    with fp64_mode:
        reference = exact(x_t.double(), (t * 1000).double(), text.double(), return_dict=False)[0]
    assert_as_exact("output", ours, theirs, reference)
    for output in (ours, theirs, reference):
        output.square().sum().backward()
    own_names = [name for name, _ in model.named_parameters() if ".lora_" in name]
    assert len(own_names) == 2 * 10 * CONFIG.num_layers
    for name in own_names:
        linear, letter = name.removesuffix(".phase_1").rsplit(".", 1)
        grads = (m.get_parameter(f"{linear}.{letter}.default.weight").grad for m in (plain, exact))
        assert_as_exact(name, model.get_parameter(name).grad, *grads)


def test_a_new_adapter_changes_nothing():
    torch.manual_seed(0)
    model = WanModel(CONFIG)
    before = model(*inputs())
    add_adapter(model, "phase_1", rank=RANK, alpha=ALPHA)
    assert torch.equal(model(*inputs(), adapter="phase_1"), before)


def test_the_call_names_the_adapter():
    model = model_with_adapter()
    add_adapter(model, "phase_2", rank=1, alpha=1.0)
    base, first, second = (model(*inputs(), adapter=name) for name in (None, "phase_1", "phase_2"))
    assert torch.equal(base, second) and not torch.allclose(base, first)
    remove_adapter(model, "phase_1")
    assert torch.equal(model(*inputs()), base)
    assert not any("phase_1" in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match=r"adapter 'phase_1': the model has \['phase_2'\]"):
        model(*inputs(), adapter="phase_1")


def test_merged_weights_are_base_plus_scaled_product():
    model = model_with_adapter()
    merged = WanModel(CONFIG)
    merged.load_state_dict(merged_state_dict(model, "phase_1"), strict=False)
    exact = copy.deepcopy(merged).double()
    for name, parameter in exact.named_parameters():
        linear = name.removesuffix(".weight")
        state = adapter_state_dict(model, "phase_1")
        if f"{linear}.lora_A.weight" in state:
            a, b = (state[f"{linear}.lora_{letter}.weight"].double() for letter in "AB")
            parameter.data = model.get_parameter(name).detach().double() + ALPHA / RANK * b @ a
    delta = {name: (p - model.get_parameter(name)).norm() for name, p in merged.named_parameters()}
    assert all((value > 0) == name.endswith(tuple(f"{target}.weight" for target in DEFAULT_TARGETS))
               for name, value in delta.items())  # fmt: skip
    for name, parameter in merged.named_parameters():
        reference = exact.get_parameter(name).detach()
        assert (parameter - reference).norm() <= torch.finfo(torch.float32).eps * reference.norm(), name


def test_merging_into_bf16_adds_in_fp32():
    torch.manual_seed(0)
    model = WanModel(CONFIG, dtype=torch.bfloat16)
    add_adapter(model, "phase_1", rank=RANK, alpha=ALPHA)
    linear = model.blocks["0"].ffn.net[2]
    torch.nn.init.normal_(linear.lora_B["phase_1"], std=1e-3)
    assert linear.lora_A["phase_1"].dtype == torch.float32
    exact = linear.weight.float() + ALPHA / RANK * linear.lora_B["phase_1"] @ linear.lora_A["phase_1"]
    assert torch.equal(merged_state_dict(model, "phase_1")["blocks.0.ffn.net.2.weight"], exact.bfloat16())


def test_adapters_are_drawn_from_their_seed_alone():
    first, second, other = WanModel(CONFIG), WanModel(CONFIG), WanModel(CONFIG)
    add_adapter(second, "earlier", rank=2, alpha=2)
    for model, seed in ((first, 5), (second, 5), (other, 6)):
        add_adapter(model, "phase_1", rank=RANK, alpha=ALPHA, seed=seed)
    states = [adapter_state_dict(model, "phase_1") for model in (first, second, other)]
    a_keys = [key for key in states[0] if "lora_A" in key]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not any(torch.equal(states[0][key], states[2][key]) for key in a_keys)
    assert not torch.equal(states[0][a_keys[0]], states[0][a_keys[1]])
    for key in a_keys:
        bound = states[0][key].shape[1] ** -0.5
        assert 0.5 * bound < states[0][key].abs().max() <= bound


def test_a_state_goes_into_another_model():
    source, target = model_with_adapter(), model_with_adapter()
    target.load_state_dict(to_hf_state_dict(source), strict=False)
    remove_adapter(target, "phase_1")
    add_adapter(target, "student", rank=RANK, alpha=ALPHA)
    load_adapter_state_dict(target, "student", adapter_state_dict(source, "phase_1"))
    assert torch.equal(target(*inputs(), adapter="student"), source(*inputs(), adapter="phase_1"))


def test_base_parameters_are_diffusers():
    twin = WanTransformer3DModel(**{name: value for name, value in CONFIG.to_hf().items() if not name.startswith("_")})
    assert {name for name, _ in base_parameters(model_with_adapter())} == set(twin.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "phase_1"}, "exists already"),
        ({"name": "phase.2"}, "letters, digits and underscores"),
        ({"rank": 0}, "--lora-rank 0"),
        ({"alpha": 0.0}, "--lora-alpha 0.0"),
        ({"targets": ("to_q", "to_x")}, "ends with 'to_x'"),
    ],
)
def test_adapters_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        add_adapter(model_with_adapter(), **{"name": "phase_2", "rank": 2, "alpha": 2.0} | options)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_states_that_do_not_fit_are_refused(change):
    model = model_with_adapter()
    state = adapter_state_dict(model, "phase_1")
    key = next(iter(state))
    if change == "missing":
        del state[key]
    elif change == "unknown":
        state["blocks.0.attn9.to_q.lora_A.weight"] = state[key]
    else:
        state[key] = torch.zeros(RANK + 1, state[key].shape[1])
    with pytest.raises(
        ValueError, match={"missing": "misses", "unknown": "unknown", "shape": "check the rank"}[change]
    ):
        load_adapter_state_dict(model, "phase_1", state)


def test_movement_is_the_relative_norm_of_what_changed():
    model = model_with_adapter()
    before, after = to_hf_state_dict(model), merged_state_dict(model, "phase_1")
    adapted = [name for name in before if name.removesuffix(".weight").endswith(DEFAULT_TARGETS)]
    change = torch.cat([(after[name].double() - before[name].double()).flatten() for name in adapted]).norm()
    whole = torch.cat([before[name].double().flatten() for name in adapted]).norm()
    torch.testing.assert_close(adapter_movement(model, "phase_1").double(), change / whole, rtol=1e-6, atol=0)
    moved = copy.deepcopy(model)
    assert weight_movement(moved, model) == 0
    with torch.no_grad():
        for _, parameter in base_parameters(moved):
            parameter.mul_(1.25)
    assert weight_movement(moved, model).item() == pytest.approx(0.25)

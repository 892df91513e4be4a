"""A model cut into pipeline stages against the whole one: flows, gradients, and what the stages hold."""

import copy

import pytest
import torch

from megatron_pdmd.models import Conditions, Hidden, WanConfig, WanModel, add_adapter
from megatron_pdmd.models.layers.tensor_parallel import compute_dtype
from megatron_pdmd.parallel.pipeline.stages import Stage, layer_split

CONFIG = WanConfig(num_attention_heads=2, attention_head_dim=12, in_channels=3, out_channels=3, text_dim=10,
                   freq_dim=14, ffn_dim=20, num_layers=5, rope_max_seq_len=32)  # fmt: skip
SIZES = (3, 4, 6)
SPLITS = [(2, 3), (4, 1), (1, 1, 2, 1)]


def whole_model(dtype: torch.dtype, recompute: str | None = None) -> WanModel:
    torch.manual_seed(0)
    model = WanModel(CONFIG, dtype=dtype, recompute_granularity=recompute)
    add_adapter(model, "phase_1", rank=2, alpha=4)
    for block in model.blocks.values():
        torch.nn.init.normal_(block.attn1.to_q.lora_B["phase_1"])
        torch.nn.init.normal_(block.ffn.net[2].lora_B["phase_1"])
    return model


def cut(whole: WanModel, split: tuple[int, ...]) -> list[WanModel]:
    """The stages of a model, with its weights."""
    stages = []
    for index in range(len(split)):
        recompute = whole.recompute_granularity
        part = WanModel(CONFIG, dtype=whole.dtype, recompute_granularity=recompute, stage=Stage.of(index, split))
        add_adapter(part, "phase_1", rank=2, alpha=4)
        weights = whole.state_dict()
        part.load_state_dict({name: weights[name] for name in part.state_dict()})
        for name, parameter in part.named_parameters():
            parameter.requires_grad_(whole.get_parameter(name).requires_grad)
        stages.append(part)
    return stages


def batch(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, Conditions]:
    torch.manual_seed(1)
    text = torch.randn(2, 7, CONFIG.text_dim).to(dtype)
    return torch.randn(2, 3, *SIZES).requires_grad_(), torch.rand(2), Conditions(text)


def run_chain(stages: list[WanModel], given: tuple, adapter: str | None, direction: torch.Tensor) -> torch.Tensor:
    """The flow; backward hands the gradient of what a stage was given to the one before, as messages would."""
    inputs, outputs, flow = [], [], None
    for stage in stages:
        made = stage.run_stage(given, SIZES, adapter)
        if isinstance(made, Hidden):
            outputs.append(made)
            given = Hidden(*(tensor.detach().requires_grad_(tensor.requires_grad) for tensor in made))
            inputs.append(given)
        else:
            flow = made
    flow.backward(direction.to(flow.dtype))
    for made, received in zip(reversed(outputs), reversed(inputs), strict=True):
        pairs = [(own, other.grad) for own, other in zip(made, received, strict=True) if other.grad is not None]
        torch.autograd.backward(*zip(*pairs, strict=True))
    return flow.detach()


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("adapter", [None, "phase_1"])
@pytest.mark.parametrize(("dtype", "recompute"), [(torch.float32, None), (torch.bfloat16, "full")], ids=str)
def test_stages_make_the_flow_and_the_gradients_of_the_whole_to_the_bit(split, adapter, dtype, recompute):
    whole = whole_model(dtype, recompute)
    if adapter:
        for name, parameter in whole.named_parameters():
            parameter.requires_grad_(".lora_" in name)
    stages = cut(whole, split)
    direction = torch.randn(2, 3, *SIZES)
    x_t, t, conditions = batch(dtype)
    expected = whole.run_stage((x_t, t, conditions), SIZES, adapter)
    expected.backward(direction.to(dtype))
    own, *_ = batch(dtype)
    assert torch.equal(run_chain(stages, (own, t, conditions), adapter, direction), expected)
    assert torch.equal(own.grad, x_t.grad)
    found = {name: parameter.grad for stage in stages for name, parameter in stage.named_parameters()}
    wanted = {name: parameter.grad for name, parameter in whole.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (gradient is None) == (found[name] is None), name
        assert gradient is None or torch.equal(found[name], gradient), name
    assert sum(gradient is not None for gradient in wanted.values()) > 20


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_tensor_stands_on_one_stage_under_the_name_that_it_has_in_the_whole(split):
    whole, stages = whole_model(torch.float32), [WanModel(CONFIG, stage=Stage.of(i, split)) for i in range(len(split))]
    names = [name for stage in stages for name, _ in stage.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in whole.named_parameters() if ".lora_" not in name)
    for layer in range(CONFIG.num_layers):
        held = [index for index, stage in enumerate(stages) if str(layer) in stage.blocks]
        assert len(held) == 1 and layer in Stage.of(held[0], split).layers
    assert stages[0].get_parameter("condition_embedder.time_proj.weight") is not None
    assert stages[-1].get_parameter("scale_shift_table") is not None


@pytest.mark.parametrize("per_token", [False, True])
def test_what_a_stage_receives_has_the_shapes_and_dtypes_of_what_is_sent(per_token):
    first, second = cut(whole_model(torch.bfloat16), (2, 3))
    x_t, t, conditions = batch(torch.bfloat16)
    t = t[:, None].expand(-1, 18) if per_token else t
    made = first.run_stage((x_t, t, conditions), SIZES, None)
    empty = second.empty_hidden(2, SIZES, 7, "cpu", None if per_token else 1)
    for name, sent, received in zip(Hidden._fields, made, empty, strict=True):
        assert (sent.shape, sent.dtype) == (received.shape, received.dtype), name
    assert compute_dtype(torch.bfloat16) not in {tensor.dtype for tensor in made}


def test_a_copy_of_a_stage_is_a_stage_with_weights_of_its_own():
    stage = cut(whole_model(torch.float32), layer_split(5, 2))[1]
    twin = copy.deepcopy(stage)
    assert twin.stage == stage.stage and list(twin.blocks) == list(stage.blocks)
    for (name, parameter), other in zip(stage.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, other) and parameter.data_ptr() != other.data_ptr(), name
    hidden = Hidden(*(torch.randn_like(tensor) for tensor in stage.empty_hidden(2, SIZES, 7, "cpu")))
    flows = [model.run_stage(hidden, SIZES, "phase_1") for model in (stage, twin)]
    assert torch.equal(*flows)


def test_adapters_start_alike_on_every_cut():
    def start(stage: Stage | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0 if stage is None else 1 + stage.index)
        model = WanModel(CONFIG, stage=stage)
        add_adapter(model, "phase_1", rank=3, alpha=6, seed=5)
        return {name: p.detach() for name, p in model.named_parameters() if ".lora_A." in name}

    whole = start(None)
    for split in SPLITS:
        parts = [start(Stage.of(index, split)) for index in range(len(split))]
        assert sum(map(len, parts)) == len(whole) > 0
        for name, tensor in whole.items():
            (own,) = [part[name] for part in parts if name in part]
            assert torch.equal(own, tensor), name

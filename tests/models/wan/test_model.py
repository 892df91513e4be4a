"""The Wan model against diffusers' WanTransformer3DModel: outputs and every gradient."""

import copy
from dataclasses import dataclass

import pytest
import torch
from diffusers import WanTransformer3DModel

from megatron_pdmd.models import Conditions, WanConfig, WanModel, add_adapter, base_parameters, from_hf
from megatron_pdmd.models.layers.tensor_parallel import partition_dim


@dataclass(frozen=True)
class Case:
    """A model and a batch with sizes that are no powers of two."""

    config: WanConfig
    latents: tuple[int, ...]  # [B, out_channels, F, H, W]
    text_tokens: int
    time_per_token: bool = False
    mask_channels: int = 0


CASES = {
    "odd-frames": Case(
        WanConfig(num_attention_heads=3, attention_head_dim=22, in_channels=3, out_channels=3, text_dim=10,
                  freq_dim=14, ffn_dim=50, num_layers=2, rope_max_seq_len=32),
        (2, 3, 3, 6, 10), 7,
    ),
    "image-to-video": Case(
        WanConfig(num_attention_heads=2, attention_head_dim=12, in_channels=10, out_channels=4, text_dim=6,
                  freq_dim=8, ffn_dim=20, num_layers=1, rope_max_seq_len=32),
        (1, 4, 1, 14, 2), 512, mask_channels=2,
    ),
    "time-per-token": Case(
        WanConfig(patch_size=(1, 4, 4), num_attention_heads=2, attention_head_dim=16, in_channels=2, out_channels=2,
                  text_dim=9, freq_dim=16, ffn_dim=36, num_layers=2, cross_attn_norm=False, rope_max_seq_len=16),
        (3, 2, 5, 4, 12), 1, time_per_token=True,
    ),
}  # fmt: skip


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request) -> Case:
    return request.param


def diffusers_model(config: WanConfig, seed: int = 0) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    arguments = {name: value for name, value in config.to_hf().items() if not name.startswith("_")}
    model = WanTransformer3DModel(**arguments)
    with torch.no_grad():  # norms' weights are ones by default, which would hide mistakes
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def batch(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, Conditions]:
    torch.manual_seed(1)
    samples, channels, *sizes = case.latents
    x_t = torch.randn(case.latents).to(dtype)
    tokens = x_t[0, 0].numel() // (case.config.patch_size[1] * case.config.patch_size[2])
    t = torch.rand(samples, tokens) if case.time_per_token else torch.rand(samples)
    text = torch.randn(samples, case.text_tokens, case.config.text_dim).to(dtype)
    if not case.mask_channels:
        return x_t, t, Conditions(text)
    given = case.config.in_channels - channels - case.mask_channels
    mask = torch.randint(2, (samples, case.mask_channels, *sizes)).to(dtype)
    return x_t, t, Conditions(text, torch.randn(samples, given, *sizes).to(dtype), mask)


def call_diffusers(model: WanTransformer3DModel, x_t, t, conditions: Conditions, dtype: torch.dtype) -> torch.Tensor:
    parts = [part for part in (x_t, conditions.mask, conditions.image_latents) if part is not None]
    joined = torch.cat(parts, dim=1).to(dtype)
    return model(joined, (t * 1000).to(dtype) if dtype is torch.float64 else t * 1000,
                 conditions.text.to(dtype), return_dict=False)[0]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_output_and_gradients_equal_diffusers(case, dtype, tmp_path, fp64_mode, assert_as_exact):
    diffusers_model(case.config).save_pretrained(tmp_path)
    ours = from_hf(tmp_path, subfolder=None, dtype=dtype)
    plain = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    with fp64_mode:
        exact = diffusers_model(case.config).double()
    exact.load_state_dict(plain.state_dict())
    for name, parameter in plain.named_parameters():
        assert ours.get_parameter(name).dtype == parameter.dtype, name

    x_t, t, conditions = batch(case, dtype)
    our_output = ours(x_t, t, conditions)
    plain_output = call_diffusers(plain, x_t, t, conditions, dtype)
    with fp64_mode:
        exact_output = call_diffusers(exact, x_t, t, conditions, torch.float64)
    assert our_output.dtype == dtype and our_output.shape == x_t.shape
    assert_as_exact("output", our_output, plain_output, exact_output)

    direction = torch.randn_like(exact_output).to(dtype)
    our_output.backward(direction)
    plain_output.backward(direction)
    exact_output.backward(direction.double())
    assert {name for name, _ in ours.named_parameters()} == {name for name, _ in exact.named_parameters()}
    total = torch.stack([parameter.grad.norm() for parameter in exact.parameters()]).norm()
    for name, parameter in exact.named_parameters():
        grads = [model.get_parameter(name).grad for model in (ours, plain)]
        if parameter.grad.norm() < total * torch.finfo(torch.float64).eps ** 0.5:
            # The softmax over a single text token is constant, so query and key have no gradient but rounding.
            assert case.text_tokens == 1 and ".attn2." in name
            assert grads[0].norm() <= torch.finfo(dtype).eps * total, name
        else:
            assert_as_exact(name, *grads, parameter.grad)


def test_gradient_of_the_latents_equals_diffusers(case, fp64_mode, assert_as_exact):
    plain = diffusers_model(case.config)
    ours = WanModel(case.config)
    ours.load_state_dict(plain.state_dict(), strict=False)
    with fp64_mode:
        exact = diffusers_model(case.config).double()
    exact.load_state_dict(plain.state_dict())
    x_t, t, conditions = batch(case, torch.float32)
    inputs = [x_t.clone().requires_grad_() for _ in range(2)] + [x_t.double().requires_grad_()]
    ours(inputs[0], t, conditions).square().sum().backward()
    call_diffusers(plain, inputs[1], t, conditions, torch.float32).square().sum().backward()
    doubles = Conditions.of(conditions).to(dtype=torch.float64)
    with fp64_mode:
        call_diffusers(exact, inputs[2], t, doubles, torch.float64).square().sum().backward()
    assert_as_exact("x_t", *(value.grad for value in inputs))


def test_latents_keep_their_dtype_in_a_bf16_model(case):
    x_t, t, conditions = batch(case, torch.float32)
    assert WanModel(case.config, dtype=torch.bfloat16)(x_t, t, conditions).dtype == torch.float32


def test_one_time_per_sample_is_the_same_time_for_every_token():
    case = CASES["odd-frames"]
    torch.manual_seed(0)
    model = WanModel(case.config, dtype=torch.float64)
    x_t, t, conditions = batch(case, torch.float64)
    tokens = x_t[0, 0].numel() // 4
    torch.testing.assert_close(model(x_t, t[:, None].expand(-1, tokens), conditions), model(x_t, t, conditions))


@pytest.mark.parametrize("granularity", ["full", "selective"])
@pytest.mark.parametrize("adapter", [None, "phase_1"])
def test_recomputation_gives_identical_numbers(adapter, granularity):
    case = CASES["odd-frames"]
    torch.manual_seed(0)
    model = WanModel(case.config)
    add_adapter(model, "phase_1", rank=2, alpha=4)
    for block in model.blocks.values():
        torch.nn.init.normal_(block.attn1.to_q.lora_B["phase_1"])
    twin = copy.deepcopy(model)
    twin.recompute_granularity = granularity
    x_t, t, conditions = batch(case, torch.float32)
    outputs = [module(x_t, t, conditions, adapter=adapter) for module in (model, twin)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if "lora" in name and adapter is None:
            assert parameter.grad is None and other.grad is None
        elif parameter.grad is None:
            assert other.grad is None, name
        else:
            assert torch.equal(parameter.grad, other.grad), name


def test_frozen_parameters_do_not_change_the_other_gradients():
    case = CASES["odd-frames"]
    torch.manual_seed(0)
    model = WanModel(case.config)
    add_adapter(model, "phase_1", rank=2, alpha=2)
    twin = copy.deepcopy(model)
    for _, parameter in base_parameters(twin):
        parameter.requires_grad_(False)
    x_t, t, conditions = batch(case, torch.float32)
    for module in (model, twin):
        module(x_t, t, conditions, adapter="phase_1").square().sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if "lora" in name:
            assert torch.equal(parameter.grad, other.grad), name
        else:
            assert other.grad is None, name


def test_a_copy_shares_no_memory_and_keeps_the_marks():
    model = WanModel(CASES["odd-frames"].config)
    twin = copy.deepcopy(model)
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, other) and parameter.data_ptr() != other.data_ptr(), name
        assert partition_dim(parameter) == partition_dim(other), name
    assert partition_dim(twin.blocks["0"].attn1.to_q.weight) == 0
    assert partition_dim(twin.blocks["0"].attn1.to_q.bias) == 0
    assert partition_dim(twin.blocks["0"].attn1.to_out[0].weight) == 1
    assert partition_dim(twin.blocks["0"].attn1.to_out[0].bias) is None
    assert partition_dim(twin.blocks["0"].attn1.norm_q.weight) == 0
    assert partition_dim(twin.blocks["0"].ffn.net[2].weight) == 1
    assert partition_dim(twin.proj_out.weight) is None


def test_a_model_without_weights_runs_on_meta():
    case = CASES["image-to-video"]
    with torch.device("meta"):
        model = WanModel(case.config)
    x_t, t, conditions = batch(case, torch.float32)
    output = model(x_t.to("meta"), t.to("meta"), conditions.to("meta"))
    output.sum().backward()
    assert output.is_meta and output.shape == x_t.shape and model.proj_out.weight.grad.is_meta


def test_a_table_made_while_sampling_serves_training():
    case = CASES["odd-frames"]
    model = WanModel(case.config)
    x_t, t, conditions = batch(case, torch.float32)
    with torch.inference_mode():
        sampled = model(x_t, t, conditions)
    trained = model(x_t, t, conditions)
    trained.sum().backward()
    assert torch.equal(sampled, trained)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_t": torch.zeros(2, 3, 3, 7, 10)}, r"\[3, 7, 10\] are not multiples of patches \(1, 2, 2\)"),
        ({"x_t": torch.zeros(2, 5, 3, 6, 10)}, "takes 3 channels, got 5"),
        ({"x_t": torch.zeros(2, 3, 6, 10)}, r"expected \[B, C, F, H, W\]"),
        ({"x_t": torch.zeros(2, 3, 40, 6, 10)}, "rope_max_seq_len 32"),
        ({"t": torch.zeros(3)}, r"times \[3\]: expected one per sample \[2\] or per token \[2, 45\]"),
        ({"t": torch.zeros(2, 44)}, r"times \[2, 44\]"),
        ({"conditions": torch.zeros(2, 7, 11)}, r"text \[2, 7, 11\]: expected \[2, tokens, 10\]"),
        ({"conditions": torch.zeros(1, 7, 10)}, r"text \[1, 7, 10\]"),
        ({"conditions": Conditions(torch.zeros(2, 7, 10), torch.zeros(2, 1, 3, 6, 8))}, "differ in channels only"),
        ({"conditions": Conditions(torch.zeros(2, 7, 10), torch.zeros(2, 1, 3, 6, 10))}, "image latents 1"),
        ({"adapter": "phase_2"}, "adapter 'phase_2': the model has none"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(change, message):
    model = WanModel(CASES["odd-frames"].config)
    arguments = {"x_t": torch.zeros(2, 3, 3, 6, 10), "t": torch.zeros(2), "conditions": torch.zeros(2, 7, 10)}
    with pytest.raises(ValueError, match=message) as error:
        model(**arguments | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_backend_name": "eager"}, "--attention-backend eager: unknown"),
        ({"recompute_granularity": "block"}, "--recompute-granularity block: unknown; choose full or selective"),
    ],
)
def test_options_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        WanModel(CASES["odd-frames"].config, **options)

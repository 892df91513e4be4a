"""megatron-core without CUDA: what the project uses of it, one row of the shim at a time."""

import pytest
import torch
import torch.nn.functional as F

from megatron_pdmd.parallel import without_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins are not installed where CUDA is")


@pytest.fixture
def config(topology):
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )


@pytest.fixture
def seeded(topology):
    """The random tracker, seeded as training seeds it."""
    from megatron.core import tensor_parallel

    with without_cuda():
        tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    return tensor_parallel.get_cuda_rng_tracker()


def test_requests_for_cuda_tensors_land_on_the_default_device_inside_the_block_only():
    with without_cuda():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.tensor([1.0], device=torch.device("cuda", 3)).device.type == "cpu"
        tensor = torch.ones(2)
        assert tensor.cuda() is tensor
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        torch.zeros(2, device="cuda")


def test_it_leaves_the_meta_device_alone():
    with torch.device("meta"), without_cuda():
        assert torch.zeros(2).device.type == "meta"
        assert torch.zeros(2, device="cuda").device.type == "meta"
        assert torch.cuda.current_device().type == "meta"
    assert torch.cuda.current_device().type == "cpu"


def test_tensor_types_are_those_megatron_sorts_parameters_by():
    with without_cuda():
        assert torch.ones(1).type() == "torch.cuda.FloatTensor"
        assert torch.ones(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        assert torch.ones(1, device="meta").type() == "torch.cuda.FloatTensor"
        assert torch.ones(1).type(torch.float64).dtype == torch.float64
    assert torch.ones(1).type() == "torch.FloatTensor"


def test_an_error_inside_the_block_ends_it():
    with pytest.raises(KeyError), without_cuda():
        raise KeyError
    assert torch.ones(1).type() == "torch.FloatTensor"


@pytest.mark.parametrize("kind", ["ColumnParallelLinear", "RowParallelLinear"])
def test_parallel_linears_are_plain_linears_on_one_rank(config, kind, assert_as_accurate_as_torch):
    from megatron.core import tensor_parallel

    extra = {"ColumnParallelLinear": {"gather_output": False}, "RowParallelLinear": {"input_is_parallel": True}}[kind]
    linear = getattr(tensor_parallel, kind)(
        8, 12, config=config, init_method=torch.nn.init.xavier_normal_, bias=True, skip_bias_add=False, **extra
    )
    torch.manual_seed(0)
    torch.nn.init.normal_(linear.bias)
    x = torch.randn(5, 3, 8, requires_grad=True)
    grad = torch.randn(5, 3, 12)

    def outputs(dtype, use_megatron):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, linear.weight, linear.bias)]
        out = F.linear(*leaves)
        if use_megatron:
            leaves = [x, linear.weight, linear.bias]
            out, _ = linear(x)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    for ours, plain, reference in zip(
        outputs(torch.float32, True), outputs(torch.float32, False), outputs(torch.float64, False), strict=True
    ):
        assert_as_accurate_as_torch(ours, plain, reference)


def test_a_fork_of_the_random_tracker_draws_apart_and_leaves_the_outside_alone(seeded):
    before = torch.get_rng_state()
    with seeded.fork():
        first = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)
    outside = torch.rand(4)
    with seeded.fork():
        second = torch.rand(4)
    assert not torch.equal(first, second)
    assert not torch.equal(first, outside)
    expected = torch.rand(8, generator=torch.Generator().manual_seed(1234 + 2718))
    assert torch.equal(torch.cat([first, second]), expected)


def test_a_recomputed_forward_draws_the_same_dropout(seeded):
    from megatron.core import tensor_parallel

    def layer(x):
        with seeded.fork():
            inside = F.dropout(x, 0.5)
        return F.dropout(inside * x, 0.5)

    x = torch.randn(64, requires_grad=True)
    states = torch.get_rng_state(), seeded.get_states()
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.set_rng_state(states[0])
    seeded.set_states(states[1])
    out = tensor_parallel.checkpoint(layer, False, x)
    torch.rand(7)
    out.square().sum().backward()
    assert torch.equal(x.grad, expected)

"""Modulated layer norm and gated residual against their formulas in plain torch."""

import pytest
import torch
import torch.nn.functional as F

from megatron_pdmd.models.layers.modulation import gated_residual, modulated_layer_norm

EPS = 1e-6


def plain_modulated_layer_norm(x, shift, scale):
    wide = x.to(shift.dtype)
    return (F.layer_norm(wide, x.shape[-1:], None, None, EPS) * (1 + scale) + shift).to(x.dtype)


def plain_gated_residual(x, h, gate):
    return (x.to(gate.dtype) + h * gate).to(x.dtype)


def compare(ours, plain, inputs, dtype, assert_as_exact):
    def run(function, leaves):
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        output = function(*leaves)
        torch.manual_seed(9)
        output.backward(torch.randn(output.shape).to(dtype).to(output.dtype))
        return [output, *(leaf.grad for leaf in leaves)]

    exact = run(plain, [tensor.double() for tensor in inputs])
    for index, tensors in enumerate(zip(run(ours, inputs), run(plain, inputs), exact, strict=True)):
        assert tensors[0].dtype == tensors[1].dtype
        assert_as_exact(f"tensor {index}", *tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("per_token", [False, True])
def test_modulated_layer_norm(dtype, per_token, assert_as_exact):
    torch.manual_seed(0)
    shift, scale = torch.randn(2, 3, 7 if per_token else 1, 33).unbind()
    inputs = [(3 + torch.randn(3, 7, 33)).to(dtype), shift, scale]
    ours = lambda x, shift, scale: modulated_layer_norm(x, shift, scale, eps=EPS)  # noqa: E731
    compare(ours, plain_modulated_layer_norm, inputs, dtype, assert_as_exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("per_token", [False, True])
def test_gated_residual(dtype, per_token, assert_as_exact):
    torch.manual_seed(0)
    inputs = [*torch.randn(2, 3, 7, 33).to(dtype).unbind(), torch.randn(3, 7 if per_token else 1, 33)]
    compare(gated_residual, plain_gated_residual, inputs, dtype, assert_as_exact)

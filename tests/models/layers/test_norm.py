"""RMSNorm against torch's, forward and gradients."""

import pytest
import torch
import torch.nn.functional as F

from megatron_pdmd.models.layers.norm import RMSNorm
from megatron_pdmd.models.layers.tensor_parallel import TensorParallel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1, 1, 6), (2, 7, 33), (3, 5, 257)])
@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 1e4])
def test_output_and_gradients_equal_torch(dtype, shape, magnitude, assert_as_exact):
    torch.manual_seed(0)
    size, eps = shape[-1], 1e-6
    norm = RMSNorm(size, eps=eps, parallel=TensorParallel(), dtype=dtype)
    torch.nn.init.normal_(norm.weight)
    x = (magnitude * torch.randn(shape)).to(dtype)
    grad = torch.randn(shape).to(dtype)
    leaves = [
        [tensor.detach().clone().to(leaf_dtype).requires_grad_() for tensor in (x, norm.weight)]
        for leaf_dtype in (dtype, torch.float64)
    ]
    x.requires_grad_()
    ours = norm(x)
    plain, exact = (F.rms_norm(a, (size,), w, eps) for a, w in leaves)
    for output in (ours, plain, exact):
        output.backward(grad.to(output.dtype))
    assert_as_exact("y", ours, plain, exact)
    assert_as_exact("dx", x.grad, leaves[0][0].grad, leaves[1][0].grad)
    assert_as_exact("dw", norm.weight.grad, leaves[0][1].grad, leaves[1][1].grad)


def test_gradients_are_those_of_the_function():
    norm = RMSNorm(5, eps=1e-6, parallel=TensorParallel(), dtype=torch.float64)
    assert torch.autograd.gradcheck(norm, torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True))

"""RMS norm, weight and rotation in pieces and at once, forward and backward."""

from itertools import product

import pytest
import torch
from kernel_checks import run
from torch import Tensor

from pdmd_kernels.reference import primitives

BOTH = (torch.float32, torch.bfloat16)
SIZES = ((2, 40, 2, 96), (1, 3, 12, 128), (1, 1, 1, 2), (1, 70, 5, 6))
CASES = list(product(SIZES, BOTH, (False, True)))


def inputs(size: tuple[int, int, int, int], dtype: torch.dtype, rotated: bool) -> tuple[Tensor, ...]:
    """grad, x, weight, rstd and rope of (samples, tokens, heads, head_dim)."""
    samples, tokens, heads, head_dim = size
    grad, x = (torch.randn(samples, tokens, heads * head_dim, dtype=dtype) for _ in range(2))
    weight = (1 + 0.2 * torch.randn(heads * head_dim)).to(dtype)
    angles = 100 * torch.randn(tokens, head_dim // 2)
    rope = torch.stack((angles.cos(), angles.sin()), dim=-1) if rotated else None
    return grad, x, weight, (x.float().square().mean(-1) + 1e-6).rsqrt(), rope


@pytest.mark.parametrize(("size", "dtype", "rotated"), CASES)
def test_forward(agrees_with_twin, size, dtype, rotated) -> None:
    _, x, weight, rstd, rope = inputs(size, dtype, rotated)
    agrees_with_twin("sum_of_squares", x)
    agrees_with_twin("rms_rope", x, weight, rstd, rope, size[2])
    agrees_with_twin("rms_norm_rope", x, weight, rope, size[2], 1e-6)


@pytest.mark.parametrize(("size", "dtype", "rotated"), CASES)
def test_backward(agrees_with_twin, size, dtype, rotated) -> None:
    grad, x, weight, rstd, rope = inputs(size, dtype, rotated)
    dots, _ = agrees_with_twin("rms_rope_backward_dots", grad, x, weight, rstd, rope, size[2])
    agrees_with_twin("rms_rope_backward_dx", grad, x, weight, rstd, dots / x.shape[-1], rope, size[2])
    agrees_with_twin("rms_norm_rope_backward", grad, x, weight, rstd, rope, size[2])


@pytest.mark.parametrize("rotated", [False, True])
def test_a_row_too_long_for_one_pass(agrees_with_twin, rotated) -> None:
    size = (1, 2, 108, 128)
    grad, x, weight, rstd, rope = inputs(size, torch.bfloat16, rotated)
    agrees_with_twin("sum_of_squares", x)
    agrees_with_twin("rms_norm_rope", x, weight, rope, 108, 1e-6)
    agrees_with_twin("rms_norm_rope_backward", grad, x, weight, rstd, rope, 108)


def test_without_rotations_heads_need_not_divide_the_row(agrees_with_twin) -> None:
    grad, x, weight, rstd, _ = inputs((1, 3, 1, 301), torch.float32, False)
    agrees_with_twin("rms_rope", x, weight, rstd, None, 1)
    agrees_with_twin("rms_rope_backward_dots", grad, x, weight, rstd, None, 1)


def test_the_model_in_bf16_may_keep_fp32_weights(agrees_with_twin) -> None:
    _, x, weight, rstd, rope = inputs((1, 9, 2, 16), torch.bfloat16, True)
    agrees_with_twin("rms_rope", x, weight.float(), rstd, rope, 2)


def test_the_gradients_are_the_derivatives_of_the_twin() -> None:
    grad, x, weight, rstd, rope = inputs((2, 7, 3, 10), torch.float32, True)
    wide = [tensor.double().requires_grad_() for tensor in (x, weight)]
    y, _ = primitives.rms_norm_rope(*wide, rope.double(), 3, 1e-6)
    expected = torch.autograd.grad(y, wide, grad.double())
    for ours, derivative in zip(run("rms_norm_rope_backward", grad, x, weight, rstd, rope, 3), expected, strict=True):
        assert (ours - derivative).norm() <= 1e-5 * derivative.norm()


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)])
def test_no_tokens(shape) -> None:
    x, weight, rstd, rope = torch.empty(shape), torch.ones(8), torch.empty(shape[:2]), torch.ones(shape[1], 2, 2)
    assert run("sum_of_squares", x).shape == shape[:2]
    assert run("rms_rope", x, weight, rstd, rope, 2).shape == shape
    dots, dweight = run("rms_rope_backward_dots", x, x, weight, rstd, rope, 2)
    assert dots.shape == shape[:2] and torch.equal(dweight, torch.zeros(8))
    assert run("rms_norm_rope", x, weight, rope, 2, 1e-6)[0].shape == shape
    assert torch.equal(run("rms_norm_rope_backward", x, x, weight, rstd, rope, 2)[1], torch.zeros(8))

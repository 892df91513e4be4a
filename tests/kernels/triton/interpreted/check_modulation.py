"""Modulated layer norm and gated residuals, forward and backward."""

from itertools import product

import pytest
import torch
from kernel_checks import run
from torch import Tensor

BOTH = (torch.float32, torch.bfloat16)
SIZES = ((2, 5, 24), (2, 3, 1536), (1, 1, 5), (1, 130, 40))
CASES = list(product(SIZES, BOTH, (False, True)))
MASKS = ((True, True), (True, False), (False, True))
LONG = (1, 3, 13824)


def factors(size: tuple[int, int, int], per_token: bool, count: int) -> list[Tensor]:
    """Slices of one [B, 1 or S, 6, d] tensor, as the model makes them; around them lies NaN."""
    samples, tokens, width = size
    table = torch.full((samples, tokens if per_token else 1, 6, width + 3), float("nan"))
    table[:, :, :count, :width] = torch.randn(samples, tokens if per_token else 1, count, width)
    return [table[:, :, index, :width] for index in range(count)]


@pytest.mark.parametrize(("size", "dtype", "per_token"), [*CASES, (LONG, torch.bfloat16, False)])
def test_modulated_layer_norm(agrees_with_twin, size, dtype, per_token) -> None:
    x = (torch.randn(size) * 3 + 1).to(dtype)
    agrees_with_twin("modulated_layer_norm", x, *factors(size, per_token, 2), 1e-6)


@pytest.mark.parametrize(("size", "dtype", "per_token"), [*CASES, (LONG, torch.bfloat16, False)])
def test_gradients_of_modulated_layer_norm(agrees_with_twin, size, dtype, per_token) -> None:
    grad, x = torch.randn(size, dtype=dtype), (torch.randn(size) * 3 + 1).to(dtype)
    shift, scale = factors(size, per_token, 2)
    _, mean, rstd = run("modulated_layer_norm", x, shift, scale, 1e-6)
    for mask in MASKS:
        results = agrees_with_twin("modulated_layer_norm_backward", grad, x, scale, mean, rstd, mask)
        assert [bool(result.numel()) for result in results] == [mask[0], mask[1], mask[1]]


def test_a_constant_token_has_no_variance(agrees_with_twin) -> None:
    x, (shift, scale) = torch.full((1, 2, 40), 7.5), factors((1, 2, 40), False, 2)
    y, mean, _ = run("modulated_layer_norm", x, shift, scale, 1e-6)
    assert torch.equal(mean, torch.full((1, 2), 7.5)) and torch.equal(y, shift.expand_as(y))


@pytest.mark.parametrize(("size", "dtype", "per_token"), CASES)
def test_gated_residual(agrees_with_twin, size, dtype, per_token) -> None:
    x, h = torch.randn(size, dtype=dtype), torch.randn(size, dtype=dtype)
    agrees_with_twin("gated_residual", x, h, *factors(size, per_token, 1))


@pytest.mark.parametrize(("size", "dtype", "per_token"), CASES)
def test_gradients_of_gated_residual(agrees_with_twin, size, dtype, per_token) -> None:
    grad, h, (gate,) = torch.randn(size, dtype=dtype), torch.randn(size, dtype=dtype), factors(size, per_token, 1)
    for mask in MASKS:
        results = agrees_with_twin("gated_residual_backward", grad, h, gate, mask)
        assert [bool(result.numel()) for result in results] == list(mask)


@pytest.mark.parametrize("size", [(0, 3, 8), (2, 0, 8)])
def test_no_tokens(size) -> None:
    x, (shift, scale) = torch.empty(size), factors((size[0], 1, size[2]), False, 2)
    y, mean, rstd = run("modulated_layer_norm", x, shift, scale, 1e-6)
    assert y.shape == size and mean.shape == rstd.shape == size[:2]
    dx, dshift, dscale = run("modulated_layer_norm_backward", x, x, scale, mean, rstd, (True, True))
    assert dx.shape == size and not dshift.any() and dshift.shape == dscale.shape == scale.shape
    assert run("gated_residual", x, x, scale).shape == size
    dh, dgate = run("gated_residual_backward", x, x, scale, (True, True))
    assert dh.shape == size and not dgate.any() and dgate.shape == scale.shape


@pytest.mark.parametrize("tokens", [1, 65])
def test_sums_over_tokens_come_out_the_same_again(tokens) -> None:
    size = (1, tokens, 40)
    grad, h, (gate,) = torch.randn(size), torch.randn(size), factors(size, False, 1)
    first, second = (run("gated_residual_backward", grad, h, gate, (False, True))[1] for _ in range(2))
    assert torch.equal(first, second)

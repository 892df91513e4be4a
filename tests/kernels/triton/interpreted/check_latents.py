"""The ops on latents: noise, loss, gradient, Euler step."""

from itertools import product

import pytest
import torch
from kernel_checks import poisoned, run

from pdmd_kernels.reference import primitives

BOTH = (torch.float32, torch.bfloat16)
SHAPES = ((3, 5, 7), (2, 1025), (1, 2048), (2,))
MIXED = list(product(SHAPES, BOTH, BOTH))


def coefficients(shape: tuple[int, ...], count: int) -> list[torch.Tensor]:
    return [torch.rand(shape[0]) + 0.5 for _ in range(count)]


@pytest.mark.parametrize(("shape", "dtype", "result"), MIXED)
def test_noise_is_added(agrees_with_twin, shape, dtype, result) -> None:
    x_s, eps = torch.randn(shape, dtype=dtype), torch.randn(shape)
    (ours,) = agrees_with_twin("subinterval_noise", x_s, eps, *coefficients(shape, 2), result)
    assert ours.dtype == result


@pytest.mark.parametrize("dtype", BOTH)
def test_noise_may_be_drawn_from_seeds(agrees_with_twin, dtype) -> None:
    x_s, seeds, (a, b) = torch.randn(2, 1027, dtype=dtype), torch.tensor([5, -9]), coefficients((2,), 2)
    agrees_with_twin("subinterval_noise", x_s, seeds, a, b, torch.float32)
    given = run("subinterval_noise", x_s, run("normal", seeds, 1027), a, b, torch.float32)
    assert torch.equal(run("subinterval_noise", x_s, seeds, a, b, torch.float32), given)


@pytest.mark.parametrize(("shape", "dtype", "latents"), MIXED)
def test_loss_and_its_gradient(agrees_with_twin, shape, dtype, latents) -> None:
    output, x_s, eps = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=latents), torch.randn(shape)
    agrees_with_twin("subinterval_loss", output, x_s, eps, *coefficients(shape, 4))


@pytest.mark.parametrize("dtype", BOTH)
def test_loss_redraws_the_noise(agrees_with_twin, dtype) -> None:
    output, x_s = torch.randn(2, 3, 401, dtype=dtype), torch.randn(2, 3, 401)
    agrees_with_twin("subinterval_loss", output, x_s, torch.tensor([3, 4]), *coefficients((2,), 4))


@pytest.mark.parametrize(("shape", "dtype", "guided"), list(product(SHAPES, BOTH, (None, 0.3, 4.0))))
@pytest.mark.parametrize("normalised", [False, True])
def test_gradient_of_the_generator(agrees_with_twin, shape, dtype, guided, normalised) -> None:
    teacher, unconditional, fake = (torch.randn(shape, dtype=dtype) for _ in range(3))
    weight, c_x = coefficients(shape, 2)
    sample = (torch.randn(shape), torch.randn(shape), c_x) if normalised else (None, None, None)
    guidance = (None, 1.0) if guided is None else (unconditional, guided)
    agrees_with_twin("dmd_gradient", teacher, *guidance, fake, weight, *sample, 1e-6)


def test_a_teacher_without_error_is_divided_by_the_floor(agrees_with_twin) -> None:
    x, one = torch.randn(2, 9), torch.ones(2)
    agrees_with_twin("dmd_gradient", torch.zeros(2, 9), None, 1.0, torch.randn(2, 9), one, x, x, one, 0.25)


def test_what_is_not_finite_is_counted() -> None:
    teacher, fake, weight = torch.randn(3, 1500), torch.randn(3, 1500), torch.ones(3)
    teacher[0, 3], teacher[0, 1400], fake[2, 7] = float("nan"), float("inf"), float("-inf")
    _, count = run("dmd_gradient", poisoned(teacher), None, 1.0, poisoned(fake), weight, None, None, None, 1e-6)
    assert count.tolist() == [2, 0, 1] and count.dtype == torch.int64


@pytest.mark.parametrize(("shape", "dtype", "copy"), list(product(SHAPES, BOTH, (None, *BOTH))))
def test_euler_step(agrees_with_twin, shape, dtype, copy) -> None:
    x, flow = torch.randn(shape), torch.randn(shape, dtype=dtype)
    x_next, copied = agrees_with_twin("euler_step", x, flow, *coefficients(shape, 2), copy)
    assert copied.numel() == 0 if copy is None else torch.equal(copied, x_next.to(copy))


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_empty_latents(shape) -> None:
    empty, factors = torch.empty(shape), [torch.ones(shape[0])] * 4
    assert run("subinterval_noise", empty, empty, *factors[:2], torch.bfloat16).shape == shape
    loss, grad = run("subinterval_loss", empty, empty, empty, *factors)
    assert loss.isnan().all() and loss.shape == shape[:1] and grad.shape == shape
    gradient, count = run("dmd_gradient", empty, empty, 4.0, empty, factors[0], empty, empty, factors[0], 1e-6)
    assert gradient.shape == shape and count.tolist() == [0] * shape[0]
    assert run("euler_step", empty, empty, *factors[:2], torch.bfloat16)[1].shape == shape


def test_the_gradient_is_the_derivative_of_the_loss() -> None:
    output = torch.randn(2, 77, dtype=torch.float64, requires_grad=True)
    x_s, eps, factors = torch.randn(2, 77), torch.randn(2, 77), coefficients((2,), 4)
    loss, _ = primitives.subinterval_loss(output, x_s, eps, *factors)
    (derivative,) = torch.autograd.grad(loss.sum(), output)
    _, grad = run("subinterval_loss", output.detach().float(), x_s, eps, *factors)
    torch.testing.assert_close(grad.double(), derivative, rtol=1e-5, atol=1e-7)

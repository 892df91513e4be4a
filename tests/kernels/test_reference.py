"""The plain twins of the ops on latents against fp64 loops over samples: values, gradients, dtypes."""

import pytest
import torch
from torch import Tensor

from pdmd_kernels import reference

SHAPES = [(3,), (1, 1), (3, 7), (2, 3, 1, 5, 7)]
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
by_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def tensors(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for _ in range(count))


def coefficients(count: int, batch: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple((0.5 + torch.rand(batch, generator=generator)) for _ in range(count))


def combined(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a[i].to(x.dtype) * x[i] + b[i].to(x.dtype) * y[i] for i in range(len(x))])


@by_shape
@by_dtype
@pytest.mark.parametrize("op", [reference.diffuse, reference.euler_step])
def test_linear_ops(op, shape, dtype, assert_as_accurate_as_torch):
    x, y = tensors(2, shape, dtype)
    a, b = coefficients(2, shape[0])
    result = op(x, y, a, b)
    assert result.dtype == dtype
    assert_as_accurate_as_torch(result, combined(x, y, a, b), combined(x.double(), y.double(), a.double(), b.double()))


def test_an_euler_step_keeps_fp32_latents_beside_a_bf16_flow(assert_as_accurate_as_torch):
    (x,), (flow,), (a, b) = tensors(1, (3, 7), torch.float32), tensors(1, (3, 7), torch.bfloat16), coefficients(2, 3)
    result = reference.euler_step(x, flow, a, b)
    assert_as_accurate_as_torch(
        result, combined(x, flow.float(), a, b), combined(x.double(), flow.double(), a.double(), b.double())
    )
    assert result.dtype == torch.float32


def plain_loss(output: Tensor, x_s: Tensor, eps: Tensor, *factors: Tensor) -> Tensor:
    c_out, c_eps, c_x, weight = (factor.to(output.dtype) for factor in factors)
    return torch.stack(
        [
            weight[i] * (c_out[i] * output[i] - c_eps[i] * eps[i] - c_x[i] * x_s[i]).square().mean()
            for i in range(len(output))
        ]
    )


@by_shape
@by_dtype
def test_subinterval_loss_and_its_gradient(shape, dtype, assert_as_accurate_as_torch):
    output, x_s, eps = tensors(3, shape, dtype)
    factors = coefficients(4, shape[0])
    wide = [tensor.double() for tensor in (x_s, eps, *factors)]
    outputs = [output.clone().requires_grad_(), output.clone().requires_grad_(), output.double().requires_grad_()]
    losses = [
        reference.subinterval_loss(outputs[0], x_s, eps, *factors),
        plain_loss(outputs[1], x_s, eps, *factors),
        plain_loss(outputs[2], *wide),
    ]
    assert losses[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert losses[0].shape == shape[:1]
    assert_as_accurate_as_torch(*(loss.detach() for loss in losses))
    assert_as_accurate_as_torch(
        *(torch.autograd.grad(loss.sum(), x)[0] for loss, x in zip(losses, outputs, strict=True))
    )


def plain_gradient(teacher: Tensor, fake: Tensor, x_s: Tensor, x_t: Tensor, weight: Tensor, c_x: Tensor) -> Tensor:
    weight, c_x = weight.to(teacher.dtype), c_x.to(teacher.dtype)
    error = torch.stack([x_s[i] - (c_x[i] * x_t[i] - weight[i] * teacher[i]) for i in range(len(teacher))])
    return torch.stack([weight[i] * (teacher[i] - fake[i]) / error[i].abs().mean() for i in range(len(teacher))])


@by_shape
@by_dtype
def test_dmd_gradient(shape, dtype, assert_as_accurate_as_torch):
    teacher, fake, x_s, x_t = tensors(4, shape, dtype)
    weight, c_x = coefficients(2, shape[0])
    result = reference.dmd_gradient(teacher, fake, weight)
    exact = combined(teacher.double(), fake.double(), weight.double(), -weight.double())
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_as_accurate_as_torch(result, combined(teacher, fake, weight, -weight), exact)

    result = reference.dmd_gradient(teacher, fake, weight, x_s, x_t, c_x)
    exact = plain_gradient(*(tensor.double() for tensor in (teacher, fake, x_s, x_t, weight, c_x)))
    assert_as_accurate_as_torch(result, plain_gradient(teacher, fake, x_s, x_t, weight, c_x), exact)


def test_the_floor_bounds_the_gradient_where_the_teacher_makes_no_error():
    teacher, fake, x = torch.ones(2, 3), torch.zeros(2, 3), torch.ones(2, 3)
    weight, c_x = torch.tensor([0.5, 0.25]), torch.tensor([1.5, 1.25])
    gradient = reference.dmd_gradient(teacher, fake, weight, x, x, c_x, floor=0.1)
    torch.testing.assert_close(gradient, torch.tensor([5.0, 2.5])[:, None].expand(2, 3))

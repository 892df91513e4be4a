"""Each op on each backend against its plain twin: values, gradients, awkward sizes, strides, no elements, padding."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import pdmd_kernels

by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@dataclass
class Call:
    """The arguments of one call; the tensors in `grads` want a gradient."""

    args: list[Any]
    kwargs: dict[str, Any] = field(default_factory=dict)
    grads: tuple[int, ...] = ()

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Call":
        def apply(value: Any) -> Any:
            return function(value) if isinstance(value, Tensor) and value.is_floating_point() else value

        return Call([apply(a) for a in self.args], {k: apply(v) for k, v in self.kwargs.items()}, self.grads)


class Maker:
    """Random tensors of a fixed seed."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(3)
        self.dtype = dtype

    def values(self, *shape: int) -> Tensor:
        return self.exact(*shape).to(self.dtype)

    def exact(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def factor(self, batch: int) -> Tensor:
        return 0.5 + torch.rand(batch, generator=self.generator)

    def seeds(self, batch: int) -> Tensor:
        return torch.randint(-(2**63), 2**63 - 1, (batch,), generator=self.generator)

    def rope(self, tokens: int, head_dim: int) -> Tensor:
        angle = self.exact(tokens, head_dim // 2)
        return torch.stack((angle.cos(), angle.sin()), dim=-1)


LATENTS = [(3,), (1, 1), (2, 7), (2, 3, 1, 5, 7), (1, 2047), (2, 2048), (3, 2049), (1, 4100)]
ROWS = [(1, 1, 10), (2, 3, 6), (1, 40, 96), (2, 65, 34), (1, 33, 130), (3, 100, 18)]


def diffuse(make: Maker, shape: tuple[int, ...]) -> Call:
    factors = make.factor(shape[0]), make.factor(shape[0])
    return Call([make.values(*shape), make.values(*shape), *factors], grads=(0, 1))


def seeded_noise(make: Maker, shape: tuple[int, ...]) -> Call:
    batch = shape[0]
    return Call([make.values(*shape), make.seeds(batch), make.factor(batch), make.factor(batch)], grads=(0,))


def euler_step_with_copy(make: Maker, shape: tuple[int, ...]) -> Call:
    factors = make.factor(shape[0]), make.factor(shape[0])
    return Call([make.exact(*shape), make.values(*shape), *factors, make.dtype], grads=(0, 1))


def loss(make: Maker, shape: tuple[int, ...]) -> Call:
    factors = [make.factor(shape[0]) for _ in range(4)]
    return Call([make.values(*shape), make.exact(*shape), make.values(*shape), *factors], grads=(0,))


def seeded_loss(make: Maker, shape: tuple[int, ...]) -> Call:
    factors = [make.factor(shape[0]) for _ in range(4)]
    return Call([make.values(*shape), make.exact(*shape), make.seeds(shape[0]), *factors], grads=(0,))


def score_gradient(make: Maker, shape: tuple[int, ...]) -> Call:
    return Call([make.values(*shape), make.values(*shape), make.factor(shape[0])], {"count_nonfinite": True})


def guided_mean_abs_gradient(make: Maker, shape: tuple[int, ...]) -> Call:
    flows = make.exact(*shape), make.values(*shape)
    samples = make.values(*shape), make.values(*shape), make.factor(shape[0])
    keywords = {"unconditional": make.values(*shape), "guidance": 4.0, "floor": 1e-3}
    return Call([*flows, make.factor(shape[0]), *samples], keywords)


def layer_norm(make: Maker, shape: tuple[int, int, int], tokens: int) -> Call:
    modulations = make.exact(shape[0], tokens, 6, shape[2])  # strided slices, as in the block
    return Call([make.values(*shape), modulations[:, :, 1], modulations[:, :, 4]], {"eps": 1e-6}, grads=(0, 1, 2))


def residual(make: Maker, shape: tuple[int, int, int], tokens: int) -> Call:
    gate = make.exact(shape[0], tokens, 6, shape[2])[:, :, 2]
    return Call([make.values(*shape), make.values(*shape), gate], grads=(0, 1, 2))


def gelu(make: Maker, shape: tuple[int, int, int]) -> Call:
    return Call([3 * make.values(*shape)], grads=(0,))


def self_attention_norm(make: Maker, shape: tuple[int, int, int], reduce: Any = None) -> Call:
    _, tokens, n = shape
    tensors = [make.values(*shape), make.values(*shape), make.values(n), make.values(n)]
    keywords = {"eps": 1e-6, "size": n, "heads": n // 2 if n % 4 else n // 4, "reduce": reduce}
    keywords["rope"] = make.rope(tokens, n // keywords["heads"])
    return Call(tensors, keywords, grads=(0, 1, 2, 3))


def cross_attention_norm(make: Maker, shape: tuple[int, int, int]) -> Call:
    batch, tokens, n = shape
    tensors = [make.values(*shape), make.values(batch, 2 * tokens, n), make.values(n), make.values(n)]
    return Call(tensors, {"eps": 1e-6, "size": n, "heads": 1}, grads=(0, 1, 2, 3))


CASES = {
    "diffuse": ("diffuse", diffuse, LATENTS),
    "seeded noise": ("subinterval_noise", seeded_noise, LATENTS),
    "euler_step with a copy": ("euler_step", euler_step_with_copy, LATENTS),
    "loss": ("subinterval_loss", loss, LATENTS),
    "seeded loss": ("subinterval_loss", seeded_loss, LATENTS),
    "gradient, score": ("dmd_gradient", score_gradient, LATENTS),
    "gradient, guided, mean_abs": ("dmd_gradient", guided_mean_abs_gradient, LATENTS),
    "layer norm, one time": ("modulated_layer_norm", lambda make, shape: layer_norm(make, shape, 1), ROWS),
    "layer norm, times": ("modulated_layer_norm", lambda make, shape: layer_norm(make, shape, shape[1]), ROWS),
    "residual, one time": ("gated_residual", lambda make, shape: residual(make, shape, 1), ROWS),
    "residual, times": ("gated_residual", lambda make, shape: residual(make, shape, shape[1]), ROWS),
    "gelu": ("gelu_tanh", gelu, ROWS),
    "qk norm and rope": ("qk_norm_rope", self_attention_norm, ROWS),
    "qk norm and rope in halves": (
        "qk_norm_rope",
        lambda make, shape: self_attention_norm(make, shape, reduce=lambda squares: None),
        ROWS,
    ),
    "qk norm": ("qk_norm_rope", cross_attention_norm, ROWS),
}
SIZED_CASES = [
    pytest.param(*case, shape, id=f"{name}-{'x'.join(map(str, shape))}")
    for name, (*case, shapes) in CASES.items()
    for shape in shapes
]
by_case = pytest.mark.parametrize(("name", "maker"), [case[:2] for case in CASES.values()], ids=CASES)


def outputs_of(namespace: Any, name: str, call: Call) -> list[Tensor]:
    """The results and the gradients of their sum, weighted by fixed numbers."""
    args = [a.detach().requires_grad_() if i in call.grads else a for i, a in enumerate(call.args)]
    result = getattr(namespace, name)(*args, **call.kwargs)
    results = list(result) if isinstance(result, tuple) else [result]
    if not call.grads:
        return results
    generator = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in results]
    grads = torch.autograd.grad(results, [args[i] for i in call.grads], cotangents)
    return [r.detach() for r in results] + list(grads)


@pytest.mark.parametrize(("name", "maker", "shape"), SIZED_CASES)
@by_dtype
def test_values_and_gradients_are_as_accurate_as_the_twins(
    name, maker, shape, dtype, backend, assert_as_accurate_as_torch
):
    call = maker(Maker(dtype), shape)
    ours = outputs_of(pdmd_kernels, name, call)
    plain = outputs_of(pdmd_kernels.reference, name, call)
    exact_call = call.mapped(Tensor.double)
    if name == "euler_step":
        exact_call.args[-1] = torch.float64
    exact = outputs_of(pdmd_kernels.reference, name, exact_call)
    for mine, twin, reference in zip(ours, plain, exact, strict=True):
        assert (mine.dtype, mine.shape) == (twin.dtype, twin.shape)
        if mine.dtype == torch.int64:
            assert torch.equal(mine, twin)
        elif reference.norm() > 0:
            assert_as_accurate_as_torch(mine, twin, reference)


@by_case
@by_dtype
def test_strided_input_gives_the_numbers_of_contiguous_input(name, maker, dtype, backend):
    call = maker(Maker(dtype), (2, 5, 6))
    strided = call.mapped(lambda x: torch.stack((x, x), dim=-1)[..., 0] if x.ndim < 3 else x.mT.contiguous().mT)
    assert any(isinstance(a, Tensor) and not a.is_contiguous() for a in strided.args)
    for ours, expected in zip(
        outputs_of(pdmd_kernels, name, strided), outputs_of(pdmd_kernels, name, call), strict=True
    ):
        assert torch.equal(ours, expected)


@by_case
@pytest.mark.parametrize("shape", [(0, 4, 6), (2, 0, 6)], ids=str)
@by_dtype
def test_no_elements_are_no_trouble(name, maker, shape, dtype, backend):
    call = maker(Maker(dtype), shape)
    ours, plain = outputs_of(pdmd_kernels, name, call), outputs_of(pdmd_kernels.reference, name, call)
    for mine, twin in zip(ours, plain, strict=True):
        assert (mine.shape, mine.dtype) == (twin.shape, twin.dtype)
        torch.testing.assert_close(mine, twin, rtol=0, atol=0, equal_nan=True)


@by_case
@pytest.mark.parametrize("shape", [(1, 33, 34), (2, 3, 6)], ids=str)
@by_dtype
def test_what_lies_around_a_tensor_is_neither_read_nor_written(name, maker, shape, dtype, backend):
    buffers: list[tuple[Tensor, Tensor]] = []

    def amid(neighbours: float, x: Tensor) -> Tensor:
        """At an odd place in memory: where a row begins decides in which order torch itself may add it up."""
        buffer = torch.full((x.numel() + 128,), neighbours, dtype=x.dtype)
        view = buffer[61 : 61 + x.numel()].view(x.shape)
        buffers.append((buffer, view.copy_(x).clone()))
        return view

    call = maker(Maker(dtype), shape)
    expected_outputs = outputs_of(pdmd_kernels, name, call.mapped(partial(amid, 0.0)))
    buffers.clear()
    poisoned = outputs_of(pdmd_kernels, name, call.mapped(partial(amid, torch.nan)))
    for ours, expected in zip(poisoned, expected_outputs, strict=True):
        assert torch.equal(ours, expected)
    for buffer, before in buffers:
        assert buffer[:61].isnan().all()
        assert buffer[61 + before.numel() :].isnan().all()
        assert torch.equal(buffer[61 : 61 + before.numel()], before.flatten())


@by_case
def test_results_do_not_depend_on_the_number_of_threads(name, maker, variant):
    call = maker(Maker(torch.float32), (2, 90, 1030))
    alone = outputs_of(pdmd_kernels, name, call)
    torch.set_num_threads(2)
    try:
        shared = outputs_of(pdmd_kernels, name, call)
    finally:
        torch.set_num_threads(1)
    for ours, expected in zip(shared, alone, strict=True):
        assert torch.equal(ours, expected)


def test_a_kept_graph_gives_the_same_gradient_twice(backend):
    call = loss(Maker(torch.float32), (2, 7))
    output = call.args[0].requires_grad_()
    value = pdmd_kernels.subinterval_loss(output, *call.args[1:]).sum()
    first = torch.autograd.grad(value, output, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(3 * value, output)[0], 3 * first)


def test_values_that_are_not_finite_are_counted_by_sample(backend):
    teacher, fake, weight = torch.zeros(3, 4099), torch.zeros(3, 4099), torch.ones(3)
    teacher[0, 4098], teacher[2, 7], fake[2, 2050] = torch.nan, torch.inf, -torch.inf
    gradient, count = pdmd_kernels.dmd_gradient(teacher, fake, weight, count_nonfinite=True)
    assert count.tolist() == [1, 0, 2]
    assert torch.equal((~gradient.isfinite()).sum(1), count)


def test_nan_and_overflow_survive_the_rounding_to_bf16(variant):
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, 3.4e38, -0.0, 1e-40, 1.00390625, 1.01171875] * 9])
    x.view(torch.int32)[0, 0] = 0x7FFFFFFF  # a nan whose rounding would carry into the sign
    one = torch.ones(1)
    ours = pdmd_kernels.subinterval_noise(x, torch.zeros_like(x), one, 0 * one, torch.bfloat16)
    torch.testing.assert_close(ours, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@by_dtype
def test_gelu_keeps_its_limits_and_a_nan(dtype, backend):
    x = torch.tensor([torch.nan, torch.inf, 3e38, 1e4, 0.0, -1e4, -1e18], dtype=dtype)
    expected = torch.tensor([torch.nan, torch.inf, 3e38, 1e4, 0.0, 0.0, 0.0], dtype=dtype)
    torch.testing.assert_close(pdmd_kernels.gelu_tanh(x), expected, rtol=0, atol=0, equal_nan=True)


@by_dtype
def test_rows_that_are_far_from_zero_keep_their_variance(dtype, backend, assert_as_accurate_as_torch):
    make = Maker(dtype)
    x = 100 + make.values(2, 37, 1030)
    call = Call([x, make.exact(2, 1, 1030), make.exact(2, 1, 1030)], {"eps": 1e-6}, grads=(0, 1, 2))
    namespaces = (
        (pdmd_kernels, call),
        (pdmd_kernels.reference, call),
        (pdmd_kernels.reference, call.mapped(Tensor.double)),
    )
    for ours, plain, exact in zip(
        *(outputs_of(namespace, "modulated_layer_norm", c) for namespace, c in namespaces), strict=True
    ):
        assert_as_accurate_as_torch(ours, plain, exact)

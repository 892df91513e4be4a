"""AdamW with beta_1 = 0 against torch.optim.AdamW, and what it refuses."""

import pytest
import torch
from torch import Tensor

import pdmd_kernels

SHAPES = [(1,), (3, 5), (16,), (129, 7), (0,), (33_000,)]
OPTIONS = {"lr": 0.03, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}


def gradients(step: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def starts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(99)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def stepped_by_torch(dtype: torch.dtype, grad_dtype: torch.dtype, scale: float) -> tuple[list[Tensor], list[Tensor]]:
    params = [torch.nn.Parameter(p.to(dtype)) for p in starts()]
    options = {"lr": OPTIONS["lr"], "eps": OPTIONS["eps"], "weight_decay": OPTIONS["weight_decay"]}
    optimizer = torch.optim.AdamW(params, betas=(0.0, OPTIONS["beta2"]), foreach=False, **options)
    for step in range(1, 4):
        for param, grad in zip(params, gradients(step, grad_dtype), strict=True):
            param.grad = grad.to(dtype) * scale
        optimizer.step()
    return [p.detach() for p in params], [optimizer.state[p]["exp_avg_sq"] for p in params]


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_three_steps_follow_torch(grad_dtype, scaled, backend, assert_as_accurate_as_torch):
    params, moments = starts(), [torch.zeros(shape) for shape in SHAPES]
    copies = [p.bfloat16() for p in params]
    scale = torch.tensor(0.375) if scaled else None
    for step in range(1, 4):
        grads = gradients(step, grad_dtype)
        pdmd_kernels.adamw_beta1_zero(params, grads, moments, copies, step=step, grad_scale=scale, **OPTIONS)
    factor = 0.375 if scaled else 1.0
    plain, exact = (stepped_by_torch(dtype, grad_dtype, factor) for dtype in (torch.float32, torch.float64))
    for mine, theirs, reference in zip(params + moments, [*plain[0], *plain[1]], [*exact[0], *exact[1]], strict=True):
        if mine.numel():
            assert_as_accurate_as_torch(mine, theirs, reference)
    for copy, param in zip(copies, params, strict=True):
        assert torch.equal(copy, param.bfloat16())


def test_only_the_tensors_own_memory_is_written(backend):
    buffers = [torch.full((200,), torch.nan) for _ in range(3)]
    param, grad, moment = (buffer[61:98].fill_(1.0) for buffer in buffers)
    pdmd_kernels.adamw_beta1_zero([param], [grad], [moment], step=1, **OPTIONS)
    assert param.isfinite().all() and moment.isfinite().all()
    for buffer in buffers:
        assert buffer[:61].isnan().all() and buffer[98:].isnan().all()


def test_a_gradient_of_the_copies_dtype_does_not_lose_the_masters_small_steps(backend):
    param, moment, copy = torch.ones(40), torch.zeros(40), torch.ones(40, dtype=torch.bfloat16)
    for step in range(1, 11):
        pdmd_kernels.adamw_beta1_zero(
            [param], [copy.clone()], [moment], [copy], lr=1e-4, beta2=0.999, eps=1e-8, weight_decay=0.0, step=step
        )
    assert param.max() < 1 and (copy == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 0}, "step is 0"),
        ({"grads": []}, "grads has 0 tensors for 1 params"),
        ({"grads": [torch.zeros(4)]}, r"grads\[0\] is \[4\]"),
        ({"params": [torch.zeros(3, dtype=torch.bfloat16)]}, r"params\[0\] is torch.bfloat16"),
        ({"exp_avg_sqs": [torch.zeros(3, dtype=torch.bfloat16)]}, r"exp_avg_sqs\[0\] is torch.bfloat16"),
        ({"exp_avg_sqs": [torch.zeros(6)[::2]]}, r"exp_avg_sqs\[0\] is not contiguous"),
        ({"copies": [torch.zeros(3, device="meta")]}, r"copies\[0\] is on meta"),
        ({"grad_scale": torch.ones(2)}, r"grad_scale is \[2\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message, backend):
    arguments = {"params": [torch.zeros(3)], "grads": [torch.zeros(3)], "exp_avg_sqs": [torch.zeros(3)], "step": 1}
    with pytest.raises(ValueError, match=message):
        pdmd_kernels.adamw_beta1_zero(**(arguments | change), **OPTIONS)

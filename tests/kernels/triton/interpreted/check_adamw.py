"""AdamW with beta_1 = 0, to the bit."""

import pytest
import torch
from kernel_checks import launcher, poisoned

SHAPES = ((17,), (3, 700), (1,), (0,), (1024,))
OPTIONS = {"lr": 3e-3, "eps": 1e-8, "weight_decay": 0.1}


def whole_vectors(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers and zeros up to a multiple of 64: torch's vectorised loop and its loop for the rest round apart."""
    return torch.nn.functional.pad(tensor.flatten(), (0, -tensor.numel() % 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 0.37])
def test_five_steps_are_those_of_torch(dtype, scale) -> None:
    params = [poisoned(torch.randn(shape)) for shape in SHAPES]
    moments = [poisoned(torch.zeros(shape)) for shape in SHAPES]
    copies = [poisoned(torch.zeros(shape, dtype=torch.bfloat16)) for shape in SHAPES]
    theirs = [torch.nn.Parameter(whole_vectors(param)) for param in params]
    optimizer = torch.optim.AdamW(theirs, betas=(0.0, 0.999), fused=True, **OPTIONS)
    for step in range(1, 6):
        grads = [torch.randn(shape, dtype=dtype) * 10.0 ** (step - 3) for shape in SHAPES]
        factor = None if scale is None else torch.tensor(scale)
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = whole_vectors(grad.float() if factor is None else grad.float() * factor)
        optimizer.step()
        arguments = (OPTIONS["lr"], 0.999, OPTIONS["eps"], OPTIONS["weight_decay"], step, factor)
        launcher("adamw_beta1_zero")(params, list(map(poisoned, grads)), moments, copies, *arguments)
    for ours, parameter, moment, copy in zip(params, theirs, moments, copies, strict=True):
        assert torch.equal(ours.flatten(), parameter[: ours.numel()])
        assert torch.equal(moment.flatten(), optimizer.state[parameter]["exp_avg_sq"][: ours.numel()])
        assert torch.equal(copy, ours.bfloat16())
        assert _margins(ours).isnan().all() and _margins(copy).isnan().all()


def test_without_copies_and_tensors_nothing_is_written() -> None:
    param, moment = torch.ones(5), torch.zeros(5)
    launcher("adamw_beta1_zero")([param], [torch.zeros(5)], [moment], [], 0.1, 0.99, 1e-8, 0.0, 1, None)
    launcher("adamw_beta1_zero")([], [], [], [], 0.1, 0.99, 1e-8, 0.0, 1, None)
    assert torch.equal(param, torch.ones(5)) and not moment.any()


def _margins(tensor: torch.Tensor) -> torch.Tensor:
    whole = torch.tensor([], dtype=tensor.dtype).set_(tensor.untyped_storage())
    start = tensor.storage_offset()
    return torch.cat((whole[:start], whole[start + tensor.numel() :]))

"""Data-parallel wrappers on one rank: where gradients land, who takes part, and how wrappers follow one another."""

import copy
import gc
import weakref

import pytest
import torch

from megatron_pdmd.parallel import data_parallel, finish_gradient_sync, no_sync, release_data_parallel

pytestmark = pytest.mark.usefixtures("topology")


class Adapted(torch.nn.Module):
    """A linear layer with two low-rank adapters, of which a caller trains one."""

    def __init__(self):
        super().__init__()
        self.base = torch.nn.Linear(6, 6)
        self.adapters = torch.nn.ParameterDict({name: torch.randn(6, 6) for name in ("a", "b")})

    def forward(self, x):
        return self.base(x) + x @ (self.adapters["a"] + self.adapters["b"])


def train_only(module, prefix):
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith(prefix))


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Adapted()


@pytest.fixture
def x():
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def plain_gradients(module, x):
    return torch.autograd.grad(module(x).square().sum(), [p for p in module.parameters() if p.requires_grad])


@pytest.mark.parametrize("overlap", [False, True])
def test_calling_the_bare_module_fills_main_grad(module, x, overlap):
    expected = plain_gradients(module, x)
    ddp = data_parallel(module, overlap_grad_reduce=overlap)
    ddp.zero_grad_buffer()
    module(x).square().sum().backward()
    finish_gradient_sync([ddp])
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        assert torch.equal(parameter.main_grad, gradient)
        assert parameter.grad is None


def test_gradients_of_several_backward_passes_add_up(module, x):
    parts = [plain_gradients(module, part) for part in x.split(1)]
    ddp = data_parallel(module, overlap_grad_reduce=True)
    ddp.zero_grad_buffer()
    with no_sync([ddp]):
        for part in x.split(1)[:-1]:
            module(part).square().sum().backward()
    module(x[-1:]).square().sum().backward()
    finish_gradient_sync([ddp])
    for parameter, *gradients in zip(module.parameters(), *parts, strict=True):
        total = torch.zeros_like(parameter)
        for gradient in gradients:
            total += gradient
        assert torch.equal(parameter.main_grad, total)


def test_only_what_is_trainable_takes_part(module, x):
    train_only(module, "adapters.a")
    (expected,) = plain_gradients(module, x)
    ddp = data_parallel(module)
    assert sum(buffer.grad_data.numel() for buffer in ddp.buffers) < 36 + 64  # the adapter's 36, and padding
    ddp.zero_grad_buffer()
    module(x).square().sum().backward()
    assert torch.equal(module.adapters["a"].main_grad, expected)
    assert not hasattr(module.base.weight, "main_grad")
    assert module.base.weight.grad is None


def test_bf16_gradients_accumulate_in_fp32(module, x):
    module.bfloat16()
    x = x.bfloat16()
    once = plain_gradients(module, x)
    ddp = data_parallel(module, bf16=True)
    ddp.zero_grad_buffer()
    for _ in range(3):
        module(x).square().sum().backward()
    for parameter, gradient in zip(module.parameters(), once, strict=True):
        assert parameter.main_grad.dtype == torch.float32
        assert torch.equal(parameter.main_grad, 3 * gradient.float())


def test_many_micro_batches_of_a_bf16_network_lose_nothing_in_their_sum(module):
    """Against an fp64 network with the same weights, and against gradients that plain torch adds up in bf16."""
    module.bfloat16()
    exact, plain = copy.deepcopy(module).double(), copy.deepcopy(module)
    batches = torch.randn(256, 4, 6, generator=torch.Generator().manual_seed(2)).bfloat16()
    ddp = data_parallel(module, bf16=True)
    ddp.zero_grad_buffer()
    for batch in batches:
        for network, x in ((module, batch), (plain, batch), (exact, batch.double())):
            (network(x).square().sum() / len(batches)).backward()
    for ours, other, reference in zip(module.parameters(), plain.parameters(), exact.parameters(), strict=True):
        assert ours.main_grad.dtype == torch.float32 and other.grad.dtype == torch.bfloat16
        in_fp32, in_bf16 = (
            ((grad.double() - reference.grad).norm() / reference.grad.norm()).item()
            for grad in (ours.main_grad, other.grad)
        )
        assert in_fp32 < torch.finfo(torch.bfloat16).eps < in_bf16


def test_two_wrappers_hold_disjoint_parameters_of_one_module(module, x):
    train_only(module, "adapters.a")
    first = data_parallel(module)
    train_only(module, "adapters.b")
    second = data_parallel(module)
    for ddp in (first, second):
        ddp.zero_grad_buffer()
    (expected,) = plain_gradients(module, x)
    module(x).square().sum().backward()
    assert torch.equal(module.adapters["b"].main_grad, expected)
    assert not module.adapters["a"].main_grad.any()


def test_each_wrapper_has_its_own_config(module):
    other = Adapted()
    assert data_parallel(module).config is not data_parallel(other).config


def test_a_released_module_is_as_before_and_can_be_wrapped_again(module, x):
    expected = plain_gradients(module, x)
    ddp = data_parallel(module)
    buffer = weakref.ref(ddp.buffers[0])
    with pytest.raises(ValueError, match="release_data_parallel"):
        data_parallel(module)
    release_data_parallel(ddp)
    gc.collect()
    assert buffer() is None
    module(x).square().sum().backward()
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)
        parameter.grad = None
    again = data_parallel(module)
    again.zero_grad_buffer()
    module(x).square().sum().backward()
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        assert torch.equal(parameter.main_grad, gradient)


def test_a_frozen_module_is_refused(module):
    with pytest.raises(ValueError, match="no parameter of the module requires a gradient"):
        data_parallel(module.requires_grad_(False))

"""Blocks combined by their normalisers are attention to all keys at once, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_pdmd.models.layers.block_attention import (
    ComposedBlocks,
    CpuFlashBlocks,
    CudaFlashBlocks,
    block_attention_for,
)


def attend_whole(query, key, value, grad):
    inputs = [x.clone().requires_grad_() for x in (query, key, value)]
    output = F.scaled_dot_product_attention(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def attend_in_blocks(blocks, query, key, value, grad, cut):
    parts = [slice(0, cut), slice(cut, None)]
    outputs, log_sums = zip(*(blocks.forward(query, key[:, :, p], value[:, :, p]) for p in parts), strict=True)
    log_sum = torch.logaddexp(*log_sums)
    weights = [torch.exp(each - log_sum).unsqueeze(-1) for each in log_sums]
    output = (outputs[0] * weights[0] + outputs[1] * weights[1]).to(query.dtype)
    grads = [blocks.backward(grad, query, key[:, :, p], value[:, :, p], output, log_sum) for p in parts]
    first, second = grads
    sums = [
        first[0].to(log_sum.dtype) + second[0],
        *(torch.cat(pair, 2) for pair in zip(first[1:], second[1:], strict=True)),
    ]
    return [output, *(x.to(query.dtype) for x in sums)]


def check_two_blocks(blocks, dtype, device, head_size, assert_as_accurate_as_torch):
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        torch.randn(2, 3, tokens, head_size, generator=generator).to(device, dtype) for tokens in (7, 13, 13, 7)
    )
    ours = attend_in_blocks(blocks, query, key, value, grad, cut=5)
    plain = attend_whole(query, key, value, grad)
    exact = attend_whole(*(x.double() for x in (query, key, value, grad)))
    for values in zip(ours, plain, exact, strict=True):
        assert_as_accurate_as_torch(*values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("blocks", [ComposedBlocks(), CpuFlashBlocks()], ids=lambda blocks: type(blocks).__name__)
def test_two_blocks_equal_the_whole(blocks, dtype, assert_as_accurate_as_torch):
    check_two_blocks(blocks, dtype, "cpu", 22, assert_as_accurate_as_torch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; what the kernel is called with is tested below")
def test_two_blocks_equal_the_whole_on_a_gpu(assert_as_accurate_as_torch):
    check_two_blocks(CudaFlashBlocks(), torch.bfloat16, "cuda", 64, assert_as_accurate_as_torch)


class Calls(TorchDispatchMode):
    """Records the calls of the flash attention ops: arguments by name, and what came back."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "flash_attention" in func.name():
            arguments = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
            self.made.append((arguments, result))
        return result


def test_the_gpus_backward_gets_what_its_forward_returns():
    """torch's meta kernel takes anything; the real one takes the packed path for a tensor in place of an offset."""
    query, grad = (torch.empty(2, 3, 7, 64, dtype=torch.bfloat16, device="meta") for _ in range(2))
    key, value = (torch.empty(2, 3, 13, 64, dtype=torch.bfloat16, device="meta") for _ in range(2))
    with Calls() as calls:
        blocks = CudaFlashBlocks()
        output, log_sum = blocks.forward(query, key, value)
        grads = blocks.backward(grad, query, key, value, output, log_sum)
    (_, returned), (given, _) = calls.made
    assert [g.shape for g in grads] == [query.shape, key.shape, value.shape]
    assert log_sum.shape == query.shape[:3] and log_sum.dtype == torch.float32
    offsets_and_lengths = (given["cum_seq_q"], given["cum_seq_k"], given["max_q"], given["max_k"])
    assert offsets_and_lengths == returned[2:6] == (None, None, 7, 13)
    for name, state in zip(("philox_seed", "philox_offset"), returned[6:8], strict=True):
        assert (given[name].shape, given[name].dtype) == (state.shape, state.dtype)
        assert given[name].device == query.device


def test_the_kernel_follows_the_device():
    assert isinstance(block_attention_for(torch.empty(1)), CpuFlashBlocks)
    assert isinstance(block_attention_for(torch.empty(1, device="meta")), ComposedBlocks)

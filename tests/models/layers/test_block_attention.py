"""Blocks combined by their normalisers are attention to all keys at once, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from megatron_pdmd.models.layers.block_attention import ComposedBlocks, CpuFlashBlocks, block_attention_for


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("blocks", [ComposedBlocks(), CpuFlashBlocks()], ids=lambda blocks: type(blocks).__name__)
def test_two_blocks_equal_the_whole(blocks, dtype, assert_as_accurate_as_torch):
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        torch.randn(2, 3, tokens, 22, generator=generator).to(dtype) for tokens in (7, 13, 13, 7)
    )
    ours = attend_in_blocks(blocks, query, key, value, grad, cut=5)
    plain = attend_whole(query, key, value, grad)
    exact = attend_whole(*(x.double() for x in (query, key, value, grad)))
    for values in zip(ours, plain, exact, strict=True):
        assert_as_accurate_as_torch(*values)


def test_the_kernel_follows_the_device():
    assert isinstance(block_attention_for(torch.empty(1)), CpuFlashBlocks)
    assert isinstance(block_attention_for(torch.empty(1, device="meta")), ComposedBlocks)

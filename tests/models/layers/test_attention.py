"""The attention backends against softmax(q k^T / sqrt(d)) v in fp64."""

import pytest
import torch

from megatron_pdmd.models.layers import attention
from megatron_pdmd.models.layers.attention import attention_backend, sdpa_attention


@pytest.mark.parametrize("tokens", [1, 5, 512])
def test_sdpa_is_softmax_attention(tokens, assert_as_exact):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 7, 3, 10), torch.randn(2, tokens, 3, 10), torch.randn(2, tokens, 3, 10)

    def formula(q, k, v):
        scores = torch.einsum("bshd,blhd->bhsl", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bhsl,blhd->bshd", scores.softmax(-1), v)

    exact = formula(query.double(), key.double(), value.double())
    assert_as_exact("out", sdpa_attention(query, key, value), formula(query, key, value), exact)


def test_backends_are_chosen_by_name(monkeypatch):
    assert attention_backend("sdpa") is sdpa_attention
    monkeypatch.setattr(attention, "flash_attention_available", lambda: False)
    with pytest.raises(ValueError, match="--attention-backend flash: flash-attn is not installed"):
        attention_backend("flash")
    monkeypatch.setattr(attention, "flash_attention_available", lambda: True)
    assert attention_backend("flash") is attention.flash_attention

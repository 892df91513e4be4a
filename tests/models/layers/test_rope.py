"""Rotations against diffusers' tables, and the cache."""

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from megatron_pdmd.models.layers.rope import RotaryEmbedding


@pytest.mark.parametrize("head_dim", [6, 16, 22, 128])
def test_tables_equal_diffusers(head_dim):
    grid = (3, 4, 5)
    table = RotaryEmbedding(head_dim, max_positions=8)(grid, device=torch.device("cpu"), dtype=torch.float32)
    cos, sin = WanRotaryPosEmbed(head_dim, (1, 1, 1), 8)(torch.empty(1, 1, *grid))
    assert torch.equal(table[..., 0].flatten(), cos[..., 0::2].flatten())
    assert torch.equal(table[..., 1].flatten(), sin[..., 1::2].flatten())


def test_scores_depend_on_distances_alone():
    torch.manual_seed(0)
    table = RotaryEmbedding(12, max_positions=8)((6, 1, 1), device=torch.device("cpu"), dtype=torch.float64)
    rotations = torch.view_as_complex(table)
    vectors = torch.view_as_complex(torch.randn(2, 6, 2, dtype=torch.float64))
    query, key = (torch.view_as_real(vector * rotations).flatten(1) for vector in vectors)
    scores = query @ key.T
    for offset in range(-5, 6):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert not torch.allclose(scores[0, 0], scores[0, 1])


def test_tables_are_kept_and_the_oldest_goes():
    rope = RotaryEmbedding(12, max_positions=32)
    options = {"device": torch.device("cpu"), "dtype": torch.float32}
    first = rope((1, 1, 1), **options)
    assert rope((1, 1, 1), **options) is first
    for length in range(2, 2 + rope.kept_tables):
        rope((length, 1, 1), **options)
    assert rope((1, 1, 1), **options) is not first

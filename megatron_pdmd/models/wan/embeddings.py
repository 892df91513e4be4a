"""What happens before the first block and after the last: patches, time and text embeddings."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_pdmd.models.layers.tensor_parallel import compute_dtype
from pdmd_kernels import gelu_tanh


class PatchEmbedding(nn.Module):
    """A linear on patches, whose weight has the shape of the convolution it stands for: [d, C, pt, ph, pw]."""

    def __init__(self, channels: int, size: int, patch: Sequence[int], *, dtype: torch.dtype):
        super().__init__()
        self.patch = tuple(patch)
        self.weight = nn.Parameter(torch.empty(size, channels, *patch, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(size, dtype=dtype))
        nn.init.kaiming_uniform_(self.weight.flatten(1), a=math.sqrt(5))

    def patches(self, x: Tensor) -> Tensor:
        """Cuts [B, C, F, H, W] into tokens, [B, S, C pt ph pw], frames outermost."""
        pt, ph, pw = self.patch
        batch, channels, frames, height, width = x.shape
        x = x.reshape(batch, channels, frames // pt, pt, height // ph, ph, width // pw, pw)
        return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, -1, channels * pt * ph * pw)

    def forward(self, patches: Tensor) -> Tensor:
        """Embeds tokens, [B, S, C pt ph pw] -> [B, S, d]."""
        return F.linear(patches, self.weight.flatten(1), self.bias)


def unpatchify(tokens: Tensor, grid: Sequence[int], patch: Sequence[int]) -> Tensor:
    """Puts tokens [B, S, pt ph pw C] on a grid of (frames, rows, columns) tokens back together as [B, C, F, H, W]."""
    frames, rows, columns = grid
    pt, ph, pw = patch
    x = tokens.reshape(len(tokens), frames, rows, columns, pt, ph, pw, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.reshape(len(tokens), -1, frames * pt, rows * ph, columns * pw)


class TwoLayerMLP(nn.Module):
    """Linear, activation, linear; whole on every rank."""

    def __init__(self, inputs: int, size: int, *, dtype: torch.dtype):
        super().__init__()
        self.linear_1 = nn.Linear(inputs, size, dtype=dtype)
        self.linear_2 = nn.Linear(size, size, dtype=dtype)


class TimeEmbedder(TwoLayerMLP):
    """An MLP on the sinusoids of a time, in at least fp32."""

    base = 10000.0

    def forward(self, t: Tensor) -> Tensor:
        """Embeds times t in [0, 1] of any shape [...] as [..., d]; the model's own scale is 1000 t."""
        half = self.linear_1.in_features // 2
        exact = self.linear_1.weight.dtype
        exponents = torch.arange(half, dtype=exact, device=t.device) * (-math.log(self.base) / half)
        angles = (t.to(exact) * 1000).unsqueeze(-1) * exponents.exp()
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.linear_2(F.silu(self.linear_1(waves)))


class TextEmbedder(TwoLayerMLP):
    """An MLP on text embeddings."""

    def forward(self, text: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, d]."""
        return self.linear_2(gelu_tanh(self.linear_1(text)))


class ConditionEmbedder(nn.Module):
    """Embeddings of time and text.

    Args:
        size: hidden units d.
        freq_dim: width of the sinusoids.
        text_dim: width D of the text embeddings.
        dtype: of all but the time embedder, which stays in at least fp32.
    """

    def __init__(self, size: int, *, freq_dim: int, text_dim: int, dtype: torch.dtype):
        super().__init__()
        self.time_embedder = TimeEmbedder(freq_dim, size, dtype=compute_dtype(dtype))
        self.time_proj = nn.Linear(size, 6 * size, dtype=dtype)
        self.text_embedder = TextEmbedder(text_dim, size, dtype=dtype)

    def time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Embeds times t [B, S] (S = 1: one for all tokens) for the head, [B, S, d], and the blocks, [B, S, 6, d]."""
        embedded = self.time_embedder(t).to(self.time_proj.weight.dtype)
        return embedded, self.time_proj(F.silu(embedded)).unflatten(-1, (6, -1))

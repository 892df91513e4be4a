"""Rotary position embedding over frames, rows and columns.

Channels (2i, 2i + 1) of a head are one complex number, turned by (position / base^(2i / d)) radians. Of the d channels
of a head, the first d - 4 (d // 6) follow the frame, the next 2 (d // 6) the row and the last 2 (d // 6) the column;
https://arxiv.org/abs/2104.09864 and, for the three axes, Wan's https://arxiv.org/abs/2503.20314.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """Rotation tables by grid size, built once for each size and device.

    Args:
        head_dim: channels of a head, even.
        max_positions: the longest axis the model knows.
        base: of the geometric series of frequencies.
    """

    kept_tables = 8

    def __init__(self, head_dim: int, *, max_positions: int, base: float = 10000.0):
        super().__init__()
        side = 2 * (head_dim // 6)
        self.axis_dims = (head_dim - 2 * side, side, side)
        self.max_positions = max_positions
        self.base = base
        self._tables: dict[tuple, Tensor] = {}

    def forward(self, grid: Sequence[int], *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The rotations of a grid of tokens.

        Args:
            grid: frames, rows and columns, in tokens.
            device: of the table.
            dtype: real dtype of the rotations, fp32 or fp64; angles are computed in fp64.

        Returns:
            (cos, sin) of each pair of channels, [frames * rows * columns, head_dim / 2, 2].

        Raises:
            ValueError: the grid is longer than the model knows.
        """
        if max(grid) > self.max_positions:
            raise ValueError(
                f"a grid of {' x '.join(map(str, grid))} tokens exceeds the model's rope_max_seq_len"
                f" {self.max_positions}; use a smaller clip"
            )
        key = (*grid, device, dtype)
        if key not in self._tables:
            if len(self._tables) == self.kept_tables:
                del self._tables[next(iter(self._tables))]
            # A table first asked for while sampling must serve training as well.
            with torch.inference_mode(False), torch.no_grad():
                self._tables[key] = self._build(grid, device).to(dtype)
        return self._tables[key]

    def _build(self, grid: Sequence[int], device: torch.device) -> Tensor:
        angles = []
        for axis, (length, dim) in enumerate(zip(grid, self.axis_dims, strict=True)):
            exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
            positions = torch.arange(length, dtype=torch.float64, device=device)
            shape = [1, 1, 1, dim // 2]
            shape[axis] = length
            angles.append(torch.outer(positions, self.base**-exponents).view(shape).expand(*grid, dim // 2))
        angle = torch.cat(angles, dim=-1).flatten(0, 2)
        return torch.stack([angle.cos(), angle.sin()], dim=-1)

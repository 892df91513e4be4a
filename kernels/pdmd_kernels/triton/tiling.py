"""The plain rules by which [B, S, d] is cut into programs.

A row kernel holds whole rows of d units in registers and walks over some of them; a tile kernel holds a tile of rows
and columns and walks down its columns. Either keeps what all its rows share and its column sums in registers.
"""

import triton
from torch import Tensor

from pdmd_kernels.triton.launching import padded

TILE = 2048
WIDEST_TILE = 1024
LONGEST_ROW_IN_COMPANY = 8192
"""Lanes of the longest row beside which a kernel can hold other rows, of factors and sums, without spilling."""
LONGEST_SUM = 16
"""Terms that are added one after the other in fp32; longer sums are taken of such sums, to keep the error small."""
ENOUGH_PROGRAMS = 512
"""With so many a device is busy."""


def row_warps(block: int) -> int:
    """Warps for rows of `block` lanes: 16 units a thread."""
    return min(max(block // 512, 1), 32)


def rows_per_program(samples: int, tokens: int, *, tile: int = 1) -> int:
    """How many rows a program walks over, `tile` at a time: as many as keep the sums exact, less on an idle device."""
    return max(min(LONGEST_SUM * tile, samples * tokens // ENOUGH_PROGRAMS), tile)


def column_tile(columns: int) -> tuple[int, int]:
    """Rows and columns of a tile of about `TILE` elements, as wide as wastes the least."""
    widths = [width for width in (WIDEST_TILE, WIDEST_TILE // 2, WIDEST_TILE // 4) if width <= padded(columns)]
    width = min(widths, key=lambda width: triton.cdiv(columns, width) * width) if widths else padded(columns)
    return TILE // width, width


def token_stride(factors: Tensor) -> int:
    """Elements from one token's shift, scale or gate to the next's in [B, 1 or S, d]: 0 where all tokens share one."""
    return factors.stride(1) if factors.shape[1] > 1 else 0

"""The 1,000 handwritten digits that no training saw, bundled as one greyscale picture.

The sheet holds 40 x 25 tiles of 28 x 28 pixels, row by row, a hundred of each class in the order of the classes, so
that a tile's label is its index // 100.
"""

import struct
from pathlib import Path

import imageio.v3 as iio
import torch

from megatron_pdmd.evaluation.moving_digits import DIGITS

TILE, COLUMNS, ROWS = 28, 40, 25
_PNG, _LARGEST_FILE = b"\x89PNG\r\n\x1a\n", 10_000_000
PER_CLASS = COLUMNS * ROWS // len(DIGITS)


def write_heldout_digits(path: Path, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Writes the sheet as PNG.

    Args:
        path: the PNG to write.
        images: [1000, 28, 28] in [0, 1].
        labels: [1000], sorted, a hundred of each class.

    Raises:
        ValueError: another number, size or order of digits.
    """
    if images.shape != (ROWS * COLUMNS, TILE, TILE) or not torch.equal(labels, _labels()):
        raise ValueError(f"the sheet takes {PER_CLASS} digits of {TILE} x {TILE} per class, sorted by class")
    pixels = (images * 255).round().to(torch.uint8).unflatten(0, (ROWS, COLUMNS))
    iio.imwrite(path, pixels.transpose(1, 2).reshape(ROWS * TILE, COLUMNS * TILE).numpy(), extension=".png")


def load_heldout_digits(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [1000, 28, 28] in [0, 1] and labels [1000].

    Raises:
        ValueError: the file is missing or is not such a sheet.
    """
    if not path.is_file():
        raise ValueError(f"no held-out digits at {path}; it is examples/tiny_wan/heldout_digits.png of the repository")
    mend = "restore examples/tiny_wan/heldout_digits.png of the repository"
    content = path.read_bytes() if path.stat().st_size <= _LARGEST_FILE else b""
    if not content.startswith(_PNG) or len(content) < 24:
        raise ValueError(f"{path} is not a readable PNG; {mend}")
    # Before it is decoded: a small file may claim more pixels than there is memory.
    columns, rows = struct.unpack(">II", content[16:24])
    try:
        fits = (columns, rows) == (COLUMNS * TILE, ROWS * TILE)
        pixels = iio.imread(content, plugin="pillow", extension=".png") if fits else None
    except Exception as error:  # whatever the decoder meets in a damaged file
        raise ValueError(f"{path} is not a readable PNG ({' '.join(str(error).split())}); {mend}") from None
    if pixels is None or pixels.shape != (rows, columns) or pixels.dtype != "uint8":
        wanted = f"{COLUMNS * TILE} x {ROWS * TILE} greyscale pixels of 8 bits"
        raise ValueError(f"{path} holds {columns} x {rows} pixels or others than {wanted}; {mend}")
    tiles = torch.from_numpy(pixels).reshape(ROWS, TILE, COLUMNS, TILE).transpose(1, 2)
    return tiles.reshape(-1, TILE, TILE).float() / 255, _labels()


def _labels() -> torch.Tensor:
    return torch.arange(ROWS * COLUMNS) // PER_CLASS

"""The 1,000 handwritten digits that no training saw, bundled as one greyscale picture.

The sheet holds 40 x 25 tiles of 28 x 28 pixels, row by row, a hundred of each class in the order of the classes, so
that a tile's label is its index // 100.
"""

from pathlib import Path

import imageio.v3 as iio
import torch

from megatron_pdmd.evaluation.moving_digits import DIGITS

TILE, COLUMNS, ROWS = 28, 40, 25
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
    try:
        pixels = iio.imread(path, plugin="pillow")
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is not a readable PNG; restore examples/tiny_wan/heldout_digits.png") from error
    if pixels.shape != (ROWS * TILE, COLUMNS * TILE) or pixels.dtype != "uint8":
        wanted = f"{COLUMNS * TILE} x {ROWS * TILE} greyscale pixels of 8 bits"
        raise ValueError(f"{path} holds {pixels.dtype} {pixels.shape}, not {wanted}; restore the repository's file")
    tiles = torch.from_numpy(pixels).reshape(ROWS, TILE, COLUMNS, TILE).transpose(1, 2)
    return tiles.reshape(-1, TILE, TILE).float() / 255, _labels()


def _labels() -> torch.Tensor:
    return torch.arange(ROWS * COLUMNS) // PER_CLASS

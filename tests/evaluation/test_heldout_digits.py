"""The sheet of held-out digits: round trip, the bundled file, and odd files."""

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from megatron_pdmd.evaluation.heldout_digits import load_heldout_digits, write_heldout_digits
from megatron_pdmd.evaluation.motion import centroids

LABELS = torch.arange(10).repeat_interleave(100)


def test_round_trip_keeps_every_digit_in_its_place(tmp_path):
    levels = torch.randint(256, (1000, 28, 28), generator=torch.Generator().manual_seed(0))
    write_heldout_digits(tmp_path / "digits.png", levels / 255, LABELS)
    images, labels = load_heldout_digits(tmp_path / "digits.png")
    assert torch.equal(images, levels / 255)
    assert torch.equal(labels, LABELS)
    assert iio.imread(tmp_path / "digits.png").shape == (25 * 28, 40 * 28)


def test_only_sorted_digits_are_written(tmp_path):
    with pytest.raises(ValueError, match="sorted by class"):
        write_heldout_digits(tmp_path / "digits.png", torch.zeros(1000, 28, 28), LABELS.flip(0))


def test_bundled_digits_are_centred_handwriting(digits):
    images, labels = digits
    assert images.shape == (1000, 28, 28) and labels.bincount().tolist() == [100] * 10
    assert centroids(2 * images[:, None, None] - 1, floor=0).abs().max() <= 1, "MNIST is centred by mass, to a pixel"
    assert len(images.unique(dim=0)) == 1000


def test_odd_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no held-out digits"):
        load_heldout_digits(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="not a readable PNG"):
        load_heldout_digits(tmp_path / "text.png")
    iio.imwrite(tmp_path / "small.png", np.zeros((28, 28), np.uint8))
    with pytest.raises(ValueError, match="1120 x 700"):
        load_heldout_digits(tmp_path / "small.png")

"""The sheet of held-out digits: round trip, the bundled file, and odd files."""

import random
import struct

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


def test_damaged_pictures_are_refused_in_one_line(tmp_path, tiny_wan):
    whole, path = (tiny_wan / "heldout_digits.png").read_bytes(), tmp_path / "digits.png"
    chance = random.Random(0)
    bomb = whole[:16] + struct.pack(">II", 2**31 - 1, 2**31 - 1) + whole[24:]
    spoilt = [bomb, *(whole[:kept] for kept in (0, 10, 30, 1000, len(whole) // 2))]
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[chance.randrange(60)] ^= 1 << chance.randrange(8)
        spoilt.append(damaged)
    refused = 0
    for content in spoilt:
        path.write_bytes(content)
        try:
            load_heldout_digits(path)
        except ValueError as error:
            refused += str(path) in str(error) and len(str(error).splitlines()) == 1
    assert refused > 50


def test_a_picture_in_colours_is_refused(tmp_path):
    iio.imwrite(tmp_path / "colours.png", np.zeros((700, 1120, 3), np.uint8))
    with pytest.raises(ValueError, match="1120 x 700 greyscale pixels"):
        load_heldout_digits(tmp_path / "colours.png")

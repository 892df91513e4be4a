"""Sheets and animations, read back from their files."""

import itertools
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from megatron_pdmd.evaluation.sheets import SheetStyle, mp4_available, save_animation, save_contact_sheet, to_pixels

STYLE = SheetStyle()


def clips_of_levels(count: int, frames: int, size: int = 16, channels: int = 1) -> torch.Tensor:
    """[B, C, F, size, size] in which every frame has its own even brightness."""
    levels = torch.linspace(-1, 1, count * frames).reshape(count, 1, frames, 1, 1)
    return levels.expand(-1, channels, -1, size, size).contiguous()


def tile_starts(line: np.ndarray) -> list[int]:
    """Where runs of one colour as long as a tile begin."""
    changes = [0, *(np.flatnonzero((line[1:] != line[:-1]).any(-1)) + 1), len(line)]
    return [a for a, b in itertools.pairwise(changes) if b - a == STYLE.smallest_tile]


def test_pixels_are_enlarged_without_smoothing():
    clips = torch.tensor([-1.0, 1.0, 0.0, -3.0]).reshape(1, 1, 1, 2, 2)
    pixels = to_pixels(clips, smallest_tile=5)
    assert pixels.shape == (1, 1, 6, 6, 3)
    assert pixels[0, 0, ::3, ::3, 0].tolist() == [[0, 255], [128, 0]]
    assert np.array_equal(pixels[0, 0], np.kron(pixels[0, 0, ::3, ::3], np.ones((3, 3, 1), np.uint8)))


def test_colours_stay_in_their_channels():
    clips = torch.full((1, 3, 1, 4, 4), -1.0)
    clips[:, 1] = 1
    assert to_pixels(clips)[0, 0, 0, 0].tolist() == [0, 255, 0]


def test_contact_sheet_has_rows_of_prompts_and_columns_of_frames(tmp_path: Path):
    clips = clips_of_levels(3, 5)
    groups = {"teacher": clips, "student": clips.flip(2)}
    save_contact_sheet(tmp_path / "new" / "sheet.png", groups, ["a 0", "a 1", "a 2"])
    sheet = iio.imread(tmp_path / "new" / "sheet.png")
    step, tile = STYLE.smallest_tile + STYLE.gap, STYLE.smallest_tile
    assert sheet.shape[0] == STYLE.margin + STYLE.line + 3 * step - STYLE.gap + STYLE.margin
    top = sheet.shape[0] - STYLE.margin - (3 * step - STYLE.gap)
    starts = tile_starts(sheet[top + step + 1])
    assert len(starts) == 10
    assert np.diff(starts[:5]).tolist() == [step] * 4
    assert starts[5] - starts[4] == tile + STYLE.group_gap
    assert sheet.shape[1] == starts[-1] + tile + STYLE.margin
    expected = to_pixels(clips)[:, :, 0, 0]
    for row in range(3):
        shown = sheet[top + row * step + tile // 2, np.array(starts) + tile // 2]
        assert np.array_equal(shown, np.concatenate([expected[row], expected[row, ::-1]]))
    assert (sheet[top:, : starts[0]] < 128).any(), "the prompts are written"
    assert (sheet[: top - 1, starts[0] :] < 128).any(), "the models' names are written"


def test_long_clips_show_evenly_spaced_frames_and_large_ones_are_shrunk(tmp_path: Path):
    save_contact_sheet(
        tmp_path / "sheet.png", clips_of_levels(1, 81, size=1024), ["a $ long $ prompt " * 50], max_frames=3
    )
    sheet = iio.imread(tmp_path / "sheet.png")
    assert sheet.shape[0] == 512 + 2 * STYLE.margin
    columns = sheet[sheet.shape[0] // 2, -STYLE.margin - 256 :: -(512 + STYLE.gap)][:3, 0]
    assert columns.tolist() == [255, 128, 0]


def test_image_sheet_in_colour(tmp_path: Path):
    save_contact_sheet(tmp_path / "sheet.png", clips_of_levels(2, 1, size=80, channels=3), ["one", "two"])
    assert iio.imread(tmp_path / "sheet.png").shape[0] == 2 * 80 + STYLE.gap + 2 * STYLE.margin


def test_gif_plays_a_grid_of_clips(tmp_path: Path):
    clips = clips_of_levels(5, 4)
    save_animation(tmp_path / "clips.gif", clips, columns=3, frames_per_second=10)
    frames = iio.imread(tmp_path / "clips.gif")
    step = STYLE.smallest_tile + STYLE.gap
    assert frames.shape == (4, 2 * step - STYLE.gap, 3 * step - STYLE.gap, 3)
    assert np.array_equal(frames[:, step, step], to_pixels(clips)[4, :, 0, 0])
    assert (frames[:, -1, -1] == 255).all(), "the empty place is white"
    assert iio.immeta(tmp_path / "clips.gif")["duration"] == 100


def test_mp4_is_written_or_the_missing_plugin_is_named(tmp_path: Path):
    if mp4_available():
        save_animation(tmp_path / "clips.mp4", clips_of_levels(1, 4, size=65))
        assert iio.imread(tmp_path / "clips.mp4", plugin="FFMPEG").shape == (4, 66, 66, 3)
    else:
        with pytest.raises(ValueError, match="pip install imageio-ffmpeg"):
            save_animation(tmp_path / "clips.mp4", clips_of_levels(1, 4))


def test_what_cannot_be_drawn(tmp_path: Path):
    with pytest.raises(ValueError, match="decode latents first"):
        save_contact_sheet(tmp_path / "sheet.png", torch.zeros(1, 16, 1, 8, 8), ["a"])
    with pytest.raises(ValueError, match="2 prompts needs as many clips, got 1 student"):
        save_contact_sheet(tmp_path / "sheet.png", {"student": torch.zeros(1, 1, 1, 8, 8)}, ["a", "b"])
    with pytest.raises(ValueError, match=r"\.gif or \.mp4"):
        save_animation(tmp_path / "clips.avi", torch.zeros(1, 1, 2, 8, 8))

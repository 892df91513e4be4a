"""Motion against clips whose motion is known exactly, and against the renderer's own paths."""

import pytest
import torch

from megatron_pdmd.evaluation.motion import centroids, direction_accuracy, displacements, mean_velocity, speed_error
from megatron_pdmd.evaluation.moving_digits import DIRECTIONS, SPEEDS, all_motions, render, sample_paths


def shifted_square(step: tuple[int, int], frames: int = 4, channels: int = 1) -> torch.Tensor:
    """A square of 3 x 3 pixels that moves whole pixels from the middle of the frame: [1, C, F, 33, 33]."""
    clip = torch.full((1, channels, frames, 33, 33), -1.0)
    for frame in range(frames):
        x, y = 15 + frame * step[0], 15 + frame * step[1]
        clip[:, :, frame, y : y + 3, x : x + 3] = 1
    return clip


@pytest.mark.parametrize("step", [(1, 0), (-2, 0), (0, 3), (2, -1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_whole_pixel_steps_are_measured(step, channels):
    clip = shifted_square(step, channels=channels)
    expected = torch.arange(4.0)[None, :, None] * torch.tensor(step, dtype=torch.float32)
    torch.testing.assert_close(centroids(clip), expected)
    torch.testing.assert_close(displacements(clip), torch.tensor(step).float().expand(1, 3, 2))
    torch.testing.assert_close(mean_velocity(clip), torch.tensor([step]).float())


def test_faint_background_does_not_draw_the_centre():
    clip = shifted_square((2, 1))
    torch.testing.assert_close(centroids(clip.clamp(min=-0.85)), centroids(clip))


def test_a_blank_clip_stands_still():
    assert torch.equal(mean_velocity(torch.full((2, 1, 4, 8, 8), -1.0)), torch.zeros(2, 2))


def test_a_single_frame_has_no_motion():
    with pytest.raises(ValueError, match="two frames"):
        mean_velocity(torch.zeros(1, 1, 1, 8, 8))


@pytest.mark.parametrize(
    ("velocity", "accuracy", "error"),
    [
        ((2.0, 0.0), 1, 1),
        ((1.0, 0.9), 1, 0),
        ((1.0, 1.1), 0, 0),
        ((-1.0, 0.0), 0, 2),
        ((0.0, 0.0), 0, 1),
        ((0.1, 0.0), 0, 0.9),
    ],
)
def test_direction_and_speed_of_one_clip(velocity, accuracy, error):
    measured, asked = torch.tensor([velocity]), torch.tensor([[1.0, 0.0]])
    assert direction_accuracy(measured, asked, minimum_speed=0.15) == accuracy
    assert speed_error(measured, asked, torch.ones(1)) == pytest.approx(error)


@pytest.fixture(scope="module")
def rendered(digits) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clips of all motions, the asked directions and the nominal speeds."""
    motions, generator = all_motions(), torch.Generator().manual_seed(0)
    clips = render(digits[0][::12][: len(motions)], sample_paths(motions, generator), generator)
    directions = torch.tensor([DIRECTIONS[m.direction] for m in motions])
    return clips, directions, torch.tensor([SPEEDS[m.speed] for m in motions])


def test_rendered_clips_move_as_asked(rendered):
    clips, directions, speeds = rendered
    velocity = mean_velocity(clips)
    assert direction_accuracy(velocity, directions) == 1
    # The renderer's speeds differ from the nominal ones by up to a tenth.
    assert speed_error(velocity, directions, speeds) < 0.1


def test_time_reversed_clips_move_the_wrong_way(rendered):
    clips, directions, speeds = rendered
    velocity = mean_velocity(clips.flip(2))
    assert direction_accuracy(velocity, directions) == 0
    assert speed_error(velocity, directions, speeds) > 1.9

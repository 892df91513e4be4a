"""The moving-digits task: short clips of one handwritten digit that drifts across a small frame, named by a prompt.

The prompt gives digit, direction and speed; the handwriting, the size, the slant, the start and the path are free, so
one prompt has many right answers. Clips are tensors [B, 1, F, H, W] in [-1, 1] with background -1, which are also the
latents of the tiny teacher (it has no VAE).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

FRAMES, HEIGHT, WIDTH = 5, 16, 16
DIGITS = tuple(range(10))
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}  # (x, y), y downwards
SPEEDS = {"slowly": 0.5, "quickly": 1.1}  # pixels per frame
SUPERSAMPLING = 2


@dataclass(frozen=True)
class Motion:
    """What one prompt asks for."""

    digit: int
    direction: str
    speed: str

    @property
    def prompt(self) -> str:
        return f"a {self.digit} moving {self.direction} {self.speed}"

    @classmethod
    def from_prompt(cls, prompt: str) -> "Motion":
        """The inverse of `prompt`.

        Raises:
            ValueError: the text is not one of this task's prompts.
        """
        for motion in all_motions():
            if motion.prompt == prompt.strip():
                return motion
        raise ValueError(f"'{prompt}' is not a prompt of the moving-digits task (like '{all_motions()[0].prompt}')")


def all_motions() -> list[Motion]:
    """The 80 motions, digit by digit."""
    return [Motion(digit, direction, speed) for digit in DIGITS for direction in DIRECTIONS for speed in SPEEDS]


def _uniform(low: float, high: float, count: int, generator: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def sample_paths(motions: list[Motion], generator: torch.Generator) -> torch.Tensor:
    """Centres of the digit in each frame, [B, F, 2] as (x, y) pixels from the frame's centre.

    Along the asked direction the digit moves evenly, at the speed's nominal value give or take a tenth; across it, it
    starts anywhere, drifts and bows a little.
    """
    count = len(motions)
    along = torch.tensor([DIRECTIONS[m.direction] for m in motions])
    across = along.flip(-1)
    speed = torch.tensor([SPEEDS[m.speed] for m in motions]) * _uniform(0.9, 1.1, count, generator)
    travel = speed * (FRAMES - 1)
    slack = (6.0 - travel).clamp(min=1.0)  # a digit is about 10 pixels wide, so its centre has about 6 to go
    start = -travel / 2 + slack * _uniform(-0.5, 0.5, count, generator)
    offset, drift, bow = (_uniform(-reach, reach, count, generator) for reach in (2.2, 0.15, 0.6))
    frame = torch.arange(FRAMES, dtype=torch.float32)
    middle = (FRAMES - 1) / 2
    a = start[:, None] + speed[:, None] * frame
    c = offset[:, None] + drift[:, None] * (frame - middle) + bow[:, None] * (1 - ((frame - middle) / middle) ** 2)
    return a[..., None] * along[:, None] + c[..., None] * across[:, None]


def render(images: torch.Tensor, paths: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draws each handwritten digit along its path.

    Args:
        images: [B, 28, 28] in [0, 1], MNIST's layout: centred by mass.
        paths: [B, F, 2], from `sample_paths`.
        generator: draws size and slant.

    Returns:
        [B, 1, F, H, W] in [-1, 1].
    """
    count, frames = paths.shape[:2]
    scale = _uniform(0.50, 0.58, count, generator)  # a 20-pixel glyph becomes 10 to 11.6 pixels
    slant, turn = _uniform(-0.15, 0.15, count, generator), _uniform(-0.12, 0.12, count, generator)
    height, width = HEIGHT * SUPERSAMPLING, WIDTH * SUPERSAMPLING
    y, x = torch.meshgrid(
        (torch.arange(height) + 0.5) / SUPERSAMPLING - HEIGHT / 2,
        (torch.arange(width) + 0.5) / SUPERSAMPLING - WIDTH / 2,
        indexing="ij",
    )
    relative = torch.stack([x, y], -1)[None, None] - paths[:, :, None, None, :]  # [B, F, h, w, 2]
    one = torch.ones_like(turn)
    rows = torch.stack([torch.stack([one, slant + turn], -1), torch.stack([-turn, one], -1)], -2)
    source = torch.einsum("bij,bfhwj->bfhwi", rows / scale[:, None, None], relative)
    grid = (source / 14.0).reshape(count, frames * height, width, 2)  # 14 of the 28 pixels are one unit of the grid
    drawn = F.grid_sample(images[:, None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    pooled = F.avg_pool2d(drawn.reshape(count * frames, 1, height, width), SUPERSAMPLING)
    return (2 * pooled - 1).reshape(count, 1, frames, HEIGHT, WIDTH)


def sample_clips(
    motions: list[Motion], images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Real clips of the given motions, [B, 1, F, H, W], each with a digit drawn at random from those of its class.

    Args:
        images: [N, 28, 28] in [0, 1].
        labels: [N] class of each image.
    """
    by_class = [torch.nonzero(labels == digit).flatten() for digit in DIGITS]
    draws = torch.rand(len(motions), generator=generator)
    candidates = [by_class[m.digit] for m in motions]
    index = torch.stack([own[int(u * len(own))] for own, u in zip(candidates, draws, strict=True)])
    return render(images[index], sample_paths(motions, generator), generator)

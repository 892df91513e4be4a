"""The pictures of the 2-D toy: samples over the exact density, and how much of each mode they hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from ring import Ring
from torch import Tensor

from megatron_pdmd.diffusion import NoiseSchedule

GRID = 240  # points a side of a density's picture
SHADES = LinearSegmentedColormap.from_list("shades", ["#ffffff", "#e3e7ee", "#aab3c5", "#6b7690"])
INK = "#2b2f3a"


@dataclass(frozen=True)
class Panel:
    """One method's samples in the combined picture.

    Attributes:
        title: of the panel.
        samples: [N, 2].
        caption: numbers below the samples.
    """

    title: str
    samples: Tensor
    caption: str


def draw_comparison(settings: Mapping[str, Sequence[Panel]], ring: Ring, schedule: NoiseSchedule, path: Path) -> None:
    """A row for each setting, a column for each method: samples, below them the modes' shares over their weights."""
    columns = len(next(iter(settings.values())))
    figure = plt.figure(figsize=(3.1 * columns, 4.35 * len(settings) + 0.2), layout="constrained")
    rows = figure.subfigures(len(settings), 1, squeeze=False)[:, 0]
    for row, (setting, panels) in zip(rows, settings.items(), strict=True):
        row.suptitle(setting, color=INK, fontweight="bold")
        axes = row.subplots(2, columns, height_ratios=(3.1, 0.7))
        limit = 1.1 * max(_largest_share(panel.samples, ring) for panel in panels)
        for plane, bars, panel in zip(*axes, panels, strict=True):
            _draw_plane(plane, panel.samples, _sample_colours(panel.samples, ring), 0.0, ring, schedule)
            plane.set_title(panel.title, color=INK, fontsize=11)
            _draw_shares(bars, panel.samples, ring, limit)
            bars.set_xlabel(panel.caption, color=INK, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_path(levels: Mapping[float, Tensor], title: str, ring: Ring, schedule: NoiseSchedule, path: Path) -> None:
    """The samples [N, 2] at every noise level of the sampler, each over the exact density of that level.

    A sample has the colour of the mode where it ends, so that the noise shows which part of it becomes which mode.
    """
    colours = _sample_colours(list(levels.values())[-1], ring)
    figure, axes = plt.subplots(1, len(levels), figsize=(2.9 * len(levels), 3.35), layout="constrained")
    figure.suptitle(title, color=INK, fontweight="bold")
    for axis, (t, samples) in zip(axes, levels.items(), strict=True):
        _draw_plane(axis, samples, colours, t, ring, schedule)
        axis.set_title(f"t = {t:.3g}", color=INK, fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_plane(
    axis: Axes, samples: Tensor, colours: np.ndarray, t: float, ring: Ring, schedule: NoiseSchedule
) -> None:
    """Samples over the exact p(x_t)."""
    extent = 1.3 * ring.centers.norm(dim=1).max().item() * (1 - t) + 3.0 * t
    ticks = torch.linspace(-extent, extent, GRID)
    points = torch.cartesian_prod(ticks, ticks).flip(1)  # image rows run along y
    density = ring.density(points, t, schedule).view(GRID, GRID)
    # The square root shows faint modes beside heavy ones; blurred by a pixel's width nothing falls between pixels.
    axis.imshow(density.sqrt(), extent=(-extent, extent) * 2, origin="lower", cmap=SHADES, interpolation="bilinear")
    axis.scatter(*samples.numpy().T, s=2.2, c=colours, alpha=0.55, linewidths=0)
    axis.set(xlim=(-extent, extent), ylim=(-extent, extent), xticks=(), yticks=(), aspect="equal")
    axis.spines[:].set_color("#c8cdd8")


def _draw_shares(axis: Axes, samples: Tensor, ring: Ring, limit: float) -> None:
    """A wide pale bar for each mode's weight, in it a narrow one for its share of the samples."""
    places = np.arange(len(ring.weights))
    axis.bar(places, ring.weights.numpy(), width=0.9, color="#d3d8e2")
    axis.bar(places, ring.shares(samples).numpy(), width=0.45, color=_mode_colours(ring))
    axis.set(ylim=(0, limit), xticks=(), yticks=())
    axis.spines[["left", "right", "top"]].set_visible(False)
    axis.spines["bottom"].set_color("#c8cdd8")


def _largest_share(samples: Tensor, ring: Ring) -> float:
    return max(ring.weights.max().item(), ring.shares(samples).max().item())


def _sample_colours(samples: Tensor, ring: Ring) -> np.ndarray:
    """The colour of the mode that each sample of [N, 2] is nearest to, RGB [N, 3]."""
    return _mode_colours(ring)[ring.nearest_mode(samples)[0].numpy()]


def _mode_colours(ring: Ring) -> np.ndarray:
    """A colour of the wheel for each pair, one shade for each of its two modes: RGB [K, 3]."""
    mode = np.arange(len(ring.weights))
    wheel = plt.get_cmap("hsv")(mode // 2 * 2 / len(mode))[:, :3]
    return wheel * np.where(mode % 2 == 0, 0.82, 0.62)[:, None]

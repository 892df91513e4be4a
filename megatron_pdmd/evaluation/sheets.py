"""Samples to look at: contact sheets with prompts (PNG), and grids of moving clips (GIF, MP4).

All functions take pixels [B, C, F, H, W] in [-1, 1] with C = 1 (grey) or 3 (RGB); F = 1 is an image. Small frames are
enlarged by a whole factor without smoothing, so that every pixel stays visible.
"""

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_pdmd.evaluation.labels import columns, fonts_for, printable, quiet_matching, wrapped
from megatron_pdmd.files.whole import write_text, written_whole

DPI = 128  # a power of two, so that pixels / DPI inches are exactly that many pixels again


@dataclass(frozen=True)
class SheetStyle:
    """Sizes of a contact sheet, in pixels unless said otherwise."""

    smallest_tile: int = 64  # smaller frames are enlarged to at least this
    largest_tile: int = 512  # larger frames are shrunk by a whole factor
    gap: int = 4  # between frames and between rows
    group_gap: int = 16  # between the samples of two models
    margin: int = 8
    text: int = 14  # height of a line's letters; lines are 1.3 times that apart
    label_letters: int = 28  # prompts are wrapped at this width

    @property
    def line(self) -> int:
        return math.ceil(1.3 * self.text)

    @property
    def letter(self) -> int:
        return math.ceil(0.61 * self.text)  # the width of DejaVu Sans Mono, which matplotlib brings along


def to_pixels(clips: torch.Tensor, smallest_tile: int = 1) -> np.ndarray:
    """[B, C, F, H, W] in [-1, 1] -> uint8 RGB [B, F, H k, W k, 3], k the least factor that makes tiles large enough.

    Values outside [-1, 1] are clipped; NaN is black.

    Raises:
        ValueError: not five dims, or neither 1 nor 3 channels.
    """
    _check_pixels(clips)
    factor = math.ceil(smallest_tile / min(clips.shape[-2:]))
    levels = ((clips.detach().float().cpu().nan_to_num(-1.0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    rgb = levels.expand(-1, 3, -1, -1, -1).permute(0, 2, 3, 4, 1)
    return rgb.repeat_interleave(factor, 2).repeat_interleave(factor, 3).numpy()


def shrunk(clips: torch.Tensor, style: SheetStyle | None = None) -> torch.Tensor:
    """[B, C, F, H, W] in the size a sheet shows, fp32: frames larger than a tile are made smaller by a whole factor."""
    factor = math.ceil(max(clips.shape[-2:]) / (style or SheetStyle()).largest_tile)
    return F.avg_pool3d(clips.float(), (1, factor, factor))


def save_contact_sheet(
    path: Path,
    clips: torch.Tensor | Mapping[str, torch.Tensor],
    prompts: list[str],
    max_frames: int = 8,
    style: SheetStyle | None = None,
) -> None:
    """Writes a PNG with a row for each prompt and a column for each frame.

    Where no installed font has a prompt's letters, the row has its number, and a text file beside the PNG the prompts.

    Args:
        path: the PNG to write; its folder is made.
        clips: one clip for each prompt, or for several models {"teacher": clips, "student": clips}, drawn side by side.
        prompts: the rows' labels.
        max_frames: of longer clips, this many evenly spaced frames are shown.
        style: sizes.

    Raises:
        ValueError: the number of clips and prompts differ, or pixels of a wrong shape.
    """
    style = style or SheetStyle()
    groups = clips if isinstance(clips, Mapping) else {"": clips}
    tiles = {name: _tiles(group, max_frames, style) for name, group in groups.items()}
    for name, group in tiles.items():
        if len(group) != len(prompts):
            raise ValueError(f"a sheet of {len(prompts)} prompts needs as many clips, got {len(group)} {name}".rstrip())
    row_height = max(group.shape[2] for group in tiles.values())
    labels = _labels(path, prompts, style, row_height)
    longest = max((columns(line) for label in labels for line in label.split("\n")), default=0)
    left = style.margin + longest * style.letter + style.margin
    top = style.margin + (style.line if any(tiles) else 0)
    widths = {name: group.shape[1] * (group.shape[3] + style.gap) - style.gap for name, group in tiles.items()}
    width = left + sum(widths.values()) + style.group_gap * (len(tiles) - 1) + style.margin
    height = top + len(prompts) * (row_height + style.gap) - style.gap + style.margin
    canvas = np.full((height, width, 3), 255, dtype=np.uint8)
    texts = [(style.margin, top + i * (row_height + style.gap), label) for i, label in enumerate(labels)]
    x = left
    for name, group in tiles.items():
        texts.append((x, style.margin // 2, name))
        for column in range(group.shape[1]):
            tile_x = x + column * (group.shape[3] + style.gap)
            for row, tile in enumerate(group[:, column]):
                y = top + row * (row_height + style.gap)
                canvas[y : y + tile.shape[0], tile_x : tile_x + tile.shape[1]] = tile
        x += widths[name] + style.group_gap
    with written_whole(path) as partial:
        iio.imwrite(partial, _with_texts(canvas, texts, style.text), extension=".png")


def save_animation(
    path: Path,
    clips: torch.Tensor,
    columns: int | None = None,
    frames_per_second: float = 8.0,
    style: SheetStyle | None = None,
) -> None:
    """Writes a grid of clips that play together, as GIF or MP4 by the path's suffix.

    Args:
        path: ends in `.gif` or `.mp4`; its folder is made.
        clips: [B, C, F, H, W].
        columns: clips in a row; by default the grid is about square.
        frames_per_second: a GIF keeps time in hundredths of a second.
        style: sizes.

    Raises:
        ValueError: another suffix, MP4 without imageio's ffmpeg plugin, or pixels of a wrong shape.
    """
    style = style or SheetStyle()
    frames = _grid(to_pixels(clips, style.smallest_tile), columns or math.ceil(math.sqrt(len(clips))), style.gap)
    suffix = path.suffix.lower()
    if suffix not in (".gif", ".mp4"):
        raise ValueError(f"clips are saved as .gif or .mp4, not as '{path.name}'")
    if suffix == ".mp4" and not mp4_available():
        raise ValueError(f"cannot write {path.name}: MP4 needs `pip install imageio-ffmpeg`, or save a .gif instead")
    with written_whole(path) as partial:
        if suffix == ".gif":
            iio.imwrite(partial, frames, extension=".gif", duration=round(100 / frames_per_second) * 10, loop=0)
        else:
            odd = [(0, side % 2) for side in frames.shape[1:3]]  # H.264's chroma planes need even sides
            even = np.pad(frames, [(0, 0), *odd, (0, 0)], mode="edge")
            options = {"fps": frames_per_second, "codec": "libx264", "macro_block_size": 2}
            partial.write_bytes(iio.imwrite("<bytes>", even, plugin="FFMPEG", extension=".mp4", **options))


def mp4_available() -> bool:
    """Whether imageio's ffmpeg plugin is installed."""
    return importlib.util.find_spec("imageio_ffmpeg") is not None


def _check_pixels(clips: torch.Tensor) -> None:
    if clips.ndim != 5 or clips.shape[1] not in (1, 3):
        raise ValueError(f"pictures need pixels [B, 1 or 3, F, H, W], got {list(clips.shape)}; decode latents first")


def _tiles(clips: torch.Tensor, max_frames: int, style: SheetStyle) -> np.ndarray:
    """The shown frames of [B, C, F, H, W], brought to a tile's size: uint8 [B, F', h, w, 3]."""
    _check_pixels(clips)
    count = clips.shape[2]
    shown = clips[:, :, torch.linspace(0, count - 1, min(count, max_frames)).round().long()]
    return to_pixels(shrunk(shown, style), style.smallest_tile)


def _labels(path: Path, prompts: list[str], style: SheetStyle, height: int) -> list[str]:
    """What stands beside the rows; what no font can draw goes into a text file beside the sheet."""
    texts = [printable(prompt) for prompt in prompts]
    missing = fonts_for(texts)[1]
    listed = [f"prompt {number}" if missing & set(text) else text for number, text in enumerate(texts, start=1)]
    if listed != texts:
        numbered = (f"{number}: {text}\n" for number, text in enumerate(texts, start=1))
        write_text(path.with_suffix(".txt"), "".join(numbered))
    return ["\n".join(wrapped(text, style.label_letters, max(1, height // style.line))) for text in listed]


def _with_texts(canvas: np.ndarray, texts: list[tuple[int, int, str]], size: int) -> np.ndarray:
    """The canvas [H, W, 3] with texts whose upper left corners lie at (x, y)."""
    height, width = canvas.shape[:2]
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    agg = FigureCanvasAgg(figure)
    figure.figimage(canvas, origin="upper")
    families = list(fonts_for(text for _, _, text in texts)[0])
    for x, y, text in texts:
        figure.text(
            x / width, 1 - y / height, text, va="top", family=families, linespacing=1.1, parse_math=False,
            fontsize=size * 72 / DPI,
        )  # fmt: skip
    with quiet_matching():
        agg.draw()
    return np.asarray(agg.buffer_rgba())[..., :3].copy()


def _grid(clips: np.ndarray, columns: int, gap: int) -> np.ndarray:
    """[B, F, h, w, 3] -> [F, H, W, 3], the clips row by row on white."""
    count, frames, height, width = clips.shape[:4]
    rows = math.ceil(count / columns)
    canvas = np.full(
        (frames, rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8
    )  # fmt: skip
    for index, clip in enumerate(clips):
        y, x = index // columns * (height + gap), index % columns * (width + gap)
        canvas[:, y : y + height, x : x + width] = clip
    return canvas

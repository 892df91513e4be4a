"""Texts of any script in pictures: broken into lines by the width of their letters, in fonts that have them."""

import functools
import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

MONOSPACE = "DejaVu Sans Mono"  # which matplotlib brings along
ELLIPSIS = "…"
# A space, a letter that a line may end at on either side, or a word.
_WIDE = "\u1100-\u115f\u2e80-\u303e\u3041-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff60\uffe0-\uffe6"
_UNITS = re.compile(rf"[ ]|[{_WIDE}]|[^ {_WIDE}]+")


def printable(text: str) -> str:
    """The text in one line, without what has no form of its own: controls, joiners, halves of characters."""
    kept = (" " if c.isspace() else c for c in text if c.isspace() or not unicodedata.category(c).startswith("C"))
    return " ".join("".join(kept).split())


def columns(text: str) -> int:
    """Letters of a monospaced line that a text takes: two for a wide one and for one that another font draws."""
    return sum(_columns(letter) for letter in text)


def _columns(letter: str) -> int:
    if unicodedata.combining(letter):
        return 0
    is_wide = unicodedata.east_asian_width(letter) in "WF"
    return 2 if is_wide or ord(letter) not in _letters_of(MONOSPACE) else 1


def wrapped(text: str, width: int, most: int) -> list[str]:
    """The text in lines, broken at spaces and beside ideographs; a word longer than a line is broken anywhere.

    Args:
        text: what `printable` returns.
        width: columns of a line, at least 4.
        most: lines, of which the last ends in an ellipsis where there would be more.
    """
    lines = [""]
    for unit in _UNITS.findall(text):
        for part in _broken(unit, width):
            if columns(lines[-1] + part) > width:
                lines[-1] = lines[-1].rstrip()
                lines.append("")
            if lines[-1] or part != " ":
                lines[-1] += part
    if len(lines) > most:
        last = lines[most - 1]
        while columns(f"{last} {ELLIPSIS}") > width:
            last = last[:-1]
        lines = [*lines[: most - 1], f"{last.rstrip()} {ELLIPSIS}"]
    return [line.rstrip() for line in lines]


def _broken(word: str, width: int) -> Iterable[str]:
    if columns(word) <= width:
        return [word]
    parts = [""]
    for letter in word:
        if columns(parts[-1] + letter) > width:
            parts.append("")
        parts[-1] += letter
    return parts


@contextmanager
def quiet_matching() -> Iterator[None]:
    """matplotlib does not tell in this block that a family has no face of the usual weight."""
    logger = logging.getLogger(font_manager.__name__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def fonts_for(texts: Iterable[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Families of installed fonts, to be tried in order, and the letters that none of them has."""
    return _fonts_for(frozenset(letter for text in texts for letter in text if letter != "\n"))


@functools.lru_cache(maxsize=64)
def _fonts_for(letters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    chosen = [MONOSPACE]
    missing = frozenset(letter for letter in letters if ord(letter) not in _letters_of(MONOSPACE))
    while missing:
        having = {family: sum(ord(letter) in _letters_of(family) for letter in missing) for family in _families()}
        best = max(having, key=having.__getitem__, default=None)
        if best is None or not having[best]:
            break
        chosen.append(best)
        missing = frozenset(letter for letter in missing if ord(letter) not in _letters_of(best))
    return tuple(chosen), missing


def _families() -> list[str]:
    """All that are installed but the one that draws a box for every letter."""
    return sorted({e.name for e in font_manager.fontManager.ttflist if not e.name.startswith("Last Resort")})


@functools.cache
def _letters_of(family: str) -> frozenset[int]:
    """Code points that a family's upright face can draw; none where it cannot be read or has pictures for letters."""
    try:
        with quiet_matching():
            path = font_manager.findfont(font_manager.FontProperties(family=[family]), fallback_to_default=False)
        font = FT2Font(path)
        return frozenset(font.get_charmap()) if font.scalable else frozenset()
    except (OSError, RuntimeError, ValueError):
        return frozenset()

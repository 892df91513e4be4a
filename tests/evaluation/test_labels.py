"""Labels of any script: their lines, their widths, and the fonts that draw them."""

import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib.tables._g_l_y_f import Glyph
from matplotlib import font_manager

from megatron_pdmd.evaluation import labels
from megatron_pdmd.evaluation.labels import MONOSPACE, columns, fonts_for, printable, wrapped
from megatron_pdmd.evaluation.sheets import save_contact_sheet

CAT = "一只猫在草地上慢慢地走"


def square() -> Glyph:
    """A letter as large as a letter can be."""
    pen = TTGlyphPen(None)
    for index, corner in enumerate(((0, -100), (0, 800), (1000, 800), (1000, -100))):
        (pen.lineTo if index else pen.moveTo)(corner)
    pen.closePath()
    return pen.glyph()


def make_font(path: Path, family: str, letters: str) -> Path:
    """A font whose letters are black squares of one em."""
    letters = "".join(dict.fromkeys(letters))
    names = [".notdef", *(f"u{ord(letter):04X}" for letter in letters)]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord(letter): f"u{ord(letter):04X}" for letter in letters})
    font.setupGlyf({name: square() for name in names})
    font.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": family, "styleName": "Regular"})
    font.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    font.setupPost()
    font.save(path)
    return path


@pytest.fixture(autouse=True)
def dejavu_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine without other fonts than those that matplotlib brings along."""
    own = [font for font in font_manager.fontManager.ttflist if font.name.startswith(("DejaVu Sans", "Last Resort"))]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    forget()
    yield
    forget()


def forget() -> None:
    """Fonts are looked for once in a program; these tests change what there is."""
    labels._fonts_for.cache_clear()
    labels._letters_of.cache_clear()
    font_manager.fontManager._findfont_cached.cache_clear()


def test_printable_text_has_one_line_and_no_controls():
    assert printable(" a\tb\n\nc\x1b[2J\u200dd\ud800e ") == "a b c[2Jde"
    assert printable("\x00\u202e") == ""


def test_wide_letters_take_two_columns_and_combining_ones_none():
    assert columns("cat") == 3
    assert columns("猫が") == 4
    assert columns("e\u0301") == 1
    assert columns("") == 0


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a seven moves", ["a seven", "moves"]),
        ("incomprehensibly", ["incomprehe", "nsibly"]),
        ("一只猫在草地上", ["一只猫在草", "地上"]),
        ("the 猫猫猫猫 walks", ["the 猫猫猫", "猫 walks"]),
        ("", [""]),
        ("a b c d e f g h i j k l m n o p", ["a b c d e", "f g h i j", "k l m n …"]),
        ("猫" * 40, ["猫" * 5, "猫" * 5, "猫" * 4 + " …"]),
    ],
)
def test_lines_are_no_wider_than_asked(text, lines):
    found = wrapped(text, 10, 3)
    assert found == lines
    assert all(columns(line) <= 10 for line in found)


def test_fonts_are_added_for_the_letters_that_need_them(tmp_path):
    assert fonts_for(["a cat"]) == ((MONOSPACE,), frozenset())
    assert fonts_for([CAT]) == ((MONOSPACE,), frozenset(CAT))
    for family, letters in (("Few", CAT[:3]), ("Most", CAT[2:]), ("None", "x")):
        font_manager.fontManager.addfont(make_font(tmp_path / f"{family}.ttf", family, letters))
    forget()
    assert fonts_for(["a cat", CAT]) == ((MONOSPACE, "Most", "Few"), frozenset())
    assert fonts_for([CAT + "狗"])[1] == {"狗"}


def test_a_broken_font_is_passed_over(tmp_path):
    path = make_font(tmp_path / "broken.ttf", "Broken", CAT)
    font_manager.fontManager.addfont(path)
    path.write_bytes(b"no font")
    forget()
    assert fonts_for([CAT]) == ((MONOSPACE,), frozenset(CAT))


def sheet(path: Path, prompts: list[str], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture) -> np.ndarray:
    """A sheet's pixels; nothing must be said while it is drawn."""
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        save_contact_sheet(path, torch.ones(len(prompts), 1, 1, 64, 64), prompts)
    assert not caplog.records and capfd.readouterr().err == ""
    return iio.imread(path)


def test_letters_of_another_font_are_drawn_within_their_columns(tmp_path, caplog, capfd):
    font_manager.fontManager.addfont(make_font(tmp_path / "han.ttf", "Han", CAT))
    own = font_manager.fontManager.ttflist
    own[-1] = replace(own[-1], weight=300)  # of which matplotlib has much to say
    forget()
    picture = sheet(tmp_path / "sheet.png", ["猫猫猫", "a cat"], caplog, capfd)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".txt"] == []
    label = picture[8 : 8 + 64, : -(64 + 8)]
    dark = np.flatnonzero((label < 64).all(-1).any(0))
    assert 3 * 13 < dark[-1] - dark[0] < 3 * 16, "three squares of an em, 14 pixels, side by side"
    assert dark[-1] + 8 <= label.shape[1], "none reaches the picture"


def test_prompts_that_no_font_has_are_numbered_and_written_beside(tmp_path, caplog, capfd):
    prompts = ["a cat", CAT, f"{CAT} \x00 again"]
    picture = sheet(tmp_path / "sheet.png", prompts, caplog, capfd)
    told = (tmp_path / "sheet.txt").read_text(encoding="utf-8").splitlines()
    assert told == ["1: a cat", f"2: {CAT}", f"3: {CAT} again"]
    numbered = sheet(tmp_path / "numbers.png", ["a cat", "prompt 2", "prompt 3"], caplog, capfd)
    assert np.array_equal(picture, numbered)
    assert not (tmp_path / "numbers.txt").exists()

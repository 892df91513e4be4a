"""The range of every number that a user gives: wide enough for any real use, narrow enough that nothing can overflow,
hang or ask for more memory than there is in the world."""

from dataclasses import dataclass

LONGEST_SHOWN = 80  # characters of a user's value that an error repeats


@dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most`, both allowed unless `open_below` or `open_above` says otherwise."""

    least: float
    most: float
    open_below: bool = False
    open_above: bool = False

    def __contains__(self, value: float) -> bool:
        above = self.least < value if self.open_below else self.least <= value
        below = value < self.most if self.open_above else value <= self.most
        return above and below

    def __str__(self) -> str:
        return f"{'(' if self.open_below else '['}{self.least}, {self.most}{')' if self.open_above else ']'}"


def check_range(
    flag: str, value: float, least: float, most: float, *, open_below: bool = False, open_above: bool = False
) -> None:
    """Refuses a number outside of a range; NaN lies in none.

    Args:
        flag: names the number in the error, such as `--frames`.
        value: what the user gave.
        least, most: the range.
        open_below, open_above: `least` or `most` itself is refused too.

    Raises:
        ValueError: names the flag, the value and the range.
    """
    allowed = Range(least, most, open_below, open_above)
    if value not in allowed:
        raise ValueError(f"{flag} {shown(value)}: must lie in {allowed}")


def shown(value: object) -> str:
    """A user's value as an error repeats it: in one line of bounded length."""
    text = str(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."

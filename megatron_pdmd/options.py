"""Dataclasses of options, read from a command line by tyro; and what a value may look like, in a flag or in YAML.

Numbers are decimal, in ASCII digits and without `_`: what YAML and Python would read as other bases, or as digits of
other scripts, is refused in both places.
"""

import contextlib
import dataclasses
import difflib
import io
import math
import os
import re
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from megatron_pdmd.limits import shown

Options = TypeVar("Options")

_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,100}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,6})?")
_LONGEST_NUMBER = 400  # characters
_LONGEST_PART, _LONGEST_PATH = 255, 4095  # bytes of a name and of a path, on Linux
_NAMES = {int: "a whole number", float: "a finite number", str: "a text", Path: "a path, its names of up to 255 bytes"}
_METAVARS = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}
_RULER = re.compile(r"\s*-{5,}\s*")


def read_options(options: type[Options], arguments: Sequence[str], default: Options | None = None) -> Options:
    """A dataclass from the flags that are given; of a flag that is given twice the last one counts.

    Args:
        options: the dataclass; its fields, and those of its fields that are dataclasses, are the flags.
        arguments: the flags.
        default: values of the flags that are not given, instead of the dataclass's own.

    Raises:
        ValueError: names the flag that is unknown, missing or has a bad value.
    """
    _refuse_unknown(options, arguments)
    given = {} if default is None else {"default": default}
    messages = io.StringIO()
    try:
        with _plain_messages(messages):
            return tyro.cli(options, args=list(arguments), registry=_registry(), prog="the program", **given)
    except SystemExit:
        raise ValueError(f"{_without_frame(messages.getvalue())}; see --help") from None


def print_help(options: type, description: str, default: Any = None) -> None:
    """Prints what the flags mean, and exits with 0."""
    given = {} if default is None else {"default": default}
    name = Path(sys.argv[0]).name
    tyro.cli(options, description=description, args=["--help"], registry=_registry(), prog=name, **given)


@contextlib.contextmanager
def _plain_messages(to: io.StringIO) -> Iterator[None]:
    """What tyro prints in the block goes there: without colours, for it is no terminal, and without line breaks."""
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(10**6)
    try:
        with contextlib.redirect_stderr(to), contextlib.redirect_stdout(to):
            yield
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _without_frame(box: str) -> str:
    """What a framed message of tyro says, without its title and the help text below it."""
    lines = box.splitlines()
    rulers = [number for number, line in enumerate(lines) if _RULER.fullmatch(line)]
    said = lines[rulers[0] + 1 : rulers[1]] if len(rulers) > 1 else lines
    text = " ".join(" ".join(said).split()).removeprefix("Error parsing ")
    return shown(re.sub(r"(?<!\.)\.$", "", text), 500)


def _refuse_unknown(options: type, arguments: Sequence[str]) -> None:
    hints = option_types(options)
    known = [f"--{name.replace('_', '-')}" for name in hints]
    known += [f"--no-{name.replace('_', '-')}" for name, hint in hints.items() if hint is bool]
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        name = name.replace("_", "-")
        if name.startswith("--") and name not in known:
            raise ValueError(f"unknown flag '{shown(name)}'{nearest(name, [*known, '--help'])}")
        if equals and hints.get(name.removeprefix("--no-").removeprefix("--").replace("-", "_")) is bool:
            raise ValueError(f"{name} takes no value; give the flag alone, or --no- before its name")


def option_types(options: type) -> dict[str, Any]:
    """The type of every option by its name, those in sections too."""
    options = get_args(options)[0] if get_origin(options) is Annotated else options
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(options).items():
        found |= option_types(hint) if dataclasses.is_dataclass(hint) else {name: hint}
    return found


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of an error about an unknown name: the known one that is most like it."""
    close = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else "; see --help"


def _registry() -> ConstructorRegistry:
    """What tells tyro to read values by `convert`."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        hint, or_none = _without_none(info.type)
        metavar = _METAVARS.get(hint)
        if get_origin(hint) is Literal:
            metavar = f"{{{','.join(map(str, get_args(hint)))}}}"
        if metavar is None or (or_none and hint not in _METAVARS):
            return None

        def read(texts: list[str]) -> Any:
            return None if or_none and texts == ["None"] else _converted(texts[0], hint)

        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=f"{{None}}|{metavar}" if or_none else metavar,
            instance_from_str=read,
            is_instance=lambda value: True,  # of defaults, which are the dataclass's own
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def comma_separated(hint: type, metavar: str) -> PrimitiveConstructorSpec:
    """How tyro reads and shows a tuple of numbers that is written with commas."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda texts: _converted(texts[0], Annotated[tuple[hint, ...], metavar]),
        is_instance=lambda value: isinstance(value, tuple) and all(isinstance(part, int | float) for part in value),
        str_from_instance=lambda value: [",".join(map(str, value))],
    )


def convert(value: Any, hint: Any, where: str) -> Any:
    """A value that a user wrote, as the type of its field.

    Args:
        value: the text after a flag, or what YAML holds.
        hint: the field's type.
        where: names the flag or the key in errors.

    Raises:
        ValueError: it is no such value.
    """
    try:
        return _converted(value, hint)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _converted(value: Any, hint: Any) -> Any:
    if get_origin(hint) is Annotated:  # numbers with commas between them, or a YAML list of them
        hint = get_args(hint)[0]
        return _converted(value.split(",") if isinstance(value, str) else value, hint)
    hint, or_none = _without_none(hint)
    if or_none and value is None:
        return None
    if get_origin(hint) is tuple:
        parts = value if isinstance(value, list) else [value]
        return tuple(_converted(part, get_args(hint)[0]) for part in parts)
    if get_origin(hint) is Literal:
        return _choice(value, get_args(hint))
    if hint is bool:
        if not isinstance(value, bool):
            raise ValueError(f"expected true or false, got {_told(value)}")
        return value
    converted = _CONVERTERS[hint](value)
    if converted is None:
        raise ValueError(f"expected {_NAMES[hint]}, got {_told(value)}")
    return converted


def _without_none(hint: Any) -> tuple[Any, bool]:
    """A type, and whether None may stand for it."""
    if get_origin(hint) not in (types.UnionType, Union):
        return hint, False
    (other,) = (option for option in get_args(hint) if option is not type(None))
    return other, True


def _choice(value: Any, options: tuple[Any, ...]) -> Any:
    """The one of the options that is written like the value; `true` is not 1."""
    for option in options:
        if value == str(option) or (type(value) is type(option) and value == option):
            return option
    raise ValueError(f"{_told(value)} is not one of {', '.join(map(str, options))}")


def _whole_number(value: Any) -> int | None:
    if isinstance(value, str) and _WHOLE_NUMBER.fullmatch(value):
        return int(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value if type(value) is int else None


def _finite_number(value: Any) -> float | None:
    is_text = isinstance(value, str) and len(value) <= _LONGEST_NUMBER and _NUMBER.fullmatch(value)
    if not is_text and type(value) not in (int, float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _text(value: Any) -> str | None:
    """A text that can be written to a file."""
    if not isinstance(value, str):
        return None
    return None if any("\ud800" <= c <= "\udfff" for c in value) else value


def _path(value: Any) -> Path | None:
    text = _text(value)
    if not text or "\0" in text or len(text.encode()) > _LONGEST_PATH:
        return None
    path = Path(text)
    return path if all(len(part.encode()) <= _LONGEST_PART for part in path.parts) else None


_CONVERTERS = {int: _whole_number, float: _finite_number, str: _text, Path: _path}


def _told(value: Any) -> str:
    """A value as an error repeats it."""
    return "null" if value is None else shown(repr(value))

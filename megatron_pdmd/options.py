"""Dataclasses of options, read from a command line; and what one of their values may look like, in a flag or in YAML.

Numbers are decimal, in ASCII digits and without `_`: what YAML and Python would read as other bases, or as digits of
other scripts, is refused in both places. tyro writes the help; the flags are read here, so that every mistake is one
line that names its flag.
"""

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from megatron_pdmd.limits import shown

Options = TypeVar("Options")

_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,100}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,6})?")
_LONGEST_NUMBER = 400  # characters
_LONGEST_PART, _LONGEST_PATH = 255, 4095  # bytes of a name and of a path, on Linux
_POSITIONAL = get_args(tyro.conf.Positional[int])[1]
_NAMES = {int: "a whole number", float: "a finite number", str: "a text", Path: "a path"}


@dataclass(frozen=True)
class _Field:
    """A field of the options, perhaps in a section of them.

    Attributes:
        section: name of the section, if it stands in one.
        name: its own.
        hint: its type.
        positional: it is given without a flag.
        required: it has no default.
    """

    section: str | None
    name: str
    hint: Any
    positional: bool
    required: bool

    @property
    def flag(self) -> str:
        return self.name.upper() if self.positional else f"--{self.name.replace('_', '-')}"

    @property
    def is_list(self) -> bool:
        """It takes as many values as follow: a tuple that is not written with commas."""
        return get_origin(self.hint) is tuple


def read_options(options: type[Options], arguments: Sequence[str], default: Options | None = None) -> Options:
    """A dataclass from the flags that are given; of a flag that is given twice the last one counts.

    Args:
        options: the dataclass; its fields, and those of its fields that are dataclasses, are the flags.
        arguments: the flags.
        default: values of the flags that are not given, instead of the dataclass's own.

    Raises:
        ValueError: names the flag that is unknown, missing or has a bad value.
    """
    options = get_args(options)[0] if get_origin(options) is Annotated else options
    fields = _fields(options)
    given: dict[_Field, Any] = {}
    waiting = [field for field in fields if field.positional]
    tokens = list(arguments)
    while tokens:
        token = tokens.pop(0)
        if token.startswith("--") and token != "--":
            field, value = _read_flag(fields, token, tokens)
        elif waiting:
            field = waiting.pop(0)
            value = convert(token, field.hint, field.flag)
        else:
            raise ValueError(f"'{shown(token)}' belongs to no flag; see --help")
        given[field] = value
    for field in fields:
        if field.required and field not in given and default is None:
            raise ValueError(f"{field.flag} is missing; see --help")
    return _build(options, given, default)


def _fields(options: type, section: str | None = None) -> list[_Field]:
    found = []
    hints = get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            found += _fields(hint, field.name)
            continue
        positional = get_origin(hint) is Annotated and _POSITIONAL in get_args(hint)[1:]
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        hint = get_args(hint)[0] if positional else hint
        found.append(_Field(section, field.name, hint, positional, required))
    return found


def _read_flag(fields: Sequence[_Field], token: str, rest: list[str]) -> tuple[_Field, Any]:
    """The field that a flag names and its value, which may be taken from the tokens after it."""
    name, equals, text = token.partition("=")
    name = name.replace("_", "-")
    flags = {field.flag: field for field in fields if not field.positional}
    switches = {f"--no-{flag[2:]}": field for flag, field in flags.items() if field.hint is bool}
    field = flags.get(name) or switches.get(name)
    if field is None:
        raise ValueError(f"unknown flag '{shown(name)}'{nearest(name, [*flags, *switches, '--help'])}")
    if field.hint is bool:
        if equals:
            raise ValueError(f"{name} takes no value; give {field.flag} or --no-{field.flag[2:]}")
        return field, name in flags
    if field.is_list:
        texts = [text] if equals else []
        while rest and not rest[0].startswith("--"):
            texts.append(rest.pop(0))
        if not texts:
            raise ValueError(f"{name}: a value is missing; see --help")
        return field, convert(texts, field.hint, name)
    if not equals:
        if not rest or rest[0].startswith("--"):
            raise ValueError(f"{name}: its value is missing; one that begins with -- is given as {name}=VALUE")
        text = rest.pop(0)
    if text == "None" and type(None) in get_args(field.hint):
        return field, None
    return field, convert(text, field.hint, name)


def _build(options: type[Options], given: dict[_Field, Any], default: Options | None) -> Options:
    """The dataclass, from the values that are given and the defaults."""
    sections: dict[str | None, dict[str, Any]] = {}
    for field, value in given.items():
        sections.setdefault(field.section, {})[field.name] = value
    own = sections.pop(None, {})
    if default is None and not sections:
        return options(**own)
    default = options() if default is None else default
    for name, values in sections.items():
        own[name] = dataclasses.replace(getattr(default, name), **values)
    return dataclasses.replace(default, **own)


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of an error about an unknown name: the known one that is most like it."""
    close = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else "; see --help"


def convert(value: Any, hint: Any, where: str) -> Any:
    """A value that a user wrote, as the type of its field.

    Args:
        value: the text after a flag, or what YAML holds.
        hint: the field's type.
        where: names the flag or the key in errors.

    Raises:
        ValueError: it is no such value.
    """
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
        if get_origin(hint) is tuple and isinstance(value, str) and "," in value:
            return convert(value.split(","), hint, f"{where} {shown(value)}")
        return convert(value, hint, where)
    origin, options = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):
        if value is None:
            return None
        return convert(value, next(option for option in options if option is not type(None)), where)
    if origin is tuple:
        parts = value if isinstance(value, list) else [value]
        return tuple(convert(part, options[0], where) for part in parts)
    if origin is Literal:
        return _convert_choice(value, options, where)
    if hint is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{where}: expected true or false, got {_told(value)}")
        return value
    converted = _CONVERTERS[hint](value)
    if converted is None:
        raise ValueError(f"{where}: expected {_NAMES[hint]}, got {_told(value)}")
    return converted


def _convert_choice(value: Any, options: tuple[Any, ...], where: str) -> Any:
    """The one of the options that is written like the value; `true` is not 1."""
    for option in options:
        if value == str(option) or (type(value) is type(option) and value == option):
            return option
    raise ValueError(f"{where}: {_told(value)} is not one of {', '.join(map(str, options))}")


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

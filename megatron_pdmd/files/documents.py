"""JSON and YAML that a user's files hold, read within limits: what is odd is refused in a line that names the file."""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import yaml

LARGEST_DOCUMENT = 100_000_000  # bytes; the index of a model of a thousand files is a hundred times smaller
DEEPEST_DOCUMENT = 64  # lists and mappings inside each other


def read_text(path: Path, *, largest: int = LARGEST_DOCUMENT) -> str:
    """A file's text in UTF-8, with or without its byte order mark.

    Args:
        path: the file.
        largest: bytes it may have.

    Raises:
        ValueError: names the file, and says that it is missing, unreadable, too large or in another encoding.
    """
    try:
        if not path.is_file():  # also where a device or a pipe would never end
            raise ValueError(f"{path}: {'not a file' if path.exists() else 'no such file'}; is the path right?")
        if (size := path.stat().st_size) > largest:
            raise ValueError(f"{path}: has {size} bytes, more than the {largest} that are read; is it the right file?")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8; save it in that encoding, or fetch it again") from None


def read_json(path: Path) -> Any:
    """What a JSON file holds. NaN and Infinity, which are no JSON, are refused, and so are numbers that a float
    cannot hold, and a key given twice.

    Raises:
        ValueError: names the file and what is wrong with it.
    """
    return parse_json(read_text(path), str(path))


def read_json_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds, if that is an object; see `read_json`.

    Raises:
        ValueError: names the file and what is wrong with it.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {_kind(content)}; fetch or make it again")
    return content


def _kind(content: Any) -> str:
    return "null" if content is None else type(content).__name__


def parse_json(text: str | bytes, where: str) -> Any:
    """What a JSON text holds; see `read_json`.

    Args:
        text: the document.
        where: names it in errors.

    Raises:
        ValueError: names it and what is wrong with it.
    """
    try:
        content = json.loads(
            text, object_pairs_hook=_without_duplicates, parse_constant=_refused_constant, parse_float=_finite_float
        )
    except RecursionError:
        raise ValueError(f"{where}: is nested too deeply; fetch or make it again") from None
    except ValueError as error:
        raise ValueError(f"{where}: is not valid JSON ({error}); fetch or make it again") from None
    _check_depth(content, where)
    return content


def read_yaml(path: Path) -> Any:
    """What a YAML file holds in mappings, lists, texts, numbers and truth values. Dates stay texts.

    Aliases are refused, for a few lines of them can stand for billions of values, and so are tags, and a key given
    twice, of which YAML would keep the last.

    Raises:
        ValueError: names the file and what is wrong with it.
    """
    text = read_text(path, largest=1_000_000)
    try:
        content = yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError(f"{path}: is nested too deeply; write it flatter") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    _check_depth(content, str(path))
    return content


_NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"[+-]?(?:0|[1-9][0-9]{0,99})$"),
    "tag:yaml.org,2002:float": re.compile(
        r"[+-]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][+-][0-9]+)?$|[+-]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
    ),
}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without aliases, tags, dates, merges and repeated keys, and with decimal numbers alone.

    YAML 1.1 would read 010 as 8, 1:30 as 90 and 1_0 as 10. Here these are texts.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {
        first: [
            (tag, _NUMBERS.get(tag, pattern))
            for tag, pattern in resolvers
            if not tag.endswith((":timestamp", ":merge"))
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        line = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"{line}: alias '*{event.anchor}'; write the value out")
        if getattr(event, "tag", None):
            raise ValueError(f"{line}: tag '{event.tag}'; write the value without it")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"line {key.start_mark.line + 1}: a key is a list or a mapping; write a name")
            if key.value in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: '{key.value}' is given twice; drop one of them")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _without_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"'{key[:40]}' is given twice")
        found[key] = value
    return found


def _refused_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _finite_float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:40]} is too large a number")
    return number


def _check_depth(content: Any, where: str) -> None:
    level = [content] if isinstance(content, dict | list) else []
    for _ in range(DEEPEST_DOCUMENT):
        holders = [value.values() if isinstance(value, dict) else value for value in level]
        level = [part for holder in holders for part in holder if isinstance(part, dict | list)]
        if not level:
            return
    raise ValueError(f"{where}: is nested too deeply; write or fetch it again")

"""Hypothesis strategies that spoil what was right: bytes, JSON, YAML, safetensors files, command lines."""

import copy
import itertools
import json
import struct
from collections.abc import Callable, Sequence
from typing import Any

import yaml
from hypothesis import strategies as st

ODD_NUMBERS = (0, 1, -1, 2, 3, 7, 0.5, -0.0, 1e-320, 1e38, 1e308, 10**9, 10**12, 10**30, 2**31, 2**53 + 1, 2**63, 2**64)
ODD_TEXTS = (
    "", " ", "null", "None", "nan", "-inf", "true", "0x10", "1_000", "1e400", "٣", "1,2", "2024-13-45",
    "..", ".", "~", "../../etc/passwd", "/dev/zero", "/dev/null", "a" * 300, "a/" * 3000, "\x00", "a\x00b", "é\u202e",
    "\n", "-", "--", "@x", "{}", "[]", "!!int", "&a *a", "cuda", "nccl", "flash", "triton",
    "teacher", "encoded", "run", "prompts.txt", "transformer",
)  # fmt: skip
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(ODD_NUMBERS),
    st.sampled_from((float("nan"), float("inf"), float("-inf"))),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from(ODD_TEXTS),
    st.text(max_size=12),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
_DEEP = 5_000


def places(content: Any, place: tuple = ()) -> list[tuple]:
    """The path of every value in a document, the whole one included."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [place, *(found for key, value in inner for found in places(value, (*place, key)))]


@st.composite
def spoilt_tree(draw: st.DrawFn, content: Any, most: int = 2) -> Any:
    """A document of which one value or two are replaced, removed, renamed, repeated or joined by others."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, most))):
        *above, last = draw(st.sampled_from(places(content)[1:] or [(None,)]))
        if last is None:
            return draw(values)
        holder = content
        for key in above:
            holder = holder[key]
        operation = draw(st.sampled_from(("replace", "replace", "replace", "remove", "rename", "add", "whole")))
        if operation == "replace":
            holder[last] = draw(values)
        elif operation == "remove":
            del holder[last]
        elif operation == "whole" and draw(st.booleans()):
            return draw(values)
        elif isinstance(holder, list):
            holder.append(draw(values))
        elif operation == "rename":
            holder[draw(st.text(max_size=12))] = holder.pop(last)
        else:
            holder[draw(st.sampled_from(ODD_TEXTS))] = draw(values)
    return content


@st.composite
def spoilt_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """A file that was cut, overwritten, prolonged, or lost a part."""
    start = draw(st.integers(0, len(content)))
    end = draw(st.integers(start, min(len(content), start + 64)))
    noise = draw(st.binary(max_size=32))
    operation = draw(st.sampled_from(("cut", "overwrite", "insert", "remove", "empty", "noise", "twice", "zeros")))
    return {
        "cut": content[:start],
        "overwrite": content[:start] + noise + content[start + len(noise) :],
        "insert": content[:start] + noise + content[start:],
        "remove": content[:start] + content[end:],
        "empty": b"",
        "noise": noise,
        "twice": content * 2,
        "zeros": content[:start] + bytes(end - start) + content[end:],
    }[operation]


def spoilt_json(content: bytes) -> st.SearchStrategy[bytes]:
    """A JSON file whose values, structure or bytes are odd."""
    deep = (b"[" * _DEEP, b'{"a":' * _DEEP + b"1" + b"}" * _DEEP)
    whole = (*deep, b"\xef\xbb\xbf" + content, b'{"a": 1, "a": 2,' + content.lstrip()[1:], b"1" * 5000, b"null")
    trees = spoilt_tree(json.loads(content)).map(lambda tree: json.dumps(tree).encode("utf-8", "surrogatepass"))
    return st.one_of(trees, trees, trees, spoilt_bytes(content), st.sampled_from(whole))


def spoilt_yaml(content: bytes) -> st.SearchStrategy[bytes]:
    """A YAML file whose values, structure or bytes are odd."""
    bomb = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in itertools.pairwise("abcdefghi"))
    tags = (b"a: !!python/object/apply:os.getcwd []", b"a: !!timestamp 2024-13-45")
    whole = (b"[" * _DEEP, bomb.encode(), content + content, *tags, b"? [1]\n: 2", b"- 1")

    def dumped(tree: Any) -> bytes:
        return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")

    trees = spoilt_tree(yaml.safe_load(content)).map(dumped)
    return st.one_of(trees, trees, trees, spoilt_bytes(content), st.sampled_from(whole))


@st.composite
def spoilt_safetensors(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file with an odd header, an odd length of it, odd bytes, or numbers that are not finite."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    kind = draw(st.sampled_from(("header", "header", "length", "bytes", "numbers")))
    if kind == "header":
        header = draw(spoilt_json(header))
        return struct.pack("<Q", len(header)) + header + data
    if kind == "length":
        other = draw(st.sampled_from((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1)))
        return struct.pack("<Q", other) + content[8:]
    if kind == "bytes":
        return draw(spoilt_bytes(content))
    at = 4 * draw(st.integers(0, len(data) // 4 - 1))
    number = struct.pack("<f", draw(st.sampled_from((float("nan"), float("inf"), float("-inf")))))
    return content[: 8 + length] + data[:at] + number + data[at + 4 :]


def spoiler(name: str) -> Callable[[bytes], st.SearchStrategy[bytes]]:
    """How files of this name are spoilt."""
    if name.endswith(".safetensors"):
        return spoilt_safetensors
    if name.endswith(".json"):
        return spoilt_json
    return spoilt_yaml if name.endswith(".yaml") else spoilt_bytes


@st.composite
def spoilt_flags(draw: st.DrawFn, flags: Sequence[str], known: Sequence[str]) -> list[str]:
    """A command line to which one to three odd flags are added, or of which one is taken, or a value is changed."""
    flags = list(flags)
    for _ in range(draw(st.integers(1, 3))):
        value = draw(scalars.map(str).filter(lambda text: "\x00" not in text))  # no command line can hold that
        flag = draw(st.sampled_from(known) if draw(st.booleans()) or draw(st.booleans()) else st.text(max_size=8))
        flag = flag.replace("\x00", "")
        operation = draw(st.sampled_from(("add", "add", "joined", "alone", "change", "take", "leftover")))
        if operation in ("change", "take") and flags:
            at = draw(st.integers(0, len(flags) - 1))
            flags[at : at + 1] = [value] if operation == "change" else []
        else:
            flags += {"joined": [f"{flag}={value}"], "alone": [flag], "leftover": [value]}.get(operation, [flag, value])
    return flags

"""Odd documents are refused in a line that names the file; plain ones are read as their libraries read them."""

import json

import pytest
import yaml

from megatron_pdmd.files.documents import read_json, read_json_object, read_text, read_yaml

BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"


def test_plain_documents(tmp_path):
    content = {"a": [1, 2.5, None, True], "b": {"c": "é"}}
    (tmp_path / "a.json").write_text(json.dumps(content))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content))
    assert read_json(tmp_path / "a.json") == read_json_object(tmp_path / "a.json") == content
    assert read_yaml(tmp_path / "a.yaml") == content
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfa")
    assert read_text(tmp_path / "bom.txt") == "a"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * 100 + b"]" * 100, "nested too deeply"),
        (b'{"a": 1, "a": 2}', "'a' is given twice"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -1e999}', "-1e999 is too large a number"),
        (b"1" * 5000, "not valid JSON"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"[1]", "expected a JSON object, got list"),
    ],
)
def test_odd_json(text, words, tmp_path):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ValueError, match=f"{tmp_path}/a.json: .*{words}"):
        read_json_object(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "alias '\\*a'; write the value out"),
        ("a: 1\nb: 2\na: 3\n", "line 3: 'a' is given twice"),
        ("s: {a: 1, a: 2}", "'a' is given twice"),
        ("? [1, 2]\n: 3", "a key is a list"),
        ("a: [", "not valid YAML"),
        ("[" * 100_000, "nested too deeply"),
        ("[" * 100 + "]" * 100, "nested too deeply"),
        ("a: !!python/object:os.system {}", "line 1: tag"),
        ("a: !!timestamp 2024-13-45", "tag"),
        ("a: !!bool x", "tag"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_odd_yaml(text, words, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}/a.yaml: .*{words}"):
        read_yaml(tmp_path / "a.yaml")


def test_dates_in_yaml_are_texts(tmp_path):
    (tmp_path / "a.yaml").write_text("a: 2024-13-45\n<<: b\n")
    assert read_yaml(tmp_path / "a.yaml") == {"a": "2024-13-45", "<<": "b"}


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}/none: no such file"):
        read_text(tmp_path / "none")
    with pytest.raises(ValueError, match=f"{tmp_path}: not a file"):
        read_text(tmp_path)
    (tmp_path / "large").write_bytes(b"x" * 11)
    with pytest.raises(ValueError, match="has 11 bytes, more than the 10"):
        read_text(tmp_path / "large", largest=10)

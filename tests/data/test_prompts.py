"""Prompt files, and embeddings on disk and back."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from megatron_pdmd.data.prompts import PromptEmbeddings, load_prompts, read_prompts
from megatron_pdmd.data.text_encoder import encode_prompts

ROOT = Path(__file__).parents[2]


@pytest.fixture
def embeddings() -> PromptEmbeddings:
    generator = torch.Generator().manual_seed(0)
    shards = tuple(torch.randn(count, 5, 3, generator=generator).bfloat16() for count in (4, 3))
    negative = torch.randn(5, 3, generator=generator).bfloat16()
    return PromptEmbeddings(tuple(f"prompt {i}" for i in range(7)), shards, negative, "blurred", "tiny")


def test_read_prompts_skips_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone\r\n\n   \n  two 文字 \nthree".encode())
    assert read_prompts(path) == ["one", "two 文字", "three"]


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), (b"\n \n", "no prompt"), (b"one\n\n\xff\n", "line 3 is not UTF-8")]
)
def test_read_prompts_refuses(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


@pytest.mark.parametrize("shard_size", [1, 3, 7, 100])
def test_folder_round_trip(tmp_path: Path, embeddings: PromptEmbeddings, shard_size: int) -> None:
    embeddings.save(tmp_path / "saved", shard_size=shard_size)
    loaded = PromptEmbeddings.load(tmp_path / "saved")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) == -(-7 // shard_size)
    assert loaded.prompts == embeddings.prompts
    assert (loaded.negative_prompt, loaded.encoder, loaded.max_length) == ("blurred", "tiny", 5)
    assert torch.equal(loaded.embeddings, embeddings.embeddings)
    assert torch.equal(loaded.negative, embeddings.negative)
    indices = torch.tensor([6, 0, 3, 4, 4])
    assert torch.equal(loaded.batch(indices), embeddings.embeddings[indices])
    with pytest.raises(IndexError):
        loaded.batch([7])


def test_saving_again_replaces_and_leaves_nothing(tmp_path: Path, embeddings: PromptEmbeddings) -> None:
    embeddings.save(tmp_path, shard_size=1)
    embeddings.save(tmp_path, shard_size=7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts-00001-of-00001.safetensors", "prompts.json"]
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(ValueError, match="holds other files"):
        embeddings.save(tmp_path)


def _index_with(**changes: object):
    def change(folder: Path) -> None:
        path = folder / "prompts.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _truncate(folder: Path) -> None:
    path = folder / "prompts-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "prompts.json").unlink(), "no readable prompts.json"),
        (lambda folder: (folder / "prompts.json").write_text("[]"), "not an index"),
        (lambda folder: (folder / "prompts-00002-of-00003.safetensors").unlink(), "shards are missing"),
        (_truncate, "cannot be read"),
        (_index_with(prompts=["one"]), "7 embeddings for 1 prompts"),
        (_index_with(prompts=[1, 2]), "not an index"),
        (_index_with(format="other"), "not an index"),
    ],
)
def test_damaged_folders_are_refused(tmp_path: Path, embeddings: PromptEmbeddings, damage, message: str) -> None:
    embeddings.save(tmp_path, shard_size=3)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        PromptEmbeddings.load(tmp_path)


def test_load_prompts_encodes_text_or_reads_a_folder(tmp_path: Path, text_folder: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\ntwo\n")
    encoded = load_prompts(path, text_folder, max_length=16, negative_prompt="bad")
    expected = encode_prompts(text_folder, ["one", "two", "bad"], max_length=16)
    torch.testing.assert_close(torch.cat([encoded.embeddings, encoded.negative[None]]), expected)
    encoded.save(tmp_path / "saved")
    assert torch.equal(load_prompts(tmp_path / "saved", max_length=16).embeddings, encoded.embeddings)
    with pytest.raises(ValueError, match="encoded to 16 tokens, but 8"):
        load_prompts(tmp_path / "saved", max_length=8)
    with pytest.raises(ValueError, match="another negative prompt"):
        load_prompts(tmp_path / "saved", negative_prompt="worse")
    with pytest.raises(ValueError, match="text encoder"):
        load_prompts(path)


def _run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Runs the tool in this process and returns its exit code."""
    path = ROOT / "tools" / "encode_prompts.py"
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_tool_encodes_and_tells_mistakes_in_one_line(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt {i}\n" for i in range(11)))
    required = ("--prompts", path, "--text-encoder", text_folder, "--save", tmp_path / "saved")
    options = ("--max-length", 12, "--negative-prompt", "bad", "--shard-size", 4, "--dtype", "float32")
    assert _run_tool(monkeypatch, *required, *options) == 0
    loaded = PromptEmbeddings.load(tmp_path / "saved")
    expected = encode_prompts(text_folder, [*loaded.prompts, "bad"], max_length=12)
    torch.testing.assert_close(torch.cat([loaded.embeddings, loaded.negative[None]]), expected)
    assert [len(shard) for shard in loaded.shards] == [4, 4, 3]
    path.unlink()
    capsys.readouterr()
    assert _run_tool(monkeypatch, *required) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "--prompts" in message

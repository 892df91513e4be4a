"""Prompt files, and embeddings on disk and back."""

import json
import os
import re
import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_pdmd.data import prompts as prompts_module
from megatron_pdmd.data import text_encoder
from megatron_pdmd.data.prompts import PromptEmbeddings, load_prompts, read_prompts, write_prompts
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
    with pytest.raises(ValueError, match="not empty and not made by this program"):
        embeddings.save(tmp_path)


def _index_with(**changes: object):
    def change(folder: Path) -> None:
        path = folder / "prompts.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _truncate(folder: Path) -> None:
    path = folder / "prompts-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _shard_with(number: int = 2, **changes: torch.Tensor):
    def change(folder: Path) -> None:
        path = folder / f"prompts-{number:05d}-of-00003.safetensors"
        save_file(load_file(path) | changes, path)

    return change


def _add_shard(folder: Path, name: str) -> None:
    save_file({"embeddings": torch.zeros(3, 5, 3).bfloat16()}, folder / name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "prompts.json").unlink(), "prompts.json: no such file"),
        (lambda folder: (folder / "prompts.json").write_text("[]"), "expected a JSON object"),
        (lambda folder: (folder / "prompts.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "prompts-00002-of-00003.safetensors").unlink(), "shards are missing"),
        (_truncate, "is truncated"),
        (_shard_with(embeddings=torch.zeros(3, 5, 4)), "embeddings of different shapes"),
        (_shard_with(embeddings=torch.zeros(3, 5, 3)), "embeddings of different shapes or dtypes"),
        (_shard_with(embeddings=torch.full((3, 5, 3), torch.nan).bfloat16()), "'embeddings of shard 2' .* not finite"),
        (_shard_with(other=torch.zeros(1)), "holds other tensors"),
        (_shard_with(1, negative=torch.full((5, 3), torch.inf).bfloat16()), "'negative' holds values .* not finite"),
        (lambda folder: _add_shard(folder, "prompts-00004-of-00004.safetensors"), "shards are missing"),
        (lambda folder: _add_shard(folder, "prompts-99999-of-99999.safetensors"), "shards are missing"),
        (_index_with(prompts=["\ud800"] * 7), "not an index"),
        (_index_with(negative_prompt=3), "not an index"),
        (_index_with(max_length=True), "another max_length than 5"),
        (_index_with(prompts=["one"]), "7 embeddings for 1 prompts"),
        (_index_with(prompts=[1, 2]), "not an index"),
        (_index_with(format="other"), "not an index"),
    ],
)
def test_damaged_folders_are_refused(tmp_path: Path, embeddings: PromptEmbeddings, damage, message: str) -> None:
    embeddings.save(tmp_path, shard_size=3)
    damage(tmp_path)
    with pytest.raises(ValueError, match=f"^--eval-prompts {tmp_path}.*{message}") as refused:
        PromptEmbeddings.load(tmp_path, "--eval-prompts")
    assert len(str(refused.value).splitlines()) == 1


def test_ranks_judge_the_values_of_a_large_set_in_turn(tmp_path: Path, embeddings, monkeypatch) -> None:
    embeddings.save(tmp_path, shard_size=3)
    _shard_with(embeddings=torch.full((3, 5, 3), torch.nan).bfloat16())(tmp_path)
    monkeypatch.setattr(prompts_module, "READ_AT_LAUNCH", 100)
    large = PromptEmbeddings.load(tmp_path)
    large.require_finite("here", part=1, parts=2)
    with pytest.raises(ValueError, match="here: tensor 'embeddings of shard 2' holds values that are not finite"):
        large.require_finite("here", part=0, parts=2)


def test_a_failed_encode_leaves_the_old_folder(tmp_path: Path, embeddings: PromptEmbeddings) -> None:
    folder = tmp_path / "saved"
    embeddings.save(folder)
    nan = PromptEmbeddings(("one",), (torch.full((1, 5, 3), torch.nan),), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="not finite"):
        nan.save(folder)
    assert torch.equal(PromptEmbeddings.load(folder).embeddings, embeddings.embeddings)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_killed_encode_leaves_the_old_folder(tmp_path: Path, embeddings: PromptEmbeddings) -> None:
    folder = tmp_path / "saved"
    embeddings.save(folder)
    child = os.fork()
    if child == 0:

        def shards():
            yield embeddings.shards[0]
            os.kill(os.getpid(), signal.SIGKILL)

        write_prompts(
            folder, embeddings.prompts, shards(), embeddings.negative, negative_prompt="", encoder="", shard_size=4
        )
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert torch.equal(PromptEmbeddings.load(folder).embeddings, embeddings.embeddings)
    embeddings.save(folder, shard_size=1)
    assert len(PromptEmbeddings.load(folder).shards) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").touch()
    for more, words in (
        (("--prompts", tmp_path / "none"), "--prompts"),
        (("--save", tmp_path / "notes"), "--save .*notes: is not empty"),
        (("--save", path), "--save .*is a file"),
        (("--text-encoder", tmp_path), "--text-encoder .*no tokenizer/"),
        (("--max-length", 10**12), "--max-length 1000000000000: must lie between"),
        (("--device", "cuda"), "--device cuda: torch finds no GPU here"),
    ):
        capsys.readouterr()
        assert _run_tool(monkeypatch, *required, *more) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and re.search(words, message)
    assert torch.equal(PromptEmbeddings.load(tmp_path / "saved").embeddings, loaded.embeddings)


@pytest.mark.parametrize("more", [("--save", "notes"), ("--device", "cuda")])
def test_the_tool_refuses_before_it_loads_the_encoder(tmp_path, monkeypatch, text_folder, more) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(text_encoder, "_transformers", lambda: pytest.fail("loads the encoder"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").touch()
    (tmp_path / "prompts.txt").write_text("one\n")
    required = ("--prompts", "prompts.txt", "--text-encoder", text_folder, "--save", "saved")
    assert _run_tool(monkeypatch, *required, *more) == 2

"""A text is encoded once: one rank does it, the others and later launches read what it left."""

import shutil
from pathlib import Path

import pytest
import torch

from megatron_pdmd.data import run_prompts
from megatron_pdmd.data.prompts import load_prompts
from megatron_pdmd.data.run_prompts import load_run_prompts
from megatron_pdmd.data.text_encoder import TextEncoder
from megatron_pdmd.errors import OtherRankError
from megatron_pdmd.parallel import initialize_topology

LENGTH = 12


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"a {number} moves left\n" for number in range(70)))
    return path


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that the encoder was given."""
    batches, encode = [], TextEncoder.encode

    def counted(encoder: TextEncoder, prompts):
        batches.append(len(prompts))
        return encode(encoder, prompts)

    monkeypatch.setattr(TextEncoder, "encode", counted)
    return batches


def test_a_text_is_encoded_once_and_to_the_bit(text, text_folder, tmp_path, topology, encoded, capsys):
    options = {"max_length": LENGTH, "negative_prompt": "bad"}
    expected = load_prompts(text, text_folder, **options)
    encoded.clear()
    for launch in range(3):
        if launch == 2:  # a launch that was killed while it wrote
            folder = next((tmp_path / "run" / "prompts").iterdir())
            next(folder.glob("*-00002-*")).unlink()
            encoded.clear()
        loaded = load_run_prompts(text, text_folder, tmp_path / "run", topology, **options)
        assert (loaded.prompts, loaded.negative_prompt) == (expected.prompts, "bad")
        assert torch.equal(loaded.embeddings, expected.embeddings)
        assert torch.equal(loaded.negative, expected.negative)
        assert encoded == [1, *[8] * 8, 6]
        told = "encoding 70 prompts, once, with" in capsys.readouterr().out
        assert told == (launch != 1)
    assert [path.name for path in tmp_path.glob("run/*")] == ["prompts"]


def test_what_the_embeddings_depend_on_names_the_folder(text, text_folder, tmp_path, topology, encoded):
    def load(source: Path = text_folder, **options):
        options = {"max_length": LENGTH} | options
        load_run_prompts(text, source, tmp_path / "run", topology, **options)
        return len(list((tmp_path / "run" / "prompts").iterdir()))

    assert load() == 1
    assert load(max_length=8) == 2
    assert load(negative_prompt="bad") == 3
    assert load(dtype=torch.bfloat16) == 4
    copy = Path(shutil.copytree(text_folder, tmp_path / "moved"))
    assert load(copy) == 4
    (copy / "tokenizer" / "more.json").write_text("{}")
    assert load(copy) == 5
    text.write_text("another\n")
    assert load() == 6


def test_ranks_share_what_the_first_encodes(text, text_folder, tmp_path, run_ranks, encoded):
    expected = load_prompts(text, text_folder, max_length=LENGTH)
    encoded.clear()

    def rank():
        topology = initialize_topology()
        loaded = load_run_prompts(text, text_folder, tmp_path / "run", topology, max_length=LENGTH)
        return len(encoded), bool(torch.equal(loaded.embeddings, expected.embeddings))

    assert run_ranks(rank, 2) == [(10, True), (0, True)]
    assert run_ranks(rank, 2) == [(0, True), (0, True)]


@pytest.mark.parametrize(
    ("fails_at", "words"), [("start", "encoder is broken"), ("third batch", "encoder is broken"), ("disk", "no space")]
)
def test_a_failure_of_the_first_rank_is_everyones(text, text_folder, tmp_path, run_ranks, monkeypatch, fails_at, words):
    encode, batches = TextEncoder.encode, []

    def broken(encoder, prompts):
        batches.append(prompts)
        if len(batches) == {"start": 1, "third batch": 7}.get(fails_at):
            raise ValueError("the encoder is broken")
        return encode(encoder, prompts)

    def full(path, needed, flag):
        raise ValueError("no space")

    monkeypatch.setattr(TextEncoder, "encode", broken)
    if fails_at == "disk":
        monkeypatch.setattr(run_prompts, "require_space", full)

    def rank():
        with pytest.raises((ValueError, OtherRankError), match=words):
            load_run_prompts(text, text_folder, tmp_path / "run", initialize_topology(), max_length=LENGTH)

    run_ranks(rank, 2, timeout=30)
    assert list((tmp_path / "run").glob("prompts/*")) == []
    assert list((tmp_path / "run").glob("prompts/.*")) == []


def test_a_folder_is_read_as_it_is(text, text_folder, tmp_path, topology, encoded):
    load_prompts(text, text_folder, max_length=LENGTH).save(tmp_path / "encoded")
    encoded.clear()
    loaded = load_run_prompts(tmp_path / "encoded", text_folder, tmp_path / "run", topology, max_length=LENGTH)
    assert len(loaded) == 70 and not encoded and not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"--eval-prompts .*was encoded to 12 tokens, but 8"):
        load_run_prompts(
            tmp_path / "encoded", text_folder, tmp_path / "run", topology, max_length=8, flag="--eval-prompts"
        )

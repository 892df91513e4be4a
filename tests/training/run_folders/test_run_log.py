"""A run's logs, as a launch that goes on finds them."""

import json

import pytest

from megatron_pdmd.training.run_folders.run_log import cut_log, entries_of

LINES = [json.dumps({"iteration": i, "fake_loss": i / 3}) for i in range(1, 6)]
ODD = [
    b"\xff\xfe{}",
    b"",
    b"[1, 2]",
    b"3",
    b"null",
    b"{}",
    b'{"iteration": "2"}',
    b'{"iteration": true}',
    b'{"iteration": 2.0}',
    b'{"iteration": null}',
    b'{"iteration": 2, "fake_loss": NaN}',
    b'{"iteration": 2, "fake_loss": 1, "fake_loss": 2}',
    b'{"iteration": 2, "a": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"iteration": 2, "fake_l',
]


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert cut_log(path, 3) is None
    assert not path.exists()
    path.write_text("\n".join(LINES) + '\n{"iteration": 2, "fake_l')
    assert cut_log(path, 3) is None
    assert path.read_text() == "\n".join(LINES[:3]) + "\n"
    assert sorted(found.name for found in tmp_path.iterdir()) == ["metrics.jsonl"]


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_odd_lines_go_and_all_others_stay(odd, tmp_path):
    path = tmp_path / "evaluations.jsonl"
    path.write_bytes(LINES[0].encode() + b"\n" + odd + b"\n" + LINES[1].encode() + b"\n")
    assert [number for number, _ in entries_of(path)] == [1, 2]
    cut_log(path, 5)
    assert path.read_text() == "\n".join(LINES[:2]) + "\n"


def test_a_log_of_which_nothing_would_be_left_is_kept_and_it_is_said(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(LINES) + "\n")
    assert "entries of 5 iterations" in cut_log(path, 0)
    assert path.read_text() == ""
    assert (tmp_path / "metrics.jsonl.old").read_text() == "\n".join(LINES) + "\n"
    assert cut_log(path, 0) is None

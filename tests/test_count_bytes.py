"""The byte counter's numbers against the sizes of the parameters."""

import json
import sys

import pytest

from megatron_pdmd.parallel import destroy_topology


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("count_bytes")


@pytest.fixture
def count(tool, monkeypatch, tmp_path):
    def run(*flags):
        destroy_topology()  # an earlier test's
        monkeypatch.setenv("WORLD_SIZE", "1")
        monkeypatch.setattr(sys, "argv", ["count_bytes.py", *flags, "--json", str(tmp_path / "bytes.json")])
        tool.main()
        return json.loads((tmp_path / "bytes.json").read_text())

    return run


def test_a_rank_holds_its_share_and_no_first_moment(count, capsys):
    rows = count("--model", "wan2.1-t2v-1.3b", "--tensor-model-parallel-sizes", "1,2,4", "--data-parallel-size", "4")
    assert "wan2.1-t2v-1.3b, GB on each rank, 4 data-parallel ranks" in capsys.readouterr().out
    assert len(rows) == 3 * 2 * 2
    for row in rows:
        one = next(r for r in rows if r["tensor"] == 1 and r["role"] == row["role"] and not r["distributed"])
        assert abs(row["split"] * row["tensor"] / one["split"] - 1) < 0.02
        assert row["weights"] - row["split"] == one["weights"] - one["split"]
        elements, copies = row["gradients"] / 4, 4 if row["distributed"] else 1
        assert abs(row["first_moment"] / (4 * elements / copies) - 1) < 0.02
        assert row["checkpoint"] == one["checkpoint"]  # it is the same from any layout
        if row["role"] == "generator":  # fp32 adapters are their own main weights
            assert row["optimizer"] == row["first_moment"]
            assert (row["checkpoint"], row["implied"]) == (2 * one["trained"], 0)
        else:
            assert abs(row["checkpoint"] / (4 * one["trained"]) - 1) < 0.02  # 8 bytes for 2
            assert abs(row["implied"] / one["trained"] - 1) < 0.02
            assert row["trained"] == row["weights"]
            assert abs(row["optimizer"] / (2 * row["first_moment"]) - 1) < 0.02


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--model", "wan9"), "--model wan9: unknown; choose one of wan2.1-t2v-1.3b"),
        (
            ("--model", "wan2.1-t2v-1.3b", "--tensor-model-parallel-sizes", "5"),
            "--tensor-model-parallel-size 5 does not",
        ),
    ],
)
def test_mistakes_are_one_line(count, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        count(*flags)
    told = capsys.readouterr().err
    assert stop.value.code == 2 and words in told and told.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--model", "wan"], "--model wan: unknown; choose one of "),
        (["--tensor-model-parallel-sizes", "1,0"], "--tensor-model-parallel-sizes 0: must lie in [1, 1024]"),
        (["--data-parallel-size", "1000000000000"], "--data-parallel-size 1000000000000: must lie in [1, 1024]"),
        (["--lora-rank", "0"], "--lora-rank 0: must lie in [1, 8192]"),
        (["--json", "/dev/null/a.json"], "--json /dev/null: /dev/null is a file"),
    ],
    ids=lambda flags: flags[0] if isinstance(flags, list) else "",
)
def test_bad_input_is_refused_in_one_line(tool, flags, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["count_bytes.py", *flags])
    with pytest.raises(SystemExit) as stop:
        tool.main()
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {line}") and told.count("\n") == 1

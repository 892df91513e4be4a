"""What is written is there as a whole or not at all, and nothing of the user's is removed."""

import contextlib
import functools
import json
import os
from pathlib import Path

import pytest

from megatron_pdmd.files.whole import (
    UNFINISHED,
    begin_folder,
    check_destination,
    check_file_destination,
    check_writable,
    drop_folder,
    finish_folder,
    replaced_whole,
    write_json,
    written_whole,
)


def is_ours(folder: Path) -> bool:
    return (folder / "ours").is_file()


def write_ours(folder: Path, content: str) -> None:
    with replaced_whole(folder, "--out", is_ours) as partial:
        (partial / "ours").write_text(content)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with written_whole(path) as partial:
        partial.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert names(path.parent) == {"file.txt"}


def test_a_file_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert names(tmp_path) == {"file.json"}


def test_a_folder_is_replaced_when_the_new_one_is_whole(tmp_path):
    out = tmp_path / "out"
    write_ours(out, "first")
    with pytest.raises(KeyError), replaced_whole(out, "--out", is_ours) as partial:
        (partial / "ours").write_text("half")
        raise KeyError
    assert (out / "ours").read_text() == "first" and names(tmp_path) == {"out"}
    write_ours(out, "second")
    assert (out / "ours").read_text() == "second" and names(out) == {"ours"} and names(tmp_path) == {"out"}


@pytest.mark.parametrize("name", ["out", ".out.partial", ".out.old"])
def test_folders_of_the_user_are_refused_and_kept(name, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"name (a new|another) folder"):
        write_ours(tmp_path / "out", "x")
    assert (tmp_path / name / "thesis.txt").read_text() == "mine" and names(tmp_path) == {name}


def test_what_a_killed_program_left_is_taken_up(tmp_path):
    out, partial, old = (tmp_path / name for name in ("out", ".out.partial", ".out.old"))
    write_ours(out, "first")
    partial.mkdir()
    (partial / UNFINISHED).touch()
    write_ours(out, "second")
    assert (out / "ours").read_text() == "second" and names(tmp_path) == {"out"}
    (out / UNFINISHED).touch()
    out.rename(old)  # killed between the two renames
    with pytest.raises(KeyError), replaced_whole(out, "--out", is_ours):
        raise KeyError
    assert (out / "ours").read_text() == "second" and names(tmp_path) == {"out"}


def let_die(monkeypatch, count: int, *names: str) -> None:
    """Lets the program die in one of these calls of os, after `count` of them have worked."""
    done = []

    def dying(call, *arguments, **options):
        done.append(call)
        if len(done) > count:
            raise KeyboardInterrupt
        return call(*arguments, **options)

    for name in names:
        monkeypatch.setattr(os, name, functools.partial(dying, getattr(os, name)))


@pytest.mark.parametrize("count", range(6))
@pytest.mark.parametrize("ends", [drop_folder, finish_folder])
def test_what_a_program_left_that_was_killed_at_its_end_is_taken_up(ends, count, tmp_path, monkeypatch):
    """Whichever of its calls it is killed in: it removes two files, the mark and two folders, or renames two."""
    out = tmp_path / "out"
    write_ours(out, "first")
    partial = begin_folder(out, "--out", is_ours)
    (partial / "model").mkdir()
    for path in (partial / "ours", partial / "model" / "weights"):
        path.write_text("second")
    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        let_die(patch, count, "unlink", "rmdir", "rename")
        ends(out)
    write_ours(out, "third")
    assert (out / "ours").read_text() == "third" and names(out) == {"ours"} and names(tmp_path) == {"out"}


def test_what_a_program_left_that_was_killed_at_its_start_is_taken_up(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    write_ours(tmp_path / "out", "first")
    assert names(tmp_path) == {"out"}


def test_an_older_folder_that_the_user_kept_under_the_name_in_between_stays(tmp_path):
    write_ours(tmp_path / "out", "first")
    (tmp_path / "out").rename(tmp_path / ".out.old")
    with pytest.raises(ValueError, match=r"\.out\.old is in the way"):
        write_ours(tmp_path / "out", "second")
    assert (tmp_path / ".out.old" / "ours").read_text() == "first" and names(tmp_path) == {".out.old"}


def test_a_folder_that_could_not_take_the_place_leaves_the_old_one(tmp_path, monkeypatch):
    out, rename = tmp_path / "out", Path.rename
    write_ours(out, "first")

    def refused(path, target):
        if path.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(OSError, match="Input/output"):
        write_ours(out, "second")
    assert (out / "ours").read_text() == "first" and names(out) == {"ours"} and names(tmp_path) == {"out"}


def test_a_file_that_cannot_be_written_is_refused_before(tmp_path):
    (tmp_path / "there.png").touch()
    check_file_destination(tmp_path / "there.png", "--save", (".png",))
    check_file_destination(tmp_path / "new" / "a.PNG", "--save", (".png",))
    for name, message in (("", "is a folder"), ("there.png/a.png", "is a file"), ("a.xyz", "ends in .png")):
        with pytest.raises(ValueError, match=message):
            check_file_destination(tmp_path / name, "--save", (".png",))
    assert names(tmp_path) == {"there.png"}


def test_a_destination_is_checked_without_a_trace(tmp_path):
    check_destination(tmp_path / "a" / "b", "--out", is_ours)
    assert names(tmp_path) == set()
    (tmp_path / "file").touch()
    for bad in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("n" * 201), tmp_path / ("m" * 300) / "a"):
        with pytest.raises(ValueError, match="--out"):
            check_destination(bad, "--out", is_ours)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; test_a_read_only_folder is the twin")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot be written"):
        check_writable(tmp_path / "a", "--out")


def test_a_read_only_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ValueError, match=f"--out {tmp_path}/a/b: {tmp_path} cannot be written"):
        check_writable(tmp_path / "a" / "b", "--out")

"""Checkpoints survive a crash at any moment, and what is not a checkpoint is refused in one line."""

import dataclasses
import itertools
import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_pdmd.training import checkpointing
from megatron_pdmd.training.checkpointing import Progress, latest_checkpoint, save_checkpoint


class Crash(Exception):
    """Stands for the end of the process."""


def states(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"generator": {"a": torch.full((3,), value)}, "fake": {"b": torch.full((2, 2), -value).bfloat16()}}


def save(folder: Path, iteration: int, **options: int) -> Path:
    return save_checkpoint(folder, Progress(iteration, consumed_samples=7), states(float(iteration)), **options)


def assert_whole(folder: Path, iterations: set[int]) -> int:
    """The tracker names one of these iterations, and all of it is there."""
    found = latest_checkpoint(folder)
    assert found.progress == Progress(found.progress.iteration, consumed_samples=7)
    assert found.progress.iteration in iterations
    for name, tensors in states(float(found.progress.iteration)).items():
        loaded = found.tensors(name)
        assert loaded.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert loaded[key].dtype == tensor.dtype and torch.equal(loaded[key], tensor)
    return found.progress.iteration


def test_there_and_back(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    progress = Progress(5, 2, 1, 80, 3, 1.5)
    folder = save_checkpoint(tmp_path, progress, states(2.0))
    found = latest_checkpoint(tmp_path)
    assert (found.folder, found.progress, set(found.files)) == (folder, progress, {"generator", "fake"})
    assert folder.name == "iter_0000005"
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text().strip() == "5"


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (checkpointing, "save_file"),
        (os, "fsync"),
        (Path, "mkdir"),
        (Path, "write_text"),
        (Path, "rename"),
        (Path, "replace"),
        (shutil, "rmtree"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_crash_at_any_stage_leaves_the_last_good_checkpoint(owner, name, tmp_path, monkeypatch):
    """The n-th call of `name` within a save never returns, for every n."""
    real = getattr(owner, name)
    survivors = []
    for fatal in itertools.count(1):
        folder = tmp_path / f"{fatal}"
        for iteration in (1, 2):
            save(folder, iteration)
        calls = itertools.count(1)

        def dying(*args, calls=calls, fatal=fatal, **options):
            if next(calls) == fatal:
                raise Crash
            return real(*args, **options)

        monkeypatch.setattr(owner, name, dying)
        try:
            save(folder, 3, keep_last=1)
        except Crash:
            survivors.append(assert_whole(folder, {2, 3}))
        else:
            break
        finally:
            monkeypatch.setattr(owner, name, real)
        save(folder, 3, keep_last=1)
        assert assert_whole(folder, {3})
        assert sorted(path.name for path in folder.iterdir()) == ["iter_0000003", checkpointing.TRACKER]
    assert survivors, f"{name} is never called"


def test_only_the_newest_are_kept(tmp_path):
    for iteration in (1, 2, 3, 4):
        save(tmp_path, iteration, keep_last=2)
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000003", "iter_0000004"]
    save(tmp_path, 5, keep_last=0)
    assert len(list(tmp_path.glob("iter_*"))) == 3


def test_a_run_that_was_set_back_keeps_what_it_saves(tmp_path):
    """A user who pointed the tracker at an older checkpoint has later ones lying there."""
    for iteration in (1, 2, 3, 4):
        save(tmp_path, iteration)
    (tmp_path / checkpointing.TRACKER).write_text("1\n")
    save(tmp_path, 2, keep_last=1)
    assert assert_whole(tmp_path, {2})
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000002", "iter_0000003", "iter_0000004"]


def test_leftovers_of_a_crash_at_another_iteration_are_removed(tmp_path):
    (tmp_path / "iter_0000009.partial").mkdir()
    save(tmp_path, 1)
    assert not list(tmp_path.glob("*.partial"))


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"--save .*no space on disk"):
        save(tmp_path, 2)
    assert sorted(tmp_path.rglob("*")) == before
    assert assert_whole(tmp_path, {1})


@pytest.mark.parametrize("text", ["", "abc", "-1", "1.5", "1e3", "release", "9" * 5000, "1\n2", "../1", "²", "\x00"])
def test_a_tracker_of_garbage_is_refused(tmp_path, text):
    save(tmp_path, 1)
    (tmp_path / checkpointing.TRACKER).write_text(text)
    with pytest.raises(ValueError, match=checkpointing.TRACKER):
        latest_checkpoint(tmp_path)


def test_a_tracker_of_other_bytes_or_of_a_checkpoint_that_is_gone_is_refused(tmp_path):
    folder = save(tmp_path, 1)
    (tmp_path / checkpointing.TRACKER).write_bytes(b"\xff\xfe1")
    with pytest.raises(ValueError, match=checkpointing.TRACKER):
        latest_checkpoint(tmp_path)
    (tmp_path / checkpointing.TRACKER).write_text("2")
    with pytest.raises(ValueError, match=r"iter_0000002.*incomplete"):
        latest_checkpoint(tmp_path)
    (tmp_path / "iter_0000002").write_bytes(b"")
    with pytest.raises(ValueError, match=r"iter_0000002.*incomplete"):
        latest_checkpoint(tmp_path)
    (tmp_path / checkpointing.TRACKER).write_text("1")
    (folder / checkpointing.MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"iter_0000001.*incomplete"):
        latest_checkpoint(tmp_path)


def manifest(folder: Path, **changes) -> None:
    path = folder / checkpointing.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


PROGRESS = dataclasses.asdict(Progress())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[1, 2]",
        b"null",
        b"{}",
        b'{"format_version": 1}',
        json.dumps({"format_version": "1", "progress": PROGRESS, "files": []}).encode(),
        json.dumps({"format_version": 1, "progress": PROGRESS | {"more": 1}, "files": []}).encode(),
        json.dumps({"format_version": 1, "progress": PROGRESS | {"iteration": "5"}, "files": []}).encode(),
        json.dumps({"format_version": 1, "progress": {"iteration": 5}, "files": []}).encode(),
        json.dumps({"format_version": 1, "progress": [1], "files": []}).encode(),
        json.dumps({"format_version": 1, "progress": PROGRESS, "files": 3}).encode(),
        json.dumps({"format_version": 1, "progress": PROGRESS, "files": "generator"}).encode(),
        json.dumps({"format_version": 1, "progress": PROGRESS, "files": [1]}).encode(),
    ],
)
def test_a_foreign_or_damaged_manifest_is_refused(tmp_path, content):
    folder = save(tmp_path, 1)
    (folder / checkpointing.MANIFEST).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{checkpointing.MANIFEST}: not a checkpoint's manifest"):
        latest_checkpoint(tmp_path)


def test_another_version_is_named_whatever_else_it_holds(tmp_path):
    folder = save(tmp_path, 1)
    (folder / checkpointing.MANIFEST).write_text(json.dumps({"format_version": 2, "shards": 4}))
    with pytest.raises(ValueError, match=r"format version 2; this program reads version 1"):
        latest_checkpoint(tmp_path)


def test_a_missing_file_is_refused(tmp_path):
    folder = save(tmp_path, 1)
    (folder / "fake.safetensors").unlink()
    with pytest.raises(ValueError, match=r"iter_0000001: fake.safetensors is missing"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("size", [0, 4, 30, 1000])
def test_a_truncated_or_foreign_file_is_refused(tmp_path, size):
    path = save(tmp_path, 1) / "generator.safetensors"
    path.write_bytes((path.read_bytes() if size < 1000 else os.urandom(1000))[:size])
    with pytest.raises(ValueError, match=r"generator.safetensors: (is truncated|has no valid safetensors header)"):
        latest_checkpoint(tmp_path)


def test_a_file_that_is_not_in_the_manifest_is_not_read(tmp_path):
    folder = save(tmp_path, 1)
    shutil.copy(folder / "fake.safetensors", folder / "other.safetensors")
    with pytest.raises(ValueError, match=r"has no other.safetensors; it was saved by another configuration"):
        latest_checkpoint(tmp_path).tensors("other")


@pytest.mark.parametrize("trick", ["../outside", "sub/outside", "/{}/outside", "..", "", "a\0b"])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, trick):
    folder = save(tmp_path / "checkpoints", 1)
    for place in (folder.parent, folder / "sub", tmp_path):
        place.mkdir(exist_ok=True)
        shutil.copy(folder / "fake.safetensors", place / "outside.safetensors")
    manifest(folder, files=["fake", trick.format(tmp_path)])
    with pytest.raises(ValueError, match="is missing"):
        latest_checkpoint(tmp_path / "checkpoints")


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(tmp_path):
    folder, marker = save(tmp_path, 1), tmp_path / "exploded"
    for payload in (
        lambda path: torch.save(Bomb(marker), path),
        lambda path: path.write_bytes(pickle.dumps(Bomb(marker))),
    ):
        for name in ("generator.safetensors", checkpointing.MANIFEST, f"../{checkpointing.TRACKER}"):
            payload(folder / name)
            with pytest.raises(ValueError):
                latest_checkpoint(tmp_path).tensors("generator")
            save(tmp_path, 1)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists(), "the bomb is a dud"

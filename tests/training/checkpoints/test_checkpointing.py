"""Checkpoints survive a crash at any moment, and what is not a checkpoint is refused in one line."""

import itertools
import json
import os
import pickle
import shutil
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from megatron_pdmd.training.checkpoints import checkpointing, torch_dist
from megatron_pdmd.training.checkpoints.checkpointing import (
    Checkpoint,
    CheckpointError,
    CheckpointWriter,
    Manifest,
    Progress,
    check_models,
    latest_checkpoint,
)
from megatron_pdmd.training.checkpoints.manifest import FORMAT_VERSION, MANIFEST
from megatron_pdmd.training.checkpoints.sharded_state import Shard

pytestmark = pytest.mark.usefixtures("topology")


class Crash(Exception):
    """Stands for the end of the process."""


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"generator": {"a": torch.full((3,), value)}, "fake": {"b": torch.full((2, 2), -value).bfloat16()}}


def states(value: float) -> dict[str, dict[str, Shard]]:
    return {state: {name: Shard.of(t) for name, t in own.items()} for state, own in tensors(value).items()}


def manifest_of(iteration: int) -> Manifest:
    progress = Progress(iteration, phase_iteration=iteration, consumed_samples=7 * iteration)
    return Manifest(progress, {"fake": 3}, 42, {"single": {"num_layers": 2}}, {"data": 1})


def save(folder: Path, iteration: int, **options) -> Path:
    writer = CheckpointWriter(folder, **options)
    try:
        writer.save(manifest_of(iteration), states(float(iteration)))
    finally:
        writer.close()
    return folder / checkpointing.checkpoint_name(iteration)


def read(found: Checkpoint, state: str) -> dict[str, torch.Tensor]:
    dtypes = {"a": torch.float32, "b": torch.bfloat16}
    own = {name: torch.zeros(shape, dtype=dtypes[name]) for name, shape in found.shapes(state).items()}
    found.read(state, {name: Shard.of(tensor) for name, tensor in own.items()})
    return own


def assert_whole(folder: Path, iterations: set[int]) -> int:
    """The tracker names one of these iterations, and all of it is there."""
    found = latest_checkpoint(folder)
    iteration = found.progress.iteration
    assert iteration in iterations and found.manifest == manifest_of(iteration)
    for state, own in tensors(float(iteration)).items():
        loaded = read(found, state)
        assert loaded.keys() == own.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in own.items())
    return iteration


def test_there_and_back(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    folder = save(tmp_path, 5)
    found = latest_checkpoint(tmp_path)
    assert (found.folder, found.manifest, found.states) == (folder, manifest_of(5), {"generator", "fake"})
    assert folder.name == "iter_0000005"
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text().strip() == "5"
    assert_whole(tmp_path, {5})


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (FileSystemWriter, "write_data"),
        (FileSystemWriter, "finish"),
        (os, "fsync"),
        (Path, "mkdir"),
        (Path, "write_text"),
        (Path, "rename"),
        (Path, "replace"),
        (shutil, "rmtree"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_crash_at_any_stage_leaves_the_last_good_checkpoint(owner, name, asynchronous, tmp_path, monkeypatch):
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
            save(folder, 3, keep_last=1, asynchronous=asynchronous)
        except Crash:
            survivors.append(assert_whole(folder, {2, 3}))
        else:
            break
        finally:
            monkeypatch.setattr(owner, name, real)
        save(folder, 3, keep_last=1, asynchronous=asynchronous)
        assert assert_whole(folder, {3})
        assert sorted(path.name for path in folder.iterdir()) == ["iter_0000003", checkpointing.TRACKER]
    assert survivors, f"{name} is never called"


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("owner", "name", "survivors"),
    [(Path, "write_text", {1, 2}), (Path, "rename", {1}), (Path, "replace", {1, 2}), (shutil, "rmtree", {2})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_crash_while_an_open_iteration_is_saved_again_leaves_the_one_or_the_other(
    owner, name, survivors, asynchronous, tmp_path, monkeypatch
):
    """Both have the iteration's name; the n-th call of `name` within the second save never returns, for every n."""
    real, found = getattr(owner, name), set()

    def save_after(updates: int, folder: Path) -> None:
        writer = CheckpointWriter(folder, keep_last=1, asynchronous=asynchronous)
        try:
            writer.save(replace(manifest_of(1), open_updates=[{"fake_loss": 0.5}] * updates), states(updates))
        finally:
            writer.close()

    for fatal in itertools.count(1):
        folder, calls = tmp_path / f"{fatal}", itertools.count(1)

        def dying(*args, calls=calls, fatal=fatal, **options):
            if next(calls) == fatal:
                raise Crash
            return real(*args, **options)

        save_after(1, folder)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dying)
            crashed = False
            try:
                save_after(2, folder)
            except Crash:
                crashed = True
        last = latest_checkpoint(folder)
        updates = len(last.manifest.open_updates)
        assert torch.equal(read(last, "generator")["a"], torch.full((3,), float(updates)))
        if not crashed:
            break
        found.add(updates)
        save_after(3, folder)
        assert len(latest_checkpoint(folder).manifest.open_updates) == 3
        assert sorted(path.name for path in folder.iterdir()) == ["iter_0000001", checkpointing.TRACKER]
    assert (updates, found) == (2, survivors)


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path, asynchronous=True)
    write = FileSystemWriter.write_data
    released = []

    def slow(self, *arguments):
        while not released:
            time.sleep(0.01)
        return write(self, *arguments)

    monkeypatch.setattr(FileSystemWriter, "write_data", slow)
    live = states(1.0)
    writer.save(manifest_of(1), live)
    for own in live.values():
        for shard in own.values():
            shard.boxes[0].tensor.fill_(99)
    assert latest_checkpoint(tmp_path) is None
    released.append(True)
    writer.save(manifest_of(2), states(2.0))  # waits for the first
    assert_whole(tmp_path, {1, 2})
    writer.close()
    assert_whole(tmp_path, {2})
    (tmp_path / checkpointing.TRACKER).write_text("1")
    assert_whole(tmp_path, {1})


@pytest.mark.parametrize(
    ("device", "expected"), [(torch.device("cuda", 3), [torch.device("cuda", 3)]), (torch.device("cpu"), [])], ids=str
)
def test_the_writing_thread_is_on_its_ranks_device(device, expected, tmp_path, monkeypatch):
    """There is no GPU here: what the thread asks of torch.cuda is recorded, and that it asks before it writes."""
    calls = []
    monkeypatch.setattr(checkpointing, "current_topology", lambda: SimpleNamespace(device=device))
    monkeypatch.setattr(torch.cuda, "set_device", lambda chosen: calls.append((threading.get_ident(), chosen)))
    write = FileSystemWriter.write_data

    def record(self, *arguments):
        calls.append((threading.get_ident(), "writes"))
        return write(self, *arguments)

    monkeypatch.setattr(FileSystemWriter, "write_data", record)
    save(tmp_path, 1, asynchronous=True)
    assert [what for _, what in calls] == [*expected, "writes"]
    assert {thread for thread, _ in calls} != {threading.get_ident()} and len({thread for thread, _ in calls}) == 1


def test_a_failure_in_the_background_is_told_at_the_next_save(tmp_path, monkeypatch):
    def full(self, *arguments):
        raise OSError(28, "No space left on device")

    writer = CheckpointWriter(tmp_path, asynchronous=True)
    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    writer.save(manifest_of(1), states(1.0))
    with pytest.raises(OSError, match="No space left"):
        writer.save(manifest_of(2), states(2.0))
    monkeypatch.undo()
    writer.save(manifest_of(3), states(3.0))
    writer.close()
    assert_whole(tmp_path, {3})


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
def test_a_tracker_of_garbage_is_found_again_from_the_folders_and_it_is_said(tmp_path, text):
    save(tmp_path, 1)
    (tmp_path / checkpointing.TRACKER).write_text(text)
    found = latest_checkpoint(tmp_path)
    assert found.progress.iteration == 1
    assert found.remark.startswith(f"{tmp_path / checkpointing.TRACKER} is damaged (")
    assert found.remark.endswith("the newest whole checkpoint is iter_0000001") and "\n" not in found.remark


def test_a_missing_tracker_is_found_again_from_the_newest_whole_folder(tmp_path):
    for iteration in (1, 2, 10_000_000):
        save(tmp_path, iteration)
    assert latest_checkpoint(tmp_path).remark == ""
    tracker = tmp_path / checkpointing.TRACKER
    tracker.unlink()
    assert latest_checkpoint(tmp_path).progress.iteration == 10_000_000
    (tmp_path / "iter_10000000" / ".metadata").unlink()
    found = latest_checkpoint(tmp_path)
    assert found.progress.iteration == 2
    told = f"{tracker} is missing: the newest whole checkpoint is iter_0000002 (iter_10000000 is not whole)"
    assert found.remark == told
    (tmp_path / "iter_0000002").rename(tmp_path / "iter_0000002.replaced")
    assert latest_checkpoint(tmp_path).folder.name == "iter_0000002.replaced"
    for path in tmp_path.glob("iter_*"):
        (path / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"is missing, and no checkpoint beside it is whole; move .* away"):
        latest_checkpoint(tmp_path)


def test_a_tracker_of_a_checkpoint_that_is_not_whole_is_refused_and_the_one_before_named(tmp_path):
    for iteration in (1, 2, 3):
        save(tmp_path, iteration)
    next((tmp_path / "iter_0000003").glob("*.distcp")).unlink()
    with pytest.raises(ValueError, match=r"iter_0000003: \S+ is missing; iter_0000002 is whole: write 2 into .*"):
        latest_checkpoint(tmp_path)
    (tmp_path / checkpointing.TRACKER).write_text("2\n")
    assert_whole(tmp_path, {2})


def test_a_tracker_of_other_bytes_or_of_a_checkpoint_that_is_gone(tmp_path):
    folder = save(tmp_path, 1)
    (tmp_path / checkpointing.TRACKER).write_bytes(b"\xff\xfe1")
    assert "damaged" in latest_checkpoint(tmp_path).remark
    (tmp_path / checkpointing.TRACKER).write_text("2")
    with pytest.raises(ValueError, match=r"iter_0000002.*incomplete.*write 1 into"):
        latest_checkpoint(tmp_path)
    (tmp_path / "iter_0000002").write_bytes(b"")
    with pytest.raises(ValueError, match=r"iter_0000002.*incomplete"):
        latest_checkpoint(tmp_path)
    (tmp_path / checkpointing.TRACKER).write_text("1")
    (folder / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"iter_0000001.*incomplete"):
        latest_checkpoint(tmp_path)


PROGRESS = asdict(Progress())


def progress_with(**changes) -> dict:
    return asdict(manifest_of(1).progress) | changes


def content_with(**changes) -> bytes:
    """A manifest with something wrong."""
    good = {"format_version": FORMAT_VERSION, "ckpt_format": "torch_dist"} | asdict(manifest_of(1))
    return json.dumps(good | changes).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[1, 2]",
        b"null",
        b"{}",
        b'{"format_version": 3}',
        content_with(format_version="2"),
        content_with(progress=PROGRESS | {"more": 1}),
        content_with(progress=PROGRESS | {"iteration": True}),
        content_with(progress=PROGRESS | {"train_seconds": float("nan")}),
        content_with(log_interval_sums={"a": [1.0]}),
        b"[" * 100000,
        content_with(progress=PROGRESS | {"iteration": "5"}),
        content_with(progress={"iteration": 5}),
        content_with(progress=[1]),
        content_with(seed=1.5),
        content_with(optimizer_steps={"fake": "3"}),
        content_with(optimizer_steps=[]),
        content_with(models={"single": 3}),
        content_with(layout=None),
        content_with(open_updates=None),
        content_with(open_updates=[3]),
        content_with(open_updates=[{"fake_loss": "3"}]),
    ],
)
def test_a_foreign_or_damaged_manifest_is_refused(tmp_path, content):
    folder = save(tmp_path, 1)
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{MANIFEST}: not a checkpoint's manifest"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (content_with(progress=progress_with(phase=99)), "phase is 99, with 1 of the run's 1 iterations"),
        (content_with(progress=progress_with(phase=0)), "phase is 0"),
        (content_with(progress=progress_with(phase=2)), "phase is 2"),
        (content_with(progress=progress_with(phase_iteration=5)), "phase is 1, with 5 of the run's 1 iterations"),
        (content_with(progress=progress_with(phase_iteration=-1)), "phase_iteration is -1"),
        (content_with(progress=progress_with(iteration=2, phase_iteration=2)), "iteration is 2 in a folder of that"),
        (content_with(progress=progress_with(consumed_samples=0)), "1 iterations consumed 0 samples"),
        (content_with(progress=progress_with(consumed_samples=10**30)), "consumed_samples is 1000"),
        (content_with(progress=progress_with(skipped_updates=-3)), "skipped_updates is -3"),
        (content_with(progress=progress_with(train_seconds=-1.0)), "train_seconds is -1.0"),
        (content_with(progress=progress_with(train_seconds=1e300)), "train_seconds is 1e[+]300"),
        (content_with(optimizer_steps={"generator": 2}), "the generator made 2 updates in 1 iterations"),
        (content_with(optimizer_steps={"fake": -3}), "fake is -3"),
        (content_with(seed=-1), "seed is -1"),
        (content_with(seed=2**64), "seed is"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path, content, words):
    folder = save(tmp_path, 1)
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{MANIFEST}: {words}.*, which cannot be; go on from"):
        latest_checkpoint(tmp_path)


def test_numbers_that_are_not_finite_come_back_from_valid_json(tmp_path):
    nan = float("nan")
    odd = replace(
        manifest_of(1), open_updates=[{"fake_loss": nan, "skipped_updates": 1}], log_interval_sums={"a": [nan, 2.0]}
    )
    writer = CheckpointWriter(tmp_path)
    writer.save(odd, states(1.0))
    writer.close()
    content = (tmp_path / "iter_0000001" / MANIFEST).read_text()
    assert "NaN" not in content and json.loads(content)["open_updates"] == [{"fake_loss": None, "skipped_updates": 1}]
    found = latest_checkpoint(tmp_path).manifest
    assert repr(found) == repr(odd)


def test_another_version_is_named_whatever_else_it_holds(tmp_path):
    folder = save(tmp_path, 1)
    (folder / MANIFEST).write_text(json.dumps({"format_version": 2, "files": ["generator"]}))
    with pytest.raises(ValueError, match=r"format version 2; this program reads version 3"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_missing_file_is_refused(tmp_path, name):
    folder = save(tmp_path, 1)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"iter_0000001: {name} is missing"):
        latest_checkpoint(tmp_path)


def test_a_file_of_another_checkpoint_is_refused(tmp_path):
    folder = save(tmp_path, 1)
    shutil.copy(folder / "__0_0.distcp", folder / "__1_0.distcp")
    with pytest.raises(ValueError, match=r"iter_0000001: __1_0.distcp is in no entry of its .metadata; move away"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("size", [0, 4, 1000])
def test_a_truncated_file_is_refused(tmp_path, size):
    path = save(tmp_path, 1) / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"__0_0.distcp: is truncated"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("size", [0, 4, 100])
def test_a_truncated_or_foreign_index_is_refused(tmp_path, size):
    path = save(tmp_path, 1) / torch_dist.INDEX
    for content in (path.read_bytes()[:size], os.urandom(size)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"\.metadata: not an index of tensors"):
            latest_checkpoint(tmp_path)


def test_a_flipped_bit_in_a_tensor_is_noticed(tmp_path):
    folder = save(tmp_path, 1)
    path, value = folder / "__0_0.distcp", torch.full((3,), 1.0).numpy().tobytes()
    content = path.read_bytes()
    assert content.count(value) == 1
    path.write_bytes(content.replace(value, value[:-1] + b"\x3e"))
    with pytest.raises(CheckpointError, match="iter_0000001: damaged"):
        read(latest_checkpoint(tmp_path), "generator")


@pytest.mark.parametrize(
    ("shards", "words"),
    [
        ({}, "'a' is on one side only"),
        ({"a": torch.zeros(3), "more": torch.zeros(1)}, "'more' is on one side only"),
        ({"a": torch.zeros(4)}, r"'a' differs in shape \(\[3\] saved, \[4\] needed\)"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(tmp_path, shards, words):
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=f"iter_0000001: generator: {words}; it was saved by another"):
        latest_checkpoint(tmp_path).read("generator", {name: Shard.of(t) for name, t in shards.items()})
    with pytest.raises(CheckpointError, match="has no other; it was saved by another configuration"):
        latest_checkpoint(tmp_path).read("other", {"a": Shard.of(torch.zeros(3))})
    assert not any(tensor.any() for tensor in shards.values())


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ({"single": {"num_layers": 4}}, "num_layers of single is 2 there, 4 in --teacher"),
        ({"single": {"num_layers": 2, "ffn_dim": 8}}, "ffn_dim of single is None there, 8 in --teacher"),
        ({"low_noise": {"num_layers": 2}}, "experts single, this teacher low_noise"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, models, words):
    save(tmp_path, 1)
    check_models(latest_checkpoint(tmp_path), manifest_of(1).models)
    with pytest.raises(CheckpointError, match=words):
        check_models(latest_checkpoint(tmp_path), models)


def rewrite_index(folder: Path, change) -> None:
    path = folder / torch_dist.INDEX
    index = pickle.loads(path.read_bytes())
    change(index)
    path.write_bytes(pickle.dumps(index))


def test_an_index_that_leads_out_of_the_folder_or_leaves_parts_out_is_refused(tmp_path):
    def lead_out(index):
        for place in index.storage_data.values():
            place.relative_path = "../__0_0.distcp"

    def leave_out(index):
        next(iter(index.state_dict_metadata.values())).chunks.clear()

    def transform(index):
        next(iter(index.storage_data.values())).transform_descriptors = ["zstd"]

    def rename(index):
        index.state_dict_metadata[3] = index.state_dict_metadata.pop("generator.a")

    for change in (lead_out, leave_out, transform, rename):
        folder = save(tmp_path, 1)
        shutil.copy(folder / "__0_0.distcp", tmp_path)
        rewrite_index(folder, change)
        with pytest.raises(ValueError, match=r"\.metadata: not an index of tensors"):
            latest_checkpoint(tmp_path)


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_that_could_run_is_unpickled(tmp_path):
    marker = tmp_path / "exploded"
    folder = save(tmp_path / "checkpoints", 1)

    def load() -> None:
        found = latest_checkpoint(tmp_path / "checkpoints")
        read(found, "generator")

    for name in (torch_dist.INDEX, MANIFEST, f"../{checkpointing.TRACKER}"):
        for payload in (pickle.dumps(Bomb(marker)), pickle.dumps([Bomb(marker)])):
            (folder / name).write_bytes(payload)
            if name == f"../{checkpointing.TRACKER}":
                load()  # found again from the folders
                continue
            with pytest.raises(ValueError):
                load()
        folder = save(tmp_path / "checkpoints", 1)
    rewrite_index(folder, lambda index: setattr(index, "planner_data", Bomb(marker)))
    with pytest.raises(ValueError, match=r"\.metadata: not an index of tensors \(it names "):
        load()
    folder = save(tmp_path / "checkpoints", 1)
    torch.save(Bomb(marker), folder / "bomb")
    size = (folder / "bomb").stat().st_size
    (folder / "bomb").rename(folder / "__0_0.distcp")

    def point_at_it(index):
        for key, place in index.storage_data.items():
            index.storage_data[key] = replace(place, offset=0, length=size)

    rewrite_index(folder, point_at_it)
    with pytest.raises(CheckpointError, match="damaged"):
        load()
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists(), "the bomb is a dud"

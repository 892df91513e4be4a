"""Safetensors headers and indices: what the safetensors library wrote is read, and what is damaged is refused."""

import json
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron_pdmd.files.safetensors_files import (
    read_header,
    read_model_header,
    read_model_headers,
    read_tensors,
    require_finite,
)

STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"
ODD_NAMES = ("a\0.safetensors", "x" * 300 + ".safetensors", "\ud800.safetensors")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of tensors of many kinds."""
    tensors = {str(dtype): torch.ones(3, index + 1).to(dtype) for index, dtype in enumerate(DTYPES)}
    path = tmp_path / f"{STEM}.safetensors"
    save_file(tensors | {"scalar": torch.tensor(1.0), "empty": torch.zeros(0, 3)}, path, metadata={"format": "pt"})
    return path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model of two files."""
    folder = tmp_path / "model"
    folder.mkdir()
    weight_map = {}
    for number, names in ((1, "ab"), (2, "c")):
        file = f"{STEM}-0000{number}-of-00002.safetensors"
        save_file({name: torch.ones(2) for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": weight_map}))
    return folder


def write(path: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def tensor(begin: int = 0, end: int = 8, shape: object = (2,), dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_every_kind_of_tensor_is_read_as_the_library_reads_it(path):
    header, loaded = read_header(path), load_file(path)
    assert header.keys() == loaded.keys() == read_tensors(path).keys()
    assert all(header[name].shape == tuple(tensor.shape) for name, tensor in loaded.items())
    assert all(header[name].size == tensor.nbytes for name, tensor in loaded.items())


@pytest.mark.parametrize("kept", [0, 4, 8, 50, -1])
def test_truncated_files_are_refused(path, kept):
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"{path.name}.*is truncated"):
        read_header(path)


def test_files_that_go_on_after_their_tensors_are_refused(path):
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="is truncated or damaged"):
        read_header(path)


def test_what_is_no_file_is_told(tmp_path):
    for path, words in ((tmp_path / "none", "no such file"), (tmp_path, "not a file"), (Path("/dev/zero"), "not a")):
        with pytest.raises(ValueError, match=words):
            read_header(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_header(tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"[]", "no valid safetensors header"),
        (b"{x}", "not valid JSON"),
        (b'{"a":' * 10_000, "JSON|deep"),
        ({"a": 3}, "no valid safetensors header"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "no valid safetensors header"),
        ({"__metadata__": {"format": 1}, "a": tensor()}, "__metadata__"),
        ({"a": tensor(dtype="F33")}, "unknown kind, 'F33'"),
        ({"a": tensor(dtype=["F32"])}, "unknown kind"),
        ({"a": tensor(shape=3)}, "no valid shape"),
        ({"a": tensor(shape=[-2])}, "no valid shape"),
        ({"a": tensor(shape=[2.0])}, "no valid shape"),
        ({"a": tensor(shape=[True, 2])}, "no valid shape"),
        ({"a": tensor(shape=[10**30, 0])}, "no valid shape"),
        ({"a": tensor(shape=[2] + 100 * [1])}, "no valid shape"),
        ({"a": tensor(shape=[3])}, "which does not fit"),
        ({"a": tensor(shape=[10**12, 10**12])}, "which does not fit"),
        ({"a": tensor(begin=8, end=0)}, "no valid data_offsets"),
        ({"a": tensor(begin=-8, end=0)}, "no valid data_offsets"),
        ({"a": tensor(begin=4, end=12)}, "starts at byte 4 of the data, not at 0"),
        ({"a": tensor(), "b": tensor()}, "'b' starts at byte 0 of the data, not at 8"),
        ({"a": tensor(), "b": tensor(12, 20)}, "'b' starts at byte 12 of the data, not at 8"),
        (b'{"a":%b,"a":%b}' % ((json.dumps(tensor()).encode(),) * 2), "'a' is given twice"),
    ],
)
def test_headers_that_cannot_be_are_refused_in_one_line(tmp_path, header, words):
    path = tmp_path / "model.safetensors"
    write(path, header, bytes(8))
    with pytest.raises(ValueError, match=words) as refused:
        read_header(path)
    assert str(refused.value).startswith(str(path)) and len(str(refused.value).splitlines()) == 1


def test_damaged_headers_end_in_one_line_or_are_read_as_the_library_reads_them(path):
    chance, whole = random.Random(0), path.read_bytes()
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    refused = 0
    for _ in range(1500):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(header_end)] = chance.choice([chance.randrange(256), *b'{}[]",:0-e'])
        path.write_bytes(damaged if chance.random() < 0.9 else damaged[: chance.randrange(len(damaged))])
        try:
            tensors = read_tensors(path)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1 and str(path) in str(error)
            refused += 1
            continue
        try:
            assert tensors.keys() == load_file(path).keys()
        except SafetensorError:
            pytest.fail(f"accepted what the library refuses: {bytes(damaged[:header_end])}")
    assert refused > 1000


def test_a_model_in_several_files(sharded):
    assert [sorted(header) for header in read_model_headers(sharded, STEM).values()] == [["a", "b"], ["c"]]
    assert sorted(read_model_header(sharded, STEM)) == [*"abc"]


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", "prompts.txt", 3, None, *ODD_NAMES],
)
def test_an_index_cannot_lead_out_of_the_folder(sharded, name):
    save_file({"a": torch.zeros(1)}, sharded.parent / "secret.safetensors")
    edit(sharded, a=name)
    with pytest.raises(ValueError, match="is no safetensors file in this folder; refused"):
        read_model_header(sharded, STEM)


def edit(folder: Path, **changes: object) -> None:
    index = json.loads((folder / INDEX).read_text())
    weight_map = index["weight_map"] | changes
    index["weight_map"] = {name: file for name, file in weight_map.items() if file != "dropped"}
    (folder / INDEX).write_text(json.dumps(index))


def test_an_index_and_its_files_say_the_same(sharded):
    first, second = (f"{STEM}-0000{number}-of-00002.safetensors" for number in (1, 2))
    edit(sharded, more=first)
    with pytest.raises(ValueError, match=f"'more' is in {first} by the index, but nowhere"):
        read_model_header(sharded, STEM)
    edit(sharded, more="dropped", b=second)
    with pytest.raises(ValueError, match=f"'b' is in {second} by the index, but in {first}"):
        read_model_header(sharded, STEM)
    edit(sharded, b="dropped")
    with pytest.raises(ValueError, match=f"'b' is nowhere by the index, but in {first}"):
        read_model_header(sharded, STEM)
    edit(sharded, b=first)
    save_file({"a": torch.ones(2), "c": torch.ones(2)}, sharded / second)
    with pytest.raises(ValueError, match=f"{second}: tensor 'a' is also in {first}"):
        read_model_header(sharded, STEM)
    (sharded / second).unlink()
    with pytest.raises(ValueError, match=f"{second}: no such file"):
        read_model_header(sharded, STEM)


@pytest.mark.parametrize("weight_map", [None, {}, [], 3])
def test_an_index_without_a_map_is_refused(sharded, weight_map):
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="has no weight_map"):
        read_model_header(sharded, STEM)


def test_links_out_of_the_folder_are_files_of_a_hub_cache(sharded):
    for path in list(sharded.glob("*.safetensors")):
        blob = sharded.parent / f"blob-{path.name}"
        path.rename(blob)
        path.symlink_to(blob)
    assert sorted(read_model_header(sharded, STEM)) == [*"abc"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(dtype, value):
    tensors = {"whole": torch.ones(4, 5), "empty": torch.ones(0), "count": torch.ones(2, dtype=torch.int64)}
    require_finite(tensors.items(), "here")
    tensors["x"] = torch.ones(4, 5)
    tensors["x"][2, 3] = value
    with pytest.raises(ValueError, match=r"^here: tensor 'x' holds values that are not finite"):
        require_finite([(name, tensor.to(dtype)) for name, tensor in tensors.items()], "here")

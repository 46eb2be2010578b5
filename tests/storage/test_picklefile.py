"""Files of `torch.save`: nothing in them is called, and nothing large is made for them."""

from __future__ import annotations

import io
import pickle
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from safeproj.errors import SafeprojError
from safeproj.storage.arrays import bytes_of, from_torch
from safeproj.storage.picklefile import find_tensors, read_pickle
from safeproj.storage.source import LocalFolder

ALLOCATED = 8 << 20
"""Bytes that reading a file of a few hundred may take."""


Records = list[tuple[str, bytes]]
Change = Callable[[Records], Records]


def saved(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None) -> Path:
    """Write what `torch.save` would, with another pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/version", b"3\n")
        for key, content in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", content)
    return path


def called(module: str, name: str, *arguments: Any) -> bytes:
    """Return the pickle of a dictionary with the result of a call."""
    packed = pickle.dumps(arguments, protocol=2)[2:-1]
    return b"\x80\x02}X\x01\x00\x00\x00wc" + f"{module}\n{name}\n".encode() + packed + b"Rs."


HUGE = 10**11

BOMBS = {
    "a large array of bytes": called("builtins", "bytearray", HUGE),
    "a large tensor": called("torch", "FloatTensor", HUGE),
    "a large storage": called("torch", "FloatStorage", HUGE),
    "large text": called("_codecs", "encode", "x" * 9, "latin1"),
    "keys whose hash takes for ever": b"\x80\x02}(" + b"))" + b"\x85q\x00h\x00\x86" * 40 + b"Nu.",
    "a set of such": b"\x80\x04\x8f(" + b")" + b"\x85\x94h\x00\x86" * 40 + b"\x90.",
    "a number of a million digits": b"\x80\x02}X\x01\x00\x00\x00w\x8b\x40\x42\x0f\x00"
    + b"\x01" * 1_000_000
    + b"s.",
    "text that is not there": b"\x80\x04X\xff\xff\xff\x7fabc.",
    "code": called("os", "system", "true"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_little_is_made_for_what_is_refused(tmp_path: Path, case: str) -> None:
    path = saved(tmp_path / "x.bin", BOMBS[case])
    with pytest.raises(SafeprojError):  # torch and its parts are imported now
        find_tensors(path)
    tracemalloc.start()
    try:
        for read in (
            lambda: find_tensors(path),
            lambda: read_pickle(LocalFolder(tmp_path, "x"), path.name),
        ):
            with pytest.raises(SafeprojError, match=r"cannot be loaded as plain|nothing else"):
                read()
        assert tracemalloc.get_traced_memory()[1] < ALLOCATED + 3 * path.stat().st_size
    finally:
        tracemalloc.stop()


def test_a_deflated_pickle_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"]" * (300 << 20))
    assert (tmp_path / "x.bin").stat().st_size < 1 << 20
    tracemalloc.start()
    try:
        with pytest.raises(SafeprojError, match="cannot be loaded as plain tensors"):
            find_tensors(tmp_path / "x.bin")
        assert tracemalloc.get_traced_memory()[1] < ALLOCATED
    finally:
        tracemalloc.stop()


def test_a_directory_of_the_zip_that_is_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safeproj.storage import picklefile

    path = tmp_path / "x.bin"
    torch.save({"w": torch.ones(2, 2)}, path)
    assert find_tensors(path).keys() == {"w"}
    monkeypatch.setattr(picklefile, "MAX_DIRECTORY", 100)
    with pytest.raises(SafeprojError, match="cannot be loaded as plain tensors"):
        find_tensors(path)


@pytest.mark.parametrize("limit", ["MAX_OPERATIONS", "MAX_PICKLE"])
def test_a_pickle_has_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    from safeproj.storage import picklefile

    torch.save({"w": torch.ones(2, 2)}, tmp_path / "x.bin")
    monkeypatch.setattr(picklefile, limit, 20)
    with pytest.raises(SafeprojError, match="cannot be loaded as plain tensors"):
        find_tensors(tmp_path / "x.bin")


def contents() -> dict[str, dict[str, Any]]:
    """Return what programs save as the weights of models and adapters."""
    W = torch.randn(5, 4)
    marked: Any = torch.nn.Parameter(torch.randn(3))
    marked.note = "an attribute"
    layer = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    return {
        "a state dict, with versions of its modules": layer.state_dict(),
        "parameters": OrderedDict(w=torch.nn.Parameter(W), m=marked),
        "views": {"whole": W, "turned": W.T, "part": W[1:3, ::2], "one": W[2, 2], "none": W[:0]},
        "dtypes": {
            str(dtype): torch.ones(2, 3).to(dtype)
            for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool)
        },
        "dtypes without a class of storages": {
            str(dtype): torch.ones(2, 3).to(dtype) for dtype in (torch.float8_e4m3fn, torch.uint16)
        },
    }


@pytest.mark.parametrize("case", contents())
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_programs_save_is_read_as_torch_reads_it(
    tmp_path: Path, case: str, protocol: int
) -> None:
    path = tmp_path / "x.bin"
    content = contents()[case]
    torch.save(content, path, pickle_protocol=protocol)
    found = read_pickle(LocalFolder(tmp_path, "x"), path.name)
    if protocol == 2:  # the only one that torch's own restricted reader knows
        assert list(found) == list(torch.load(path, weights_only=True))
    assert list(found) == list(contents()[case])
    for name, tensor in content.items():
        expected = from_torch(tensor)
        assert found[name].dtype == expected.dtype
        assert found[name].shape == expected.shape
        assert bytes_of(found[name]) == bytes_of(expected)


def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"w": torch.ones(64, 64)}, path)
    content = path.read_bytes()
    for stored, other in ((b"K@K@\x86", b"KAK@\x86"), (b"K@K\x01\x86", b"KBK\x01\x86")):
        assert content.count(stored) == 1
        buffer = io.BytesIO(content.replace(stored, other))
        path.write_bytes(buffer.getvalue())
        with pytest.raises(SafeprojError):
            find_tensors(path)


def renamed(old: str, new: str) -> Change:
    return lambda found: [(new if name == old else name, content) for name, content in found]


ARCHIVES: dict[str, Change] = {
    "a record above the directory": lambda found: [*found, ("../x", b"")],
    "a record of another directory": renamed("x/data/0", "y/data/0"),
    "the pickle deeper": renamed("x/data.pkl", "x/x/data.pkl"),
    "no directory": lambda found: [(name.partition("/")[2], each) for name, each in found],
    "no version": renamed("x/version", "x/other"),
    "a version to come": lambda found: [
        (name, b"11" if name == "x/version" else each) for name, each in found
    ],
    "big numbers first": lambda found: [
        (name, b"big" if name == "x/byteorder" else each) for name, each in found
    ],
    "an alignment that is no number": lambda found: [
        *[each for each in found if each[0] != "x/.storage_alignment"],
        ("x/.storage_alignment", b"6x"),
    ],
    "a number of the file that is no text": lambda found: [
        *[each for each in found if each[0] != "x/.data/serialization_id"],
        ("x/.data/serialization_id", b"1\xff"),
    ],
    "a record that is too long": lambda found: [
        (name, each + b"\0" if name == "x/data/0" else each) for name, each in found
    ],
    "a program": lambda found: [*found, ("x/constants.pkl", b"\x80\x02).")],
    "something before it": lambda found: found,
}
"""What torch does not load, or not as plain tensors of these numbers."""


@pytest.mark.parametrize("case", ARCHIVES)
def test_archives_that_torch_refuses_are_refused(tmp_path: Path, case: str) -> None:
    path = tmp_path / "x.bin"
    torch.save({"w": torch.ones(2, 2)}, path)
    with zipfile.ZipFile(path) as archive:
        found = [(name, archive.read(name)) for name in archive.namelist()]

    def write(records: Records, front: bytes = b"") -> None:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in records:
                archive.writestr(name, content)
        path.write_bytes(front + buffer.getvalue())

    write(found)
    assert find_tensors(path).keys() == torch.load(path, weights_only=True).keys()
    write(ARCHIVES[case](found), b"#!" if case == "something before it" else b"")
    with pytest.raises(SafeprojError, match="cannot be loaded as plain tensors"):
        find_tensors(path)
    if case != "big numbers first":  # those it turns
        with pytest.raises(Exception, match=r".+"):
            torch.load(path, weights_only=True)


def test_two_records_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"w": torch.ones(2, 2)}, path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("x/data/0", bytes(16))
    with pytest.raises(SafeprojError, match="cannot be loaded as plain tensors"):
        find_tensors(path)


@pytest.mark.filterwarnings("ignore")
def test_whatever_byte_of_the_zip_is_another_it_is_read_as_torch_reads_it_or_refused(
    tmp_path: Path,
) -> None:
    path = tmp_path / "x.bin"
    torch.save({"w": torch.ones(2, 2)}, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        places = {*range(archive.start_dir, len(whole))}
        for member in archive.infolist():
            places |= {*range(member.header_offset, member.header_offset + 30)}
    for place in sorted(places):
        for flip in (0x01, 0x40, 0xFF):
            other = bytearray(whole)
            other[place] ^= flip
            path.write_bytes(other)
            try:
                found = read_pickle(LocalFolder(tmp_path, "x"), path.name)
            except SafeprojError:
                continue
            theirs = torch.load(path, weights_only=True)["w"]
            assert bytes_of(found["w"]) == bytes_of(from_torch(theirs))


def test_weights_of_a_file_that_shrank_are_an_error_and_no_signal(tmp_path: Path) -> None:
    from safeproj.checkpoint import open_checkpoint
    from tests.checkpoint.reading import read

    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(512, 512), "turned": torch.ones(512, 512).T}, path)
    checkpoint = open_checkpoint(str(tmp_path))
    weights = [checkpoint.weight(name) for name in ("w", "turned")]
    with path.open("r+b") as file:
        file.truncate(4096)
    for weight in weights:
        with pytest.raises(SafeprojError, match="truncated while reading"):
            read(weight)

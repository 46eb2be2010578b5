"""Files are known by their bytes, as the programs write them that make such files."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file

from safeproj.storage.filekind import (
    HDF5,
    PICKLE,
    SAFETENSORS,
    ZIP,
    Group,
    kind_of,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"

GROUPS = {".safetensors": Group.weights, ".lora": Group.archive}
"""What the fixtures' files are by their suffix, all others text: litgpt saves with `torch.save`."""


def of_bytes(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def legacy(path: Path) -> None:
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)


def numpy_zip(path: Path) -> None:
    with path.open("wb") as file:
        numpy.savez(file, a=numpy.ones(2))


def numpy_array(path: Path) -> None:
    with path.open("wb") as file:
        numpy.save(file, numpy.ones(2))


def tar(path: Path, kind: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w", format=kind) as file:
        entry = tarfile.TarInfo("a")
        entry.size = 3
        file.addfile(entry, io.BytesIO(b"abc"))


def old_tar(path: Path) -> None:
    """Write an archive as before POSIX: a checksum and no name of the format."""
    tar(path, tarfile.USTAR_FORMAT)
    content = bytearray(path.read_bytes())
    content[257:265] = bytes(8)
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)


def zip_behind_text(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a", "b")
    path.write_bytes(b"# A model card\n" + path.read_bytes())


WEIGHTS: dict[str, Callable[[Path], object]] = {
    "safetensors": lambda path: save_file({"a": torch.ones(2)}, path),
    "torch": lambda path: torch.save({"a": torch.ones(2)}, path),
    "torch-before-1.6": legacy,
    "pickle-0": of_bytes(pickle.dumps({"a": [1, 2, 3]}, 0)),
    "pickle-2": of_bytes(pickle.dumps({"a": [1, 2, 3]}, 2)),
    "pickle-5": of_bytes(pickle.dumps({"a": [1, 2, 3]}, 5)),
    "npz": numpy_zip,
    "npy": numpy_array,
    "gguf": of_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0)),
    "gguf-big-endian": of_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0)),
    "ggml": of_bytes(struct.pack("<II", 0x67676A74, 3)),
    "hdf5": of_bytes(b"\x89HDF\r\n\x1a\n" + bytes(40)),
    "hdf5-behind-a-user-block": of_bytes(b" " * 2048 + b"\x89HDF\r\n\x1a\n" + bytes(40)),
    "tar": tar,
    "old-tar": old_tar,
    "gzip": of_bytes(gzip.compress(b"abc")),
    "bzip2": of_bytes(bz2.compress(b"abc")),
    "xz": of_bytes(lzma.compress(b"abc")),
    "lzma": of_bytes(lzma.compress(b"abc", lzma.FORMAT_ALONE)),
    "zlib": of_bytes(zlib.compress(b"abc")),
    "zstandard": of_bytes(b"\x28\xb5\x2f\xfd\x20\x03\x19\0\0abc"),
    "7z": of_bytes(b"7z\xbc\xaf\x27\x1c\0\4" + bytes(24)),
    "zip-behind-text": zip_behind_text,
    "numbers": lambda path: path.write_bytes(torch.randn(64).numpy().tobytes()),
    "numbers-behind-text": of_bytes(b"# A model card\n" * 10_000 + struct.pack("<3f", 1, 2, 3)),
    "onnx": of_bytes(b"\x08\x08\x12\x07pytorch\x1a\x032.0:\xff\x01"),
    "msgpack": of_bytes(b"\x81\xa6params\x81\xa6kernel\xc7\x04\x01\0\0\x80?"),
    "tflite": of_bytes(b"\x1c\0\0\0TFL3" + bytes(20)),
    "sqlite": of_bytes(b"SQLite format 3\0" + bytes(84)),
    "parquet": of_bytes(b"PAR1\x15\x04" + bytes(20)),
}

OTHERS: dict[str, tuple[Group, bytes]] = {
    "nothing": (Group.empty, b""),
    "markdown": (Group.text, "# Ein Modell für alle\n".encode()),
    "latin-1": (Group.text, "# Ein Modell für alle\n".encode("latin-1")),
    "json": (Group.text, json.dumps({"a": [1, 2]}).encode()),
    "words-that-are-opcodes": (Group.text, b"tablet."),
    "text-that-starts-like-a-program": (Group.text, b"MZ is the start of a program."),
    "text-that-starts-like-a-table": (Group.text, b"ORC and PAR1 are tables."),
    "script": (Group.program, b"#!/bin/sh\n"),
    "elf": (Group.program, Path(sys.executable).read_bytes()[:4096]),
    "windows-program": (Group.program, b"MZ\x90\0\x03\0"),
    "image": (Group.media, b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"),
    "sentencepiece": (
        Group.vocabulary,
        b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02\n\x0c\n\x03<s>\x15\0\0\0\0\x18\x03"
        b"\n\x0d\n\x04</s>\x15\0\0\0\0\x18\x03",
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_may_hold_weights_is_known(name: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.md"
    WEIGHTS[name](path)
    assert kind_of(path).may_hold_weights, kind_of(path)


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_are_told_apart(name: str, tmp_path: Path) -> None:
    group, content = OTHERS[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert kind_of(path).group is group
    assert not kind_of(path).may_hold_weights


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("safetensors", SAFETENSORS),
        ("torch", ZIP),
        ("torch-before-1.6", PICKLE),
        ("hdf5-behind-a-user-block", HDF5),
    ],
)
def test_the_kind_is_named(name: str, kind: object, tmp_path: Path) -> None:
    WEIGHTS[name](tmp_path / "x")
    assert kind_of(tmp_path / "x") == kind


def test_compiled_python_is_a_program(tmp_path: Path) -> None:
    import py_compile

    (tmp_path / "a.py").write_text("x = 1\n", "utf-8")
    py_compile.compile(str(tmp_path / "a.py"), str(tmp_path / "b"))
    assert kind_of(tmp_path / "b").group is Group.program


def test_a_log_of_tensorboard_is_one(tmp_path: Path) -> None:
    """It is a row of records: a length, its checksum, the event, and the event's checksum."""
    events = (
        b"\t\0\0\x80\xc1\x1a\xd8\xd9A\x1a\rbrain.Event:2",
        b"\t\0\0\x80\xc1\x1a\xd8\xd9A\x10\x01",
    )
    path = tmp_path / "events.out.tfevents.1"
    records = [struct.pack("<Q", len(e)) + b"\1\2\3\4" + e + b"\5\6\7\x80" for e in events]
    path.write_bytes(b"".join(records))
    assert kind_of(path).group is Group.log
    path.write_bytes(b"".join(records) + b"\xff" * 20)
    assert kind_of(path).group is Group.unknown


def test_files_of_the_fixtures_are_known() -> None:
    for path in FIXTURES.rglob("*"):
        if path.is_file():
            wanted = GROUPS.get(path.suffix, Group.text)
            assert kind_of(path).group is wanted, path
            assert kind_of(path).may_hold_weights == (path.suffix in GROUPS), path

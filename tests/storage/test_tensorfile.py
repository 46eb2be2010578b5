"""Headers of safetensors files: what the library refuses is refused, all else is read as by it."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save

from safeproj.adapter.files import read_safetensors
from safeproj.errors import SafeprojError
from safeproj.storage import documents as jsontext
from safeproj.storage import tensorfile
from safeproj.storage.arrays import to_torch
from safeproj.storage.source import LocalFolder, content_sha256, file_sha256, read_json
from safeproj.storage.tensorfile import parse_header, read_header

SEEDS = 3_000

SOUND = save(
    {
        "a": torch.arange(6, dtype=torch.float32).view(2, 3),
        "b": torch.ones(3, dtype=torch.bfloat16),
        "c": torch.empty(0, 4),
        "d": torch.tensor(1.0),
        "e": torch.zeros(5, dtype=torch.uint8),
    },
    metadata={"format": "pt"},
)

LIBRARY: Any = safetensors.deserialize


def packed(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def mutated(seed: int) -> bytes:
    """Return a file with something changed: bytes, numbers, or fields of its header."""
    rng = random.Random(seed)
    length = struct.unpack("<Q", SOUND[:8])[0]
    header, data = json.loads(SOUND[8 : 8 + length]), SOUND[8 + length :]
    if seed % 3 == 0:
        content = bytearray(SOUND)
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(8 + length)] = rng.randrange(256)
        return bytes(content)
    name = rng.choice([*header, "new"])
    values: list[Any] = [None, 0, -1, 1.5, True, "x", [], {}, [0, 24], [2**63, 2**64], [3, 8]]
    if seed % 3 == 1 and isinstance(header.get(name), dict):
        header[name][rng.choice([*header[name], "more"])] = rng.choice([*values, "F32", "F4"])
    else:
        header[name] = rng.choice(values)
    return packed(header, data[: rng.choice([len(data), len(data), len(data) - 1])])


def test_what_the_library_refuses_is_refused() -> None:
    accepted = 0
    for seed in range(SEEDS):
        content = mutated(seed)
        try:
            own = parse_header("x", bytearray(content))
        except (ValueError, RecursionError, SafeprojError):
            continue
        accepted += 1
        theirs = dict(LIBRARY(content))
        assert theirs.keys() == own.tensors.keys(), seed
        for name, entry in own.tensors.items():
            assert list(entry.shape) == theirs[name]["shape"], seed
            assert entry.dtype == theirs[name]["dtype"], seed
            found = content[entry.start : entry.start + entry.nbytes]
            assert found == bytes(theirs[name]["data"]), seed
    assert accepted > SEEDS // 50  # some changes are harmless


def test_a_sound_file_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(SOUND)
    metadata, tensors = read_safetensors(LocalFolder(tmp_path, "x"), "x")
    assert metadata == {"format": "pt"}
    for name, tensor in safetensors.torch.load(SOUND).items():
        assert to_torch(tensors[name]).dtype == tensor.dtype
        assert torch.equal(to_torch(tensors[name]), tensor)


def test_values_that_do_not_lie_as_processors_want_are_read(tmp_path: Path) -> None:
    W = torch.arange(4, dtype=torch.float64)
    entry = {"dtype": "F64", "shape": [4], "data_offsets": [0, 32]}
    for pad in range(8):
        text = json.dumps({"w": entry}).encode() + b" " * pad
        (tmp_path / "x").write_bytes(packed(text, W.numpy().tobytes()))
        _, tensors = read_safetensors(LocalFolder(tmp_path, "x"), "x")
        assert torch.equal(to_torch(tensors["w"]), W)


def test_a_header_with_too_many_tensors_is_not_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorfile, "MAX_TENSORS", 10)
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    (tmp_path / "x").write_bytes(packed({str(n): entry for n in range(11)}))

    def parse(_: bytes) -> object:
        raise AssertionError("it was parsed")

    monkeypatch.setattr(jsontext, "parse", parse)
    with pytest.raises(SafeprojError, match="names 11 tensors; expected at most 10"):
        read_header(tmp_path / "x")


# --- a file that changes while it is used


def test_tensors_and_digests_are_those_of_one_reading(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(SOUND)
    digest, folder = file_sha256(path), LocalFolder(tmp_path, "x")
    _, tensors = read_safetensors(folder, "x")
    path.write_bytes(b"\xff" * len(SOUND))  # in place: a mapping would show it
    assert torch.equal(to_torch(tensors["a"]), torch.arange(6.0).view(2, 3))
    path.write_bytes(b"")  # and a mapping would end the process
    assert torch.equal(to_torch(tensors["a"]), torch.arange(6.0).view(2, 3))
    assert content_sha256(folder, "x") == digest


def test_a_config_is_hashed_as_it_was_parsed(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"r": 8}')
    digest, folder = file_sha256(path), LocalFolder(tmp_path, "c")
    assert read_json(folder, "c.json") == {"r": 8}
    path.write_text('{"r": 1000}')
    assert content_sha256(folder, "c.json") == digest
    assert read_json(folder, "c.json") == {"r": 8}


# --- JSON


@pytest.mark.parametrize("content", ["[" + "[]," * 40 + "0]", '{"a":' + "{}" + "}", "1" * 5000])
def test_json_is_bounded_before_it_is_parsed(content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsontext, "MAX_VALUES", 1)
    monkeypatch.setattr(jsontext, "MAX_BYTES", 4000)

    def loads(*_: Any, **__: Any) -> object:
        raise AssertionError("it was parsed")

    monkeypatch.setattr(json, "loads", loads)
    with pytest.raises(ValueError, match="expected at most"):
        jsontext.parse(content.encode())


@pytest.mark.parametrize(
    "content",
    [r'{"a": "\ud800"}', r'["\uDFFF"]', '{"a": 1, "a": 1}', "[" * 100_000, "1" * 5_000, "\ufeff1"],
)
def test_json_that_readers_disagree_about_is_refused(content: str) -> None:
    with pytest.raises((ValueError, RecursionError)):
        jsontext.parse(content.encode())


def test_whole_characters_may_be_escaped() -> None:
    assert jsontext.parse(rb'"\ud83d\ude00 \\ud800"') == "\N{GRINNING FACE} \\ud800"


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_a_header_with_what_is_no_number_of_json_is_refused(constant: str) -> None:
    text = f'{{"w": {{"dtype": "F32", "shape": [0], "data_offsets": [0, 0], "x": {constant}}}}}'
    content = struct.pack("<Q", len(text)) + text.encode()
    with pytest.raises(Exception, match=r"expected value|invalid number"):
        LIBRARY(content)
    with pytest.raises((ValueError, SafeprojError)):
        parse_header("x", bytearray(content))

"""Files that a caller puts into, or leaves out of, the adapter that is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
from safetensors.torch import load_file

from safeproj.adapter import read_adapter
from safeproj.adapter.write import write_adapter
from safeproj.errors import SafeprojError
from safeproj.storage.arrays import FLOAT32
from tests.conftest import Trio
from tests.support import CONFIG, FACTORS, MANIFEST, read_json, snapshot


def test_documents_replace_add_to_and_leave_out_files(trio: Trio, tmp_path: Path) -> None:
    source = tmp_path / "adapter"
    source.mkdir()
    for path in trio.adapter.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "stale.bin").write_bytes(b"stale")
    config = json.dumps({**read_json(source / CONFIG), "r": 8}).encode()
    before = snapshot(source)

    adapter = read_adapter(str(source))
    documents = {CONFIG: config, "new/notes.txt": b"new", "stale.bin": None, "absent": None}
    write_adapter(adapter, {}, {"method": "test"}, "words", tmp_path / "out", documents)

    found = snapshot(tmp_path / "out")
    assert found[CONFIG] == config
    assert found["new/notes.txt"] == b"new"
    assert found.keys() == {*before, "new", "new/notes.txt", MANIFEST} - {"stale.bin"}
    assert snapshot(source) == before


def test_tensors_may_get_other_shapes_and_further_ones_come_last(
    trio: Trio, tmp_path: Path
) -> None:
    adapter = read_adapter(str(trio.adapter))
    key = next(iter(adapter.tensors))
    replaced = {"further": numpy.ones(2, FLOAT32), key: numpy.zeros((9, 32), FLOAT32)}
    write_adapter(adapter, replaced, {}, "words", tmp_path / "out")
    found = load_file(tmp_path / "out" / FACTORS)
    assert found.keys() == {*adapter.tensors, "further"}
    assert found[key].shape == (9, 32)
    digests = read_json(tmp_path / "out" / MANIFEST)["output"]["tensors"]
    assert list(digests) == [*adapter.tensors, "further"]


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside", "a\\b"])
def test_no_document_leads_out_of_the_adapter(trio: Trio, tmp_path: Path, name: str) -> None:
    adapter = read_adapter(str(trio.adapter))
    with pytest.raises(SafeprojError, match="leads out of the adapter"):
        write_adapter(adapter, {}, {}, "words", tmp_path / "out", {name: b"x"})
    assert list(tmp_path.iterdir()) == []


def test_documents_do_not_take_the_place_of_what_is_written(trio: Trio, tmp_path: Path) -> None:
    adapter = read_adapter(str(trio.adapter))
    documents = {FACTORS: b"x", MANIFEST: b"x", "README.md": b"# Card"}
    write_adapter(adapter, {}, {"method": "test"}, "words", tmp_path / "out", documents)
    assert load_file(tmp_path / "out" / FACTORS).keys() == adapter.tensors.keys()
    assert read_json(tmp_path / "out" / MANIFEST)["method"] == "test"
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert card.startswith("# Card\n")
    assert "words" in card

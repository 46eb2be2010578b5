"""Limits that are stated in docs/reliability.md, beside those that each module's tests count."""

from __future__ import annotations

import difflib
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from safeproj.adapter import collection
from safeproj.errors import SafeprojError
from safeproj.gate import check
from safeproj.gate.weights import found
from safeproj.names import Names, find
from safeproj.records.rules import Level
from safeproj.storage import source
from safeproj.storage.source import LocalFolder
from safeproj.text import MAX_MESSAGE, cut
from tests.names.support import checkpoint

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"


def test_the_page_states_the_limits() -> None:
    stated = {int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", PAGE.read_text())}
    limits = {
        "storage.documents": ["MAX_VALUES"],
        "storage.tensorfile": ["MAX_TENSORS", "MAX_NAME"],
        "storage.picklefile": ["MAX_OPERATIONS"],
        "storage.patterns": ["MAX_PATTERNS", "MAX_PATTERN"],
        "adapter.peft_config": ["MAX_LISTED", "MAX_LAYERS_PATTERNS", "MAX_LENGTHS", "MAX_DEPTHS"],
        "adapter.gguf": ["MAX_BLOCKS"],
        "adapter.collection": ["MAX_ENTRIES"],
        "storage.source": ["MAX_FILES"],
        "gate.check": ["MAX_FINDINGS"],
        "text": ["MAX_MESSAGE"],
    }
    for module, names in limits.items():
        for name in names:
            assert getattr(import_module(f"safeproj.{module}"), name) in stated, name


def test_findings_of_one_kind_are_counted_beyond_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MAX_FINDINGS", 3)
    given = [found("SP001", f"module {n}") for n in range(5)]
    given += [found("SP006", f"note {n}", level=Level.note) for n in range(3)]
    kept = check._cut(given)
    assert [each.message for each in kept] == [
        *("module 0", "module 1", "module 2", "and 2 more of this kind"),
        *("note 0", "note 1", "note 2"),
    ]
    assert {each.level for each in kept if each.id == "SP001"} == {given[0].level}


def test_few_names_are_compared_with_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = 0, difflib.get_close_matches

    def counted(*arguments: Any, **options: Any) -> list[str]:
        nonlocal calls
        calls += 1
        return real(*arguments, **options)

    monkeypatch.setattr(difflib, "get_close_matches", counted)
    names = Names(checkpoint(tmp_path, {f"layers.{n}.weight": (2, 2) for n in range(50)}))
    for number in range(200):
        with pytest.raises(SafeprojError, match="no weight for"):
            names.find(f"other.{number % 100}.weight", lambda _: True)
    assert calls <= find.MAX_CLOSEST


def test_a_directory_of_too_many_files_is_no_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(12):
        (tmp_path / f"{number}.json").touch()
    monkeypatch.setattr(source, "MAX_FILES", 10)
    monkeypatch.setattr(collection, "MAX_ENTRIES", 10)
    with pytest.raises(SafeprojError, match="more than 10 files"):
        _ = LocalFolder(tmp_path, "x").files
    with pytest.raises(SafeprojError, match="more than 10 files and directories"):
        collection.collect([str(tmp_path)])


@pytest.mark.parametrize("length", [0, MAX_MESSAGE, MAX_MESSAGE + 1, 100_000])
def test_messages_are_cut_in_their_middle(length: int) -> None:
    text = "begin" + "x" * length + "end"
    message = str(SafeprojError(text))
    assert message == cut(text)
    assert len(message) <= MAX_MESSAGE
    assert message.startswith("begin")
    assert message.endswith("end")
    if length < 1000:
        assert message == text

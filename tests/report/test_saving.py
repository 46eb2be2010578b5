"""Records show and save themselves: in Python, in files, and in notebooks."""

from __future__ import annotations

import json
import os
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import safeproj
from safeproj import SafeprojError
from safeproj.records.rendered import Rendered
from safeproj.records.repairs import Goal, Repair
from safeproj.report import CHECK_FORMATS, FORMATS, SUFFIXES, Checks, Reports, render
from tests.report.checks import HOSTILE, check, checks, finding, hostile
from tests.report.test_escaping import EVIL, RECORD
from tests.report.test_report import EXAMPLE
from tests.report.test_visible import EVALUATION
from tests.sweep.records import point, sweep

REPAIR = Repair(
    version="1.2.3",
    inputs={role: {"source": EVIL} for role in ("base", "aligned", "adapter")},
    goal=Goal(0.95, 0.05),
    methods=("Safe LoRA",),
    splits={},
    validation=(),
    controls=(),
    chosen=None,
    test=None,
    out=EVIL,
    command=("safeproj", "patch", "--adapter", EVIL),
    warnings=(EVIL,),
)

RECORDS: dict[str, Any] = {
    "report": RECORD,
    "reports": Reports("1.2.3", {EVIL: RECORD, "plain": EXAMPLE}, {}),
    "checks": hostile(),
    "evaluation": EVALUATION,
    "sweep": sweep(point(2, method=(80, 70)), name=HOSTILE),
    "repair": REPAIR,
}


def formats(record: Any) -> tuple[str, ...]:
    return CHECK_FORMATS if isinstance(record, Checks) else FORMATS


@pytest.mark.parametrize("name", RECORDS)
def test_every_record_shows_itself_in_its_formats(name: str) -> None:
    record = RECORDS[name]
    assert issubclass(type(record), Rendered)
    assert record.render() == render(record, "table")
    for each in formats(record):
        assert record.render(each) == render(record, each)
    assert record.render(width=60, color=True) == render(record, "table", width=60, color=True)
    for other in {*CHECK_FORMATS, "../json", "text"} - set(formats(record)):
        with pytest.raises(SafeprojError, match=r"format .*: expected table, json, markdown"):
            record.render(other)


@pytest.mark.parametrize("name", RECORDS)
def test_the_end_of_a_name_tells_the_format(name: str, tmp_path: Path) -> None:
    record = RECORDS[name]
    for end, each in SUFFIXES.items():
        path = tmp_path / f"Report{end.upper()}"
        if each in formats(record):
            record.save(path)
            assert path.read_text("utf-8") == record.render(each)
        else:
            with pytest.raises(SafeprojError, match=f"format {each}: expected"):
                record.save(path)
            assert not path.exists()
    record.save(str(tmp_path / "report"), "json")
    assert json.loads((tmp_path / "report").read_text("utf-8"))["schema"]


def test_every_format_but_that_of_a_log_has_an_end() -> None:
    assert set(SUFFIXES.values()) == set(CHECK_FORMATS) - {"github"}


def test_findings_are_all_saved_where_that_is_asked_for(tmp_path: Path) -> None:
    several = (finding(module="a"), finding(module="b"))
    found = checks(check(*several))
    found.save(tmp_path / "all.txt", verbose=True)
    assert (tmp_path / "all.txt").read_text("utf-8") == render(found, "table", verbose=True)
    assert found.render(verbose=True) != found.render()


@pytest.mark.parametrize("name", ["report.pdf", "report", ".json", "report.json.bak"])
def test_a_name_that_tells_no_format_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SafeprojError, match=r"its end tells no format; expected \.txt, .* format"):
        EXAMPLE.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_file_is_complete_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    path.write_text("before", "utf-8")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(SafeprojError, match=r"path .*cannot be written \(No space left"):
            EXAMPLE.save(path)
    assert path.read_text("utf-8") == "before"
    assert list(tmp_path.iterdir()) == [path]
    EXAMPLE.save(path)
    assert json.loads(path.read_text("utf-8"))["method"] == "safe-lora"


@pytest.mark.parametrize("name", ["missing/report.json", "directory.json"])
def test_where_no_file_can_be_is_said(name: str, tmp_path: Path) -> None:
    (tmp_path / "directory.json").mkdir()
    with pytest.raises(SafeprojError, match=r"path .*: the report cannot be written \("):
        EXAMPLE.save(tmp_path / name)
    assert [each.name for each in tmp_path.iterdir()] == ["directory.json"]


def test_a_device_is_written_to() -> None:
    EXAMPLE.save(os.devnull, "json")
    assert not Path(os.devnull).is_file()


def lines(text: str) -> list[str]:
    """The lines of a text, without the space at their ends."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


class Elements(HTMLParser):
    """The elements of a page, their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("name", RECORDS)
def test_a_notebook_gets_one_element_with_the_text_of_the_table(name: str) -> None:
    record = RECORDS[name]
    page = Elements(record._repr_html_())
    assert lines(page.text) == lines(record.render())
    (frame, *inside) = page.found
    assert frame[0] == "pre"
    assert {tag for tag, _ in inside} <= {"span"}
    for _, attributes in page.found:
        assert attributes.keys() == {"style"}
        assert "url" not in str(attributes["style"])


def test_a_notebook_needs_no_plotly_and_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.delenv("TERM", raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert lines(Elements(EXAMPLE._repr_html_()).text) == lines(EXAMPLE.render())


def test_what_functions_return_is_public() -> None:
    for record in RECORDS.values():
        assert getattr(safeproj, type(record).__name__) is type(record)

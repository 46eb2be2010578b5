"""What is visible of a page without scrolling, on a phone and on two screens, and saved figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from safeproj.report import Record
from tests.report.checks import check, checks, finding
from tests.report.test_escaping import EVALUATION as HOSTILE_EVALUATION
from tests.report.test_findings import SAID, run
from tests.report.test_html import BEFORE, EVIL, MANY, Open, Opened, browser, show
from tests.report.test_report import module, report
from tests.sweep.records import EXAMPLE, NONE, point, sweep

__all__ = ["browser", "show"]  # fixtures

EVALUATION = replace(
    HOSTILE_EVALUATION,
    sets=tuple({**each, "source": each["name"]} for each in HOSTILE_EVALUATION.sets),
)

SCREENS = [(400, 800), (1280, 720), (1920, 1080)]
"""A phone, a small laptop and a large screen, in pixels of the page."""


def sizes(of: Opened) -> Iterator[tuple[int, int]]:
    """Give a page each size in turn; it never scrolls sideways."""
    for width, height in SCREENS:
        of.page.set_viewport_size({"width": width, "height": height})
        of.settle()
        assert of.page.evaluate("() => document.documentElement.scrollWidth") <= width
        yield width, height


def assert_visible(of: Opened, selector: str, size: tuple[int, int]) -> None:
    """Check that all of each such element is on the first screen."""
    found = of.page.locator(selector).all()
    assert found
    for each in found:
        box = each.bounding_box()
        assert box is not None, selector
        assert box["x"] >= 0, (selector, box)
        assert box["x"] + box["width"] <= size[0], (selector, box)
        assert box["y"] + box["height"] <= size[1], (selector, box)


def test_what_was_found_in_eight_adapters_is_before_the_fold(show: Open) -> None:
    page = show(run())
    for size in sizes(page):
        assert page.column("adapters", 1) == [f"adapter-{number}" for number in range(8)]
        assert page.column("adapters", 2) == ["failed"] * 8
        assert page.column("adapters", 3) == [f"SP001 {said}; 1 note" for said in SAID]
        assert_visible(page, "main > .banner", size)
        assert_visible(page, "#adapters tbody tr > :nth-child(-n + 3)", size)


def test_what_was_found_in_one_adapter_is_before_the_fold_and_the_heatmap_before_the_list(
    show: Open,
) -> None:
    page = show(run(1))
    for size in sizes(page):
        rules = ["SP001 module-below-threshold", "SP020 missing-provenance"]
        assert page.column("rules-0", 1) == rules
        assert page.column("rules-0", 3) == [SAID[0], "there is no safeproj.json"]
        assert_visible(page, "#rules-0 tbody tr > *", size)
        places = [
            page.page.locator(each).bounding_box()
            for each in ("#rules-0", "#heatmap-0", "#findings-0", "#modules-0")
        ]
        tops = [box["y"] for box in places if box is not None]
        assert len(tops) == 4
        assert tops == sorted(tops)
    assert len(page.column("findings-0", 1)) == 225


def test_both_axes_of_a_sweep_are_on_its_chart(show: Open) -> None:
    page = show(EXAMPLE)
    for size in sizes(page):
        chart = page.page.locator("#curve").bounding_box()
        assert chart is not None
        axes = page.page.locator("#curve :is(.xtick, .ytick) text, #curve :is(.xtitle, .ytitle)")
        boxes = [each.bounding_box() for each in axes.all()]
        assert len(boxes) >= 2 + 2 * 3
        for box in boxes:
            assert box is not None
            assert box["x"] >= chart["x"]
            assert box["x"] + box["width"] <= chart["x"] + chart["width"] + 1
            assert box["y"] + box["height"] <= chart["y"] + chart["height"] + 1
        if size[0] >= 1280:
            assert_visible(page, "#curve, #curve .xtitle, #curve .ytitle", size)
            assert_visible(page, "#curve .annotation-text", size)


def test_a_sweep_marks_the_chosen_point_and_the_wanted_line(show: Open) -> None:
    page = show(EXAMPLE)
    ring = page.chart("curve")[-1]
    assert (ring["x"], ring["y"]) == ([0.91], [0.6])
    texts = page.page.locator("#curve .annotation-text").all_text_contents()
    assert texts == ["wanted 90 %", "4 of 10 modules projected, tau 0.400"]
    (line,) = page.page.evaluate("() => document.getElementById('curve').layout.shapes")
    assert (line["x0"], line["x1"]) == (0.9, 0.9)
    assert line["line"]["color"] == ring["marker"]["color"]
    assert page.page.locator("#curve .shapelayer path").count() == 1


def test_where_nothing_reaches_what_is_wanted_no_point_is_marked(show: Open) -> None:
    page = show(sweep(NONE, point(4, method=(50, 60))))
    assert page.page.locator("#curve .annotation-text").all_text_contents() == ["wanted 90 %"]
    assert "the smallest that reaches it" not in [each["name"] for each in page.chart("curve")]


# --- figures as files


def saved(of: Opened, figure: str, kind: str, directory: Path) -> str:
    """Return the file that a button below a figure saves."""
    button = of.page.locator(f"figure:has(#{figure})").get_by_role("button", name=kind)
    with of.page.expect_download() as download:
        button.click()
    assert download.value.suggested_filename == f"safeproj-{figure}.{kind.lower()}"
    path = directory / download.value.suggested_filename
    download.value.save_as(path)
    return path.read_bytes().decode()


def numbers(text: str) -> list[list[str]]:
    """Return the rows of a CSV file."""
    return list(csv.reader(io.StringIO(text, newline="")))


@pytest.mark.parametrize(
    ("record", "keys"),
    [
        (MANY, ("curve", "heatmap-0", "measure-0")),
        (EXAMPLE, ("curve",)),
        (EVALUATION, ("shares-0",)),
    ],
    ids=["scores", "sweep", "evaluation"],
)
def test_every_figure_is_saved_as_svg_and_csv(
    show: Open, record: Record, keys: tuple[str, ...], tmp_path: Path
) -> None:
    page = show(record)
    for key in keys:
        svg = ET.fromstring(saved(page, key, "SVG", tmp_path))
        assert svg.tag == "{http://www.w3.org/2000/svg}svg"
        heads, *rows = numbers(saved(page, key, "CSV", tmp_path))
        assert rows
        assert {len(row) for row in rows} == {len(heads)}


def test_the_numbers_of_the_charts_are_in_their_files(show: Open, tmp_path: Path) -> None:
    page = show(MANY)
    heads, *rows = numbers(saved(page, "heatmap-0", "CSV", tmp_path))
    assert heads == ["layer", "kind", "module", "cosine"]
    assert sorted(rows) == sorted(
        [str(each.layer), each.kind, each.name, str(each.cosine)] for each in BEFORE.modules
    )
    heads, *rows = numbers(saved(page, "curve", "CSV", tmp_path))
    assert heads == ["adapter", "place", "module", "cosine"]
    assert [float(row[3]) for row in rows if row[0] == "before"] == sorted(BEFORE.cosines)
    page = show(EXAMPLE)
    heads, *rows = numbers(saved(page, "curve", "CSV", tmp_path))
    assert heads[:6] == ["adapter", "modules", "tau", "change", "factor", "refused"]
    assert rows[2][:6] == ["Safe LoRA", "4", "0.4", "0.4", "", "0.91"]
    assert len(rows) == 2 + 2 * 3


def test_names_in_files_are_no_formulas_and_no_markup(show: Open, tmp_path: Path) -> None:
    names = [f"=HYPERLINK({EVIL})", 'a,"b"\r\n@c']
    found = report(*(module(each, 0.1) for each in names))
    page = show(checks(check(finding(), report=found)))
    _, *rows = numbers(saved(page, "heatmap-0", "CSV", tmp_path))
    assert {row[2] for row in rows} == {f"'{names[0]}", names[1]}
    svg = saved(page, "measure-0", "SVG", tmp_path)
    assert not list(ET.fromstring(svg).iter("{http://www.w3.org/1999/xhtml}script"))
    assert "<script" not in svg

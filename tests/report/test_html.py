"""The HTML report: its text, and what a real browser makes of it."""

from __future__ import annotations

import base64
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from safeproj.cli.options import ReportFormat, Reporting
from safeproj.errors import SafeprojError
from safeproj.methods.registry import detail_of
from safeproj.records.rules import RULES, Level
from safeproj.report import (
    Check,
    Checks,
    Evidence,
    Failure,
    Finding,
    Record,
    Report,
    Reports,
    render,
)
from safeproj.report.html_page import figures
from safeproj.report.html_page.document import data
from safeproj.report.html_page.figures import arrange
from tests.report.test_report import EXAMPLE, SALORA, module, report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


SIZE = 6 * 2**20
"""Bytes of a report: plotly.js is 4.6 MiB of it."""

THEMES: dict[Literal["light", "dark"], str] = {"light": "#ffffff", "dark": "#16181d"}
"""Each theme and the colour of its page."""

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")


def layers(count: int, shift: float = 0.0) -> Report:
    """Return a report with cosines that differ, some of them at tau."""
    return report(
        *(
            module(
                f"model.layers.{layer}.{kind}",
                round(0.05 + shift + (layer * 3 + i) * 0.9 / (count * 3), 2),
            )
            for layer in range(count)
            for i, kind in enumerate(KINDS)
        )
    )


BEFORE, AFTER = layers(4), layers(4, 0.04)
MANY = Reports(
    "1.2.3", {"before": BEFORE, "after": AFTER}, {"broken": Failure("x/broken", "no config")}
)
CHECKS = Checks(
    "1.2.3",
    {"threshold": 0.5, "file": "safeproj.toml", "allow": {"full-weight-changes": False}},
    (
        Check(
            "before",
            "adapters/before",
            "adapter_model.safetensors",
            (Finding("SP001", Level.fail, "cosine 0.05", module=BEFORE.modules[0].name),),
            (Finding("SP017", Level.note, "a tokenizer", file="tokenizer.json"),),
            {BEFORE.modules[0].name: Evidence.signed},
            BEFORE,
            ("the signature is valid for every file",),
        ),
        Check(
            "gone", "adapters/gone", None, (Finding("SP090", Level.undecided, "no such adapter"),)
        ),
    ),
)

EVIL = "<img src=x onerror=alert(1)>&amp;</script><script>alert(2)</script>\u2028'\"\u202e$x$"
HOSTILE = replace(
    report(
        module(f"model.layers.0.{EVIL}", 0.1),
        module("model.layers.1.<a href='javascript:alert(3)'>k</a>", 0.2, note=EVIL),
        warnings=(EVIL,),
    ),
    inputs={"adapter": {"source": EVIL, "revision": EVIL}},
)


def below(of: Report, tau: float) -> int:
    return sum(cosine <= tau for cosine in of.cosines)


HOSTILE_CHECKS = Checks(
    EVIL,
    {"file": EVIL, EVIL: {EVIL: [EVIL]}},
    (
        Check(
            EVIL,
            EVIL,
            EVIL,
            (Finding("SP001", Level.fail, EVIL, module=EVIL, tensor=EVIL, file=EVIL),) * 4,
            (Finding("SP014", Level.fail, EVIL, file=EVIL),),
            {HOSTILE.modules[0].name: Evidence.recorded},
            HOSTILE,
            (EVIL,),
        ),
    ),
)

# --- the text


@pytest.mark.parametrize("record", [EXAMPLE, SALORA, MANY, CHECKS, HOSTILE_CHECKS])
def test_a_report_has_the_same_bytes_again_and_a_bounded_size(record: Record) -> None:
    text = render(record, "html")
    assert text == render(record, "html")
    assert text.endswith("</html>\n")
    assert len(text.encode()) < SIZE


def test_a_check_says_what_else_was_looked_at() -> None:
    assert "the signature is valid for every file" in render(CHECKS, "html")


def test_without_plotly_nothing_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    formats, places = [ReportFormat.json, ReportFormat.html], [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(
        SafeprojError, match=r"^plotly is not installed.*`pip install '\.\[report\]'`"
    ):
        _ = Reporting(formats, places).outputs


def test_without_plotly_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(figures, "import_module", missing)
    with pytest.raises(
        SafeprojError, match=r"^plotly is not installed.*`pip install '\.\[report\]'`"
    ):
        render(EXAMPLE, "html")


def test_nothing_that_a_record_says_is_markup() -> None:
    text = render(HOSTILE, "html")
    assert text.count("<script") == render(EXAMPLE, "html").count("<script")
    assert "<img src=x" not in text
    assert "\u2028" not in text.split("<script>")[0]
    assert "\u202e" not in text.split("<script>")[0]
    found = re.search(r'<script type="application/json" id="record">(.*)</script>', text)
    assert found is not None
    assert not re.search("[<>&\u2028\u2029]", found[1])
    assert json.loads(found[1])["tau"] == 0.35


def test_json_in_a_script_keeps_its_values() -> None:
    value = {"a": ["</script><!--&\u2028", 0.1, None, {"b": True}]}
    assert json.loads(data(value)) == value
    assert json.loads(data([float("nan"), float("inf")])) == [None, None]


def test_charts_take_names_as_text() -> None:
    assert figures.plain("<b>&lt;\n\u202e") == "&lt;b&gt;&amp;lt;\\n\\u202e"
    label = figures.plain("a" * 20 + "<" + "b" * 20, 28)
    assert len(label) == 28
    assert label.startswith("aaaa")
    assert label.endswith("bbbb")


def test_the_policy_lets_nothing_be_loaded() -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', render(EXAMPLE, "html"))
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules["default-src"] == "'none'"
    assert re.fullmatch(r"'sha256-\S{44}' 'sha256-\S{44}'", rules["script-src"])
    assert rules["img-src"] == "data: blob:"
    assert set(rules) == {
        "default-src", "script-src", "style-src", "img-src", "base-uri", "form-action",
    }  # fmt: skip


def test_the_grid_has_layers_in_natural_order_and_the_rest_last() -> None:
    grid = arrange(
        [
            module("lm_head"),
            module("model.layers.10.q"),
            module("model.layers.2.q"),
            module("model.layers.2.e[0]"),
            module("model.layers.2.e[1]"),
        ]
    )
    assert grid.rows == ["2", "10", "-"]
    assert grid.columns == ["lm_head", "q", "e"]
    assert [each.name for each in grid.cells[0, 2]] == [
        "model.layers.2.e[0]",
        "model.layers.2.e[1]",
    ]


def test_stacks_and_kinds_of_one_name_are_kept_apart_in_the_grid() -> None:
    grid = arrange(
        [
            module("encoder.layers.0.self_attn.q"),
            module("decoder.layers.0.self_attn.q"),
            module("decoder.layers.0.cross_attn.q"),
        ]
    )
    assert grid.rows == ["encoder.layers.0", "decoder.layers.0"]
    assert grid.columns == ["self_attn.q", "cross_attn.q"]
    assert len(grid.cells) == 3


def test_the_tables_hold_every_number_without_a_script() -> None:
    tables = render(CHECKS, "html").split('<script type="application/json"')[0]
    for each in BEFORE.modules:
        assert f">{each.cosine:.4f}</td>" in tables
    for expected in (
        "Failed: the policy does not allow what was found.",
        "2 adapters: 1 failed, 1 undecided.",
        "self_attn.q_proj: cosine 0.05",
        "module-below-threshold",
        RULES["SP001"].remedy.replace("'", "&#x27;"),
        "no such adapter",
        "projected (signed)",
        "unjudged-file",
        "allow.full-weight-changes",
        "base_model.model.lm_head.weight",
        "org/base",
    ):
        assert expected in tables, expected


def test_the_slider_starts_at_the_threshold_of_the_policy_or_the_selection() -> None:
    assert "<strong>tau 0.5</strong>" in render(CHECKS, "html")
    assert "<strong>tau 0.35</strong>" in render(EXAMPLE, "html")
    other = replace(EXAMPLE, selection={"mode": "top", "top": 5})
    assert "<strong>tau 0.35</strong>" in render(other, "html")
    exact = replace(EXAMPLE, selection={"mode": "threshold", "threshold": 0.345})
    assert "<strong>tau 0.345</strong>" in render(exact, "html")


def test_salora_has_its_own_words() -> None:
    text = render(SALORA, "html")
    assert "share ‖UᵀΔW‖²/‖ΔW‖²" in text
    assert "‖CB‖" not in text
    assert ">0.9844</td>" in text


def test_numbers_on_the_heatmap_can_be_read() -> None:
    colors = import_module("plotly.colors")
    for step in range(101):
        cosine = step / 100
        cell = colors.unlabel_rgb(colors.sample_colorscale("Cividis", [cosine])[0])
        assert contrast(hexadecimal(figures._ink(cosine)), cell) >= 4.5, cosine


def test_the_table_of_modules_has_the_columns_of_its_record() -> None:
    plain = render(EXAMPLE, "html")
    assert "bounds of the cosine" not in plain
    assert ">evidence</th>" not in plain
    truncated = replace(
        module("m.layers.0.q", 0.3),
        bounds=(0.25, 0.375),
        uncertain=True,
        detail={"truncation_error": 0.125, "projector_rank": 5},
    )
    text = render(report(truncated), "html")
    for expected in ("0.2500 to 0.3750 uncertain", ">0.125</td>", ">rank of C</th>", ">5</td>"):
        assert expected in text, expected


# --- the page in a browser


@dataclass
class Opened:
    """A page, and what it did."""

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def settle(self) -> None:
        """Wait until what was asked for has been drawn."""
        self.page.evaluate(
            "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
        )

    def move(self, steps: int) -> None:
        """Move the slider with the keyboard."""
        self.page.focus("#tau")
        for _ in range(abs(steps)):
            self.page.keyboard.press("ArrowRight" if steps > 0 else "ArrowLeft")
        self.settle()

    def chart(self, key: str) -> list[dict[str, Any]]:
        """Return the traces that a chart was drawn from."""
        script = "(key) => JSON.parse(JSON.stringify(document.getElementById(key).data))"
        found: list[dict[str, Any]] = self.page.evaluate(script, key)
        return found

    def column(self, table: str, number: int) -> list[str]:
        """Return the visible texts of a column, from 1."""
        cells = self.page.locator(f"#{table} tbody tr:not([hidden]) > :nth-child({number})")
        return cells.all_inner_texts()


Open = Callable[[Record], Opened]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no chromium or chrome on PATH; scripts/install_chromium.sh installs one")
    from playwright.sync_api import sync_playwright

    options = [
        "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--no-first-run", "--disable-quic",
    ]  # fmt: skip
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=options)
        yield started
        started.close()


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Open a record; at the end nothing may have been requested, and nothing complained."""
    context = browser.new_context(viewport={"width": 1000, "height": 800}, color_scheme="light")
    all_opened: list[Opened] = []

    def opening(record: Record) -> Opened:
        path = tmp_path / f"report-{len(all_opened)}.html"
        path.write_text(render(record, "html"), encoding="utf-8")
        opened = Opened(context.new_page())
        all_opened.append(opened)
        opened.page.on("request", lambda request: opened.requests.append(request.url))
        opened.page.on("console", lambda message: opened.complaints.append(message.text))
        opened.page.on("pageerror", lambda error: opened.complaints.append(str(error)))
        opened.page.on("dialog", lambda dialog: opened.complaints.append(dialog.message))
        opened.page.goto(path.as_uri())
        opened.settle()
        assert opened.requests == [path.as_uri()]
        return opened

    yield opening
    for opened in all_opened:
        assert len(opened.requests) == 1
        assert opened.complaints == []
    context.close()


@pytest.mark.parametrize("record", [EXAMPLE, SALORA, BEFORE], ids=["example", "salora", "layers"])
def test_the_charts_of_a_report_are_drawn(show: Open, record: Report) -> None:
    opened = show(record)
    (curve,) = opened.chart("curve")
    assert curve["y"] == sorted(record.cosines)
    cells, _, numbers = opened.chart("heatmap-0")
    values = [value for row in cells["z"] for value in row]
    assert sorted(value for value in values if value is not None) == sorted(record.cosines)
    assert numbers["text"].count("n/a") == len(record.modules) - len(record.cosines)
    measured = [value for trace in opened.chart("measure-0") for value in trace["y"]]
    first = detail_of(record.method).columns[0]
    assert sorted(measured) == sorted(record.values(first.key))
    for key in ("curve", "heatmap-0", "measure-0"):
        assert opened.page.locator(f"#{key} svg").count() > 0
    assert opened.page.locator(".modebar, .plotly-notifier").count() == 0


def test_hovering_tells_all_about_a_module(show: Open) -> None:
    opened = show(report(module("model.layers.0.q", 0.25, note="something special")))
    opened.page.locator("#heatmap-0 .nsewdrag").hover()
    shown = opened.page.locator("#heatmap-0 .hoverlayer").text_content() or ""
    for expected in (
        "model.layers.0.q", "cosine 0.2500", "scale ‖CB‖/‖B‖ 0.0625", "64×32", "rank 8", "‖V‖ 3.25",
        "not projected", "something special",
    ):  # fmt: skip
        assert expected in shown


def test_an_expert_cell_shows_the_lowest_cosine(show: Open) -> None:
    experts = [module(f"m.layers.0.e[{i}]", 0.5 - i / 10) for i in range(3)]
    opened = show(report(*experts))
    cells = opened.chart("heatmap-0")[0]
    assert cells["z"] == [[experts[2].cosine]]
    assert cells["hovertext"][0][0].startswith("lowest of 3 modules")
    assert "lowest cosine" in opened.page.locator("figure:has(#heatmap-0) figcaption").inner_text()


def test_the_slider_counts_and_marks_what_a_tau_would_project(show: Open) -> None:
    opened = show(MANY)
    for steps, tau in ((0, 0.35), (1, 0.36), (-10, 0.26), (40, 0.66)):
        opened.move(steps)
        count, other = below(BEFORE, tau), below(AFTER, tau)
        assert opened.page.locator("#tau-output").inner_text().split("\n") == [
            f"tau {tau:g}",
            f"before: would project {count} of 12 modules with a cosine",
            f"after: would project {other} of 12 modules with a cosine",
        ]
        assert opened.page.locator("#modules-0 tr.at-tau").count() == count
        assert opened.page.locator("#modules-1 tr.at-tau").count() == other
        assert opened.column("modules-0", 7).count("yes") == count
        filled = [
            sum(not symbol.endswith("-open") for symbol in trace["marker"]["symbol"])
            for trace in opened.chart("curve")
        ]
        assert filled == [count, other]
        assert len(opened.chart("heatmap-0")[1]["x"]) == count
        line = opened.page.evaluate("() => document.getElementById('curve').layout.shapes[0].y0")
        assert line == tau


def test_curves_differ_in_more_than_colour(show: Open) -> None:
    first, second = show(MANY).chart("curve")
    assert (first["name"], second["name"]) == ("before", "after")
    assert first["line"]["dash"] != second["line"]["dash"]
    assert first["line"]["color"] != second["line"]["color"]
    assert first["marker"]["symbol"][-1] != second["marker"]["symbol"][-1]


def test_the_selector_shows_one_adapter_at_a_time(show: Open) -> None:
    opened = show(MANY)
    page = opened.page
    visible = page.locator("section.adapter:visible > h2")
    assert visible.all_inner_texts() == ["before"]
    page.get_by_label("Adapter shown below").select_option("after")
    opened.settle()
    assert visible.all_inner_texts() == ["after"]
    assert page.locator("#heatmap-1 svg").count() > 0
    assert opened.chart("heatmap-1")[0]["z"][0][0] == AFTER.modules[0].cosine
    page.get_by_label("Adapter shown below").select_option("broken")
    assert visible.all_inner_texts() == ["broken"]
    assert page.get_by_text("Failed: no config").is_visible()


def test_tables_sort_by_number_and_by_keyboard(show: Open) -> None:
    opened = show(EXAMPLE)
    head = opened.page.locator("#modules-0 th", has_text="cosine")
    assert head.get_attribute("aria-sort") == "none"
    head.get_by_role("button").press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert opened.column("modules-0", 4) == ["0.1250", "0.5000", "0.8750", ""]
    head.get_by_role("button").press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert opened.column("modules-0", 4) == ["0.8750", "0.5000", "0.1250", ""]
    opened.page.locator("#modules-0 th", has_text="module").get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "none"
    assert opened.column("modules-0", 1) == [each.name for each in EXAMPLE.modules]


def test_tables_filter_and_say_how_many_rows_are_left(show: Open) -> None:
    opened = show(EXAMPLE)
    opened.page.locator("#modules-0-filter").fill("Q_PROJ")
    assert opened.column("modules-0", 1) == [
        "model.layers.2.self_attn.q_proj", "model.layers.10.self_attn.q_proj",
    ]  # fmt: skip
    assert opened.page.locator("output[for=modules-0-filter]").inner_text() == "2 of 4 rows"


def test_the_page_of_a_check_says_how_it_ended_and_what_to_do(show: Open) -> None:
    page = show(CHECKS).page
    assert "Failed:" in page.locator("main > .banner").inner_text()
    assert page.locator("#findings-0").get_by_text(RULES["SP001"].remedy).is_visible()
    assert page.locator("#ignored-0").get_by_text("tokenizer.json").is_visible()
    assert page.locator("#adapters .undecided").inner_text() == "undecided"
    page.get_by_label("Adapter shown below").select_option("gone")
    assert page.locator("#findings-1").get_by_text("no such adapter").is_visible()
    assert page.locator("#adapter-1 .plot").count() == 0


def test_hostile_names_are_shown_and_not_run(show: Open) -> None:
    opened = show(HOSTILE)
    page = opened.page
    shown = (
        "<img src=x onerror=alert(1)>&amp;</script><script>alert(2)</script>\\u2028'\"\\u202e$x$"
    )
    assert page.title().endswith(shown)
    assert opened.column("modules-0", 1)[0] == f"model.layers.0.{shown}"
    page.locator("#heatmap-0 .nsewdrag").hover(position={"x": 20, "y": 8})
    hover = page.locator("#heatmap-0 .hoverlayer").text_content() or ""
    assert "<img src=x onerror=alert(1)>&amp;</script>" in hover
    assert page.locator("img, body a:not(.skip), .plot a").count() == 0
    opened.move(5)
    checked = show(HOSTILE_CHECKS)
    checked.page.locator("#findings-0-filter").fill("<img")
    assert checked.column("findings-0", 5) == [shown] * 4
    many = show(Reports("1", {EVIL: HOSTILE, "b": HOSTILE}, {"c": Failure(EVIL, EVIL)}))
    many.page.get_by_label("Adapter shown below").select_option(shown)
    many.move(3)
    assert f"{shown}: would project" in many.page.locator("#tau-output").inner_text()


def test_text_has_enough_contrast_in_both_themes(show: Open) -> None:
    opened = show(CHECKS)
    for scheme, paper in THEMES.items():
        opened.page.emulate_media(color_scheme=scheme)
        opened.settle()
        assert hexadecimal(paper) == colours(opened.page, "body")[1]
        for what in (
            "body", "h1", "h2", "figcaption", "dt", "caption", ".banner", "td.failed",
            "td.undecided", "tr.at-tau td.number", "tr.at-tau .tau", "th button", "select",
            "input[type=search]", "footer",
        ):  # fmt: skip
            text, behind = colours(opened.page, what)
            assert contrast(text, behind) >= 4.5, (scheme, what, text, behind)


def test_every_line_has_enough_contrast(show: Open) -> None:
    names = {f"adapter {i}": BEFORE for i in range(7)}
    opened = show(Reports("1", names, {}))
    for scheme, paper in THEMES.items():
        opened.page.emulate_media(color_scheme=scheme)
        opened.settle()
        drawn = opened.page.evaluate("() => document.getElementById('curve').layout.paper_bgcolor")
        assert drawn == paper
        found = {trace["line"]["color"] for trace in opened.chart("curve")}
        assert len(found) == 7
        assert min(contrast(hexadecimal(each), hexadecimal(paper)) for each in found) >= 3


def test_paper_is_light_and_leaves_nothing_out(show: Open) -> None:
    opened = show(MANY)
    page = opened.page
    page.locator("#modules-0-filter").fill("q_proj")
    page.set_viewport_size({"width": 718, "height": 1000})  # A4 at 96 dpi with margins of 10 mm
    page.emulate_media(media="print", color_scheme="dark")
    opened.settle()
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == (
        "rgb(255, 255, 255)"
    )
    assert page.locator("section.adapter:visible").count() == 3
    assert page.locator("#modules-0 tbody tr:visible").count() == 12
    assert page.locator(".control:visible").count() == 0
    for key in ("curve", "heatmap-0", "heatmap-1", "measure-1"):
        box = page.locator(f"#{key} svg").first.bounding_box()
        assert box is not None
        assert 300 < box["width"] <= 700
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 718
    assert page.evaluate("() => document.getElementById('curve').layout.paper_bgcolor") == "#ffffff"
    page.emulate_media(media="screen")
    opened.settle()
    assert page.locator("section.adapter:visible").count() == 1


def test_a_narrow_screen_does_not_scroll_sideways(show: Open) -> None:
    opened = show(CHECKS)
    opened.page.set_viewport_size({"width": 360, "height": 700})
    opened.settle()
    assert opened.page.evaluate("() => document.documentElement.scrollWidth") <= 360


def test_the_page_can_be_used_without_seeing_it(show: Open) -> None:
    page = show(CHECKS).page
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.title() == "safeproj check: failed"
    unlabelled = page.evaluate(
        "() => [...document.querySelectorAll('input, select')]"
        ".filter((each) => !each.labels.length).length"
    )
    assert unlabelled == 0
    for figure in page.locator("figure").all():
        chart = figure.locator(".plot")
        assert chart.get_attribute("role") == "img"
        assert re.search(r"\d\.\d{4}", chart.get_attribute("aria-label") or "")
        assert figure.locator("figcaption").count() == 1
    levels = [int(tag[1]) for tag in headings(page)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert page.locator("table").count() == page.locator("table > caption").count()
    names = page.evaluate("() => [...document.querySelectorAll('[id]')].map((each) => each.id)")
    assert len(names) == len(set(names))
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("() => document.activeElement.id") == "main"


def test_without_scripts_the_tables_are_there(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(render(MANY, "html"), encoding="utf-8")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.locator("section.adapter:visible").count() == 3
    assert page.locator("#modules-1 tbody tr:visible").count() == 12
    assert page.locator(".control:visible").count() == 0
    assert page.locator("noscript").is_visible()
    context.close()


def test_a_picture_of_the_page_is_not_blank(show: Open, browser: Browser) -> None:
    opened = show(BEFORE)
    for scheme in THEMES:
        opened.page.emulate_media(color_scheme=scheme)
        opened.settle()
        for key in ("curve", "heatmap-0", "measure-0"):
            assert shades(browser, opened.page.locator(f"#{key}").screenshot()) > 40


def test_a_report_without_any_cosine_is_drawn(show: Open) -> None:
    opened = show(report(module("lm_head", None, note="empty update")))
    assert opened.chart("heatmap-0")[2]["text"] == ["n/a"]
    opened.move(3)
    assert "would project 0 of 0" in opened.page.locator("#tau-output").inner_text()


def test_a_report_without_modules_is_drawn(show: Open) -> None:
    assert show(report()).page.locator("#modules-0").count() == 1


def test_a_large_model_is_drawn_within_seconds(show: Open) -> None:
    deep = layers(80)
    opened = show(deep)
    opened.page.set_default_timeout(20_000)
    opened.move(1)
    assert opened.page.locator("#modules-0 tr.at-tau").count() == below(deep, 0.36)
    assert opened.page.locator("#heatmap-0 .ytick text").count() == 80


# --- what the assertions about a page need


def headings(page: Page) -> list[str]:
    script = "() => [...document.querySelectorAll('h1,h2,h3,h4')].map((each) => each.tagName)"
    found: list[str] = page.evaluate(script)
    return found


def colours(page: Page, selector: str) -> tuple[list[float], list[float]]:
    """Return the colour of the first such element's text, and what is behind it."""
    script = """(selector) => {
        const first = document.querySelector(selector);
        const behind = (each) => {
            const own = getComputedStyle(each).backgroundColor;
            return own === "rgba(0, 0, 0, 0)" ? behind(each.parentElement) : own;
        };
        return [getComputedStyle(first).color, behind(first)];
    }"""
    text, behind = page.evaluate(script, selector)
    return numbers(text), numbers(behind)


def numbers(colour: str) -> list[float]:
    return [float(each) for each in re.findall(r"[\d.]+", colour)][:3]


def hexadecimal(colour: str) -> list[float]:
    return [float(int(colour[i : i + 2], 16)) for i in (1, 3, 5)]


def contrast(first: list[float], second: list[float]) -> float:
    """Return the contrast ratio of WCAG 2.2."""

    def luminance(colour: list[float]) -> float:
        scaled = (each / 255 for each in colour)
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in scaled]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def shades(browser: Browser, png: bytes) -> int:
    """Return how many distinct colours a picture has."""
    script = """async (source) => {
        const image = new Image();
        image.src = source;
        await image.decode();
        const canvas = new OffscreenCanvas(image.width, image.height).getContext("2d");
        canvas.drawImage(image, 0, 0);
        const { data } = canvas.getImageData(0, 0, image.width, image.height);
        return new Set(new Uint32Array(data.buffer)).size;
    }"""
    page = browser.new_page()
    found: int = page.evaluate(script, f"data:image/png;base64,{base64.b64encode(png).decode()}")
    page.close()
    return found

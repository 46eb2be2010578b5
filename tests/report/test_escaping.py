"""Text of an adapter is nothing but text, in every format and in the card that is written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from safeproj.adapter import card
from safeproj.records.evaluations import Evaluation, Subject
from safeproj.records.rates import Rate
from safeproj.records.scores import Failure, Unprojected
from safeproj.report import CHECK_FORMATS, Report, Reports, render
from safeproj.report.card import section
from safeproj.report.markdown import code, escaped
from tests.report.checks import HOSTILE, check, checks, finding, hostile
from tests.report.test_report import EXAMPLE, module
from tests.sweep.records import point, sweep

EVIL = (
    "# Approved\n\n## Safe\n[ok](https://evil.example) ![](https://evil.example/i.png) <b>x</b> "
    "<https://evil.example> https://evil.example www.evil.example a@evil.example @maintainers #1 "
    "`code` | cell | *x* _y_ ~z~ $m$ &lt; \x1b[2J\x1b]8;;https://evil.example\x07t\x1b]8;;\x07 "
    "\x9b31m [link=https://evil.example]t[/link] [bold red]r[/] \u202e <!-- safeproj:end -->"
)

RECORD = replace(
    EXAMPLE,
    inputs={
        role: {"source": EVIL, "revision": EVIL}
        for role in ("base", "aligned", "adapter", "alignment", "data", "safety_module")
    },
    modules=(
        replace(module("lm_head", projected=True), name=EVIL, stack=EVIL, kind=EVIL, note=EVIL),
        module("lm_head", note=EVIL),
    ),
    unprojected=(Unprojected(EVIL, EVIL, EVIL, 0.5),),
    warnings=(EVIL,),
)

RATE = {"refused": Rate(1, 2), EVIL: Rate(1, 2)}
EVALUATION = Evaluation(
    version="1.2.3",
    versions={},
    model={"source": EVIL},
    judge={"kind": "command", "command": [EVIL]},
    options={},
    sets=({"name": EVIL, "kind": "harmful", "prompts": 2},),
    subjects=(
        Subject("no adapter", None, {EVIL: RATE}),
        Subject(EVIL, {"source": EVIL}, {EVIL: RATE}),
    ),
    warnings=(EVIL,),
)

RECORDS: dict[str, Any] = {
    "report": RECORD,
    "reports": Reports("1.2.3", {EVIL: RECORD}, {f"{EVIL}2": Failure(EVIL, EVIL)}),
    "check": hostile(),
    "findings": checks(
        check(
            finding("SP001", EVIL, module=EVIL, tensor=EVIL, file=EVIL),
            name=EVIL,
            source=EVIL,
            weights_file=EVIL,
            ignored=(finding("SP005", EVIL, tensor=EVIL),),
            remarks=(EVIL,),
            report=RECORD,
        ),
        check(name=f"{EVIL}2"),
    ),
    "evaluation": EVALUATION,
    "sweep": replace(
        sweep(point(2, method=(80, 70)), name=EVIL),
        inputs={"adapter": {"source": EVIL}},
        warnings=(EVIL,),
    ),
}


def tokens(text: str) -> Iterator[Token]:
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    for token in parser.parse(text):
        yield token
        yield from token.children or ()


def headings(text: str) -> list[str]:
    found = list(tokens(text))
    return [after.content for before, after in pairwise(found) if before.type == "heading_open"]


FOLDING = re.compile(r"<details><summary>[A-Za-z0-9 ]+</summary>\n|</details>\n?")
"""The only HTML in Markdown, which is ours: no name is in it."""


def assert_only_text(text: str) -> None:
    """Check that Markdown has none of what the hostile text would like to be."""
    for token in tokens(text):
        if token.type == "html_block" and FOLDING.fullmatch(token.content):
            continue
        assert token.type not in ("link_open", "image", "html_inline", "html_block", "s_open")
        assert token.type not in ("em_open", "hr", "fence", "code_block"), token
        if token.type == "text":  # what GitHub would link by itself
            assert not re.search(r"://|www\.|@", token.content), token.content
    assert not {"Approved", "Safe"} & set(headings(text))


def shown(text: str) -> set[str]:
    return {c for c in text if not c.isprintable()} - {"\n"}


@pytest.mark.parametrize("name", RECORDS)
def test_markdown_has_no_markup_of_the_adapters(name: str) -> None:
    for verbose in (False, True):
        text = render(RECORDS[name], "markdown", verbose=verbose)
        assert_only_text(text)
        assert not shown(text)
        assert "example" in text


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("color", [False, True])
def test_the_terminal_gets_no_escapes_of_the_adapters(name: str, color: bool) -> None:
    text = render(RECORDS[name], "table", color=color)
    own = re.sub(r"\x1b\[[0-9;]*m", "", text)  # colours
    assert not shown(own)
    assert "example" in own.replace("\n", "")  # it is shown, as it is written


@pytest.mark.parametrize("name", ["check", "findings"])
@pytest.mark.parametrize("format_", [each for each in CHECK_FORMATS if each != "table"])
def test_no_format_of_a_check_has_characters_that_steer(name: str, format_: Any) -> None:
    text = re.sub("<script>.*?</script>", "", render(RECORDS[name], format_), flags=re.DOTALL)
    assert not shown(text)


@pytest.mark.parametrize("name", RECORDS)
def test_json_has_the_text_as_it_is_and_steers_no_terminal(name: str) -> None:
    text = render(RECORDS[name], "json")
    assert not shown(text)
    assert (HOSTILE if name == "check" else EVIL) in strings(json.loads(text))


def strings(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value) | {text for each in value.values() for text in strings(each)}
    if isinstance(value, list):
        return {text for each in value for text in strings(each)}
    return {value} if isinstance(value, str) else set()


def test_every_text_of_a_report_is_hostile_here() -> None:
    """So that a further field has to be thought of."""
    known = {
        "version",
        "method",
        "projector",
        "selection",
        "pdst",
        "summary",
        "unaltered",
        "written",
    }
    assert {each.name for each in fields(Report)} - known == {
        "inputs",
        "modules",
        "unprojected",
        "warnings",
    }


@pytest.mark.parametrize("method", ["safe-lora", "salora", "covariance"])
def test_the_card_has_no_markup_of_the_adapters(method: str) -> None:
    inputs = {role: {"source": EVIL} for role in ("safety_data", "task_data", *RECORD.inputs)}
    text = section(replace(RECORD, method=method, inputs=inputs))
    assert_only_text(text)
    assert headings(text) == ["Safety projection"]
    assert not shown(text)


def test_a_card_written_twice_has_one_section() -> None:
    first = card.with_section(b"# mine\n", section(RECORD))
    again = card.with_section(first, section(replace(RECORD, warnings=())))
    assert again.count(card.BEGIN) == again.count(card.END) == 1
    assert again.startswith(b"# mine\n")
    assert b"Warning" not in again


@pytest.mark.parametrize(
    "text",
    ["- a", "+ a", "1. a", "12) a", "=== a", "# a", "> a", "* a", "--- ", "| a |", "\ta", "~~~ a"],
)
def test_what_begins_a_block_is_text_at_the_beginning_of_a_line(text: str) -> None:
    kinds = {token.type for token in tokens(escaped(text))}
    assert kinds <= {"paragraph_open", "paragraph_close", "inline", "text"}


def test_names_are_legible_and_their_underscores_emphasise_nothing() -> None:
    assert escaped("held_out_pairs (ä_ö, 12_b)") == "held_out_pairs (ä_ö, 12_b)"
    for text in (
        "_a_b_",
        "a__b__c",
        "__a__",
        "(_a_)",
        "a_ _b_c",
        "a_\u0301_b _c_",
        "a_._b_",
        "_*a*_",
    ):
        kinds = {token.type for token in tokens(escaped(text))}
        assert kinds <= {"paragraph_open", "paragraph_close", "inline", "text"}, text


def test_code_cannot_be_left() -> None:
    assert [t.type for t in tokens(code("a`<!-- b -->|c\nd"))].count("code_inline") == 1
    assert "<!--" not in code("<!-- safeproj:end -->")
    assert code("model.layers.0.mlp") == "`model.layers.0.mlp`"

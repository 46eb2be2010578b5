"""224 modules of 8 adapters on one screen: findings by adapter and rule, in formats for people."""

from __future__ import annotations

import math
from dataclasses import replace
from xml.etree import ElementTree as ET

import pytest

from safeproj.records.rules import RULES, Level
from safeproj.report import Check, Checks, render
from tests.report.checks import Q0, check, checks, finding
from tests.report.test_report import module, report

KINDS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def large(number: int) -> Check:
    """Return an adapter of a model of 7B, all of whose modules are below the threshold."""
    modules = [
        module(
            f"model.layers.{layer}.{kind}",
            0.094 + number / 1000 + (31 - layer) / 200 + abs(KINDS.index("mlp.up_proj") - i) / 100,
        )
        for layer in range(32)
        for i, kind in enumerate(KINDS)
    ]
    low = [
        replace(
            finding(message=f"{each.name}: cosine {each.cosine:.4f} is low", module=each.name),
            value=each.cosine,
        )
        for each in modules
    ]
    note = finding("SP020", "there is no safeproj.json", level=Level.note)
    name = f"adapter-{number}"
    return check(*low, note, name=name, source=f"adapters/{name}", report=report(*modules))


def run(adapters: int = 8) -> Checks:
    return checks(*map(large, range(adapters)))


SAID = [f"in 224 of 224 modules, lowest model.layers.31.mlp.up_proj 0.09{4 + i}" for i in range(6)]
SAID += [f"in 224 of 224 modules, lowest model.layers.31.mlp.up_proj 0.10{i}" for i in range(2)]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("color", [False, True])
def test_many_findings_are_one_screen_of_a_terminal(width: int, color: bool) -> None:
    text = render(run(), "table", width=width, color=color)
    for escape in ("\x1b[31m", "\x1b[2m", "\x1b[0m", "\x1b[1m"):
        text = text.replace(escape, "")
    lines = text.splitlines()
    rows = sum(max(1, math.ceil(len(line) / width)) for line in lines)
    assert rows <= 23  # of 24, and one for the prompt
    for number, said in enumerate(SAID):
        assert f"  adapter-{number}: {said}" in lines
    assert "note      SP020 missing-provenance  8 adapters: there is no safeproj.json" in lines
    assert RULES["SP001"].remedy in " ".join(text.split())
    assert sum(line.startswith("adapter-") and " failed " in line for line in lines) == 8


def test_one_adapter_is_not_named_and_short_findings_take_one_line() -> None:
    found = check(finding("SP017", "x.jinja is not judged"), finding(module=Q0))
    lines = render(checks(found), "table", width=100).splitlines()
    assert lines[0] == (
        "fail      SP001 module-below-threshold  the cosine is 0.21, expected more than 0.35"
    )
    assert lines[3] == "note      SP017 unjudged-file  x.jinja is not judged"
    assert "--verbose" not in "\n".join(lines)


def test_verbose_lists_every_finding() -> None:
    short, text = (render(run(2), "table", verbose=each) for each in (False, True))
    assert text.count("cosine 0.") == 2 * 224
    assert "--verbose lists every finding; `safeproj rule ID` explains one" in short
    assert "--verbose" not in text
    assert "  adapter-1: model.layers.3.mlp.up_proj: cosine 0.2350 is low" in text.splitlines()
    markdown = render(run(2), "markdown", verbose=True)
    assert markdown.count("is low") == 2 * 224
    assert "is low" not in render(run(2), "markdown")


def test_annotations_go_to_adapters_in_turn() -> None:
    first = check(*(finding(id_) for id_ in ("SP001", "SP004", "SP005", "SP007")), name="first")
    second = check(finding("SP002"), finding("SP017"), name="second")
    third = check(finding("SP017"), finding("SP010"), name="third")
    text = render(checks(first, second, third), "github")
    said = [line.partition("::")[2].partition("::") for line in text.splitlines()[:-1]]
    assert [(head[:19], words.partition(":")[0]) for head, _, words in said] == [
        ("error title=SP001 m", "first"),
        ("error title=SP010 c", "third"),
        ("error title=SP002 m", "second"),
        ("error title=SP004 f", "first"),
        ("error title=SP005 u", "first"),
        ("error title=SP007 d", "first"),
        ("notice title=SP017 ", "second"),
        ("notice title=SP017 ", "third"),
    ]


def test_many_findings_are_ten_annotations_with_all_adapters() -> None:
    lines = render(run(), "github").splitlines()
    assert [line.rpartition("::")[2] for line in lines[:8]] == [
        f"adapter-{number}: {said}" for number, said in enumerate(SAID)
    ]
    assert all(line.startswith("::error title=SP001") for line in lines[:8])
    assert len(lines) == 11
    assert "7 further findings (7 note)" in lines[9]


def test_every_finding_can_be_annotated() -> None:
    lines = render(run(2), "github", verbose=True).splitlines()
    assert lines[0].endswith("adapter-0: model.layers.31.mlp.up_proj: cosine 0.0940 is low")
    assert lines[1].endswith("adapter-1: model.layers.31.mlp.up_proj: cosine 0.0950 is low")
    assert "441 further findings (439 fail, 2 note)" in lines[9]


def test_markdown_says_all_before_what_is_folded() -> None:
    text = render(run(), "markdown")
    shown = text.partition("<details>")[0]
    assert len(shown.splitlines()) < 40
    for number, said in enumerate(SAID):
        row = f"| `adapter-{number}` | SP001 module-below-threshold | fail | {said} |"
        assert row in shown.splitlines()
    assert shown.count(RULES["SP001"].remedy) == 1
    assert text.count("<details><summary>Scores of 224 modules</summary>\n\n") == 8
    assert text.count("\n\n</details>\n") == 8


def test_junit_says_it_in_the_headline_and_lists_all_below() -> None:
    (suite,) = ET.fromstring(render(run(1), "junit"))
    (failure,) = suite.iter("failure")
    assert failure.attrib["message"] == SAID[0]
    assert len((failure.text or "").splitlines()) == 224


@pytest.mark.parametrize("format_", ["json", "sarif"])
def test_formats_for_programs_keep_every_finding(format_: str) -> None:
    text = render(run(2), format_)
    assert text.count(" is low") == 2 * 224
    assert text == render(run(2), format_, verbose=True)

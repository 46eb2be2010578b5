"""Annotations of GitHub workflows, and the summary of their steps."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safeproj.records.rules import Level
from safeproj.report import Checks, github, markdown, render
from tests.report.checks import (
    HOSTILE,
    Q0,
    TEXTS,
    WEIGHTS,
    check,
    checks,
    finding,
    hostile,
    mixed,
)
from tests.report.test_report import EXAMPLE

COMMAND = re.compile(r"::(error|warning|notice) title=([^:,\n]*),file=([^:,\n]*)::(.*)")


def unescaped(text: str) -> str:
    """Return what GitHub's runner reads: the escapes undone, that of the percent sign last."""
    for escape, character in (("%0D", "\r"), ("%0A", "\n"), ("%3A", ":"), ("%2C", ",")):
        text = text.replace(escape, character)
    return text.replace("%25", "%")


def commands(found: Checks) -> list[tuple[str, str, str, str]]:
    """Return level, title, file and message of every annotation with a file."""
    text = render(found, "github")
    assert text.endswith("\n")
    matches = [COMMAND.fullmatch(line) for line in re.split(r"[\r\n]", text)]
    return [(m[1], unescaped(m[2]), unescaped(m[3]), unescaped(m[4])) for m in matches if m]


def test_an_annotation_has_level_title_file_and_message() -> None:
    assert render(checks(check(finding(module=Q0))), "github") == (
        f"::error title=SP001 module-below-threshold,file=adapters/bad/{WEIGHTS}::"
        f"{Q0}: the cosine is 0.21, expected more than 0.35\n"
        "safeproj: failed: 0 of 1 adapters passed\n"
    )


def test_a_pass_is_a_line_in_the_log_and_no_annotation() -> None:
    found = checks(check(), check())
    assert render(found, "github") == "safeproj: passed: 2 of 2 adapters passed\n"
    assert render(checks(), "github") == "safeproj: passed: 0 of 0 adapters passed\n"


def test_the_examples_of_the_docstrings_hold() -> None:
    assert doctest.testmod(github) == (0, 1)


def test_what_blocks_is_an_error_and_the_worst_comes_first() -> None:
    assert [(level, title[:5]) for level, title, *_ in commands(mixed())] == [
        ("error", "SP001"),  # of one adapter
        ("error", "SP090"),  # of another
        ("error", "SP005"),
        ("error", "SP002"),
        ("notice", "SP017"),
    ]


def test_of_many_adapters_each_message_says_which() -> None:
    first, *_ = commands(mixed())
    assert first[3] == f"bad: {Q0}: the cosine is 0.21, expected more than 0.35"
    assert render(mixed(), "github").endswith("\nsafeproj: failed: 1 of 3 adapters passed\n")


def test_ignored_findings_are_no_annotations() -> None:
    assert commands(checks(check(ignored=(finding(),)))) == []


def test_escapes_are_those_of_githubs_toolkit() -> None:
    found = check(finding(message="100%: a, b", file="x:y,100%"), source="org/a,b")
    assert render(checks(found), "github").splitlines()[0] == (
        "::error title=SP001 module-below-threshold,file=org/a%2Cb/x%3Ay%2C100%25::"
        "x:y,100%25: 100%25: a, b"
    )


@pytest.mark.parametrize("count", [10, 11, 100])
def test_at_most_ten_annotations_and_the_last_counts_the_rest(count: int) -> None:
    notes = [finding("SP017", "a note", file=str(i)) for i in range(count - 1)]
    lines = render(checks(check(*notes, finding())), "github", verbose=True).splitlines()
    annotations = [line for line in lines if line.startswith("::")]
    assert len(annotations) == github.MAX_ANNOTATIONS == 10
    assert annotations[0].startswith("::error title=SP001")
    if count > 10:
        assert annotations[-1].startswith(
            f"::notice title=safeproj%3A more findings::{count - 9} further findings "
            f"({count - 9} note)"
        )
    else:
        assert "further findings" not in annotations[-1]


def test_what_is_left_out_is_annotated_as_the_worst_of_it() -> None:
    found = [*(finding() for _ in range(11)), finding("SP002"), finding("SP017")]
    last = render(checks(check(*found)), "github", verbose=True).splitlines()[-2]
    assert last.startswith("::error ")
    assert "4 further findings (2 fail, 1 undecided, 1 note)" in last


def test_a_long_message_is_cut_where_the_runner_would() -> None:
    ((*_, message),) = commands(checks(check(finding(message="%" * 10_000))))
    assert message == "%" * 4095 + "…"


def test_no_name_starts_another_command() -> None:
    text = render(hostile(), "github")
    lines = re.split(r"[\r\n]", text.removesuffix("\n"))
    assert all(COMMAND.fullmatch(line) for line in lines[:-1])
    assert lines[-1] == "safeproj: failed: 0 of 2 adapters passed"
    assert not {"\x1b", "\x00", "\u2028", "\u202e"} & set(text)
    assert HOSTILE not in text


@settings(deadline=None)
@given(TEXTS, TEXTS, TEXTS, st.sampled_from(Level))
def test_any_text_gives_one_command_and_comes_back(
    name: str, message: str, file: str, level: Level
) -> None:
    found = finding(message=f"::error::{message}", level=level, module=name, file=file)
    text = render(checks(check(found, name=name, source=name)), "github")
    assert "\r" not in text
    assert text.count("\n") == 2
    ((_, title, path, said),) = commands(checks(check(found, name=name, source=name)))
    assert title == "SP001 module-below-threshold"
    assert path.isprintable()
    assert said.isprintable()


def use(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Have the Markdown format render this."""
    monkeypatch.setattr(markdown, "render_checks", lambda *_, **__: text, raising=False)


def test_the_summary_is_the_markdown_report() -> None:
    found = checks(check(finding(module=Q0), report=EXAMPLE))
    assert github.summary(found) == render(found, "markdown")


def test_the_summary_of_many_findings_keeps_to_githubs_limit() -> None:
    found = check(*(finding(module=f"model.layers.{i}.🧨") for i in range(20_000)))
    assert len(github.summary(checks(found)).encode()) < 2_000
    text = github.summary(checks(found), verbose=True)
    assert github.SUMMARY_LIMIT == 1024 * 1024
    assert len(text.encode()) <= 1024 * 1024
    assert "lines are left out" in text.splitlines()[-1]
    assert text.splitlines()[-4:-1] == ["", "</details>", ""]


TABLE = (
    "# Gate\n\n| module | cosine |\n|---|---:|\n| `a🧨` | 0.1 |\n| `b` | 0.2 |\n\n## More\n\n"
    "- c\n\n<details><summary>All</summary>\n\n- d\n- e\n"
)


def test_a_summary_that_just_fits_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, TABLE)
    assert github.summary(checks(), len(TABLE.encode())) == TABLE
    assert github.summary(checks(), len(TABLE.encode()) - 1) != TABLE


@settings(deadline=None)
@given(st.integers(0, 1200), st.lists(TEXTS, max_size=30))
def test_a_summary_is_cut_between_lines_and_says_what_is_missing(
    limit: int, names: list[str]
) -> None:
    rows = [f"| `{''.join(name.split())}` | 🧨 |" for name in names]
    lines = [*TABLE.splitlines(), *rows]
    whole = "\n".join(lines) + "\n"
    with pytest.MonkeyPatch.context() as monkeypatch:
        use(monkeypatch, whole)
        text = github.summary(checks(), limit)
    assert len(text.encode()) <= limit
    if text in ("", whole):
        return
    *kept, blank, note = text.removesuffix("\n").split("\n")
    assert blank == ""
    if kept[-1:] == ["</details>"]:
        *kept, blank, _ = kept
        assert blank == ""
        assert "<details>" in "".join(kept)
    assert whole.split("\n")[: len(kept)] == kept
    found = re.match(r"_(\d+) of (\d+) lines are left out", note)
    assert found
    assert int(found[1]) + len(kept) == int(found[2]) == whole.count("\n")
    assert not kept or not kept[-1].startswith(("#", "|---", "| module", "<details>"))


def test_a_summary_keeps_to_every_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, TABLE * 9)
    for limit in range(len((TABLE * 9).encode()) + 1):
        assert len(github.summary(checks(), limit).encode()) <= limit


def test_a_limit_too_small_for_the_note_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, TABLE)
    assert github.summary(checks(), 20) == ""


def test_annotations_name_files_of_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    ((_, _, file, _),) = commands(checks(check(finding(file="b/c.py"), source=str(tmp_path / "a"))))
    assert file == "a/b/c.py"

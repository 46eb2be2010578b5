"""What every command's help shows, and what usage errors say."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from safeproj.cli import usage
from safeproj.cli.app import app
from tests.conftest import Trio
from tests.support import assert_refused, safeproj

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny-lm"
ROOT_COMMAND: Any = get_command(app)
PYTHON = re.compile(r"<?\b(list|str|int|float|bool|None|Optional|tuple)\b[\[>]|<\w+>\.\.\.|\]\]")
"""What help must not show: types."""


def walk(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every command and group with the words that it is called by."""
    yield path, command
    for name in getattr(command, "commands", ()):
        yield from walk(command.commands[name], (*path, name))


ALL = dict(walk(ROOT_COMMAND))
LEAVES = {path: each for path, each in ALL.items() if not hasattr(each, "commands")}


def text_of(path: tuple[str, ...], columns: int = 80) -> str:
    found = CliRunner().invoke(app, [*path, "--help"], terminal_width=columns)
    assert found.exit_code == 0
    return found.stdout


def flags_of(command: Any) -> dict[str, Any]:
    return {flag: each for each in command.params for flag in each.opts if flag.startswith("-")}


def error_of(*arguments: str) -> str:
    """Return the line that a usage error ends with."""
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 2
    return found.stderr.rstrip("\n").splitlines()[-1]


# --- help


@pytest.mark.parametrize("path", ALL, ids=" ".join)
@pytest.mark.parametrize("columns", [60, 80])
def test_help_fits_the_screen_in_whole_words(path: tuple[str, ...], columns: int) -> None:
    lines = text_of(path, columns).splitlines()
    told = [line for line in lines if not line.startswith(("  safeproj ", "      --"))]
    names = [line for line in told if line.startswith("  -") and "  " not in line.strip()]
    assert max(len(line) for line in told if line not in names) <= columns
    text = " ".join(" ".join(lines).split())
    for each in ALL[path].params:
        assert " ".join(each.help.split()) in text, each.name
    assert " ".join(ALL[path].help.split()) in text


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_does_not_speak_of_python(path: tuple[str, ...]) -> None:
    text = text_of(path).replace("<think>", "").replace("</NAME>", "").replace("<NAME>", "")
    assert PYTHON.findall(text) == []
    for line in text.splitlines():
        assert not re.search(r"--[a-z-]+ <", line), line


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_options_stand_below_groups(path: tuple[str, ...]) -> None:
    text = text_of(path)
    heads = re.findall(r"^(\w+):$", text, re.MULTILINE)
    shown = [each for each in heads if each in usage.GROUPS]
    assert shown == [each for each in usage.GROUPS if each in shown]
    assert "Options" not in heads
    assert heads[-2:] == ["Messages", "Examples"]
    for flag, each in flags_of(LEAVES[path]).items():
        if each.name != "help":
            assert each.rich_help_panel in usage.GROUPS, flag
    if "--threshold" in flags_of(LEAVES[path]):
        group = "Policy" if path == ("check",) else "Selection"
        below = text.partition(f"\n{group}:\n")[2].partition("\n\n")[0]
        assert "  --threshold T " in below


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_ends_with_examples_that_can_be_parsed_and_pages_that_there_are(
    path: tuple[str, ...],
) -> None:
    text = text_of(path)
    *_, shown, more = text.rstrip("\n").split("\n\n")
    head, _, block = shown.partition("\n")
    assert head == "Examples:"
    assert max(map(len, block.splitlines())) <= 79
    lines = block.replace("\\\n", " ").splitlines()
    assert lines
    for line in lines:
        program, *words = shlex.split(line)
        assert program == "safeproj"
        name = next(key for key in LEAVES if tuple(words[: len(key)]) == key)
        LEAVES[name].make_context(" ".join(name), words[len(name) :])
    if path in LEAVES:
        assert all(" ".join(["safeproj", *path]) in line for line in lines[:1])
    pages = re.findall(r"[\w/-]+\.md", more)
    assert more.startswith("More: ")
    assert pages
    assert [each for each in pages if not (ROOT / each).is_file()] == []


def test_pages_are_named_by_where_they_are_wherever_the_help_is_asked_for(tmp_path: Path) -> None:
    """Here beside the package; where it was installed they lie in it."""
    for words, count in ((["repair"], 2), (["stats"], 2), (["salora", "init"], 2), ([], 2)):
        done = safeproj(*words, "--help", cwd=tmp_path)
        pages = re.findall(r"\S+\.md\b", done.stdout)
        assert len(pages) == count
        assert all(Path(each).is_absolute() and Path(each).is_file() for each in pages)


def test_a_command_that_takes_one_adapter_shows_one_place() -> None:
    assert text_of(("verify",)).startswith("Usage: safeproj verify [OPTIONS] [PATCHED]\n")
    assert text_of(("check",)).startswith("Usage: safeproj check [OPTIONS] [ADAPTER]...\n")


@pytest.mark.parametrize("words", [["--help"], ["patch", "--help"], ["salora", "--help"]])
def test_help_imports_neither_rich_nor_numpy(words: list[str]) -> None:
    program = (
        f"import sys; sys.argv = ['safeproj', *{words!r}]\n"
        "from safeproj.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([each for each in ('rich', 'numpy', 'torch') if each in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "Examples:" in found.stdout
    assert found.stdout.splitlines()[-1] == "[]"


# --- suggestions


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("inspect --tau 0.3", "--threshold"),
        ("patch --force", "--overwrite"),
        ("check --json", "--format json"),
        ("check --sarif", "--format sarif"),
        ("inspect --lora x", "--adapter"),
        ("patch --base-model x", "--base or --aligned or --model"),
        ("patch --base_model x", "--base or --aligned or --model"),
        ("eval --base-model x", "--model"),
        ("patch --output-dir x", "--out"),
        ("check --output-file x", "--output"),
        ("repair --model x", "--aligned"),
        ("check --silent", "--quiet"),
        ("stats --dataset x", "--data"),
        ("inspect --cuda", "--device cuda"),
        ("inspect --no-color", "--color never"),
        ("patch --Dry_Run", "--dry-run"),
        ("patch --treshold 1", "--threshold"),
        ("inspect --jsom", "--format json"),
        ("salora fold --force", "--overwrite"),
        ("patch -o x", "--out"),
        ("--quiet patch", "safeproj patch --quiet"),
        ("--tau 1 inspect", "safeproj inspect --threshold"),
    ],
)
def test_what_may_be_meant_is_suggested(words: str, meant: str) -> None:
    option = next(each for each in words.split() if each.startswith("-"))
    assert error_of(*words.split()) == (f"Error: No such option: {option}. Did you mean {meant}?")


@pytest.mark.parametrize(
    "words", ["inspect --force", "inspect --sarif", "stats --json", "check --zzz", "--frob patch"]
)
def test_nothing_is_suggested_that_the_command_does_not_have(words: str) -> None:
    option = next(each for each in words.split() if each.startswith("-"))
    assert error_of(*words.split()) == f"Error: No such option: {option}"


def test_every_suggestion_is_an_option_of_the_command_and_every_synonym_is_one_somewhere() -> None:
    names = {(each, meant) for meant, others in usage.SYNONYMS for each in others.split()}
    found = set()
    for command in LEAVES.values():
        flags = flags_of(command)
        for given, _ in names:
            for meant in usage.suggestions(given, command.params):
                flag, _, value = meant.partition(" ")
                assert flag in flags
                if value:
                    command.make_context("x", [flag, value], resilient_parsing=True)
                found.add((given, meant))
    assert names - found == set()


# --- values


NUMBERS = [
    (path, flag)
    for path, command in LEAVES.items()
    for flag, each in flags_of(command).items()
    if each.metavar in ("N", "K", "T", "R", "E", "S", "X", "A", "MU", "GB", "SHARE", "SECONDS")
    or "|" in (each.metavar or "")
]


@pytest.mark.parametrize(("path", "flag"), NUMBERS, ids=lambda each: str(each))
def test_a_value_that_cannot_be_used_is_said_in_words(path: tuple[str, ...], flag: str) -> None:
    if flags_of(LEAVES[path])[flag].metavar == "N|P%":
        pytest.skip("the policy reads it")
    said = error_of(*path, flag, "1.x\x1b")
    head, _, reason = said.partition("': ")
    assert head == f"Error: Invalid value for '{flag}"
    assert re.fullmatch(
        r"'1\.x\\x1b' is not (a number|a whole number|one of ('[\w-]+'(, )?)+)\.", reason
    ), said


# --- adapters


MODEL = ("--model", str(TINY / "aligned"))
TAKING = {
    ("inspect",): (), ("patch",): ("--out", "out"), ("check",): (), ("eval",): MODEL,
    ("sweep",): (), ("repair",): ("--out", "out"), ("verify",): ("--original", "no"),
    ("sign",): ("--private-key", "key"), ("salora", "fold"): ("--module", "m", "--out", "out"),
}  # fmt: skip


def test_all_commands_that_take_adapters_are_known_here() -> None:
    assert {path for path, each in LEAVES.items() if "--adapter" in flags_of(each)} == set(TAKING)


@pytest.mark.parametrize("path", TAKING, ids=" ".join)
def test_an_adapter_can_be_given_by_its_place_and_by_its_option(
    path: tuple[str, ...], tmp_path: Path
) -> None:
    models = ("--base", str(TINY / "base"), "--aligned", str(TINY / "aligned"))
    known = flags_of(LEAVES[path])
    given = [*path, *TAKING[path], *(models if "--base" in known else ())]
    rows = [json.dumps({"prompt": f"do {n}", "response": f"no {n}"}) for n in range(12)]
    (tmp_path / "p.jsonl").write_text("\n".join(rows))
    prompts = [each for each in ("--harmful", "--skill", "--task") if each in known]
    given += [word for each in prompts for word in (each, f"{each[2:]}=p.jsonl")]
    said = []
    for words in (["nowhere/x"], ["--adapter", "nowhere/x"]):
        result = safeproj(*given, *words, cwd=tmp_path)
        assert result.returncode == 2, result.stderr
        said.append(result.stderr)
    assert said[0] == said[1]
    if path not in (("sign",), ("salora", "fold")):  # which look at others first
        assert "nowhere/x" in said[0]
    if path != ("eval",):  # which measures the model alone
        assert_refused(safeproj(*given, cwd=tmp_path), "no ", "; expected the SRC of ")


def test_both_ways_together_are_many_adapters(trio: Trio, tmp_path: Path) -> None:
    shutil.copytree(trio.adapter, tmp_path / "other")
    result = safeproj("inspect", tmp_path / "other", *trio.arguments, "--format", "json")
    assert result.returncode == 0, result.stderr
    assert list(json.loads(result.stdout)["reports"]) == ["other", trio.adapter.name]


def test_more_than_one_where_one_is_meant_is_refused(trio: Trio, tmp_path: Path) -> None:
    given = ("verify", trio.adapter, "--adapter", "x", "--public-key", "key.pub")
    assert_refused(safeproj(*given, cwd=tmp_path), "2 adapters", "expected one PATCHED")

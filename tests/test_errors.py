"""Errors name arguments in Python, and options on the command line."""

from __future__ import annotations

import ast
import inspect
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main

import safeproj
from safeproj import SafeprojError
from safeproj.cli.app import app
from safeproj.cli.usage import SYNONYMS
from safeproj.errors import argument
from tests.support import assert_refused
from tests.support import safeproj as command

ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples" / "tiny-lm"
BASE, ALIGNED, BAD = TINY / "base", TINY / "aligned", TINY / "adapters" / "bad"
PAIR = ("--base", BASE, "--aligned", ALIGNED)

OF_THE_COMMAND = {
    *("--format", "--output", "--quiet", "--verbose", "--color", "--method", "--judge", "--forbid"),
    *("--private-key", "--password-env", "--module", "--alpha", "--task-rank", "--skill"),
    *("--push-to-hub", "--private", "--revision", "--create-pr"),
}
"""Options that no function has an argument for: `skill` is a kind of prompts, and from Python the
Hub's own client publishes what was written."""


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("--threshold must lie in [0, 1]", "threshold must lie in [0, 1]"),
        ("give --safety-data (--map A=B)", "give safety_data (maps A=B)"),
        ("--include/--exclude leave none", "include/exclude leave none"),
        (
            "`safeproj stats --aligned SRC` makes --data",
            "`safeproj stats --aligned SRC` makes data",
        ),
        ("run `git lfs pull --include x`; --out", "run `git lfs pull --include x`; out"),
        ("--out /a/--b/c: '--b' is no-one's --", "out /a/--b/c: '--b' is no-one's --"),
    ],
)
def test_options_become_arguments_and_commands_stay(message: str, expected: str) -> None:
    error = SafeprojError(message)
    assert (str(error), error.message) == (expected, message)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.message) == (expected, message)


SAID: list[tuple[Callable[[], Any], tuple[str | Path, ...], str]] = [
    (
        lambda: safeproj.Selection(threshold=2.0),
        ("inspect", *PAIR, "--adapter", BAD, "--threshold", "2"),
        "--threshold must lie in [0, 1], found 2.0",
    ),
    (
        lambda: safeproj.SafeLora(BASE, ALIGNED, rank=3),
        ("inspect", *PAIR, "--adapter", BAD, "--rank", "3"),
        "--rank and --energy need --projector exact",
    ),
    (
        lambda: safeproj.Options(maps=("x",)),
        ("inspect", *PAIR, "--adapter", BAD, "--map", "x"),
        "--map 'x': ",
    ),
    (
        lambda: safeproj.patch(safeproj.SafeLora(BASE, ALIGNED), BAD, BAD),
        ("patch", *PAIR, "--adapter", BAD, "--out", BAD),
        f"--out {BAD}: overlaps with --adapter {BAD}",
    ),
    (
        lambda: safeproj.Covariance(safety_data="x.jsonl"),
        ("inspect", "--safety-data", "x.jsonl", "--adapter", BAD),
        "give --aligned, which is run on the data; or statistics for both --safety-data and "
        "--task-data, which `safeproj stats` makes",
    ),
    (
        lambda: safeproj.verify(BAD),
        ("verify", BAD),
        "nothing to compare with; give --original, --public-key, or both",
    ),
]


@pytest.mark.parametrize(("call", "words", "message"), SAID, ids=range(len(SAID)))
def test_the_same_error_names_what_was_called(
    call: Callable[[], Any], words: tuple[str | Path, ...], message: str
) -> None:
    assert_refused(command(*words), message)
    expected = re.sub(r"--([a-z-]+)", lambda found: argument(found[0]), message)
    with pytest.raises(SafeprojError) as caught:
        call()
    assert expected in str(caught.value)
    assert "--" not in str(caught.value)


def test_records_name_options_whoever_makes_them(tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "one").symlink_to(BAD)
    (tmp_path / "out" / "one").mkdir(parents=True)
    (tmp_path / "out" / "one" / "adapter_config.json").write_text("{}", "utf-8")
    method = safeproj.SafeLora(BASE, ALIGNED)
    found = safeproj.patch_many(method, [tmp_path / "adapters"], tmp_path / "out")
    assert "give overwrite to" in str(found[0].error)
    assert "give --overwrite to" in safeproj.reports(found).failures["one"].error


def options() -> set[str]:
    """The options of all commands."""

    def below(found: Any) -> Iterator[str]:
        if hasattr(found, "list_commands"):
            context = click.Context(found)
            for name in found.list_commands(context):
                yield from below(found.get_command(context, name))
            return
        for parameter in found.params:
            yield from (each for each in parameter.opts if each.startswith("--"))

    return set(below(typer.main.get_command(app)))


def arguments() -> set[str]:
    """The arguments of all that is public."""
    public = [getattr(safeproj, name) for name in dir(safeproj)]
    public += [getattr(safeproj.salora, name) for name in dir(safeproj.salora)]
    made = [each.make for each in public if hasattr(each, "make")]
    return {
        name
        for each in (*public, *made, safeproj.PromptSet.first, safeproj.Feed.load)
        if callable(each)
        for name in inspect.signature(each).parameters
    }


def test_every_option_is_an_argument_in_python() -> None:
    known, found = arguments(), options() - OF_THE_COMMAND
    assert len(found) > 60
    assert {each for each in found if argument(each) not in known} == set()


def texts(tree: ast.AST) -> Iterator[str]:
    """The texts of a module, without docstrings; `X` stands for what is put into one."""
    inside: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            inside.add(node.value)
        elif isinstance(node, ast.JoinedStr):
            inside |= set(ast.walk(node)) - {node}
    for node in ast.walk(tree):
        if node in inside:
            continue
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "X" for part in node.values]
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def modules(*names: str) -> Iterator[tuple[Path, ast.AST]]:
    for path in sorted(path for name in names for path in (ROOT / name).rglob("*.py")):
        yield path, ast.parse(path.read_text("utf-8"))


def test_what_messages_call_an_option_is_one_and_commands_are_in_backticks() -> None:
    known = options() | {"--version", "--help"}
    others = {names for _, names in SYNONYMS}
    for path, tree in modules("safeproj"):
        for text in set(texts(tree)) - others:
            bare = re.sub(r"`[^`]*`", "", text)
            found = set(re.findall(r"(?<![^\s(])--[a-z][a-z-]*", bare))
            assert found <= known, (path, text)


def test_errors_are_repeated_as_they_were_written() -> None:
    """What `str` makes of them names arguments, which the command must not print."""
    for path, tree in modules("safeproj", "action", "bench", "lab", "scripts"):
        for handler in (node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)):
            kinds = ast.unparse(handler.type) if handler.type is not None else ""
            if handler.name is None or "SafeprojError" not in kinds:
                continue
            shown = re.compile(rf"\{{{handler.name}\}}|\b(str|first_line)\({handler.name}\)")
            found = [shown.search(ast.unparse(line)) for line in handler.body]
            assert not any(found), (path, handler.lineno)

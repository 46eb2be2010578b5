"""Commands made of bundles: what is an option, how it is handed over, and how errors end."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner, Result

from safeproj.cli.app import app as commands
from safeproj.cli.bundles import Without, command
from safeproj.cli.inspect import inspect_command
from safeproj.cli.options import Choosing, Color, Given, Reporting, Running, Talking
from safeproj.cli.patch import patch_command
from safeproj.errors import SafeprojError
from tests.support import assert_refused, safeproj


@dataclass(frozen=True)
class Size:
    """How large."""

    width: Annotated[int, typer.Option("--width", metavar="COLUMNS", help="How wide.")] = 3
    height: Annotated[float | None, typer.Option("--height", help="How high.")] = None
    whole: Annotated[bool, typer.Option("--whole", help="All of it.")] = False
    names: Annotated[list[str] | None, typer.Option("--name", help="What is in it.")] = None

    def __post_init__(self) -> None:
        if self.width < 1:
            raise SafeprojError(f"--width must be 1 or more,\nfound {self.width}")
        if self.width > 100:
            raise ZeroDivisionError("too wide")


@dataclass(frozen=True)
class Place:
    """Where."""

    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where it goes.")]
    over: Annotated[bool, typer.Option("--over/--under", help="On top of it.")] = True


@dataclass(frozen=True)
class Sized(Size):
    """The same with another default."""

    width: Annotated[int, typer.Option("--width", help="How wide.")] = 5


class Loose:
    """One that says its options itself."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    @classmethod
    def parameters(cls) -> Iterator[Parameter]:
        for name in ("first", "second"):
            annotation = Annotated[str | None, typer.Option(f"--{name}", help=f"The {name}.")]
            yield Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


MADE: list[tuple[object, ...]] = []
"""What the commands below were called with."""


@pytest.fixture(autouse=True)
def _nothing_made() -> None:
    MADE.clear()


@command
def draw(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="A thing.")],
    size: Size,
    place: Place,
    loose: Loose,
    talking: Talking,
    colour: Annotated[str, typer.Option("--colour", help="Which one.")] = "red",
) -> None:
    """Draw a thing.

    Somewhere.
    """
    MADE.append((what, size, place, loose.values, talking, colour))


@command
def sketch(
    size: Annotated[Sized, Without("height", "names")],
    place: Annotated[Place, Without("over")],
    loose: Annotated[Loose, Without("second")],
    talking: Annotated[Talking, Without("quiet")],
) -> None:
    """Draw a thing roughly."""
    MADE.append((size, place, loose.values, talking))


def run(function: Callable[..., None], *arguments: str) -> Result:
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(function)
    return CliRunner().invoke(app, arguments)


def options_of(function: Callable[..., None]) -> dict[str, Any]:
    """Return the default of every option and argument, by name; `Parameter.empty` is none."""
    return {each.name: each.default for each in inspect.signature(function).parameters.values()}


# --- what is an option


def test_each_field_is_an_option_with_its_default() -> None:
    nothing = Parameter.empty
    assert options_of(draw) == {
        "what": nothing,
        "width": 3,
        "height": None,
        "whole": False,
        "names": None,
        "out": nothing,
        "over": True,
        "first": None,
        "second": None,
        "quiet": 0,
        "verbose": False,
        "color": Color.auto,
        "colour": "red",
    }
    assert list(options_of(draw))[:3] == ["what", "width", "height"]  # where the bundle stands
    assert {each.kind for each in inspect.signature(draw).parameters.values()} == {
        Parameter.KEYWORD_ONLY
    }


def test_fields_that_a_command_does_not_take_are_no_options() -> None:
    assert list(options_of(sketch)) == ["width", "whole", "out", "first", "verbose", "color"]
    for option in ("--height=1", "--name=a", "--under", "--second=b", "--quiet"):
        result = run(sketch, "--out", "x", option)
        assert result.exit_code == 2
        assert option.split("=")[0] in result.stderr
        assert "No such option" in result.stderr
    assert MADE == []


def test_a_bundle_that_inherits_has_its_own_default() -> None:
    assert options_of(sketch)["width"] == 5


def test_two_bundles_with_one_field_are_refused_at_once() -> None:
    def twice(size: Size, other: Size, talking: Talking) -> None:
        del size, other, talking

    with pytest.raises(ValueError, match="duplicate parameter"):
        command(twice)


# --- what is handed over


def test_bundles_are_made_of_their_defaults() -> None:
    result = run(draw, "box", "--out", "x")
    assert result.exit_code == 0, result.stderr
    loose = {"first": None, "second": None}
    assert [("box", Size(), Place(Path("x")), loose, Talking(), "red")] == MADE


def test_bundles_are_made_of_what_is_given() -> None:
    result = run(
        draw, "--width", "7", "box", "--height", "0", "--whole", "--name", "a", "--name", "b",
        "--out", "x", "--under", "--second", "", "-q", "--verbose", "--colour", "blue",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    size = Size(7, 0.0, True, ["a", "b"])
    loose = {"first": None, "second": ""}
    assert [("box", size, Place(Path("x"), False), loose, Talking(1, True), "blue")] == MADE


def test_what_is_left_out_has_its_default_in_the_bundle() -> None:
    result = run(sketch, "--out", "x", "--first", "a")
    assert result.exit_code == 0, result.stderr
    assert [(Sized(5, None, False, None), Place(Path("x")), {"first": "a"}, Talking())] == MADE


# --- errors


def test_a_bundles_own_check_ends_in_one_line() -> None:
    result = run(draw, "box", "--out", "x", "--width", "0")
    assert result.exit_code == 2
    assert result.stderr == "safeproj: error: --width must be 1 or more, found 0\n"
    assert result.stdout == ""
    assert MADE == []


def test_verbose_shows_where() -> None:
    result = run(draw, "box", "--out", "x", "--width", "0", "--verbose")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("safeproj: error: --width must be 1 or more, found 0\n")


def test_what_a_bundle_did_not_expect_ends_in_one_line_too() -> None:
    result = run(draw, "box", "--out", "x", "--width", "101")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "unexpected ZeroDivisionError: too wide" in line
    assert MADE == []


def test_an_error_of_the_command_itself_ends_so() -> None:
    @command
    def fail(talking: Talking) -> None:
        raise SafeprojError(f"quiet is {talking.quiet}")

    result = run(fail, "--quiet")
    assert (result.exit_code, result.stderr) == (2, "safeproj: error: quiet is 1\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["box"], "Missing option '--out'"),
        (["--out", "x"], "Missing argument 'WHAT'"),
        (["box", "--out", "x", "--width", "wide"], "'--width'"),
        (["box", "--out", "x", "--width"], "'--width' requires an argument"),
    ],
    ids=["option", "argument", "value", "no value"],
)
def test_what_is_required_or_no_value_is_said(arguments: list[str], words: str) -> None:
    result = run(draw, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert MADE == []


# --- help


def test_help_lists_every_field() -> None:
    text = " ".join(run(draw, "--help").stdout.split())
    assert "Draw a thing. Somewhere." in text
    for option, *words in (
        ("WHAT", "A thing."),
        ("--width", "COLUMNS", "How wide.", "[default: 3]"),
        ("--height", "How high."),
        ("--whole", "All of it."),
        ("--name", "What is in it."),
        ("--out", "FILE", "Where it goes.", "[required]"),
        ("--over / --under", "On top of it."),
        ("--first", "The first."),
        ("--second", "The second."),
        ("-q, --quiet", "Nothing but errors;"),
        ("--colour", "Which one.", "[default: red]"),
    ):
        _, _, text = text.partition(f" {option} ")  # in the order of the bundles
        assert [each for each in words if each not in text[:80]] == [], option


def test_help_leaves_out_what_a_command_does_not_take() -> None:
    text = run(sketch, "--help").stdout
    for option in ("--height", "--name", "--over", "--second", "--quiet"):
        assert option not in text
    assert "--width" in text


# --- the commands that there are


def flags_of(name: str) -> list[str]:
    group = get_command(commands)
    assert isinstance(group, TyperGroup)
    return [flag for each in group.commands[name].params for flag in each.opts]


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("patch", set()),
        ("inspect", {"--reconstruct"}),
        ("check", {"--reconstruct"}),
        ("verify", {"--reconstruct"}),
        (
            "sweep",
            {
                *("--mu", "--reconstruct", "--weight"),
                *("--safe-model", "--strength", "--delta-rank"),
            },
        ),
    ],
)
def test_commands_take_every_option_of_the_methods_but_these(name: str, missing: set[str]) -> None:
    flags = flags_of(name)
    assert len(set(flags)) == len(flags)
    known = {f"--{each.name.replace('_', '-')}" for each in Given.parameters()}
    assert known - set(flags) == missing


def test_wrong_options_are_refused_before_torch_is_imported() -> None:
    """Which takes a second or more; a command is made without it too."""
    program = (
        "import sys; from typer.testing import CliRunner; from safeproj.cli.app import app\n"
        "found = CliRunner().invoke(app, ['inspect', '--mu', '0', '--alignment', 'a', "
        "'--adapter', 'x'])\n"
        "print(found.stderr.strip(), found.exit_code, 'torch' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith("safeproj: error: --mu goes with --safety-data")
    assert found.stdout.endswith(" 2 False\n")


def test_what_commands_share_is_written_once() -> None:
    for bundle in (Choosing, Running, Reporting, Talking):
        known = {field.name for field in dataclasses.fields(bundle)}
        assert known <= options_of(patch_command).keys()
        assert known <= options_of(inspect_command).keys()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "--method", "salora"], "--method salora needs --safety-module"),
        (["stats", "--random-tokens", "1", "--memory", "0"], "--memory must be more than 0"),
        (["stats", "--random-tokens", "1", "--batch-size", "0"], "--batch-size must be 1 or more"),
    ],
    ids=["given", "memory", "batch size"],
)
def test_the_commands_own_bundles_end_in_one_line(
    arguments: list[str], words: str, tmp_path: Path
) -> None:
    rest = {"inspect": ["--adapter", "x"], "stats": ["--aligned", "a", "--out", "x.safetensors"]}
    result = safeproj(*arguments, *rest[arguments[0]], cwd=tmp_path)
    assert_refused(result, words)
    assert list(tmp_path.iterdir()) == []

"""What commands say: how quiet, in which colours, and how a log shows that a run goes on."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

from safeproj import Options, api
from safeproj.cli import terminal
from safeproj.cli.options import Reporting, WritingTalking
from safeproj.cli.progress import INTERVAL, Lines, Run, Steps
from safeproj.engine import Progress
from scripts.readme import PROGRESS
from tests.conftest import Trio
from tests.report.test_columns import REPAIR
from tests.support import assert_refused, needs_terminal, on_terminal, safeproj

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-lm"
ESCAPE = "\x1b["
Words = tuple[str | Path, ...]


def ended(code: int, stdout: str, stderr: str, *words: str | Path) -> None:
    """Run a command and compare all that it says."""
    result = safeproj(*words)
    assert (result.returncode, result.stdout, result.stderr) == (code, stdout, stderr)


# --- quiet


@pytest.mark.parametrize("quiet", ["-q", "-qq"])
def test_a_command_that_writes_says_nothing(trio: Trio, tmp_path: Path, quiet: str) -> None:
    pair: Words = ("--base", trio.base, "--aligned", trio.aligned)
    out = tmp_path / "out"
    ended(0, "", "", "patch", *trio.arguments, "--out", out, "--layers", "9", quiet)
    assert (out / "adapter_model.safetensors").is_file()
    alignment = tmp_path / "model.safealign.safetensors"
    ended(0, "", "", "align", *pair, "--out", alignment, quiet)
    assert alignment.is_file()
    stats: Words = (
        "stats",
        "--aligned",
        TINY / "aligned",
        "--random-tokens",
        "4",
        "--max-length",
        "8",
    )
    ended(0, "", "", *stats, "--out", tmp_path / "x.safetensors", quiet)
    policy = tmp_path / "policy.toml"
    ended(0, "", "", "check", "--init", "--policy", policy, quiet)
    assert policy.is_file()


@pytest.mark.parametrize("quiet", ["-q", "-qq"])
def test_what_is_asked_for_is_given_however_quiet(trio: Trio, tmp_path: Path, quiet: str) -> None:
    place = tmp_path / "report.json"
    given: Words = (
        "patch",
        *trio.arguments,
        "--dry-run",
        "--out",
        tmp_path / "out",
        "--layers",
        "9",
    )
    loud = safeproj(*given, "--format", "json")
    assert loud.stderr
    ended(0, loud.stdout, "", *given, "--format", "json", quiet)
    ended(0, "", "", *given, "--format", "json", "--output", place, quiet)
    assert place.read_text() == loud.stdout
    ended(0, "", "", *given, "--output", tmp_path / "table.txt", quiet)
    assert "cosine" in (tmp_path / "table.txt").read_text()
    inspected: Words = ("inspect", *trio.arguments, "--format", "markdown")
    ended(0, safeproj(*inspected).stdout, "", *inspected, quiet)


def test_a_report_that_is_what_a_command_is_for_is_left_out_last(trio: Trio) -> None:
    given: Words = ("inspect", *trio.arguments, "--layers", "9")
    loud = safeproj(*given)
    assert "warning" in loud.stderr
    ended(0, loud.stdout, "", *given, "-q")
    ended(0, "", "", *given, "-qq")
    model: Words = ("eval", "--model", TINY / "aligned", "--max-new-tokens", "1", "--limit", "1")
    measured: Words = (*model, "--harmful", TINY / "data" / "safety.jsonl")
    ended(0, safeproj(*measured).stdout, "", *measured, "-q")
    ended(0, "", "", *measured, "-qq")


def test_a_gate_says_failing_findings_then_nothing(trio: Trio) -> None:
    given: Words = ("check", *trio.arguments, "--threshold", "1")
    loud = safeproj(*given).stdout
    assert "SP020" in loud
    assert "outcome" in loud
    quiet = safeproj(*given, "-q")
    assert (quiet.returncode, quiet.stderr) == (1, "")
    assert quiet.stdout.startswith("fail      SP001 module-below-threshold")
    for word in ("note", "outcome", "SP020"):
        assert word not in quiet.stdout
    listed = safeproj(*given, "-q", "--verbose").stdout
    assert listed.count(" is at or below 1") == 4
    ended(1, "", "", *given, "-qq")
    full = safeproj(*given, "--format", "github").stdout
    ended(1, full, "", *given, "--format", "github", "-qq")


def test_a_gate_that_passes_says_nothing(trio: Trio) -> None:
    given: Words = ("check", *trio.arguments, "--threshold", "0")
    ended(0, "", "", *given, "-q")
    ended(0, "", "", *given, "-qq")


@pytest.mark.parametrize("quiet", ["-q", "-qq"])
def test_errors_of_exit_code_2_are_always_said(trio: Trio, tmp_path: Path, quiet: str) -> None:
    assert_refused(safeproj("inspect", *trio.arguments, "--threshold", "2", quiet), "--threshold")
    broken = tmp_path / "broken"
    shutil.copytree(trio.adapter, broken)
    (broken / "adapter_config.json").write_text("{")
    pair: Words = ("--base", trio.base, "--aligned", trio.aligned)
    found = safeproj("check", broken, *pair, quiet)
    assert_refused(found, "adapter_config.json")
    assert ("SP090" in found.stdout) is (quiet == "-q")


def test_what_failed_of_many_is_said_unless_the_exit_code_is_to_say_it(
    trio: Trio, tmp_path: Path
) -> None:
    for name in ("good", "broken"):
        shutil.copytree(trio.adapter, tmp_path / "adapters" / name)
    (tmp_path / "adapters" / "broken" / "adapter_config.json").write_text("{")
    pair: Words = ("--base", trio.base, "--aligned", trio.aligned)
    given: Words = ("patch", tmp_path / "adapters", *pair, "--overwrite", "--out", tmp_path / "out")
    said = safeproj(*given, "-q")
    assert (said.returncode, said.stdout) == (1, "")
    assert re.fullmatch(r"safeproj: error: broken: .*\n", said.stderr)
    ended(1, "", "", *given, "-qq")


UNREACHED = replace(REPAIR, goal=replace(REPAIR.goal, refusals=1.0))


@pytest.mark.parametrize(
    ("quiet", "said"), [(1, r"safeproj: error: Not reached: 100 % refused.*\n"), (2, "")]
)
def test_a_goal_that_is_not_reached_is_an_error_where_no_report_says_so(
    capsys: pytest.CaptureFixture[str], quiet: int, said: str
) -> None:
    with pytest.raises(typer.Exit) as end:
        terminal.finish(UNREACHED, Reporting(), WritingTalking(quiet), "nothing written")
    assert end.value.exit_code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(said, err)


# --- colours


ALWAYS: list[tuple[list[str], dict[str, str], bool]] = [
    ([], {}, False),
    (["--color", "always"], {}, True),
    (["--color", "always"], {"NO_COLOR": "1"}, True),
    (["--color", "never"], {"FORCE_COLOR": "1"}, False),
    (["--color", "auto"], {"FORCE_COLOR": "1"}, True),
    ([], {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ([], {"FORCE_COLOR": ""}, False),
    (["--color", "always"], {"TERM": "dumb"}, True),
]


@pytest.mark.parametrize(("options", "variables", "colored"), ALWAYS)
def test_colours_on_a_pipe(
    trio: Trio, options: list[str], variables: dict[str, str], colored: bool
) -> None:
    clean = {"NO_COLOR": "", "FORCE_COLOR": "", "TERM": "xterm", **variables}
    given: Words = ("check", *trio.arguments, "--threshold", "1", *options)
    result = safeproj(*given, env=clean)
    assert (ESCAPE in result.stdout) is colored
    plain = re.sub(r"\x1b\[[\d;]*m", "", result.stdout)
    bare = safeproj(*given, "--color", "never").stdout
    assert [line.rstrip() for line in plain.splitlines()] == bare.splitlines()
    warned = safeproj("inspect", *trio.arguments, "--layers", "9", *options, env=clean).stderr
    assert warned.startswith("\x1b[33msafeproj: warning:\x1b[0m --layers") is colored
    assert warned.startswith("safeproj: warning: --layers") is not colored
    refused = safeproj("inspect", *trio.arguments, "--threshold", "2", *options, env=clean).stderr
    assert refused.startswith("\x1b[1;31msafeproj: error:\x1b[0m --threshold") is colored
    assert (ESCAPE in refused) is colored


def test_a_file_has_no_colours(trio: Trio, tmp_path: Path) -> None:
    place = tmp_path / "table.txt"
    given: Words = ("inspect", *trio.arguments, "--color", "always", "--output", place)
    assert safeproj(*given, env={"FORCE_COLOR": "1"}).returncode == 0
    assert ESCAPE not in place.read_text()


@needs_terminal
@pytest.mark.parametrize(
    ("options", "variables", "colored"),
    [
        ([], {}, True),
        ([], {"NO_COLOR": "1"}, False),
        (["--color", "never"], {}, False),
        ([], {"TERM": "dumb"}, False),
        (["--color", "always"], {"NO_COLOR": "1"}, True),
    ],
)
def test_colours_on_a_terminal(
    trio: Trio, options: list[str], variables: dict[str, str], colored: bool
) -> None:
    code, shown = on_terminal("inspect", *trio.arguments, "-q", *options, env=variables)
    assert code == 0
    assert (ESCAPE in shown) is colored


def test_an_option_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from safeproj.cli.options import Color

    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with terminal.command(False, color=Color.always):
        assert os.environ.get("FORCE_COLOR")
        assert "NO_COLOR" not in os.environ
    assert os.environ["NO_COLOR"] == "1"
    assert "FORCE_COLOR" not in os.environ


# --- what a terminal shows is not broken inside words


@needs_terminal
@pytest.mark.parametrize("columns", [80, 120])
def test_long_lines_are_broken_between_words(trio: Trio, tmp_path: Path, columns: int) -> None:
    code, shown = on_terminal(
        "patch", *trio.arguments, "--layers", "9", "--out", tmp_path / "out", "--color", "never",
        columns=columns,
    )  # fmt: skip
    assert code == 0
    piped = safeproj("patch", *trio.arguments, "--layers", "9", "--out", tmp_path / "other")
    last = shown.splitlines()
    command = next(line for line in last if line.startswith("next: safeproj eval "))
    assert command.split() == [
        each.replace("/other", "/out") for each in piped.stderr.splitlines()[-1].split()
    ]
    warning = piped.stderr.splitlines()[0]
    assert warning in " ".join(shown.split())
    assert f"\n{warning}" not in shown or len(warning) <= columns


# --- lines of a log


def test_comparisons_leave_out_what_a_slow_machine_says() -> None:
    counted = Steps("answers")
    lines = Lines(counted, print)
    for share in (0, 3, 9):
        counted.told(share, 9)
        for seconds in (0.0, 40.0, 4000.0):
            line = f"safeproj: {lines.line(time.monotonic() + seconds)}\n"
            assert PROGRESS.sub("", f"{line}wrote out\n{line}") == "wrote out\n"
    assert PROGRESS.sub("", "safeproj: warning: so far, 3 left\n") != ""


class Told:
    """Keeps what is said, and lets one wait for so much of it."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        self.lines.append(line)

    def wait(self, matches: Callable[[str], Any]) -> str:
        until = time.monotonic() + 20.0
        while time.monotonic() < until:
            found = [line for line in self.lines if matches(line)]
            if found:
                return found[0]
            time.sleep(0.005)
        raise AssertionError(self.lines)


def test_a_log_shows_at_least_every_30_seconds_that_a_run_goes_on() -> None:
    assert INTERVAL <= 30.0
    told, counted = Told(), Steps("answers")
    with Lines(counted, told, 0.01):
        told.wait(re.compile(r"safeproj: no answers yet, 0:00 so far").fullmatch)
        counted.told(3, 20)
        told.wait(re.compile(r"safeproj: 3/20 answers, 0:00 so far").fullmatch)
        counted.told(10, 20)
        told.wait(re.compile(r"safeproj: 10/20 answers, 0:00 so far, about 0:0\d left").fullmatch)
    count = len(told.lines)
    time.sleep(0.05)
    assert len(told.lines) == count  # nothing is said of what has ended


def test_what_is_left_follows_from_the_time_that_steps_took_and_not_from_what_came_before() -> None:
    counted = Steps("answers")
    lines = Lines(counted, print)
    begun = time.monotonic()
    counted.told(4, 20)
    counted.told(8, 20)  # 4 in a minute, so 12 in three
    assert lines.line(begun + 60.0) == "8/20 answers, 1:00 so far, about 3:00 left"
    assert lines.line(begun + 3600.0).startswith("8/20 answers, 1:00:00 so far, about 3:00:0")


def test_a_run_counts_data_then_weights() -> None:
    seen: list[str] = []
    run = Run(lambda run: seen.append(run.text))
    assert (run.text, run.share) == ("nothing read yet", 0.0)
    run.ran(1, 4)
    run.ran(4, 4)
    run.start(2, 100)
    run.progress(Progress("a", nbytes=50))
    assert run.share == 0.5
    run.progress(Progress("a", finished=True))
    run.start(2, 100)
    assert (run.text, run.share) == ("1/4 weights", 0.25)
    assert seen == [
        "1/4 batches of the data", "4/4 batches of the data", "0/2 weights", "0/2 weights",
        "1/2 weights", "1/4 weights",
    ]  # fmt: skip


def test_a_run_over_checkpoints_says_so_in_a_log(
    trio: Trio, capsys: pytest.CaptureFixture[str]
) -> None:
    with terminal.observer(0, interval=0.001) as observer:
        assert observer is not None
        options = Options(observer=observer)
        for _ in range(20):
            api.inspect(trio.method, str(trio.adapter), options)
            lines = capsys.readouterr().err.splitlines()
            if any(re.fullmatch(r"safeproj: \d+/\d+ weights, .* so far.*", each) for each in lines):
                break
        else:
            raise AssertionError(lines)


@pytest.mark.parametrize("quiet", [0, 1])
def test_steps_are_said_in_a_log_unless_it_is_to_be_quiet(
    capsys: pytest.CaptureFixture[str], quiet: int
) -> None:
    with terminal.observed_steps(quiet, "adapters measured", interval=0.01) as (_, step):
        time.sleep(0.1)
        step(1, 3)
        time.sleep(0.1)
    lines = capsys.readouterr().err.splitlines()
    begun = [each for each in lines if each.startswith("safeproj: nothing read yet, ")]
    counted = [each for each in lines if each.startswith("safeproj: 1/3 adapters measured, ")]
    assert (bool(begun), bool(counted)) == (not quiet, not quiet)
    assert begun + counted == lines


def test_an_interruption_ends_the_lines_too(capsys: pytest.CaptureFixture[str]) -> None:
    with suppress(KeyboardInterrupt), terminal.steps(0, "answers", interval=0.01):
        raise KeyboardInterrupt
    time.sleep(0.05)
    assert capsys.readouterr().err == ""

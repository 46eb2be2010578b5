"""Patterns from files: the meaning of `re`, one process and one time limit for all of them."""

from __future__ import annotations

import re
import subprocess
import time
from typing import Any

import pytest

from safeproj.errors import SafeprojError
from safeproj.storage import patterns
from safeproj.storage.patterns import first_matches, fullmatches, one_budget

PREFIX = r"(.*\.)?"

PATTERNS = ["q_proj", "a.b", "..", "", "x.*", "(a|b)c", ".", "b", "a.b.c", "c$", "_proj"]
NAMES = ["q_proj", "x.q_proj", "aq_proj", "a.b", "z.a.b", "acb", "x.acb", "a", "b", "", "a.", "ab"]
NAMES += ["x.b", "a.b.c", "azbyc", "x.q_proj.b", "ac", "q.bc"]


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_they_mean_what_re_means(prefix: str) -> None:
    expected = {}
    for name in NAMES:
        for number, pattern in enumerate(PATTERNS):
            if re.fullmatch(f"{prefix}({pattern})" if prefix else pattern, name):
                expected[name] = number
                break
    assert first_matches(PATTERNS, NAMES, prefix=prefix) == expected


class Processes:
    """Counts the processes that are started."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, real = 0, subprocess.Popen

        def started(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            return real(*arguments, **options)

        monkeypatch.setattr(subprocess, "Popen", started)


def test_one_process_runs_all_patterns_of_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes(monkeypatch)
    with one_budget():
        for number in range(20):
            assert fullmatches(rf"layers\.{number}\..*", [f"layers.{number}.x"])
        first_matches([rf"a{n}|b" for n in range(1000)], ["b"] * 10)
    assert processes.count == 1
    first_matches(["q_proj", "layers.0"], ["q_proj"])
    assert processes.count == 1  # plain ones need none


def test_one_time_limit_holds_for_all_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 1.0)
    processes, begin = Processes(monkeypatch), time.monotonic()
    with one_budget():
        for _ in range(50):
            with pytest.raises(SafeprojError, match="more than 1 seconds"):
                fullmatches("(a+)+b", ["a" * 40])
    assert processes.count == 1
    assert time.monotonic() - begin < 25.0  # not 50 times the limit, however busy the machine is


def test_the_work_of_plain_patterns_grows_with_them_and_not_with_their_product() -> None:
    def work(count: int) -> int:
        """Return the looks at a table that this many patterns over as many names take."""
        names = [f"model.layers.{n % 64}.mlp.experts.{n:05}.gate_proj" for n in range(count)]
        looks = 0

        class Counted(str):
            def __getitem__(self, key: Any) -> str:
                nonlocal looks
                looks += 1
                return str.__getitem__(self, key)

        found = first_matches(names, [Counted(name) for name in names], prefix=PREFIX)
        assert list(found.values()) == list(range(count))
        return looks

    assert work(4_000) < 2.5 * work(2_000)


@pytest.mark.parametrize("pattern", ["(", "a)(b", "a{99999999999}", "(?P<n"])
def test_what_is_no_pattern_is_named(pattern: str) -> None:
    with pytest.raises(SafeprojError, match="is no regular expression"):
        fullmatches(pattern, ["a"])


def test_there_are_limits() -> None:
    with pytest.raises(SafeprojError, match="expected at most"):
        first_matches(["a"] * (patterns.MAX_PATTERNS + 1), ["a"])
    with pytest.raises(SafeprojError, match="characters; expected at most"):
        fullmatches("a" * (patterns.MAX_PATTERN + 1), ["a"])

"""Completion of commands and options, which shells ask the command itself for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from safeproj.cli.app import COMMANDS, Commands
from tests.support import COMMAND


def completed(words: str) -> list[str]:
    """Return what bash would offer after these words."""
    asked = {"_SAFEPROJ_COMPLETE": "complete_bash", "COMP_WORDS": words}
    count = str(len(words.split(" ")) - 1)
    found = subprocess.run(
        [COMMAND],
        capture_output=True,
        text=True,
        env={**os.environ, **asked, "COMP_CWORD": count},
        check=False,
    )
    return found.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("safeproj in", ["inspect"]),
        ("safeproj salora f", ["fold"]),
        ("safeproj inspect --al", ["--aligned", "--alignment", "--all"]),
        ("safeproj x", []),
    ],
)
def test_words_are_completed(words: str, expected: list[str]) -> None:
    assert completed(words) == expected


@pytest.mark.parametrize("name", ["inspect", "check"])
def test_only_the_command_that_is_meant_is_imported(name: str) -> None:
    code = f"""
import sys
from safeproj.cli.app import Commands
Commands()[{name!r}]
print([each for each in ("inspect", "check") if f"safeproj.cli.{{each}}" in sys.modules])
print("numpy" in sys.modules, "torch" in sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == [f"[{name!r}]", "False False"]


def test_the_list_of_commands_says_what_each_says_and_imports_none() -> None:
    for name, summary in COMMANDS.items():
        assert Commands()[name].get_short_help_str(1000) == summary
    code = """
import sys
from safeproj.cli.app import app
try:
    app(["--help"])
except SystemExit:
    print([each for each in ("inspect", "options") if f"safeproj.cli.{each}" in sys.modules])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "inspect" in found.stdout
    assert found.stdout.splitlines()[-1] == "[]"

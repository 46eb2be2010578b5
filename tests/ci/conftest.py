"""Fixtures of the tests of CI."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ci.support import ALIGNMENT, ENVIRONMENT, TINY, Job
from tests.forks import program
from tests.support import COMMAND, safeproj

_MODELS = ("--base", TINY / "base", "--aligned", TINY / "aligned")


@pytest.fixture(scope="session")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter `bad` with every module projected; tests must not change it."""
    out = tmp_path_factory.mktemp("patched") / "patched"
    adapter = TINY / "adapters" / "bad"
    done = safeproj("patch", *_MODELS, "--adapter", adapter, "--out", out, "--all")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def alignment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exact alignment file of the example; tests must not change it."""
    out = tmp_path_factory.mktemp("alignment") / ALIGNMENT
    done = safeproj("align", *_MODELS, "--out", out, "--exact")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def quickly() -> Iterator[dict[str, str]]:
    """A PATH whose `safeproj` is run without importing everything again."""
    with program(COMMAND) as folder:
        yield {"PATH": f"{folder}{os.pathsep}{ENVIRONMENT['PATH']}"}


@pytest.fixture
def job(tmp_path: Path, capfd: pytest.CaptureFixture[str], quickly: dict[str, str]) -> Job:
    """The action, in an empty workspace."""
    made = Job(tmp_path, capfd, {**quickly})
    made.workspace.mkdir()
    return made

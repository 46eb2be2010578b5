"""What is written beside runs to the same place that are at it, too."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from safeproj.storage import publish

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs locks on files")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """What another run takes for a leftover: the first that is made, before it is locked."""
    import fcntl

    found: list[Path] = []
    others: list[threading.Thread] = []
    real = publish._locked

    def late(path: Path, **how: Any) -> int | None:
        if how.get("wait") and not found:
            found.append(path)
            held = os.open(path, os.O_RDONLY)
            fcntl.flock(held, fcntl.LOCK_EX)

            def remove() -> None:
                publish.remove(path)
                os.close(held)

            others.append(threading.Timer(0.2, remove))
            others[0].start()
        return real(path, **how)

    monkeypatch.setattr(publish, "_locked", late)
    yield found
    for other in others:
        other.join()


@pytest.mark.parametrize("directory", [False, True])
def test_what_another_run_removes_before_it_is_locked_is_made_anew(
    taken: list[Path], tmp_path: Path, *, directory: bool
) -> None:
    with publish.appearing(tmp_path / "out", directory=directory) as made:
        assert made.path != taken[0]
        assert made.path.exists()
        publish.remove_leftovers(tmp_path / "out")
        assert made.path.exists()  # it is locked
        made.appear(None)
    assert [each.name for each in tmp_path.iterdir()] == ["out"]

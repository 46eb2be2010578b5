"""What appears at `--out` while a run goes on is never lost, and of two runs one is told."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from safeproj.adapter.collection import collect
from safeproj.storage.publish import AppearedError, appearing, is_leftover
from safeproj.storage.wholefile import replace_file, write_file
from tests.conftest import Trio
from tests.faults.system import failing
from tests.support import (
    CONFIG,
    Process,
    assert_complete,
    assert_refused,
    safeproj,
    save_safety_module,
    snapshot,
    started,
)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX processes")

SMALL_FILES = 400

SYSTEMS = {
    "renames without replacing": {},
    "knows no such rename": {"FAIL_RENAMEAT2": "ENOSYS"},
    "has a file system without it": {"FAIL_RENAMEAT2": "EINVAL"},
}
"""What the system can: the result must not depend on it."""


@pytest.fixture(params=SYSTEMS)
def system(request: pytest.FixtureRequest) -> Mapping[str, str]:
    calls = SYSTEMS[request.param]
    return failing(**calls) if calls else {}


@pytest.fixture(scope="module")
def slow(trio: Trio, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that takes a while to write."""
    adapter = tmp_path_factory.mktemp("slow") / "adapter"
    shutil.copytree(trio.adapter, adapter)
    (adapter / "logs").mkdir()
    for number in range(SMALL_FILES):
        (adapter / "logs" / f"step-{number}.json").write_text("{}")
    return adapter


def ended(process: Process) -> subprocess.CompletedProcess[str]:
    _, errors = process.communicate(timeout=300)
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.args, process.returncode, "", errors)


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if is_leftover(path.name)]


def when_it_writes(process: Process, out: Path, act: Callable[[], object]) -> None:
    """Do something when a run has begun to write, and is not done yet."""
    while not leftovers(out.parent) and process.poll() is None:
        time.sleep(0.0005)
    assert not out.exists()
    act()


def put(file: Path) -> None:
    file.parent.mkdir()
    file.write_text("mine")


def patch(trio: Trio, adapter: Path, out: Path, *options: str) -> list[str | Path]:
    checkpoints: list[str | Path] = ["--base", trio.base, "--aligned", trio.aligned]
    return ["patch", *checkpoints, "--adapter", adapter, "--all", "-q", "--out", out, *options]


WRITERS = """
import os, sys, time
from pathlib import Path
from safeproj.adapter.collection import collect
from safeproj.storage.publish import AppearedError, appearing
place, kind, go, count = sys.argv[1:]

def write(text):
    with appearing(Path(place), directory=kind == "directory") as found:
        (found.path / "text" if kind == "directory" else found.path).write_text(text)
        while not Path(go).exists():
            time.sleep(0.0005)
        try:
            found.appear(None)
        except AppearedError:
            return 2
    return 0

children = []
for number in range(int(count)):
    child = os.fork()
    if not child:
        code = 1
        try:
            code = write(str(number))
        finally:
            os._exit(code)
    children.append(child)
print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""
"""So many processes that write a place as the commands do, without what they compute."""


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_of_many_runs_to_one_place_one_writes_it(
    tmp_path: Path, system: Mapping[str, str], kind: str
) -> None:
    place, go = tmp_path / "place" / "out", tmp_path / "go"
    place.parent.mkdir()
    command = [sys.executable, "-c", WRITERS, str(place), kind, str(go), "6"]
    env = {**os.environ, **system}
    runs = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while len(list(place.parent.iterdir())) < 6 and runs.poll() is None and time.monotonic() < end:
        time.sleep(0.001)
    go.touch()
    codes = [int(code) for code in runs.communicate(timeout=60)[0].split()]

    assert sorted(codes) == [0, 2, 2, 2, 2, 2]
    written = place / "text" if kind == "directory" else place
    assert written.read_text() == str(codes.index(0))
    assert list(place.parent.iterdir()) == [place]


def test_what_appears_meanwhile_is_left_as_it_is(trio: Trio, slow: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = started(*patch(trio, slow, out))
    when_it_writes(process, out, lambda: put(out / "mine.txt"))

    assert_refused(ended(process), f"--out {out}", "has appeared while this run went on")
    assert snapshot(out) == {"mine.txt": b"mine"}
    assert leftovers(tmp_path) == []


def test_overwrite_looks_again_before_it_replaces(trio: Trio, slow: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = started(*patch(trio, slow, out, "--overwrite"))
    when_it_writes(process, out, lambda: put(out / "thesis.txt"))

    assert_refused(ended(process), f"--out {out}", "is no adapter")
    assert snapshot(out) == {"thesis.txt": b"mine"}
    assert leftovers(tmp_path) == []


def test_two_runs_that_may_overwrite_leave_a_complete_adapter(
    trio: Trio, slow: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    runs = [started(*patch(trio, slow, out, "--overwrite")) for _ in range(2)]

    assert [ended(run).returncode for run in runs] == [0, 0]
    assert_complete(out, slow)
    assert leftovers(tmp_path) == []


def test_two_runs_of_align_to_one_place(trio: Trio, tmp_path: Path) -> None:
    out = tmp_path / "model.alignment.safetensors"
    checkpoints: list[str | Path] = ["--base", trio.base, "--aligned", trio.aligned]
    system = failing(FAIL_RENAMEAT2="ENOSYS", FAIL_LINK="EPERM")  # the simplest file system
    runs = [started("align", *checkpoints, "-q", "--out", out, env=system) for _ in range(2)]
    results = [ended(run) for run in runs]

    assert sorted(result.returncode for result in results) == [0, 2], results
    arguments: list[str | Path] = ["inspect", "--alignment", out, "--adapter", trio.adapter, "-q"]
    assert safeproj(*arguments).returncode == 0
    assert leftovers(tmp_path) == []


def test_a_recorded_file_replaces_only_its_own_kind(trio: Trio, tmp_path: Path) -> None:
    from safeproj.errors import SafeprojError
    from safeproj.methods.recorded import open_recorded, write_recorded
    from safeproj.methods.salora.file import KIND

    given = save_safety_module(trio.aligned_model, tmp_path / "own.safety.safetensors")
    content = open_recorded(str(given), KIND)
    out = tmp_path / "new.safety.safetensors"

    def appears_meanwhile() -> Mapping[str, Any]:
        out.write_text("mine")
        return content.document

    from safetensors.numpy import load_file

    for overwrite in (False, True):
        with pytest.raises(SafeprojError, match=r"has appeared|not a complete"):
            write_recorded(
                out, KIND, load_file(given).items(), appears_meanwhile, overwrite=overwrite
            )
        assert out.read_text() == "mine"
    assert leftovers(tmp_path) == []


# --- what a killed run leaves behind


def test_the_next_run_removes_what_a_killed_one_left(
    trio: Trio, slow: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = started(*patch(trio, slow, out))
    when_it_writes(process, out, process.kill)
    process.communicate()
    assert len(leftovers(tmp_path)) == 1

    assert safeproj(*patch(trio, slow, out)).returncode == 0
    assert leftovers(tmp_path) == []
    assert_complete(out, slow)


def test_what_a_live_run_writes_is_no_leftover(tmp_path: Path) -> None:
    with appearing(tmp_path / "out", directory=True) as first:
        (first.path / "file").write_text("x")
        with appearing(tmp_path / "out", directory=True) as second:
            assert first.path.is_dir()
            assert second.path != first.path
        (first.path / "file").write_text("y")
        first.appear(None)
    assert snapshot(tmp_path) == {"out": None, "out/file": b"y"}


@pytest.mark.parametrize("directory", [True, False])
def test_a_signal_as_the_hidden_name_appears_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: bool
) -> None:
    def interrupted(path: Path, **_: Any) -> None:
        assert [path] == list(tmp_path.iterdir())  # it is made, and nobody knows it yet
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("safeproj.storage.publish._locked", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever ran before
    try:
        with pytest.raises(KeyboardInterrupt), appearing(tmp_path / "out", directory=directory):
            pass
    finally:
        signal.signal(signal.SIGINT, before)
    assert snapshot(tmp_path) == {}


def test_leftovers_are_no_adapters(trio: Trio, slow: Path, tmp_path: Path) -> None:
    adapters = tmp_path / "adapters"
    shutil.copytree(trio.adapter, adapters / "one")
    out = adapters / "two"
    process = started(*patch(trio, slow, out))
    when_it_writes(process, out, lambda: None)
    while not any((adapters / name / CONFIG).exists() for name in leftovers(adapters)):
        time.sleep(0.0005)
    process.kill()
    process.communicate()

    result = safeproj("inspect", *trio.arguments[:4], "--adapter", adapters, "--format", "json")
    assert result.returncode == 0, result.stderr
    assert "two" not in result.stdout
    assert [member.name for member in collect([str(adapters)]).members] == ["one"]

    # A gate believes no names: a folder that only calls itself a leftover is looked at as well.
    (left,) = leftovers(adapters)
    members = collect([str(adapters)], written=False).members
    assert [member.name for member in members] == [left, "one"]


def test_leftovers_of_other_places_and_machines_stay(tmp_path: Path) -> None:
    others = [".other.0a1b2c-00000000.tmp", ".out.ffffff-00000000.tmp", ".out.1234.tmp"]
    for name in others:
        (tmp_path / name).write_text("x")
    replace_file(tmp_path / "out", b"new")
    assert sorted(snapshot(tmp_path)) == sorted([*others, "out"])


# --- what goes wrong when all is written


def test_an_old_adapter_that_cannot_be_removed_is_named(trio: Trio, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(trio.adapter, out)
    (out / "stays.txt").write_text("x")
    env = failing(FAIL_UNLINKAT="EPERM", FAIL_UNLINKAT_NAME="stays.txt")

    result = safeproj(*patch(trio, trio.adapter, out, "--overwrite"), env=env)

    (left,) = leftovers(tmp_path)
    assert_refused(result, f"{out} is written and complete", "cannot be removed", left)
    assert_complete(out, trio.adapter)


def test_a_name_that_may_not_be_on_the_disk_is_no_silence(trio: Trio, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(trio.adapter, out)
    before = snapshot(out)
    env = failing(FAIL_SYNC="EIO", FAIL_SYNC_INODE=str(tmp_path.stat().st_ino))

    result = safeproj(*patch(trio, trio.adapter, out, "--overwrite"), env=env)

    (left,) = leftovers(tmp_path)  # either of the two may have the name after a power failure
    assert_refused(result, f"{out} is written and complete", "power failure", left)
    assert_complete(out, trio.adapter)
    assert snapshot(tmp_path / left) == before


# --- files


def test_a_file_is_not_written_over_what_appeared(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("mine")
    with pytest.raises(AppearedError):
        write_file(place, b"other")
    place.unlink()
    place.mkdir()
    (place / "mine").write_text("mine")
    with pytest.raises(IsADirectoryError):
        replace_file(place, b"other")
    assert snapshot(tmp_path) == {"file": None, "file/mine": b"mine"}


def test_the_longest_name_that_the_system_allows_can_be_written(tmp_path: Path) -> None:
    place = tmp_path / ("n" * 255)
    replace_file(place, b"content")
    assert snapshot(tmp_path) == {place.name: b"content"}

"""When the disk is full, `patch` says so in one line and leaves everything as it was."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Trio
from tests.support import (
    COMMAND,
    CONFIG,
    FACTORS,
    assert_complete,
    assert_refused,
    change_json,
    safeproj,
    snapshot,
)

FULL = Path("/dev/full")
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
"""Bytes in which a tmpfs counts."""

Mount = Callable[[str], Path]


@pytest.fixture(scope="module")
def big_adapter(trio: Trio, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose tensors take 2 MB, most of it in a fully trained head."""
    adapter = tmp_path_factory.mktemp("disk") / "adapter"
    shutil.copytree(trio.adapter, adapter)
    change_json(adapter / CONFIG, modules_to_save=["lm_head"])
    head = {"base_model.model.lm_head.weight": torch.randn(16_384, 32)}
    save_file(
        {**load_file(adapter / FACTORS), **head}, adapter / FACTORS, metadata={"format": "pt"}
    )
    return adapter


@pytest.fixture(scope="module")
def pages(trio: Trio, big_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Pages that the patched adapter takes on a tmpfs."""
    out = tmp_path_factory.mktemp("room") / "out"
    result = safeproj(*patch_arguments(trio, big_adapter), "--out", out)
    assert result.returncode == 0, result.stderr
    assert_complete(out, big_adapter)
    return sum(-(-path.stat().st_size // PAGE) for path in out.iterdir())


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mounts a tmpfs with the given options, where that is permitted."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mounted(options: str) -> Path:
        if not sys.platform.startswith("linux"):
            pytest.skip("a tmpfs needs Linux")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            pytest.skip(f"may not mount a tmpfs: {result.stderr.strip()}")
        return disk

    yield mounted
    if disk.is_mount():
        subprocess.run(["umount", str(disk)], check=True)


def patch_arguments(trio: Trio, adapter: Path) -> list[str]:
    checkpoints = ["--base", str(trio.base), "--aligned", str(trio.aligned)]
    return ["patch", *checkpoints, "--adapter", str(adapter), "--all"]


@pytest.mark.parametrize("room", ["for nothing", "for the small files", "for all but the last"])
def test_a_full_disk_leaves_nothing_behind(
    trio: Trio, big_adapter: Path, pages: int, mount: Mount, room: str
) -> None:
    size = {"for nothing": 1, "for the small files": 20, "for all but the last": pages - 1}[room]
    disk = mount(f"size={size * PAGE}")
    out = disk / "out"

    result = safeproj(*patch_arguments(trio, big_adapter), "--out", out)

    assert_refused(result, f"--out {out}", "No space left on device", "nothing was written")
    assert list(disk.iterdir()) == []


def test_a_disk_that_is_just_large_enough_does(
    trio: Trio, big_adapter: Path, pages: int, mount: Mount
) -> None:
    out = mount(f"size={(pages + 8) * PAGE}") / "out"

    result = safeproj(*patch_arguments(trio, big_adapter), "--out", out)

    assert result.returncode == 0, result.stderr
    assert_complete(out, big_adapter)


def test_a_disk_without_room_for_a_directory_is_reported(
    trio: Trio, big_adapter: Path, mount: Mount
) -> None:
    disk = mount("nr_inodes=1")
    out = disk / "out"

    result = safeproj(*patch_arguments(trio, big_adapter), "--out", out)

    assert_refused(result, f"--out {out}", "No space left on device")
    assert list(disk.iterdir()) == []


def test_a_full_disk_leaves_the_old_adapter_as_it_was(
    trio: Trio, big_adapter: Path, mount: Mount
) -> None:
    disk = mount("size=1m")
    out = disk / "out"
    shutil.copytree(trio.adapter, out)
    before = snapshot(disk)

    result = safeproj(*patch_arguments(trio, big_adapter), "--out", out, "--overwrite")

    assert_refused(result, f"--out {out}", "No space left on device", "nothing was written")
    assert snapshot(disk) == before


@pytest.mark.skipif(os.name != "posix", reason="file size limits are POSIX")
@pytest.mark.parametrize(
    "largest_file", [1 << 10, 1 << 20], ids=["while copying", "while writing tensors"]
)
def test_a_limit_on_file_size_is_reported(
    trio: Trio, big_adapter: Path, tmp_path: Path, largest_file: int
) -> None:
    out = tmp_path / "out"

    result = safeproj(*patch_arguments(trio, big_adapter), "--out", out, largest_file=largest_file)

    assert_refused(result, f"--out {out}", "File too large", "nothing was written")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="file size limits are POSIX")
def test_a_limit_on_file_size_leaves_the_old_adapter_as_it_was(
    trio: Trio, big_adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(trio.adapter, out)
    before = snapshot(tmp_path)

    result = safeproj(
        *patch_arguments(trio, big_adapter), "--out", out, "--overwrite", largest_file=1 << 20
    )

    assert_refused(result, f"--out {out}", "File too large", "nothing was written")
    assert snapshot(tmp_path) == before


# --- the adapter can be written, the report cannot


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
def test_a_report_that_finds_no_room_is_an_error(trio: Trio, tmp_path: Path) -> None:
    out = tmp_path / "out"

    result = safeproj(*patch_arguments(trio, trio.adapter), "--out", out, "--output", FULL)

    assert_refused(result, f"--output {FULL}", "No space left on device")
    if out.exists():
        assert_complete(out, trio.adapter)
        assert str(out) in result.stderr  # where it is must be said


def patch_to(trio: Trio, out: Path, stdout: int | IO[str]) -> subprocess.CompletedProcess[str]:
    """Run `patch` with its report going to a stream of the test's."""
    return subprocess.run(
        [COMMAND, *patch_arguments(trio, trio.adapter), "--out", str(out)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
def test_a_stdout_that_is_full_is_an_error(trio: Trio, tmp_path: Path) -> None:
    out = tmp_path / "out"

    with FULL.open("w") as full:
        result = patch_to(trio, out, full)

    assert_refused(result, "No space left on device")
    if out.exists():
        assert_complete(out, trio.adapter)


@pytest.mark.skipif(os.name != "posix", reason="POSIX pipes")
def test_a_reader_that_went_away_is_no_failed_gate(trio: Trio, tmp_path: Path) -> None:
    out = tmp_path / "out"

    read, write = os.pipe()
    os.close(read)
    try:
        result = patch_to(trio, out, write)
    finally:
        os.close(write)

    assert result.returncode != 1  # which is what a failed gate returns
    assert "Traceback" not in result.stderr
    assert_complete(out, trio.adapter)

"""What the system refuses ends in one clear line: names, links, memory, rights, full disks."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from safeproj.adapter.collection import collect
from safeproj.errors import SafeprojError, explained
from safeproj.storage.source import open_folder
from safeproj.text import MAX_MESSAGE
from tests.conftest import Trio
from tests.support import COMMAND, CONFIG, FACTORS, assert_refused, change_json, read_json, safeproj

pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX files")

LONG = "n" * 300


@pytest.fixture
def copied(trio: Trio, tmp_path: Path) -> Path:
    adapter = tmp_path / "adapter"
    shutil.copytree(trio.adapter, adapter)
    return adapter


def inspect(trio: Trio, adapter: str | Path) -> subprocess.CompletedProcess[str]:
    return safeproj("inspect", *trio.arguments[:4], "--adapter", adapter)


# --- what SRC and --out may be


@pytest.mark.parametrize("option", ["--base", "--adapter"])
def test_a_name_that_is_too_long(trio: Trio, option: str) -> None:
    arguments = [*trio.arguments]
    arguments[arguments.index(option) + 1] = LONG
    result = safeproj("inspect", *arguments)
    assert_refused(result, LONG[:50], "File name too long")


def test_a_link_that_leads_to_itself(trio: Trio, tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert_refused(inspect(trio, loop), str(loop), "Too many levels of symbolic links")
    for out in (loop / "out", tmp_path / LONG):
        result = safeproj("patch", *trio.arguments, "--all", "--out", out)
        assert_refused(result, str(out)[:100])
    assert list(tmp_path.iterdir()) == [loop]


@pytest.mark.parametrize("source", ["/", "//", "/usr/.."])
def test_the_root_is_no_source(source: str) -> None:
    for look in (open_folder, lambda given: collect([given])):
        with pytest.raises(SafeprojError, match=f"^{source}: the root of the file system"):
            look(source)


# --- rights


WITHOUT_RIGHTS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
"""Takes from root what lets it read every file."""


@pytest.fixture
def bounded() -> list[str]:
    """The beginning of a command that may not read every file."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None or subprocess.run([*WITHOUT_RIGHTS, "true"]).returncode:
        pytest.skip("root may read every file, and nothing here takes that from it")
    return WITHOUT_RIGHTS


@pytest.mark.parametrize("what", [FACTORS, "shards"])
def test_what_may_not_be_read(trio: Trio, tmp_path: Path, bounded: list[str], what: str) -> None:
    for name in ("aligned", "adapter"):
        shutil.copytree(getattr(trio, name), tmp_path / name)
    shards = sorted((tmp_path / "aligned").glob("*.safetensors"))
    for path in shards if what == "shards" else [tmp_path / "adapter" / FACTORS]:
        path.chmod(0)
    command = [*bounded, COMMAND, "check", "--base", str(trio.base)]
    result = subprocess.run(
        [*command, "--aligned", str(tmp_path / "aligned"), str(tmp_path / "adapter")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert result.returncode == 2, result.stderr
    assert "Permission denied" in result.stderr
    assert "unexpected" not in result.stderr
    assert "Traceback" not in result.stderr


# --- memory


def test_too_little_memory_is_said(trio: Trio, copied: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))

    huge = copied / FACTORS
    with huge.open("r+b") as file:
        file.truncate(4 << 30)  # a file with a hole, which takes no room on the disk
    command = [sys.executable, "-m", "safeproj", "inspect", *trio.arguments[:4]]
    result = subprocess.run(
        [*command, "--adapter", str(copied)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        preexec_fn=limit,
    )
    assert_refused(result, FACTORS, "memory")


def test_errors_of_memory_are_explained() -> None:
    import numpy
    import torch

    makers: list[Callable[[], object]] = [
        lambda: bytearray(1 << 60),
        lambda: torch.empty(1 << 58),
        lambda: numpy.empty(1 << 58),
    ]
    for make in makers:
        with pytest.raises((MemoryError, RuntimeError)) as caught:
            make()
        assert (explained(caught.value) or "").startswith("not enough memory")
    assert explained(RuntimeError("a fault of our own")) is None


# --- messages


@pytest.mark.parametrize("length", [7_000, 100_000])
def test_long_texts_from_files_are_cut(trio: Trio, copied: Path, length: int) -> None:
    change_json(copied / CONFIG, peft_type="X" * length)
    result = inspect(trio, copied)
    assert_refused(result, "peft_type", "is not supported", "characters in all")
    assert len(result.stderr) < MAX_MESSAGE + 200

    change_json(copied / CONFIG, peft_type="LORA", base_model_name_or_path="Y" * length)
    result = safeproj("check", *trio.arguments[:4], copied, "--format", "json")
    assert len(result.stdout) < 60_000
    assert "SP018" in result.stdout


def test_half_a_character_is_no_text(trio: Trio, copied: Path) -> None:
    text = (copied / CONFIG).read_text()
    (copied / CONFIG).write_text(text.replace('"LORA"', r'"LORA\ud800"'))
    assert_refused(inspect(trio, copied), CONFIG, "surrogate")


INPUTS = {("bad", 0): "0", ("bad", 1): "1"}
"""Digests of what the model gets."""


def test_half_a_character_in_saved_answers(tmp_path: Path) -> None:
    from safeproj.evaluation.responses import SCHEMA, Responses

    path = tmp_path / "model.jsonl"
    header: dict[str, Any] = {"schema": SCHEMA, "made_of": {}, "sets": {}, "judge": None}
    row = '{"set": "bad", "index": 0, "prompt": "p", "response": "\\udc80"}'
    path.write_text(f"{json.dumps(header)}\n{row}\n")
    before = path.read_bytes()
    with pytest.raises(SafeprojError, match=f"{path}:2: not a line of saved answers"):
        Responses(path, {}, {}, {}).open()
    assert path.read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_while_answers_are_written(tmp_path: Path) -> None:
    from safeproj.evaluation.responses import Responses

    found = Responses(tmp_path / "model.jsonl", {"model": "m"}, {"bad": "0"}, INPUTS)
    found.open()
    found.add("bad", [(0, "prompt", "answer")])
    before = (tmp_path / "model.jsonl").read_bytes()
    found.close()
    with Path("/dev/full").open("ab") as full:
        found._file = full  # the disk is full from now on
        with pytest.raises(SafeprojError, match=r"No space left on device.*goes on from them"):
            found.add("bad", [(1, "prompt", "x" * 100_000)])
        found.close()
    assert (tmp_path / "model.jsonl").read_bytes() == before


def test_two_runs_do_not_write_the_same_answers(tmp_path: Path) -> None:
    from safeproj.evaluation.responses import Responses

    path = tmp_path / "model.jsonl"
    script = (
        "import sys, time; from pathlib import Path\n"
        "from safeproj.evaluation.responses import Responses\n"
        f"found = Responses(Path({str(path)!r}), {{}}, {{}}, {INPUTS!r}); found.open()\n"
        "found.add('bad', [(0, 'p', 'a')]); print('ready', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    before = path.read_bytes()
    for overwrite in (False, True):
        with pytest.raises(SafeprojError, match="another run is writing it"):
            Responses(path, {}, {}, {}).open(overwrite)
    assert path.read_bytes() == before

    other.kill()
    other.communicate()
    found = Responses(path, {}, {}, INPUTS)
    found.open()
    assert found.answers == {("bad", 0): "a"}
    found.close()


def test_salora_init_names_its_targets_in_order(tmp_path: Path) -> None:
    from safeproj.methods.salora.start import _sort_targets

    (tmp_path / CONFIG).write_text(json.dumps({"target_modules": ["v_proj", "k_proj", "q_proj"]}))
    _sort_targets(tmp_path / CONFIG)
    assert read_json(tmp_path / CONFIG)["target_modules"] == ["k_proj", "q_proj", "v_proj"]

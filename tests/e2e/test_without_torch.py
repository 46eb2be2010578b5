"""What repairs and checks adapters on the processor imports no torch, and needs none."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import tomli
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.numpy import load_file

import safeproj as package
from tests.conftest import Trio
from tests.gate.test_signing import make_keys
from tests.support import FACTORS, MANIFEST, read_json

ROOT = Path(__file__).parents[2]

HEAVY = ("array_api_compat", "peft", "torch", "transformers")

PROBE = f"""
import json, os, sys
from safeproj.__main__ import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["safeproj", *words]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
    finally:
        found = sorted(set({HEAVY}) & set(sys.modules))
        with open(os.environ["PROBE"], "a") as file:
            print(*found, file=file)
"""
"""Runs the command, as often as it is told, and tells which of these modules it has each time."""

Command = Sequence[str | Path]

REPORTS = ("table", "json", "markdown", "html")
FINDINGS = (*REPORTS, "sarif", "junit", "github")


def run(python: str | Path, probe: Path, *commands: Command, **env: str) -> list[str]:
    """Run commands in one process, which must succeed; return the heavy modules after each."""
    done = subprocess.run(
        [str(python), "-c", PROBE, told(*commands)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PROBE": str(probe), **env},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    heavy = probe.read_text("utf-8").splitlines()
    assert len(heavy) == len(commands)
    return heavy


def told(*commands: Command) -> str:
    """Return what `PROBE` is given."""
    return json.dumps([[str(word) for word in command] for command in commands])


def required(*needs: str) -> set[str]:
    """Return the installed distributions that some need, and those that these need."""
    found, seen, left = set[str](), set[tuple[str, str]](), [(need, "") for need in needs]
    while left:
        text, extra = left.pop()
        need = Requirement(text)
        if need.marker is None or need.marker.evaluate({"extra": extra}):
            name = canonicalize_name(need.name)
            found.add(name)
            for wanted in {(name, each) for each in ("", *need.extras)} - seen:
                seen.add(wanted)
                left += [(each, wanted[1]) for each in distribution(name).requires or ()]
    return found


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with nothing but what safeproj declares that it needs: no torch."""
    root = tmp_path_factory.mktemp("bare")
    venv.create(root, symlinks=True)
    (site,) = root.glob("lib/python*/site-packages")
    (site / "safeproj").symlink_to(Path(package.__file__).parent)
    project = tomli.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for name in required(*project["dependencies"], *project["optional-dependencies"]["report"]):
        each = distribution(name)
        for top in {file.parts[0] for file in each.files or ()} - {"..", "__pycache__"}:
            (site / top).symlink_to(str(each.locate_file(top)))
    return root / "bin" / "python"


@pytest.fixture(scope="session", params=["beside torch", "without torch"])
def python(request: pytest.FixtureRequest) -> Path:
    """An interpreter that has torch, or none."""
    if request.param == "beside torch":
        return Path(sys.executable)
    if sys.platform == "win32":
        pytest.skip("links need privileges there")
    found: Path = request.getfixturevalue("bare")
    return found


def test_there_is_none(bare: Path) -> None:
    for name in HEAVY:
        done = subprocess.run([bare, "-c", f"import {name}"], capture_output=True, check=False)
        assert b"ModuleNotFoundError" in done.stderr


def test_commands_import_no_torch(trio: Trio, tmp_path: Path, python: Path) -> None:
    probe, out, file = tmp_path / "probe", tmp_path / "out", tmp_path / "a.safealign.safetensors"
    pair = ("--base", trio.base, "--aligned", trio.aligned)
    policy = tmp_path / "policy.toml"
    policy.write_text('max-below = "100%"\n', "utf-8")
    reports, findings = (
        [each for name in names for each in ("--format", name, "--output", str(tmp_path / name))]
        for names in (REPORTS, FINDINGS)
    )
    commands: tuple[Command, ...] = (
        ("--version",),
        ("--help",),
        ("inspect", *pair, "--adapter", trio.adapter, *reports),
        ("inspect", *pair, "--adapter", trio.adapter, "--projector", "exact", "--rank", "3"),
        ("patch", *pair, "--adapter", trio.adapter, "--out", out, "--all", *reports),
        ("align", *pair, "--out", file),
        ("align", *pair, "--out", tmp_path / "b.safealign.safetensors", "--rank", "2"),
        ("inspect", "--alignment", file, "--adapter", trio.adapter),
        ("check", out, *pair, "--policy", policy, *findings),
        ("verify", *pair, "--original", trio.adapter, out, *findings),
    )
    heavy = zip(commands, run(python, probe, *commands), strict=True)
    assert [each for each in heavy if each[1]] == []


def test_signing_imports_no_torch(trio: Trio, tmp_path: Path) -> None:
    try:
        distribution("model-signing")
    except PackageNotFoundError:
        pytest.skip("model-signing is not installed")
    probe, out, keys = tmp_path / "probe", tmp_path / "out", make_keys(tmp_path / "keys")
    pair = ("--base", trio.base, "--aligned", trio.aligned)
    commands: tuple[Command, ...] = (
        ("patch", *pair, "--adapter", trio.adapter, "--out", out, "--all"),
        ("sign", out, "--private-key", keys.private),
        ("verify", *pair, "--original", trio.adapter, "--public-key", keys.public, out),
    )
    heavy = zip(commands, run(sys.executable, probe, *commands), strict=True)
    assert [each for each in heavy if each[1]] == []


@pytest.mark.skipif(sys.platform != "linux", reason="drivers are files on Linux alone")
def test_a_gpu_that_is_not_used_is_told_once(trio: Trio, tmp_path: Path, bare: Path) -> None:
    driver = "from safeproj.engine import device\ndevice.DRIVERS = ('/dev/null',)\n"
    given = ("patch", *trio.arguments, "--out", str(tmp_path / "out"))
    done = subprocess.run(
        [bare, "-c", driver + PROBE, told(given)],
        capture_output=True,
        text=True,
        env={**os.environ, "PROBE": str(tmp_path / "probe")},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "GPU" in line] == [
        "safeproj: there is a GPU; torch is needed for that, and is not installed: install it with "
        "`pip install '.[torch]'` in a clone of safeproj; the CPU is used"
    ]
    options = read_json(tmp_path / "out" / MANIFEST)["options"]
    assert (options["device"], options["engine"]) == ("cpu", "numpy")


def test_without_torch_what_needs_it_says_so(trio: Trio, tmp_path: Path, bare: Path) -> None:
    given = ("patch", *trio.arguments, "--out", str(tmp_path / "out"), "--device", "torch")
    done = subprocess.run(
        [bare, "-c", PROBE, told(given)],
        capture_output=True,
        text=True,
        env={**os.environ, "PROBE": str(tmp_path / "probe")},
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "torch is needed for that, and is not installed" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "projector", [(), ("--projector", "exact", "--energy", "0.5")], ids=["approx", "exact"]
)
def test_neither_workers_nor_threads_nor_torch_show_in_the_result(
    trio: Trio, tmp_path: Path, bare: Path, projector: tuple[str, ...]
) -> None:
    written = set()
    for python, workers, threads in (
        (sys.executable, 1, 1), (sys.executable, 2, 4), (sys.executable, 5, 4), (bare, 2, 4),
        (bare, 5, 1),
    ):  # fmt: skip
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        command: Command = ["patch", *trio.arguments, "--out", out, "--all", *projector]
        run(
            python, out.with_suffix(".probe"), [*command, "--workers", str(workers)],
            OPENBLAS_NUM_THREADS=str(threads), OMP_NUM_THREADS=str(threads),
        )  # fmt: skip
        written.add((out / FACTORS).read_bytes())
    assert len(written) == 1


def test_factors_are_those_of_torch_but_for_rounding(trio: Trio, tmp_path: Path) -> None:
    found = {}
    for device in ("cpu", "torch"):
        out = tmp_path / device
        command = ("patch", *trio.arguments, "--out", out, "--all", "--device", device)
        (heavy,) = run(sys.executable, tmp_path / f"{device}.probe", command)
        assert ("torch" in heavy.split()) is (device == "torch")
        found[device] = load_file(out / FACTORS)
    for module in read_json(tmp_path / "cpu" / MANIFEST)["modules"]:
        m, n = module["shape"]
        name = f"base_model.model.{module['name']}.lora_B.weight"
        one, other = (found[device][name].astype("float64") for device in ("cpu", "torch"))
        difference = math.dist(one.ravel(), other.ravel())
        # Sums of n, then of m products in float32, in another order: errors of their roundings
        # add up like √(m + n) of 2⁻²⁴ each (Higham and Mary 2019), here sixteen times that.
        assert difference <= 16 * 2**-24 * math.sqrt(m + n) * math.hypot(*one.ravel()), name

"""The method that docs/design.md adds, by its line in the registry alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Trio

PAGE = Path(__file__).parents[2] / "docs" / "design.md"

MAIN = """

if __name__ == "__main__":
    from safeproj.methods import registry

    registry.METHODS += (Halve,)
    from safeproj.__main__ import main

    main()
"""

COLUMNS = {
    "table": (r" 1\.000 0\.500", r"left +min 0\.500"),
    "json": (r'"left": 0\.5',),
    "markdown": (
        r"\| cosine \| left \| would project \|",
        r"\| 1\.0000 \| 0\.5000 \|",
        "left ‖ΔW'‖/‖ΔW‖: 0",
    ),
    "html": (r">left</th>", r">0\.5000</td>"),
}
"""What shows the number that it has of each update."""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = re.search(r"<!-- a method -->\n```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert found is not None
    assert len(found[1].splitlines()) <= 60
    path = tmp_path_factory.mktemp("added") / "halving.py"
    path.write_text(found[1] + MAIN, "utf-8")
    return path


def run(program: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, program, *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "COLUMNS": "200", "PYTHONPATH": str(PAGE.parents[1])},
        timeout=120,
        check=False,
    )


def test_every_command_takes_it(program: Path) -> None:
    for command in ("patch", "check", "sweep"):  # inspect and verify are run below
        assert "--halved" in run(program, command, "--help").stdout  # imports no torch


def test_it_halves_and_passes_the_gate(program: Path, trio: Trio, tmp_path: Path) -> None:
    model, out = ("--halved", trio.aligned), tmp_path / "out"
    result = run(program, "patch", *model, "--adapter", trio.adapter, "--out", out)
    assert result.returncode == 0, result.stderr
    before, after = (
        load_file(place / "adapter_model.safetensors") for place in (trio.adapter, out)
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        expected = tensor / 2 if "lora_B" in name else tensor
        assert torch.equal(after[name], expected), name
    assert "halved the updates of" in (out / "README.md").read_text("utf-8")
    assert json.loads((out / "safeproj.json").read_text("utf-8"))["method"] == "halve"

    for arguments in (("verify", out), ("check", out)):
        result = run(program, *arguments, "--original", trio.adapter, *model)
        assert result.returncode == 0, result.stdout + result.stderr


def test_every_format_shows_it(program: Path, trio: Trio, tmp_path: Path) -> None:
    model = ("--halved", trio.aligned)
    plain = ("table", "json", "markdown", "html")
    for command, kinds in (
        (("inspect", "--adapter", trio.adapter), plain),
        (("check", trio.adapter), (*plain, "sarif", "junit", "github")),
    ):
        files = {kind: tmp_path / f"{command[0]}.{kind}" for kind in kinds}
        reports = [each for kind in kinds for each in ("--format", kind, "--output", files[kind])]
        result = run(program, *command, *model, *reports)
        assert result.returncode == 0, result.stderr
        for kind, file in files.items():
            shown = file.read_text("utf-8")
            assert shown if command[0] == "check" else "halv" in shown, kind
            for column in COLUMNS[kind] if command[0] == "inspect" else ():
                assert re.search(column, shown), (kind, column)

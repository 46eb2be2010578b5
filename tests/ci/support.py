"""What the tests of CI share: a repository with adapters, and patched ones."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from action.run import Runner
from tests.support import COMMAND

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny-lm"
ALIGNMENT = "model.safealign.safetensors"

ENVIRONMENT = {
    "PATH": f"{Path(COMMAND).parent}{os.pathsep}{os.environ['PATH']}",
    "GITHUB_STEP_SUMMARY": "",  # the tests themselves may run in an action
    "HF_HUB_OFFLINE": "1",
}
"""What the programs under test need: the installed command, and no network."""


def load(path: Path) -> Any:
    """Return the content of a YAML file."""
    return yaml.safe_load(path.read_text("utf-8"))


def put(adapter: Path, place: Path) -> Path:
    """Copy an adapter, in place of what is there."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(adapter, place)
    return place


@dataclass
class Run:
    """What a run of the action left behind."""

    code: int
    outputs: dict[str, str]
    skipped: list[tuple[str, dict[str, str]]]
    log: str
    summary: str


@dataclass
class Job:
    """Runs the action in a workspace, with a cache that its runs share."""

    root: Path
    capfd: pytest.CaptureFixture[str]
    env: dict[str, str] = field(default_factory=dict)
    runs: int = 0

    @property
    def workspace(self) -> Path:
        return self.root / "work space"

    def __call__(self, **inputs: str) -> Run:
        self.runs += 1
        temp = self.root / f"temp {self.runs}"
        temp.mkdir()
        given = {"install": "false", **{name.replace("_", "-"): v for name, v in inputs.items()}}
        runner = Runner(
            ROOT,
            given,
            workspace=self.workspace,
            temp=temp,
            cache=self.root / "cache",
            env={**ENVIRONMENT, **self.env},
        )
        self.capfd.readouterr()
        result = runner.run()
        out, err = self.capfd.readouterr()
        summary = (temp / "summary.md").read_text("utf-8")
        return Run(result.code, result.outputs, result.skipped, out + err, summary)

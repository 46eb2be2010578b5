"""The blocks of pages on Python run one after the other, and print what is shown below them."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file

import safeproj
from tests.e2e.test_readme import assert_same_but_for_rounding
from tests.support import FACTORS, python_c

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "python.md").read_text("utf-8")
MARK = "next block"


def run_blocks(text: str, tmp_path: Path) -> int:
    """Run the blocks of a page, whose last lines are shown below, and return how many there are."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    blocks = re.findall(r"```python\n(.*?)```\n(?:```text\n(.*?)```\n)?", text, re.DOTALL)
    program = f"\nprint({MARK!r})\n".join(code for code, _ in blocks)
    printed = python_c(program, tmp_path)
    for found, (_, shown) in zip(printed.split(f"{MARK}\n"), blocks, strict=True):
        lines = found.splitlines(keepends=True)
        own = [line for line in lines if not line.startswith("{'")]  # what a Trainer logs
        assert_same_but_for_rounding("".join(own), shown)
    return len(blocks)


def test_the_blocks_print_what_is_shown(tmp_path: Path) -> None:
    assert run_blocks(PAGE, tmp_path) >= 6
    assert {each.name for each in tmp_path.iterdir()} >= {"report.md", "all.json", "check.sarif"}


def test_a_training_is_projected_as_shown(tmp_path: Path) -> None:
    assert run_blocks((ROOT / "docs" / "live-models.md").read_text("utf-8"), tmp_path) == 1
    written = {each.name for each in (tmp_path / "run").iterdir()}
    assert written == {"checkpoint-10", "checkpoint-20", "projected-10", "projected-20"}
    projected, saved = (
        load_file(tmp_path / place / FACTORS) for place in ("run/projected-20", "adapter")
    )
    assert all(torch.equal(projected[key], saved[key]) for key in projected)


def test_every_function_is_named() -> None:
    functions = {name for name in dir(safeproj) if name.islower() and name != "__version__"}
    assert not [name for name in functions if f"`{name}" not in PAGE and f"{name}(" not in PAGE]

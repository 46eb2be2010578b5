"""The blocks of docs/python.md run one after the other, and print what is shown below them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import safeproj
from tests.e2e.test_readme import assert_same_but_for_rounding

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "python.md").read_text("utf-8")
MARK = "next block"


def test_the_blocks_print_what_is_shown(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    blocks = re.findall(r"```python\n(.*?)```\n(?:```text\n(.*?)```\n)?", PAGE, re.DOTALL)
    assert len(blocks) >= 6
    program = f"\nprint({MARK!r})\n".join(code for code, _ in blocks)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, encoding="utf-8", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    for found, (_, shown) in zip(done.stdout.split(f"{MARK}\n"), blocks, strict=True):
        assert_same_but_for_rounding(found, shown)
    assert {each.name for each in tmp_path.iterdir()} >= {"report.md", "all.json", "check.sarif"}


def test_every_function_is_named() -> None:
    functions = {name for name in dir(safeproj) if name.islower() and name != "__version__"}
    assert not [name for name in functions if f"`{name}" not in PAGE and f"{name}(" not in PAGE]

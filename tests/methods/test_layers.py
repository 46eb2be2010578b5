"""What is outside the methods' folders does not ask which method is running."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import safeproj
from safeproj.methods import registry
from tests.support import for_each

PACKAGE = Path(safeproj.__file__).parent

FOLDERS = ("safe_lora", "salora", "covariance", "merge", "safe_delta")

NAMES = {*registry.by_name(), *(method.__name__ for method in registry.METHODS)}
NAMES |= {"Approx", "Exact", "Complement", "Correction", "Reconstruction"}
NAMES |= {"Pair", "AlignmentFile", "SafetyModuleFile", "Statistics"}

EXCEPTIONS = {
    "api.py": "`align` makes the file of one method",
    "cli/app.py": "has the commands of one method's training",
    "cli/salora.py": "the commands of one method's training",
    "cli/stats.py": "makes the file of one method",
    "extracting/run.py": "what one method compares is what is extracted",
    "gate/evidence.py": "an adapter that was folded has a record of its own",
    "gate/policy.py": "the names of projectors that a policy file may have",
    "plan/residual.py": "an initialisation that has the name of a method",
    "repairing/run.py": "which methods can be tried with what is given",
    "repairing/ways.py": "one method is tried in two forms",
    "sweeping/apart.py": "takes the formulas of projections apart",
    "sweeping/strengths.py": "the axis of one method",
    "sweeping/weights.py": "likewise",
}
"""Files that name one, with the reason."""


def asked(path: Path) -> Iterator[str]:
    """Yield where a file names a method: an import of its folder, its class or its name."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            parts = node.module.split(".")
            if parts[:2] == ["safeproj", "methods"] and set(parts[2:3]) & set(FOLDERS):
                yield f"line {node.lineno}: imports {node.module}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value in NAMES:
                yield f"line {node.lineno}: {node.value!r}"
        elif isinstance(node, ast.Name) and node.id in NAMES:
            yield f"line {node.lineno}: {node.id}"


FILES = sorted(
    str(path.relative_to(PACKAGE).as_posix())
    for path in PACKAGE.rglob("*.py")
    if "methods" not in path.relative_to(PACKAGE).parts
)


@for_each("name", [name for name in FILES if name not in EXCEPTIONS])
def test_a_file_asks_for_no_method(name: str) -> None:
    assert list(asked(PACKAGE / name)) == []


@for_each("name", EXCEPTIONS)
def test_exceptions_are_needed(name: str) -> None:
    assert list(asked(PACKAGE / name))


KEYS = {column.key for method in registry.METHODS for column in method.detail.columns} - {"scale"}


@for_each("name", [name for name in FILES if name.startswith(("report/", "run/"))])
def test_a_format_loops_over_what_a_method_says(name: str) -> None:
    """And looks for nothing that only some of them say."""
    nodes = ast.walk(ast.parse((PACKAGE / name).read_text("utf-8")))
    assert not KEYS & {node.value for node in nodes if isinstance(node, ast.Constant)}

"""Names that a package offers, imported on first use: they are written once, in its stub."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

Exports = tuple[list[str], Callable[[str], object], Callable[[], list[str]]]


def attach(package: str, file: str) -> Exports:
    """Return `__all__`, `__getattr__` and `__dir__` of a package, from the `.pyi` beside it.

    Type checkers read the stub, and this reads it at run time, as lazy-loader does: importing the
    package must not import what its names need, such as torch.

    Args:
        package: its `__name__`.
        file: its `__file__`.
    """
    own: list[str] = []
    homes: dict[str, str] = {}
    for line in ast.parse(Path(file).with_suffix(".pyi").read_text("utf-8")).body:
        if isinstance(line, ast.ImportFrom) and line.module is not None:
            homes.update(dict.fromkeys((each.name for each in line.names), line.module))
        elif isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            own.append(line.target.id)  # which the package itself defines

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = import_module(homes[name])
        found = getattr(home, name, None) or import_module(f"{home.__name__}.{name}")
        setattr(sys.modules[package], name, found)
        return found

    names = sorted([*own, *homes])
    return names, get, names.copy

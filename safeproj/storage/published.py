"""What files that are made may say of the machine: nothing of its directories."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from safeproj.text import is_plain


def without_paths(value: Any) -> Any:
    """Return a config without the places on a machine that some keep, such as `_name_or_path`."""
    if isinstance(value, Mapping):
        return {key: without_paths(each) for key, each in value.items() if not _is_path(each)}
    return [without_paths(each) for each in value] if isinstance(value, list) else value


def _is_path(value: Any) -> bool:
    absolute = (PurePosixPath, PureWindowsPath)
    return isinstance(value, str) and any(kind(value).is_absolute() for kind in absolute)


def published(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity without the directories of the machine that the file is made on."""
    if "revision" in identity:
        return dict(identity)
    name = Path(identity["source"]).expanduser().resolve().name
    return {"source": "".join(each if is_plain(each) else "_" for each in name)}

"""What a model is called where it lies, and whether two names are of one model."""

from __future__ import annotations

import re
from pathlib import Path

from safeproj.storage.source import Folder, LocalFolder, hub_place

_CACHED = re.compile(r"models--(?P<org>[^/\\]+?)--(?P<name>[^/\\]+)")


def cached_id(path: str) -> str | None:
    """Return the Hub id of what lies in the Hub's cache, None where a path is another one."""
    found = _CACHED.search(path)
    return None if found is None else f"{found['org']}/{found['name']}"


def name_of(folder: Folder) -> str:
    """Return the Hub id of a model, or the absolute path of its directory."""
    place = None if folder.revision is None else hub_place(folder.source)
    if place is not None:
        return place.name
    assert isinstance(folder, LocalFolder)
    path = str(folder.root.absolute())
    return cached_id(path) or path


def is_same_model(named: str, known: str) -> bool:
    """Tell whether a name can be that of a model, which is a Hub id or an absolute path.

    Two ids are compared whole. A directory says nothing of an organisation, and one on another
    machine nothing of directories above it.
    """
    if Path(named).is_absolute() or Path(known).is_absolute():
        return Path(named).name == Path(known).name
    return named == known

"""The key under which action.yml keeps an alignment file; needs only a Python.

Prints it, or nothing where the content of a checkpoint could change unnoticed.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

_PINNED = re.compile(r"\w[\w.-]*/\w[\w.-]*@[0-9a-f]{40}", re.ASCII)
_NOT_READ = {".git", ".cache"}


def identity(source: str) -> str | None:
    """Return what tells a checkpoint from every other, or None if its name alone does not.

    Args:
        source: a directory or file, of which the content counts, or a Hub id.
    """
    place = Path(source)
    if not place.exists():
        return source if _PINNED.fullmatch(source) else None
    digest = hashlib.sha256()
    for path in [place] if place.is_file() else sorted(place.rglob("*")):
        name = path.relative_to(place)
        if path.is_file() and not _NOT_READ & set(name.parts):
            digest.update(f"{name.as_posix()}\0{_sha256(path)}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def main(arguments: Sequence[str]) -> None:
    """Print the key of VERSION BASE ALIGNED OPTIONS."""
    version, base, aligned, options = arguments
    parts = [version]
    for role, source in (("base", base), ("aligned", aligned)):
        known = identity(source)
        if known is None:
            text = f"{role} is not pinned (org/name@COMMIT), so the alignment file is not kept"
            print(f"::notice title=safeproj::{text}", file=sys.stderr)
            return
        parts.append(known)
    parts += [line.strip() for line in options.splitlines() if line.strip()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    print(f"safeproj-alignment-{key}")


if __name__ == "__main__":
    main(sys.argv[1:])

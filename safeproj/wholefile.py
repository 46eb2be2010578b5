"""Writing a small file in one step."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def replace_file(place: Path, content: bytes) -> None:
    """Write a file: it is complete, or as it was.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    hidden = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")
    try:
        with hidden.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        hidden.replace(place)
    finally:
        hidden.unlink(missing_ok=True)

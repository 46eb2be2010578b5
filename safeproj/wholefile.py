"""Writing a small file in one step."""

from __future__ import annotations

from pathlib import Path

from safeproj.publish import Look, appearing


def replace_file(place: Path, content: bytes) -> None:
    """Write a file, whatever is there: it is complete, or as it was.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    write_file(place, content, lambda: None)


def write_file(place: Path, content: bytes, look: Look | None = None) -> None:
    """Write a file: it is complete, or as it was.

    Args:
        place: the file.
        content: of the file.
        look: looks at what is there, which may be replaced; None to replace nothing.

    Raises:
        AppearedError: something is there, and nothing may be replaced.
        OSError: it cannot be written; nothing is left behind.
        SafeprojError: it is written, and something went wrong afterwards.
    """
    with appearing(place) as found:
        found.path.write_bytes(content)
        found.appear(look)

"""The directory of the parts of the prompts: kept if something was written, gone otherwise."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safeproj.errors import SafeprojError
from safeproj.repairing.split import NAMES
from safeproj.storage.publish import remove


class Parts:
    """What tells whether the directory is to stay."""

    is_kept = False

    def keep(self) -> None:
        """Let it stay."""
        self.is_kept = True


@contextmanager
def parts_at(
    place: Path, inputs: Sequence[tuple[str, Path | None]], *, overwrite: bool
) -> Iterator[Parts]:
    """Make an empty directory for the parts of the prompts.

    Args:
        place: the directory.
        inputs: option names and local paths that it must be apart from, None for the Hub.
        overwrite: replace what an earlier run left there; it comes back if this one is not kept.

    Raises:
        SafeprojError: something else is there, or it cannot be made.
    """
    _require_free(place, inputs, overwrite)
    before = place.with_name(f".{place.name}.before") if os.path.lexists(place) else None
    try:
        if before is not None:
            remove(before)
            place.rename(before)
        place.mkdir()
    except OSError as error:
        raise SafeprojError(f"--data-out {place}: cannot be written ({error.strerror})") from error
    parts = Parts()
    try:
        yield parts
    finally:
        if not parts.is_kept:
            remove(place)
        if before is not None:
            if parts.is_kept:
                remove(before)
            else:
                before.rename(place)


def _require_free(place: Path, inputs: Sequence[tuple[str, Path | None]], overwrite: bool) -> None:
    own = place.resolve()
    for option, path in inputs:
        given = None if path is None else path.resolve()
        if given is not None and (own == given or own in given.parents or given in own.parents):
            raise SafeprojError(
                f"--data-out {place}: overlaps with {option} {path}; choose another directory"
            )
    if not os.path.lexists(place):
        return
    if place.is_symlink() or not place.is_dir():
        raise SafeprojError(f"--data-out {place}: is no directory; choose one that does not exist")
    others = sorted({each.name for each in place.iterdir()} - set(NAMES))
    if others:
        raise SafeprojError(
            f"--data-out {place}: holds {others[0]}, which no repair left there; choose another "
            "directory"
        )
    if not overwrite:
        raise SafeprojError(
            f"--data-out {place}: an earlier run left its prompts there; give --overwrite"
        )

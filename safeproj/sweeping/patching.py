"""The command that writes what a sweep tried, but for its strength and place."""

from __future__ import annotations

from collections.abc import Iterator

from safeproj.methods.interface import Method
from safeproj.run.options import Options


def patching(method: Method, adapter: str, options: Options) -> tuple[str, ...]:
    """Return the words of `safeproj patch` on the same adapter with the same method.

    Args:
        method: what was swept, as it was given.
        adapter: SRC of the adapter.
        options: how; of the selection only what it leaves out counts.
    """
    return ("safeproj", "patch", *_given(method), "--adapter", adapter, *_chosen(options))


def _given(method: Method) -> Iterator[str]:
    known = method.options()
    for name, value in method.given.items():
        yield known[name].flag
        if value is not True:
            yield str(value)


def _chosen(options: Options) -> Iterator[str]:
    selection = options.selection
    for flag, values in (
        ("--include", selection.include),
        ("--exclude", selection.exclude),
        ("--map", options.maps),
    ):
        for value in values:
            yield from (flag, value)

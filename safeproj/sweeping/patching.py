"""The command that writes what was tried on an adapter, but for its strength and place."""

from __future__ import annotations

from collections.abc import Iterator

from safeproj.methods.interface import Method
from safeproj.run.options import Options


def patching(method: Method, adapter: str, options: Options) -> tuple[str, ...]:
    """Return the words of `safeproj patch` on the same adapter with the same method.

    Args:
        method: what was done, as it was given.
        adapter: SRC of the adapter.
        options: how; of the selection only what it leaves out counts.
    """
    return ("safeproj", "patch", *given_as(method), "--adapter", adapter, *chosen_as(options))


def given_as(method: Method) -> Iterator[str]:
    """Yield the options by which a method is given."""
    known = method.options()
    for name, value in method.given.items():
        yield known[name].flag
        if value is not True:
            yield str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def chosen_as(options: Options) -> Iterator[str]:
    """Yield those that say which modules are considered, the maps, and how chats are put."""
    selection = options.selection
    for flag, values in (
        ("--include", selection.include),
        ("--exclude", selection.exclude),
        ("--map", options.maps),
    ):
        for value in values:
            yield from (flag, value)
    yield from options.chat.words()

"""The model card, and where the section about what was done lies in it."""

from __future__ import annotations

from pathlib import Path

from safeproj.adapter.record import Adapter

BEGIN, END = b"<!-- safeproj:begin -->", b"<!-- safeproj:end -->"


def with_section(card: bytes, text: str) -> bytes:
    """Return the card with the section at its end, in place of one from an earlier run.

    The rest of the card is kept byte for byte, whatever its encoding.
    """
    block = BEGIN + b"\n" + text.encode("utf-8", "surrogateescape") + b"\n" + END
    begin, end = card.find(BEGIN), card.find(END)
    if 0 <= begin < end:
        return card[:begin] + block + card[end + len(END) :]
    gap = b"" if not card else b"\n" if card.endswith(b"\n") else b"\n\n"
    return card + gap + block + b"\n"


def new(adapter: Adapter) -> bytes:
    """Return the start of a card for an adapter that has none."""
    kind = adapter.format
    lines = [] if kind.library is None else [f"library_name: {kind.library}"]
    base_model = None if kind.base_model_key is None else adapter.config.get(kind.base_model_key)
    named = isinstance(base_model, str) and base_model.isprintable() and base_model
    if named and not Path(named).is_absolute():
        lines.append("base_model: '" + named.replace("'", "''") + "'")
    return "\n".join(["---", *lines, "tags:", "- safeproj", "---", ""]).encode()

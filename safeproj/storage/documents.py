"""JSON out of files: with a bound on what it may cost, and without what readers disagree about."""

from __future__ import annotations

import json
import re
from typing import Any

MAX_BYTES = 64 << 20
"""Bytes of a JSON file: a record of 10,000 modules has about 10 MB."""

MAX_VALUES = 4_000_000
"""Values in it: two bytes of JSON can take a hundred in memory."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse(content: bytes | bytearray, *, numbers_alone: bool = False) -> Any:
    """Return what JSON text holds.

    Args:
        content: the text.
        numbers_alone: refuse NaN and Infinity, which Python reads and the standard does not have.

    Raises:
        ValueError: it is no JSON in UTF-8, too large, has duplicate keys, or half of a character.
        RecursionError: it is nested too deeply.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has {len(content)} bytes; expected at most {MAX_BYTES}")
    values = sum(map(content.count, (b",", b"[", b"{")))
    if values > MAX_VALUES:
        raise ValueError(f"it has about {values} values; expected at most {MAX_VALUES}")
    constants: dict[str, Any] = {"parse_constant": _refuse} if numbers_alone else {}
    found = json.loads(content.decode("utf-8"), object_pairs_hook=unique, **constants)
    if _SURROGATE.search(content):
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("it has half of a surrogate pair, which is no character") from error
    return found


def json_document(value: Any) -> bytes:
    """Return a JSON file, as safeproj writes them beside tensors."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _refuse(name: str) -> Any:
    raise ValueError(f"{name}, which is no number of JSON")


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a JSON object with duplicate keys, on which readers disagree about which one counts.

    For `json.loads(..., object_pairs_hook=unique)`.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate keys")
    return found

"""The hashes that digests of tensors are made by, and how a record says which.

A record has the digests of an input by hash: `{"sha256": {"files": …}, "blake3": {"tensors": …}}`.
Those of tensors are by BLAKE3, in older records by SHA-256. Those of whole files are by SHA-256,
as `sha256sum` prints them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol, get_args

from safeproj.text import shorten

Hash = Literal["blake3", "sha256"]

HASHES: tuple[Hash, ...] = get_args(Hash)

NEW: Hash = "blake3"
"""That of new records: it takes about half the time of SHA-256."""

Digests = Mapping[Hash, Mapping[str, str]]
"""Hash to label of each tensor that was read to the digest of its bytes, in hexadecimal digits."""

Sides = tuple[Digests, Digests]
"""The digests of the two things that were read of a weight, such as both checkpoints."""

NONE: Sides = ({}, {})


class Hasher(Protocol):
    """What is fed bytes, and tells their digest."""

    def update(self, data: bytes | memoryview, /) -> object: ...

    def hexdigest(self) -> str: ...


def hasher(name: Hash) -> Hasher:
    """Return a hash that was fed nothing."""
    if name == "sha256":
        return hashlib.sha256()
    from blake3 import blake3  # here, since most commands hash no tensor

    return blake3()


def digest(name: Hash, data: bytes | memoryview) -> str:
    """Return the digest of bytes."""
    found = hasher(name)
    found.update(data)
    return found.hexdigest()


def merged(parts: Iterable[Digests]) -> dict[Hash, dict[str, str]]:
    """Return digests of several things as one."""
    found: dict[Hash, dict[str, str]] = {}
    for part in parts:
        for name, digests in part.items():
            found.setdefault(name, {}).update(digests)
    return found


def record(tensors: Digests, **others: Any) -> dict[str, dict[str, Any]]:
    """Return what a record says of an input.

    Args:
        tensors: their digests.
        others: what else was read, by its SHA-256: `files`, `metadata` or `data`.
    """
    found: dict[str, dict[str, Any]] = {"sha256": others}
    for name, digests in tensors.items():
        found.setdefault(name, {})["tensors"] = dict(digests)
    return found


def tensors_of(recorded: Mapping[str, Any]) -> dict[Hash, Mapping[str, str]]:
    """Return the digests of tensors that a record says of an input, by hash."""
    return {
        name: recorded[name]["tensors"] for name in HASHES if "tensors" in recorded.get(name, {})
    }


def hash_of(*records: Mapping[str, Any]) -> Hash | None:
    """Return the hash that records of inputs have digests of tensors by, None if they have none.

    Raises:
        ValueError: they are by more than one, or by one that is not known.
        AttributeError: what should be a record is none.
    """
    found = sorted(
        {
            name[:40]
            for recorded in records
            for name, each in recorded.items()
            if isinstance(each, dict) and "tensors" in each
        }
    )
    if len(found) > 1:
        raise ValueError(f"digests of tensors are by {shorten(found)}, expected one hash for all")
    for name in HASHES:
        if found == [name]:
            return name
    if found:
        raise ValueError(
            f"digests of tensors are by {shorten(found)}, expected {' or '.join(HASHES)}; use "
            "the version of safeproj that wrote them"
        )
    return None

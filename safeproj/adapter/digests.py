"""The digests of an adapter: of the files that were read, and of what PEFT runs of it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from hashlib import sha256
from typing import Any

from safeproj.adapter.interface import CONFIG, MANIFEST
from safeproj.adapter.record import Adapter
from safeproj.errors import SafeprojError
from safeproj.storage.arrays import bytes_of
from safeproj.storage.picklefile import read_pickle
from safeproj.storage.source import Folder, content_sha256, read_json
from safeproj.storage.tensorfile import DTYPES, OTHER_DTYPES, TensorEntry

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""Weights that PEFT runs: the first of them that is there."""

_NAMES = {**{name: found[0] for name, found in DTYPES.items()}, **OTHER_DTYPES}


def adapter_record(adapter: Adapter, further: Collection[str] = ()) -> dict[str, Any]:
    """Return the digests of the files that were read of an adapter, and its own `safeproj.json`.

    Args:
        adapter: the adapter.
        further: files that were read if they are there.

    Raises:
        SafeprojError: its `safeproj.json` is no JSON object.
    """
    present = [name for name in further if name in adapter.folder.files]
    read = (*adapter.format.documents, adapter.weights_file, *present)
    files = {name: content_sha256(adapter.folder, name) for name in read}
    found: dict[str, Any] = {"sha256": {"files": files}}
    if adapter.converted_from is not None:
        found["converted_from"] = adapter.converted_from
    if MANIFEST in adapter.folder.files:
        found["previous"] = read_json(adapter.folder, MANIFEST)
    return found


def run_digests(folder: Folder) -> dict[str, Any] | None:
    """Return what tells an adapter that PEFT runs from every other, None of what it cannot run.

    Returns:
        `files`, the SHA-256 of the config and of the weights, and `tensors`: that of a listing of
        all tensors by name, each with dtype, shape and the SHA-256 of its bytes, which stays the
        same where they are stored again.

    Raises:
        SafeprojError: a file cannot be read.
    """
    weights = next((name for name in WEIGHTS if name in folder.files), None)
    if weights is None or CONFIG not in folder.files:
        return None
    listing = sha256()
    for row in sorted(_listed(folder, weights)):
        listing.update(json.dumps(row).encode() + b"\n")
    files = {name: content_sha256(folder, name) for name in sorted((CONFIG, weights))}
    return {"files": files, "tensors": listing.hexdigest()}


def _listed(folder: Folder, name: str) -> Iterator[tuple[str, str, list[int], str]]:
    """Yield name, dtype, shape and digest of each tensor."""
    if name == WEIGHTS[1]:
        for key, tensor in read_pickle(folder, name).items():
            digest = sha256(bytes_of(tensor)).hexdigest()
            yield key, tensor.dtype.name, list(tensor.shape), digest
        return
    path = folder.path(name)
    entries = folder.header(name).tensors
    try:
        with path.open("rb") as file:
            for key, entry in entries.items():
                file.seek(entry.start)
                digest = _digest(file.read, entry)
                yield key, _NAMES.get(entry.dtype, entry.dtype), list(entry.shape), digest
    except OSError as error:
        raise SafeprojError(
            f"{folder.source}: {name} cannot be read ({error.strerror or error})"
        ) from error


def _digest(read: Any, entry: TensorEntry) -> str:
    """Return the SHA-256 of a tensor's bytes, of which a file may hold more than memory does."""
    found, left = sha256(), entry.nbytes
    while left and (chunk := read(min(left, 1 << 20))):
        found.update(chunk)
        left -= len(chunk)
    return found.hexdigest()

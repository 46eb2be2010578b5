"""The digests of the files that were read of an adapter."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from safeproj.adapter.interface import MANIFEST
from safeproj.adapter.record import Adapter
from safeproj.storage.source import content_sha256, read_json


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

"""What the model card says of patching, beside what safeproj.json and the original's card say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from safeproj import __version__
from safeproj.adapter import Adapter, card
from safeproj.adapter.interface import MANIFEST
from safeproj.adapter.write import CARD
from safeproj.errors import SafeprojError
from safeproj.gate.weights import found
from safeproj.records.checks import Finding
from safeproj.records.rules import Level
from safeproj.records.scores import SCHEMA, ModuleReport, Report, Unprojected, place
from safeproj.report.card import section as written_section
from safeproj.storage.source import read_json

_SIGNS = (card.BEGIN, card.END, b"## Safety projection")


def about_claim(adapter: Adapter) -> Iterator[Finding]:
    """Yield that a card says that the adapter was patched, and nothing records that."""
    if CARD not in adapter.folder.files or MANIFEST in adapter.folder.files:
        return
    content = adapter.path(CARD).read_bytes()
    if any(sign in content for sign in _SIGNS):
        text = f"{CARD} says that the adapter was patched, and there is no {MANIFEST}"
        yield found("SP021", text, file=CARD)


def about_card(before: Adapter, patched: Adapter) -> Iterator[Finding]:
    """Yield that the card is not the original's with the section that `patch` writes.

    Outside the markers it is the original's, byte for byte. Inside it is what the record says,
    where this version wrote it: others have other words. A run that changed nothing leaves it.
    """
    given = before.path(CARD).read_bytes() if _has_card(before) else card.new(before)
    there = patched.path(CARD).read_bytes() if _has_card(patched) else None
    section = _section(patched)
    if section == "":
        if there != (given if _has_card(before) else None):
            text = f"{CARD} is not the original's, and {MANIFEST} says that nothing was changed"
            yield found("SP025", text, file=CARD)
        return
    if there is None:
        if _has_card(before) or MANIFEST in patched.folder.files:
            yield found("SP025", f"{CARD} is in the original alone", file=CARD)
        return
    if section is None:
        begin, end = there.find(card.BEGIN), there.find(card.END)
        inside = there[begin + len(card.BEGIN) + 1 : end - 1] if 0 <= begin < end else None
        section = None if inside is None else inside.decode("utf-8", "surrogateescape")
        outside = given if section is None else card.with_section(given, section)
        if there != outside:
            yield found("SP025", f"{CARD} differs from the original's", file=CARD)
        elif section is not None and MANIFEST in patched.folder.files:
            text = f"the section in {CARD} is another version's, and was not compared"
            yield found("SP025", text, level=Level.note, file=CARD)
    elif there != card.with_section(given, section):
        text = f"{CARD} is not the original's with the section that {MANIFEST} gives"
        yield found("SP025", text, file=CARD)


def _has_card(adapter: Adapter) -> bool:
    return CARD in adapter.folder.files


def _section(patched: Adapter) -> str | None:
    """Return the section that this version writes for a record, None where it did not write it."""
    if MANIFEST not in patched.folder.files:
        return None
    try:
        document = read_json(patched.folder, MANIFEST)
        if document["tool"]["version"] != __version__:
            return None
        return written_section(recorded_report(document))
    except (SafeprojError, LookupError, TypeError, ValueError, AttributeError):
        return None  # what is wrong with it is said elsewhere


def about_change(adapter: Adapter) -> Iterator[Finding]:
    """Yield that the record says that patching changed nothing."""
    if MANIFEST not in adapter.folder.files:
        return
    try:
        document = read_json(adapter.folder, MANIFEST)
        if document["schema"] != SCHEMA or recorded_report(document).changed:
            return
    except (SafeprojError, LookupError, TypeError, ValueError, AttributeError):
        return  # what is wrong with it is said elsewhere
    text = f"{MANIFEST} says that patching changed none of {len(document['modules'])} modules"
    yield found("SP051", text, file=MANIFEST)


def recorded_report(document: Mapping[str, Any]) -> Report:
    """Return the report that a record holds, as far as the card shows it.

    Raises:
        LookupError, TypeError, ValueError: it is not as `safeproj patch` writes it.
    """
    projected = document["summary"]["projected"]
    return Report(
        version=document["tool"]["version"],
        method=document["method"],
        projector=document["projector"],
        selection=document["selection"],
        inputs=document["inputs"],
        modules=tuple(map(_module, document["modules"])),
        pdst=document["summary"]["pdst"],
        unprojected=tuple(Unprojected(**item) for item in document["unprojected"]),
        warnings=tuple(document["warnings"]),
        summary=document["summary"],
        unaltered=projected - document["summary"].get("changed", projected),
        written=True,
    )


def _module(item: Mapping[str, Any]) -> ModuleReport:
    m, n = item["shape"]
    bounds = item.get("cosine_bounds")
    return ModuleReport(
        item["name"],
        *place(item["name"]),
        (m, n),
        item["rank"],
        item["cosine"],
        item["scale"],
        item["projected"],
        item["note"],
        None if bounds is None else (bounds[0], bounds[1]),
        detail=item,
    )

"""The model card's section about what was done to the adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safeproj.adapter.record import Adapter
from safeproj.records.scores import Report
from safeproj.report.markdown import code, describe, energy_lines, escaped, span
from safeproj.report.methods import METHODS

BEGIN, END = b"<!-- safeproj:begin -->", b"<!-- safeproj:end -->"


def section(report: Report) -> str:
    """Return the Markdown that says what was done."""
    lines = [
        "## Safety projection",
        "",
        f"safeproj {report.version} {_DONE[report.method](report)}.",
        "",
        f"- projector: {describe(report.projector)}",
        f"- selection: {describe(report.selection)}",
        f"- cosine of an update and its projection, before: {span(report.cosines)}",
        f"- {METHODS[report.method].formula}: {span(report.measures)}",
        *energy_lines(report),
        "- every module, its score and the digests of the inputs: `safeproj.json`",
        "",
        "Projection is no proof of safety: evaluate the patched adapter before you publish it.",
    ]
    return "\n".join([*lines, *(f"\n> Warning: {escaped(warning)}" for warning in report.warnings)])


def _safe_lora(report: Report) -> str:
    base, aligned = (_published_name(report.inputs[role]) for role in ("base", "aligned"))
    return (
        f"projected the updates of {report.projected} of {len(report.modules)} adapted modules "
        f"onto the subspace spanned by the difference of {aligned} and {base} (Safe LoRA, "
        "arXiv 2405.16833)"
    )


def _salora(report: Report) -> str:
    aligned, data = (_published_name(report.inputs[role]) for role in ("aligned", "data"))
    return (
        f"removed from the updates of {report.projected} of {len(report.modules)} adapted modules "
        f"what lies in the safety subspace of {aligned}, found from its outputs on the safety "
        f"data {data} (SaLoRA, arXiv 2501.01765)"
    )


def _covariance(report: Report) -> str:
    aligned, safety, task = (
        _published_name(report.inputs[role]) for role in ("aligned", "safety_data", "task_data")
    )
    return (
        f"corrected the updates of {report.projected} of {len(report.modules)} adapted modules so "
        f"that they do least to what {aligned} computes on the safety data {safety} and stay "
        f"closest to what they were on the benign data {task} (covariance-weighted correction)"
    )


_DONE: dict[str, Callable[[Report], str]] = {
    "safe-lora": _safe_lora,
    "salora": _salora,
    "covariance": _covariance,
}
"""What was done, by method."""


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
    return "\n".join(["---", *lines, "---", ""] if lines else []).encode()


def _published_name(identity: Mapping[str, Any]) -> str:
    """Return the source, as code, without the directories of the machine it was patched on."""
    source = str(identity["source"])
    name = Path(source).name if Path(source).is_absolute() else source
    revision = identity.get("revision")
    return code(name if revision is None or "@" in name else f"{name}@{revision}")

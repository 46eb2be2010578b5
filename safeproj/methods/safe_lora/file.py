"""Alignment files: what `C` needs of every weight, in one safetensors file instead of two models.

The tensors of a weight are named by its key: `KEY.U` (m, K) and `KEY.eigenvalues` (K,), the leading
eigenpairs of `C`; or the smaller exact form, `KEY.C` (m, m) or `KEY.V` (m, n). All are float32. The
rest is JSON under `safeproj` in the file's metadata; docs/formats.md describes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, KeysView, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from safeproj.adapter import Adapter
from safeproj.checkpoint.expression import key_of, stored_names
from safeproj.errors import SafeprojError
from safeproj.methods.recorded import (
    Content,
    FileKind,
    Parameters,
    RecordedFile,
    open_recorded,
    require_plain,
)
from safeproj.methods.reference import Plain
from safeproj.methods.safe_lora.sources import Kept
from safeproj.methods.score import Score
from safeproj.plan.match import Plan, PlannedModule, plan, quantised_warning
from safeproj.plan.select import Selection
from safeproj.storage.source import identity
from safeproj.text import is_plain, shorten

SCHEMA = "safeproj.alignment/1"

VALUES = "eigenvalues"

IDENTITY = ("source", "revision")
"""What a report says of a checkpoint that the file was made of."""

ZERO, V_ITSELF, C_ITSELF, EIGENPAIRS = "zero", "V", "C", "U"
FORMS = (ZERO, V_ITSELF, C_ITSELF, EIGENPAIRS)
"""What is kept of a weight: nothing where `V = 0`, `V`, `C`, or eigenpairs of `C`."""


@dataclass(frozen=True)
class Recorded:
    """What an alignment file says of one weight, beside its tensors.

    Attributes:
        form: one of `FORMS`.
        shape: (m, n).
        alignment_norm: `‖V‖_F`.
        error: upper bound of `‖C - C_K‖_F / ‖C‖_F`; 0 for the exact forms.
        residual: upper bound of `‖C - C_K‖₂`.
        leak: upper bound of `‖Uᵀ (C - C_K) U‖₂`.
    """

    form: str
    shape: tuple[int, int]
    alignment_norm: float
    error: float = 0.0
    residual: float = 0.0
    leak: float = 0.0


@dataclass(frozen=True)
class AlignmentFile(Plain):
    """An alignment file, in place of two checkpoints.

    Attributes:
        file: what it holds.
    """

    file: RecordedFile[Recorded]

    @property
    def is_truncated(self) -> bool:
        """Whether it holds eigenpairs of any weight, so that `C` is not exact."""
        return any(weight.form == EIGENPAIRS for weight in self.file.weights.values())

    @property
    def config(self) -> Mapping[str, Any]:
        return self.file.config

    @property
    def names(self) -> KeysView[str]:
        return self.file.names

    @property
    def inputs(self) -> dict[str, dict[str, Any]]:
        document = self.file.document
        found: dict[str, dict[str, Any]] = {}
        for role, recorded in document["inputs"].items():
            found[role] = {name: recorded[name] for name in IDENTITY if name in recorded}
        return {**found, "alignment": {**document["options"], **identity(self.file)}}

    def plan(self, adapter: Adapter, selection: Selection) -> Plan:
        found = plan(adapter, self.file.running, self.file.running, selection)
        quantised = tuple(
            quantised_warning(role, recorded["quantised"])
            for role, recorded in self.file.document["inputs"].items()
            if recorded["quantised"]
        )
        return replace(found, warnings=(*found.warnings, *quantised))

    def group(self, item: PlannedModule) -> Hashable:
        return item.aligned, item.base

    def origin(self, item: PlannedModule) -> Kept:
        file, key = self.file, key_of(item.aligned)
        kept = file.weights.get(key or "")
        if key is None or kept is None or not file.is_whole(item.aligned):
            raise SafeprojError(
                f"{file.source}: holds nothing for {item.module.name} as the adapter has it "
                f"({key or shorten(stored_names(item.aligned))}); make a file with it among "
                "--targets, with transformers installed (safeproj[train]), or use the checkpoints"
            )
        if kept.form == ZERO:
            return Kept(kept.form, None, kept.alignment_norm)
        return Kept(
            kept.form,
            file.matrix(f"{key}.{kept.form}"),
            kept.alignment_norm,
            file.vector(f"{key}.{VALUES}") if kept.form == EIGENPAIRS else (),
            kept.error,
            kept.residual,
            kept.leak,
        )

    def digests(self, scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
        recorded = self.file.document["inputs"]
        read: dict[str, str] = {}
        for score in scores.values():
            read |= score.sha256[0] if score.sha256 is not None else {}
        return {
            **{role: recorded[role]["sha256"] for role in ("base", "aligned")},
            "alignment": self.file.digests(read, {EIGENPAIRS: VALUES}),
        }


def open_file(source: str, maps: Sequence[str] = ()) -> AlignmentFile:
    """Return the alignment file that SRC names: a file, or a folder or repository that holds one.

    Raises:
        SafeprojError: there is none, or it is damaged.
    """
    return AlignmentFile(open_recorded(source, KIND, maps))


def _read(content: Content) -> dict[str, Recorded]:
    """Return the records of a file that fits together and cannot steer a report that shows it.

    Raises:
        LookupError, TypeError, ValueError: it does not, or could.
    """
    document = content.document
    weights = {key: _recorded(item) for key, item in document["weights"].items()}
    if set(document["inputs"]) != {"base", "aligned"}:
        raise ValueError(f"inputs are {sorted(document['inputs'])}")
    for role, recorded in document["inputs"].items():
        shown = (recorded["source"], *recorded["quantised"], recorded.get("revision", ""))
        require_plain(f"identity of {role}", *shown)
        if not isinstance(recorded["sha256"]["tensors"], dict):
            raise TypeError(f"digests of {role}")
    _check_options(**document["options"])
    for key, weight in weights.items():
        _check_tensors(content, key, weight)
    return weights


KIND = FileKind(
    name="alignment file",
    schema=SCHEMA,
    suffix=".safealign.safetensors",
    command="safeproj align",
    remedy="make a file with its module among --targets, or use the checkpoints",
    read=_read,
)


def _recorded(item: Mapping[str, Any]) -> Recorded:
    m, n = item["shape"]
    numbers = {
        name: float(item.get(name, 0.0)) for name in ("alignment_norm", "error", "residual", "leak")
    }
    if not all(math.isfinite(value) and value >= 0.0 for value in numbers.values()):
        raise ValueError(f"not a size: {numbers}")
    if item["form"] not in FORMS or (item["form"] == ZERO) != (numbers["alignment_norm"] == 0.0):
        raise ValueError(f"form {item['form']!a} with norm {numbers['alignment_norm']}")
    return Recorded(item["form"], (int(m), int(n)), **numbers)


def _check_tensors(content: Content, key: str, weight: Recorded) -> None:
    """Refuse a weight whose tensors are not what is recorded.

    Raises:
        LookupError, ValueError: they are not.
    """
    if weight.shape != _expected_shape(key, content.parameters):
        raise ValueError(f"{key} has the shape {weight.shape}")
    if weight.form == ZERO:
        return
    tensors, (m, n) = content.header.tensors, weight.shape
    entry = tensors[f"{key}.{weight.form}"]
    columns = {V_ITSELF: n, C_ITSELF: m, EIGENPAIRS: entry.shape[-1]}[weight.form]
    if entry.dtype != "F32" or entry.shape != (m, columns) or columns < 1:
        raise ValueError(f"{key} is {entry.dtype} {list(entry.shape)}")
    if weight.form == EIGENPAIRS:
        values = tensors[f"{key}.{VALUES}"]
        if values.dtype != "F32" or values.shape != (columns,):
            raise ValueError(f"{key}.{VALUES} is {values.dtype} {list(values.shape)}")


def _check_options(
    *, targets: Any, rank: Any = None, energy: Any = None, exact: Any = False
) -> None:
    """Refuse options that `align` does not write."""
    fits = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    if not fits or not all(is_plain(name) for name in targets):
        raise ValueError("targets")
    if not (rank is None or type(rank) is int) or type(exact) is not bool:
        raise ValueError("rank or exact")
    if energy is not None and not (isinstance(energy, float) and 0.0 < energy <= 1.0):
        raise ValueError("energy")


def _expected_shape(key: str, parameters: Parameters) -> tuple[int, int]:
    """Return the (m, n) of what a key names.

    Raises:
        LookupError, ValueError: it names nothing.
    """
    match = re.fullmatch(r"(?P<name>.*?)(\[(?P<expert>\d+)\])?(?P<turned>\.T)?", key)
    assert match is not None
    shape, layout = parameters[match["name"]]
    if match["expert"] is not None:
        count, *shape_of_one = shape
        if layout.kind != "experts" or int(match["expert"]) >= count:
            raise ValueError(f"{key} is no expert")
        shape = tuple(shape_of_one)
    if layout.kind == "conv":
        shape = (shape[0], math.prod(shape[1:]))
    if (match["turned"] is None) == (not layout.out_first):
        raise ValueError(f"{key} is turned the wrong way")
    m, n = shape[::-1] if match["turned"] else shape
    return m, n

"""Alignment files: what `C` needs of every weight, in one safetensors file instead of two models.

The tensors of a weight are named by its key: `KEY.U` (m, K) and `KEY.eigenvalues` (K,), the leading
eigenpairs of `C`; or the smaller exact form, `KEY.C` (m, m) or `KEY.V` (m, n). All are float32. The
rest is JSON under `safeproj` in the file's metadata; docs/formats.md describes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from safeproj.adapter import Adapter
from safeproj.checkpoint.expression import key_of
from safeproj.checkpoint.hashes import hash_of, record
from safeproj.errors import install
from safeproj.methods.file_reference import FileReference, held, made_of, read_of
from safeproj.methods.recorded import (
    Content,
    FileKind,
    Parameters,
    open_recorded,
    recorded_amount,
    recorded_shape,
    require_model,
    require_plain,
    require_tensor,
)
from safeproj.methods.safe_lora.sources import Kept
from safeproj.methods.score import Score
from safeproj.plan.match import Plan, PlannedModule, quantised_warning
from safeproj.plan.select import Selection
from safeproj.storage.source import identity

VALUES = "eigenvalues"

_REMEDY = (
    "make a file with it among --targets, for which transformers is needed, or use the "
    f"checkpoints; {install('train')}"
)
"""What to do about an adapter that has a module otherwise than the file."""

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
class AlignmentFile(FileReference[Recorded]):
    """An alignment file, in place of two checkpoints."""

    @property
    def is_truncated(self) -> bool:
        """Whether it holds eigenpairs of any weight, so that `C` is not exact."""
        return any(weight.form == EIGENPAIRS for weight in self.file.weights.values())

    @property
    def inputs(self) -> dict[str, dict[str, Any]]:
        document = self.file.document
        found = {role: made_of(self.file, role) for role in document["inputs"]}
        return {**found, "alignment": {**document["options"], **identity(self.file)}}

    def plan(self, adapter: Adapter, selection: Selection) -> Plan:
        found = super().plan(adapter, selection)
        quantised = tuple(
            quantised_warning(role, recorded["quantised"])
            for role, recorded in self.file.document["inputs"].items()
            if recorded["quantised"]
        )
        return replace(found, warnings=(*found.warnings, *quantised))

    def origin(self, item: PlannedModule) -> Kept:
        file, key = self.file, key_of(item.aligned) or ""
        kept = held(file, item, key, _REMEDY)
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
        return {
            **{role: _digests(recorded[role]) for role in ("base", "aligned")},
            "alignment": self.file.digests(read_of(scores), {EIGENPAIRS: VALUES}),
        }


def open_file(source: str, maps: Sequence[str] = ()) -> AlignmentFile:
    """Return the alignment file that SRC names: a file, or a folder or repository that holds one.

    Raises:
        SafeprojError: there is none, or it is damaged.
    """
    return AlignmentFile(open_recorded(source, KIND, maps))


def _checkpoint(recorded: Mapping[str, Any]) -> None:
    """Refuse the identity of a checkpoint that no report can show."""
    require_model(recorded)
    if not isinstance(recorded["quantised"], list):
        raise TypeError("dtypes")
    require_plain("dtypes", *recorded["quantised"])
    for digests in _digests(recorded).values():
        require_plain("digests of tensors", *digests.get("tensors", {}).values())


def _digests(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is said of a checkpoint's tensors and files.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: it is not said.
    """
    name = hash_of(recorded)
    if name is None:
        raise LookupError("no digests of tensors")
    return record({name: recorded[name]["tensors"]}, files=recorded["sha256"]["files"])


def _weight(content: Content, key: str, item: Mapping[str, Any]) -> Recorded:
    """Return the record of a weight whose tensors are what is recorded."""
    sizes = {
        name: recorded_amount({name: 0.0, **item}, name)
        for name in ("alignment_norm", "error", "residual", "leak")
    }
    if item["form"] not in FORMS or (item["form"] == ZERO) != (sizes["alignment_norm"] == 0.0):
        raise ValueError(f"form {item['form']!a} with norm {sizes['alignment_norm']}")
    found = Recorded(item["form"], recorded_shape(item), **sizes)
    _check_tensors(content, key, found)
    return found


KIND = FileKind(
    name="alignment file",
    schema="safeproj.alignment/1",
    suffix=".safealign.safetensors",
    command="safeproj align",
    remedy="make a file with its module among --targets, or use the checkpoints",
    inputs={"base": _checkpoint, "aligned": _checkpoint},
    options={
        "rank": lambda value: type(value) is int,
        "energy": lambda value: isinstance(value, float) and 0.0 < value <= 1.0,
        "exact": lambda value: type(value) is bool,
    },
    weight=_weight,
)


def _check_tensors(content: Content, key: str, weight: Recorded) -> None:
    """Refuse a weight whose tensors are not what is recorded.

    Raises:
        LookupError, ValueError: they are not.
    """
    if weight.shape != _expected_shape(key, content.parameters):
        raise ValueError(f"{key} has the shape {weight.shape}")
    if weight.form == ZERO:
        return
    tensor, (m, n) = f"{key}.{weight.form}", weight.shape
    require_tensor(content, tensor, (m, {V_ITSELF: n, C_ITSELF: m, EIGENPAIRS: None}[weight.form]))
    if weight.form == EIGENPAIRS:
        columns = content.header.tensors[tensor].shape[1]
        require_tensor(content, f"{key}.{VALUES}", (columns,))


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

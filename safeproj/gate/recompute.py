"""Recomputing what patching an adapter gives, and comparing it with what is there."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import ml_dtypes
from numpy import array_equal

from safeproj import __version__
from safeproj.adapter import AdaptedModule, Adapter
from safeproj.adapter.interface import MANIFEST, SIGNATURE
from safeproj.adapter.record import Factor
from safeproj.adapter.weightfiles import other_weights, training_state
from safeproj.adapter.write import CARD
from safeproj.engine import Place
from safeproj.errors import SafeprojError
from safeproj.gate.card import about_card
from safeproj.gate.files import listing
from safeproj.gate.weights import found
from safeproj.records.checks import Evidence, Finding
from safeproj.run.decide import resized_documents
from safeproj.run.job import Run
from safeproj.storage.arrays import Array, DType, cast, double, norm
from safeproj.storage.source import LocalFolder, content_sha256, read_json
from safeproj.text import shorten
from safeproj.versions import versions

FLOAT32 = 2.0**-24
"""Unit roundoff of the arithmetic."""

CONVERTED = 1e-5
"""How far a factor of a converted adapter may lie from what another library computes, relative to
it: float64 before it is rounded to float32, and ill-conditioned where singular values are close."""


@dataclass
class Recomputed:
    """What the comparison found.

    Attributes:
        evidence: the modules that were projected.
        findings: what is not as patching would have left it.
        equal: projected tensors that are equal bit for bit.
        close: those that are within the tolerance.
        other: why no projection was computed to compare with, None where it was.
        error: the largest relative error among the latter.
        same: whether the same hardware and versions are recorded, so that nothing else will do.
        dtype: that projected tensors were written in, where it is recorded; `keep` for their own.
    """

    same: bool
    dtype: str | None = None
    evidence: dict[str, Evidence] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    equal: int = 0
    close: int = 0
    error: float = 0.0
    other: str | None = None

    @property
    def remark(self) -> str:
        """What was compared, in words."""
        if self.other is not None:
            return (
                f"not recomputed from the original: {self.other}; compared with it: all but the "
                f"factors of the {len(self.evidence)} modules that {MANIFEST} says were changed"
            )
        why = "the same hardware and versions are recorded"
        if not self.same:
            why = "other or no hardware and versions are recorded"
        text = f"{self.equal} projected factors are equal bit for bit"
        if self.close:
            text += f", {self.close} within rounding (relative error at most {self.error:.1e})"
        return f"recomputed from the original: {text}; {why}"


def recomputed(original: Run, patched: Adapter, place: Place) -> Recomputed:
    """Compare a patched adapter with its original, of which every module was scored.

    What is projected is told from the tensors alone: those that differ from the original's.

    Args:
        original: the run over the adapter before patching.
        patched: the adapter after it.
        place: where the arithmetic ran.
    """
    result = Recomputed(same_hardware(patched, place), _dtype(patched))
    before = original.adapter
    result.findings += _other_tensors(original, patched, same=result.same)
    if before.tensors.keys() == patched.tensors.keys():
        for item in original.plan.modules:
            _compare(result, original, patched, item.module)
    resized = resized_documents(before, original.plan, original.scores, result.evidence)
    documents = {**before.documents, **resized}
    result.findings += other_files(replace(before, documents=documents), patched)
    result.findings += about_card(before, patched)
    return result


def compared(
    original: Run, patched: Adapter, place: Place, claimed: Collection[str], other: str
) -> Recomputed:
    """Compare what patching copies, where what it writes is not computed again.

    Args:
        original: the run over the adapter before patching, by another method than patched it.
        patched: the adapter after it.
        place: where the arithmetic ran.
        claimed: the modules that safeproj.json says were changed.
        other: why they are not computed again.
    """
    result = Recomputed(same_hardware(patched, place), _dtype(patched), other=other)
    before = original.adapter
    modules = {item.module.name: item.module for item in original.plan.modules}
    places = {name: list(module.written("both")) for name, module in modules.items()}
    left_out = {place.key for name in claimed & places.keys() for place in places[name]}
    result.findings += _other_tensors(original, patched, same=result.same, left_out=left_out)
    both = before.tensors.keys() & patched.tensors.keys()
    for name, own in places.items():
        pairs = [place for place in own if place.key in both]
        same = all(_is_same(place, before.tensors, patched.tensors) for place in pairs)
        if name in claimed and not same:
            result.evidence[name] = Evidence.recorded
        elif name not in claimed and not same and left_out & {place.key for place in pairs}:
            text = f"{name} differs from the original's, and {MANIFEST} does not say so"
            result.findings.append(found("SP025", text, module=name))
    result.findings += other_files(before, patched)
    result.findings += about_card(before, patched)
    return result


def _is_same(place: Factor, before: Mapping[str, Array], after: Mapping[str, Array]) -> bool:
    """Tell whether a factor is what it was; one of another shape is not."""
    if before[place.key].shape != after[place.key].shape:
        return False
    return _identical(place.view(before), place.view(after))


def _dtype(patched: Adapter) -> str | None:
    """Return the dtype that safeproj.json says projected tensors were written in, if another."""
    if MANIFEST not in patched.folder.files:
        return None
    try:
        return str(read_json(patched.folder, MANIFEST)["options"]["dtype"])
    except (SafeprojError, LookupError, TypeError):
        return None


def same_hardware(patched: Adapter, place: Place) -> bool:
    """Tell whether safeproj.json records what this comparison runs on."""
    if MANIFEST not in patched.folder.files:
        return False
    try:
        document: dict[str, Any] = read_json(patched.folder, MANIFEST)
        where = document["options"]["device"], document["options"]["engine"]
        versions_then, tool = document["versions"], document["tool"]["version"]
    except (SafeprojError, LookupError, TypeError):
        return False
    then, now = versions_then, versions(by_torch="torch" in versions_then)
    return bool(where == (place.name, place.engine) and then == now and tool == __version__)


def _other_tensors(
    original: Run, patched: Adapter, *, same: bool, left_out: Collection[str] | None = None
) -> Iterator[Finding]:
    """Yield what differs in tensors that patching copies, or converts.

    Args:
        original: the run over the adapter before patching.
        patched: the adapter after it.
        same: whether the same hardware and versions are recorded.
        left_out: keys that it may have written; those that the method of the run writes if None.
    """
    before = original.adapter.tensors
    other = sorted(before.keys() ^ patched.tensors.keys())
    if other:
        yield found("SP025", f"the tensors are not those of the original: {shorten(other)}")
    side = original.method.side
    written = left_out
    if written is None:
        written = {f.key for item in original.plan.modules for f in item.module.written(side)}
    exact = same or original.adapter.converted_from is None
    for key in [key for key in before if key in patched.tensors and key not in written]:
        wanted = cast(before[key], _converted(original, patched, key) or before[key].dtype)
        there = patched.tensors[key]
        if not (_identical(wanted, there) if exact else _close(wanted, there)):
            yield found("SP025", f"{key} differs from the original's", tensor=key)


def _converted(original: Run, patched: Adapter, key: str) -> DType | None:
    """Return what patching converts a factor to: the dtype of the factor that it has projected."""
    side = original.method.side
    for item in original.plan.modules:
        if item.module.factor("input" if side == "output" else "output").key != key:
            continue
        other = item.module.factor(side).key
        before, there = original.adapter.tensors[other], patched.tensors.get(other)
        if there is not None and there.dtype != before.dtype:
            return there.dtype
    return None


def _identical(one: Array, other: Array) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and array_equal(one, other)


def _close(one: Array, other: Array) -> bool:
    """Tell whether a factor that was converted elsewhere is this one but for rounding."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return norm(double(one) - double(other)) <= CONVERTED * norm(one)


def _compare(result: Recomputed, run: Run, patched: Adapter, module: AdaptedModule) -> None:
    """Compare the factors of one module: all kept, or all projected."""
    placed = list(run.scores[module.name].placed(module, run.method.side))
    states = [_state(result, run, patched, module, *each) for each in placed]
    if None in states:
        return  # said already
    # What becomes what it was tells nothing of the others: a bias of zero, or a factor that stays.
    moving = [not _is_unmoved(run, patched, *each) for each in placed]
    states = [state for state, is_moving in zip(states, moving, strict=True) if is_moving] or states
    if len(set(states)) > 1:
        text = f"{module.name}: some of its factors are projected and some are not"
        result.findings.append(found("SP024", text, module=module.name))
    elif states[0]:
        result.evidence[module.name] = Evidence.recomputed


def is_own_projection(run: Run, patched: Adapter, name: str) -> bool:
    """Tell whether projecting a module of the original gives what it was, in the dtype there."""
    module = next((item.module for item in run.plan.modules if item.module.name == name), None)
    if module is None:
        return False
    placed = run.scores[name].placed(module, run.method.side)
    return all(_is_unmoved(run, patched, *each) for each in placed)


def _is_unmoved(run: Run, patched: Adapter, factor: Factor, expected: Array | None) -> bool:
    """Tell whether what is to take a factor's place is what it was, in the dtype there."""
    there, before = patched.tensors.get(factor.key), factor.view(run.adapter.tensors)
    if expected is None or there is None:
        return False
    return array_equal(double(cast(expected, there.dtype)), double(before))


def _state(
    result: Recomputed,
    run: Run,
    patched: Adapter,
    module: AdaptedModule,
    factor: Factor,
    expected: Array | None,
) -> bool | None:
    """Tell whether a factor is projected (True) or kept (False); None if it is neither."""
    score = run.scores[module.name]
    before, after = run.adapter.tensors[factor.key], patched.tensors[factor.key]
    given, wanted = factor.view(run.adapter.tensors), before.shape
    if expected is not None and expected.shape != given.shape:
        wanted = factor.resized(expected, before).shape
    if after.shape not in (before.shape, wanted):
        text = f"{factor.key} has shape {list(after.shape)}; expected {list(wanted)}"
        result.findings.append(found("SP024", text, module=module.name, tensor=factor.key))
        return None
    if not _is_dtype(after, before, result.dtype):
        text = f"{factor.key} is of {after.dtype}; the original's is of {before.dtype}"
        result.findings.append(found("SP025", text, module=module.name, tensor=factor.key))
        return None
    there = factor.view(patched.tensors)
    if array_equal(double(there), double(given)):
        return False
    if expected is not None and array_equal(there, cast(expected, there.dtype)):
        result.equal += 1
        return True
    text = f"{factor.key} is neither the original's nor its projection"
    if expected is not None and expected.shape == there.shape:
        size = norm(expected)
        error = norm(double(there) - double(expected))
        length = module.out_features + module.in_features
        if score.settled is not None:  # what was computed with in place of large terms that cancel
            given = score.settled.core.factor(score.settled.core.M)
        if error <= _tolerance(there, expected, given, score.detail.length, length):
            if not result.same:
                result.close += 1
                result.error = max(result.error, error / size if size else 0.0)
                return True
            text += ": it is within rounding, but the same hardware and versions are recorded"
        else:
            text += f": it differs by {error / size if size else math.inf:.2g} of its norm"
    result.findings.append(found("SP024", text, module=module.name, tensor=factor.key))
    return None


def _is_dtype(after: Array, before: Array, recorded: str | None) -> bool:
    """Tell whether a factor has the original's dtype, or the one that patching was asked for."""
    return after.dtype.name in (before.dtype.name, recorded)


def _tolerance(
    there: Array, expected: Array, given: Array, alignment_norm: float | None, length: int
) -> float:
    """Return how far a stored factor may lie from one that is computed elsewhere, in `‖·‖_F`.

    Rounding to the stored dtype, half a unit in the last place or of the smallest number; and the
    errors of sums in float32, which grow like the root of their length where products cancel, once
    for each computation, relative to `‖C‖ ‖B‖`. `‖C‖` is at most `‖V‖_F`, and 1 where `C`
    is an orthogonal projector. `A'` is computed in float64, and rounded to float32 at the end.
    """
    info: Any = ml_dtypes.finfo(there.dtype)  # type: ignore[no-untyped-call]
    rounding = float(info.eps) / 2 * norm(expected)
    smallest = float(info.smallest_normal) * float(info.eps) / 2 * math.sqrt(there.size)
    bound = 1.0 if alignment_norm is None else max(alignment_norm, 1.0)
    sums = 2 * math.sqrt(length + 4) * FLOAT32 * bound * norm(given)
    return rounding + smallest + sums


def other_files(before: Adapter, patched: Adapter) -> Iterator[Finding]:
    """Yield files that patching copies and that are not what they were, at any depth.

    What else is in the original, patching may leave out: other weights, what trainers kept, `.git`,
    `.cache`.
    """
    written = {MANIFEST, CARD, SIGNATURE}
    files = listing(patched.folder)
    there = set(files.names) - written - patched.weights_files
    all_of_it = not isinstance(before.folder, LocalFolder) or before.folder.only is None
    given = before.folder.files - before.format.replaced_files - written if all_of_it else set()
    state = set(training_state(before, given))
    left_out = state.union(other_weights(before, given - state))
    for name in sorted(given - there - left_out):
        yield found("SP025", f"{name} is in the original alone", file=name)
    for name in sorted(there):
        if not files.is_file(name):
            continue  # said already
        if name not in given:
            yield found("SP025", f"{name} is in the patched adapter alone", file=name)
            continue
        document = before.documents.get(name)
        wanted = (
            content_sha256(before.folder, name)
            if document is None
            else sha256(document).hexdigest()
        )
        if wanted != content_sha256(patched.folder, name):
            yield found("SP025", f"{name} differs from the original's", file=name)
    if patched.weights_file != before.format.output_file:
        text = f"the tensors are in {patched.weights_file}; expected {before.format.output_file}"
        yield found("SP025", text, file=patched.weights_file)
    elif patched.format.container not in (
        before.format.container,
        before.format.written_container,
    ):
        text = f"the metadata in {patched.weights_file} is not the original's"
        yield found("SP025", text, file=patched.weights_file)

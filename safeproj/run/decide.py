"""From scores to decisions: which tensors are replaced, and what the report says."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from numpy import array_equal

from safeproj import __version__
from safeproj.adapter import AdaptedModule, Adapter
from safeproj.adapter.peft_config import PREFIX
from safeproj.adapter.record import Factor, Side
from safeproj.errors import SafeprojError
from safeproj.methods.interface import Method
from safeproj.methods.measures import pdst
from safeproj.methods.score import Score
from safeproj.plan.match import Plan
from safeproj.plan.select import Selection
from safeproj.records.scores import ModuleReport, Report, Unprojected, place
from safeproj.storage.arrays import (
    Array,
    DType,
    cast,
    double,
    dtype_of,
    is_finite,
    norm,
    promoted,
    quiet,
)
from safeproj.storage.source import identity
from safeproj.text import natural_order, shorten

DTYPES: dict[str, DType | None] = {
    "keep": None,
    **{name: dtype_of(name) for name in ("float32", "bfloat16", "float16")},
}
"""`--dtype`: what the projected tensors are written as; `keep` is the dtype they had."""

LOST_IN_ROUNDING = 0.01
"""Relative error of a written tensor from which on the user is warned: float16 has few bits left
for the small numbers that projection makes."""


@dataclass(frozen=True)
class Decision:
    """What is to be done to an adapter.

    Attributes:
        replaced: the tensors to write in place of the adapter's, by key.
        report: the record of the run.
        converted: those of them that have another dtype alone, since the other factor has it.
        documents: files that say so, where factors have another rank than before.
    """

    replaced: dict[str, Array]
    report: Report
    converted: frozenset[str] = frozenset()
    documents: Mapping[str, bytes] = field(default_factory=dict)


@quiet
def decide(
    adapter: Adapter,
    inputs: Mapping[str, Mapping[str, Any]],
    plan: Plan,
    scores: Mapping[str, Score],
    changes: Mapping[str, float | None],
    selection: Selection,
    method: Method,
    dtype: str,
) -> Decision:
    """Choose the modules to project and describe the outcome.

    Args:
        adapter: the input.
        inputs: role to the identity of what the projectors come from.
        plan: what was scored.
        scores: module name to score.
        changes: key of a tensor that replaces a weight to the size of the change, relative to it.
        selection: how modules are chosen.
        method: what the scores are of.
        dtype: one of `DTYPES`.

    Raises:
        SafeprojError: there is nothing to compare any module with.
    """
    if all(score.is_blank for score in scores.values()):
        sources = {role: identity["source"] for role, identity in inputs.items()}
        raise SafeprojError(method.detail.blank.refusal.format(**sources))
    cosines = {name: score.cosine for name, score in scores.items()}
    chosen = selection.choose(cosines)
    bounds = {name: score.bounds for name, score in scores.items() if score.bounds is not None}
    uncertain = selection.uncertain(cosines, bounds)
    replaced = _replaced(adapter, plan, scores, chosen, DTYPES[dtype], method.side)
    written = {**adapter.tensors, **replaced}
    distances, lossy = [], []
    for planned in plan.modules:
        module, score = planned.module, scores[planned.module.name]
        if score.factor is None or score.cosine is None:
            continue
        there = module.factor(method.side).view(written)
        if method.side == "output":  # it is the reference code's measure of C B
            distances.append(pdst(there, score.factor))
        if module.name in chosen and _lost(module, written, score, method.side) > LOST_IN_ROUNDING:
            if score.settled is not None:
                raise SafeprojError(
                    f"{module.name}: the terms of B A cancel so far that its projection cannot be "
                    f"written beside the other factor in {there.dtype}; save the adapter again "
                    "from the model it was trained on"
                )
            lossy.append(module.name)
    unprojected = tuple(_unprojected(adapter, plan, scores, changes, method.side))
    details = {name: score.detail for name, score in scores.items()}
    items = [(each.module, each.note) for each in plan.modules]
    modules = module_reports(items, plan.excluded, scores, chosen, uncertain, method)
    report = Report(
        version=__version__,
        method=method.name,
        projector=method.describe(scores.values()),
        selection=selection.to_dict(),
        inputs={
            **{role: dict(identity) for role, identity in inputs.items()},
            "adapter": _identity(adapter),
        },
        modules=modules,
        pdst=sum(distances) / len(distances) if distances else None,
        unprojected=unprojected,
        summary=method.detail.summary(modules, details.values()),
        unaltered=_unaltered(adapter, plan, replaced, chosen, method.side),
        warnings=(
            *adapter.warnings,
            *plan.warnings,
            *warnings_of(scores, selection, chosen, lossy, unprojected, method),
            *method.detail.warnings(details, chosen, uncertain),
        ),
    )
    converted = {}
    if dtype != "keep":
        converted = _converted(adapter, plan, replaced, chosen, method.side)
    return Decision(
        {**replaced, **converted},
        report,
        frozenset(converted),
        resized_documents(adapter, plan, scores, chosen),
    )


def resized_documents(
    adapter: Adapter, plan: Plan, scores: Mapping[str, Score], chosen: Collection[str]
) -> dict[str, bytes]:
    """Return the adapter's files that name ranks, where those of chosen modules become others.

    Raises:
        SafeprojError: adapters of its format cannot have such ranks.
    """
    modules = {planned.module.name: planned.module for planned in plan.modules}
    ranks = {
        name: rank
        for name, module in modules.items()
        if name in chosen and (rank := scores[name].rank) not in (None, module.rank)
    }
    return adapter.format.resized(adapter, ranks) if ranks else {}


def _replaced(
    adapter: Adapter,
    plan: Plan,
    scores: Mapping[str, Score],
    chosen: frozenset[str],
    dtype: DType | None,
    side: Side,
) -> dict[str, Array]:
    """Return the tensors that change, whole: of a stack of experts some may stay as they are."""
    others = [p.module for p in plan.modules if p.module.name not in chosen]
    kept = {factor.key for module in (*others, *plan.excluded) for factor in module.written(side)}
    replaced: dict[str, Array] = {}
    for planned in plan.modules:
        score = scores[planned.module.name]
        if planned.module.name not in chosen or score.factor is None:
            continue
        for factor, value in score.placed(planned.module, side):
            assert value is not None
            before = adapter.tensors[factor.key]
            if factor.key not in replaced:
                wanted = dtype or before.dtype
                if factor.key in kept:  # what is kept in it must not be rounded
                    wanted = promoted(wanted, before.dtype)
                replaced[factor.key] = cast(before, wanted)
            place = factor.view(replaced)
            if place.shape == value.shape:
                place[...] = cast(value, place.dtype)
            else:  # of another rank
                place = replaced[factor.key] = cast(factor.resized(value, before), place.dtype)
            if not is_finite(place):
                raise SafeprojError(
                    f"{factor.key}: the projected tensor does not fit into {place.dtype}; use "
                    "--dtype float32"
                )
    return replaced


def _unaltered(
    adapter: Adapter,
    plan: Plan,
    replaced: Mapping[str, Array],
    chosen: frozenset[str],
    side: Side,
) -> int:
    """Return of how many chosen modules all that is written is what it was."""

    def is_same(factor: Factor) -> bool:
        return array_equal(double(factor.view(replaced)), double(factor.view(adapter.tensors)))

    modules = (planned.module for planned in plan.modules if planned.module.name in chosen)
    return sum(all(map(is_same, module.written(side))) for module in modules)


def _converted(
    adapter: Adapter,
    plan: Plan,
    replaced: Mapping[str, Array],
    chosen: frozenset[str],
    side: Side,
) -> dict[str, Array]:
    """Return the other factors of projected modules in the dtype that is written.

    Some readers refuse two dtypes in one module.
    """
    other: Side = "input" if side == "output" else "output"
    modules = [*(planned.module for planned in plan.modules), *plan.excluded]
    kept = {m.factor(other).key for m in modules if m.name not in chosen}
    found: dict[str, Array] = {}
    for module in modules:
        written, key = replaced.get(module.factor(side).key), module.factor(other).key
        if written is None or module.name not in chosen or key in replaced:
            continue
        before, wanted = adapter.tensors[key], written.dtype
        if key in kept:  # what is kept in it must not be rounded
            wanted = promoted(wanted, before.dtype)
        if before.dtype == wanted:
            continue
        found[key] = cast(before, wanted)
        if not is_finite(found[key]):
            raise SafeprojError(
                f"{key}: does not fit into {wanted}, which its module is written as; use --dtype "
                "float32"
            )
    return found


def _unprojected(
    adapter: Adapter,
    plan: Plan,
    scores: Mapping[str, Score],
    changes: Mapping[str, float | None],
    side: Side,
) -> Iterator[Unprojected]:
    """Yield what the adapter changes past every projection."""
    for planned in plan.changes:
        change = planned.change
        size = changes.get(change.key)
        yield Unprojected(change.key, change.parameter, change.kind, size, planned.added_rows)
    # ΔW may be zero where the bias of lora_B is not: that change of the output stays, and so does
    # every one where A is changed.
    for module in (planned.module for planned in plan.modules):
        bias, scored = module.bias, scores[module.name].cosine is not None
        if bias is None or (scored and side != "input"):
            continue
        if bool(adapter.tensors[bias.key].any()):
            kind = "bias of lora_B" if scored else "bias of lora_B without a cosine"
            yield Unprojected(bias.key, module.name, kind, None)


def _lost(module: AdaptedModule, written: Mapping[str, Array], score: Score, side: Side) -> float:
    """Return how far what was written is from what was computed, relative to it.

    Of the factors; of the update itself where terms cancel, since a factor says little of it.
    """
    if score.settled is None:
        return max(
            _relative_error(factor.view(written), value)
            for factor, value in score.placed(module, side)
            if value is not None and factor in (module.output, module.input)
        )
    there = module.factor(side).view(written)
    columns = there if side == "output" else there.T
    return _relative_error(score.settled.core.coordinates(columns), score.settled.after)


def _relative_error(there: Array, factor: Array) -> float:
    size = norm(factor)
    return norm(double(there) - double(factor)) / size if size else 0.0


def module_reports(
    items: Sequence[tuple[AdaptedModule, str | None]],
    excluded: Sequence[AdaptedModule],
    scores: Mapping[str, Score],
    chosen: frozenset[str],
    uncertain: frozenset[str],
    method: Method,
) -> tuple[ModuleReport, ...]:
    """Return what a report says of modules, in natural order.

    Args:
        items: those that were scored, each with what is special about it.
        excluded: those that were not.
        scores: by module.
        chosen: those that are projected.
        uncertain: those that cosines within their bounds might decide otherwise.
        method: what the scores are of.
    """
    found = [_module_report(each, None, method) for each in excluded]
    for module, note in items:
        report = _module_report(module, scores[module.name], method, note)
        is_chosen, is_uncertain = module.name in chosen, module.name in uncertain
        found.append(replace(report, projected=is_chosen, uncertain=is_uncertain))
    return tuple(sorted(found, key=lambda module: natural_order(module.name)))


def _module_report(
    module: AdaptedModule, score: Score | None, method: Method, note: str | None = None
) -> ModuleReport:
    stack, layer, kind = place(module.name)
    return ModuleReport(
        name=module.name,
        stack=stack,
        layer=layer,
        kind=kind,
        shape=(module.out_features, module.in_features),
        rank=module.rank,
        cosine=score.cosine if score else None,
        scale=score.scale if score else None,
        projected=False,
        note="; ".join(text for text in (_note(module, score, method), note) if text) or None,
        bounds=score.bounds if score else None,
        detail=score.detail.to_dict() if score else method.detail.unscored(),
    )


def _note(module: AdaptedModule, score: Score | None, method: Method) -> str | None:
    if score is None:
        return "left out by --include/--exclude: kept, not scored"
    if score.is_blank:
        return method.detail.blank.note
    if score.cosine is None:
        return score.empty
    if module.mirrors and method.side == "output":
        tied = ", ".join(factor.key.removeprefix(PREFIX) for factor in module.mirrors)
        return f"tied weights: {tied} holds the same factor and is written too"
    return "DoRA: the magnitude is kept" if module.dora else None


def warnings_of(
    scores: Mapping[str, Score],
    selection: Selection,
    chosen: frozenset[str],
    lossy: list[str],
    unprojected: tuple[Unprojected, ...],
    method: Method,
) -> Iterator[str]:
    """Yield what the user should know of what was scored and decided."""
    changed = [item for item in unprojected if not item.is_copy]
    if changed:
        yield (
            f"{len(changed)} tensors change weights or biases directly, which no projection "
            f"touches: {shorten(item.describe() for item in changed)}"
        )
    blank = [name for name, score in scores.items() if score.is_blank]
    if blank:
        yield method.detail.blank.warning.format(count=len(blank), names=shorten(blank))
    if selection.layers is not None and len(chosen) < selection.layers:
        yield f"--layers {selection.layers}: only {len(chosen)} modules have a cosine"
    if lossy:
        yield (
            f"rounding to the written dtype loses over {LOST_IN_ROUNDING:.0%} of {len(lossy)} "
            f"projected tensors ({shorten(lossy)}); use --dtype float32"
        )


def _identity(adapter: Adapter) -> dict[str, Any]:
    """Return what a report says of the adapter that it is about."""
    found = identity(adapter.folder)
    if adapter.converted_from is not None:
        found["converted_from"] = adapter.converted_from
    return found

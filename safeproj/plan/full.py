"""Pairs each weight of a full fine-tune with the same of the model that it was made from.

Only names, shapes and dtypes are looked at: a plan is complete before the first weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safeproj.adapter.record import AdaptedModule, Factor, FullChange, Kind
from safeproj.adapter.vocabulary import HEADS
from safeproj.checkpoint import Checkpoint, open_checkpoint
from safeproj.checkpoint.expression import (
    Expression,
    Flat,
    Stored,
    dtype_and_shape,
    stored_names,
)
from safeproj.checkpoint.quantised import QuantisedCheckpoint
from safeproj.checkpoint.rewrite import Rewriting
from safeproj.errors import SafeprojError
from safeproj.names import Layout, Names
from safeproj.plan.match import (
    PlannedChange,
    PlannedModule,
    oriented,
    quantised_dtypes,
    quantised_warning,
)
from safeproj.plan.select import Selection
from safeproj.storage.source import Folder, Src, src
from safeproj.storage.tensorfile import DTYPES
from safeproj.text import natural_order, shorten

Unheld = Callable[[PlannedModule], str | None]
"""Tells why nothing is known of a weight, None where it is."""

KINDS = ("linear", "conv1d", "conv", "experts")
"""Kinds of layers whose weights are matrices that map inputs to outputs."""


@dataclass(frozen=True)
class FullModel:
    """A full fine-tuned checkpoint, in the place of an adapter.

    Attributes:
        source: SRC of the checkpoint.
        aligned: SRC of the model that it was made from; that of the method if None.
    """

    source: Src
    aligned: Src | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", src(self.source))
        if self.aligned is not None:
            object.__setattr__(self, "aligned", src(self.aligned))

    def __str__(self) -> str:
        return str(self.source)


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned checkpoint, opened beside the model that it was made from.

    Attributes:
        names: its weights.
        aligned: those of that model.
        files: its files, to be written again.
    """

    names: Names
    aligned: Names
    files: Rewriting

    @property
    def checkpoint(self) -> Checkpoint:
        """The fine-tuned checkpoint."""
        return self.names.checkpoint

    @property
    def folder(self) -> Folder:
        """Where its files are."""
        found = self.checkpoint.folder
        assert found is not None  # it is no file that stands for a model
        return found


@dataclass(frozen=True)
class PlannedWeight:
    """One weight that a method may change.

    Attributes:
        item: the weight as references know it, with where it is there.
        tuned: the weight in the fine-tuned checkpoint, (m, n).
        before: the weight in the aligned one, (m, n).
    """

    item: PlannedModule
    tuned: Expression
    before: Expression

    @property
    def name(self) -> str:
        """Of the module."""
        return self.item.module.name


@dataclass(frozen=True)
class FullPlan:
    """Everything that is to be scored of a full fine-tune.

    Attributes:
        weights: what may be changed, in natural order.
        excluded: weights that `--include` and `--exclude` leave out.
        others: all other tensors.
        warnings: what the user should know about the checkpoints.
    """

    weights: tuple[PlannedWeight, ...]
    excluded: tuple[AdaptedModule, ...]
    others: tuple[PlannedChange, ...]
    warnings: tuple[str, ...]


def open_tuned(model: FullModel, aligned: Names | None, maps: Sequence[str] = ()) -> Tuned:
    """Return a fine-tuned checkpoint beside the model that it was made from.

    Args:
        model: both.
        aligned: the second, if it is open.
        maps: `--map` rules.

    Raises:
        SafeprojError: one of them cannot be used, or the first not be written again.
    """
    checkpoint = open_checkpoint(str(model.source))
    if isinstance(checkpoint, QuantisedCheckpoint) and checkpoint.is_packed:
        raise SafeprojError(
            f"{model.source}: stored as MXFP4, in which nothing is written; expected a fine-tune "
            "in floating-point numbers or FP8: save it after decoding"
        )
    if aligned is None:
        assert model.aligned is not None
        aligned = Names(open_checkpoint(str(model.aligned)), maps)
    return Tuned(Names(checkpoint, maps), aligned, Rewriting(checkpoint))


def plan_full(
    tuned: Tuned,
    sides: tuple[Names, Names],
    selection: Selection,
    unheld: Unheld,
    *,
    by_file: bool = False,
) -> FullPlan:
    """Return the plan for a full fine-tune.

    Args:
        tuned: the fine-tune, and the model that it was made from.
        sides: the weights that a method measures against, as references have them.
        selection: which weights are considered.
        unheld: tells of which of them a method knows nothing.
        by_file: whether a file takes their place, which may lack some.

    Raises:
        SafeprojError: it is no fine-tune of that model, or nothing is left to score.
    """
    found = _Finding(tuned, sides, unheld, by_file=by_file)
    units = list(found.units())
    weights = tuple(each for each in units if selection.considers(each.name))
    excluded = tuple(each.item.module for each in units if not selection.considers(each.name))
    if not weights:
        raise SafeprojError(
            f"--include/--exclude leave none of the {len(units)} weights; their names look like "
            f"{units[0].name}"
            if units
            else f"{tuned.checkpoint.source}: no weight that can be compared"
        )
    return FullPlan(weights, excluded, tuple(found.others(units)), tuple(_warnings(tuned, weights)))


class _Finding:
    """Finds the weights of a fine-tune that a method may change, and all others."""

    def __init__(
        self, tuned: Tuned, sides: tuple[Names, Names], unheld: Unheld, *, by_file: bool
    ) -> None:
        self._tuned, self._sides, self._is_file = tuned, sides, by_file
        self._unheld = unheld
        self._kinds: dict[str, str] = {}
        self._seen: set[object] = set()

    def units(self) -> Iterator[PlannedWeight]:
        """Yield the weights that a method may change, in natural order."""
        names, aligned = self._tuned.names, self._tuned.aligned
        own = _layouts(names)
        self._require_all(aligned)
        for name, layout in own.items():
            found = self._found(names, name) if layout.kind == "embedding" else None
            if found is not None:
                self._saw(found, "embedding")
        for parameter in sorted(own, key=natural_order):
            if own[parameter].kind in KINDS:
                yield from self._units(parameter, own[parameter])

    def others(self, units: Sequence[PlannedWeight]) -> Iterator[PlannedChange]:
        """Yield all other tensors of floating-point numbers."""
        checkpoint = self._tuned.checkpoint
        taken = {name for each in units for name in stored_names(each.tuned)}
        taken |= set(self._tuned.files.codes.values())
        for name in checkpoint.names:
            if name in taken:
                continue
            info = checkpoint.describe(name)
            if info.dtype in DTYPES:
                before = self._before(name, info.shape)
                kind = self._kinds.get(name) or _kind(name)
                yield self._other(name, info.shape, kind, before)

    def _other(
        self, name: str, shape: tuple[int, ...], kind: str, before: Expression | None
    ) -> PlannedChange:
        added = 0
        if before is None:
            kind = f"{kind}, which the aligned model does not have"
        elif shape:
            added = shape[0] - dtype_and_shape(before, self._tuned.aligned.checkpoint)[1][0]
        return PlannedChange(FullChange(name, name, kind), before, added)

    def _before(self, name: str, shape: tuple[int, ...]) -> Expression | None:
        """Return the same tensor of the aligned model, if its rows are as long."""
        aligned = self._tuned.aligned.checkpoint
        if name not in aligned.names:
            return None
        info = aligned.describe(name)
        fits = len(info.shape) == len(shape) and info.shape[1:] == shape[1:]
        return Stored(name) if fits and info.dtype in DTYPES else None

    def _units(self, parameter: str, layout: Layout) -> Iterator[PlannedWeight]:
        tuned, aligned = self._tuned.names, self._tuned.aligned
        whole = self._found(tuned, parameter)
        if whole is None or not self._saw(whole, None):
            return  # it is in neither model, or tied to what was seen
        shape = _shape(whole, tuned)
        before = self._found(aligned, parameter)
        if before is None or 0 in shape or (layout.kind == "experts" and layout.out_first is None):
            return
        if _is_head(parameter) and _is_tied(tuned.checkpoint.config):
            self._saw(whole, "output head, which is the embedding")
            return
        if _is_head(parameter) and _shape(before, aligned)[0] != shape[0]:
            self._saw(whole, "output head of another size")
            return
        self._require_shape(parameter, shape, _shape(before, aligned), aligned)
        first = self._found(self._sides[0], parameter)
        second = self._found(self._sides[1], parameter, is_base=True)
        if first is None or second is None:
            self._saw(whole, f"weight that {self._sides[0].checkpoint.source} does not hold")
            return
        for side, each in zip(self._sides, (first, second), strict=True):
            self._require_shape(parameter, shape, _shape(each, side), side)
        is_stack = layout.kind == "experts" and len(shape) == 3
        for expert in range(shape[0]) if is_stack else [None]:
            own, known, one, other = (
                as_matrix(each, layout, expert) for each in (whole, before, first, second)
            )
            m, n = _shape(own, tuned)
            item = PlannedModule(_module(parameter, layout, expert, m, n), one, other)
            if (why := self._unheld(item)) is not None:
                self._saw(whole, why)
                return
            yield PlannedWeight(item, own, known)

    def _saw(self, whole: Expression, kind: str | None) -> bool:
        """Note of what kind the tensors of a weight are; tell whether none was seen before."""
        files = self._tuned.files.spots
        keys = set()
        for name in stored_names(whole):
            if kind is not None:
                self._kinds[name] = kind
            keys.add((files[name].file, files[name].start) if name in files else name)
        is_new = self._seen.isdisjoint(keys)
        self._seen |= keys
        return is_new

    def _found(self, names: Names, parameter: str, *, is_base: bool = False) -> Expression | None:
        """Return a weight of another model; None where it may be without.

        Raises:
            SafeprojError: the base model is without, as no base of the aligned model is.
        """
        try:
            return names.find(parameter, lambda _: True)
        except SafeprojError as error:
            if is_base and not self._is_file:
                raise SafeprojError(
                    f"{names.checkpoint.source}: no weight for {parameter}, which "
                    f"{self._tuned.aligned.checkpoint.source} has; are both of the same model?"
                ) from error
            return None

    def _require_all(self, aligned: Names) -> None:
        """Refuse a fine-tune without a weight of the model that it was made from.

        Raises:
            SafeprojError: there is one that it does not have.
        """
        own, stored = self._tuned.names, self._tuned.checkpoint.names
        wanted = [name for name in _layouts(aligned) if self._found(aligned, name) is not None]
        wanted += [
            name
            for name in aligned.checkpoint.names
            if name.endswith((".weight", ".bias")) and "experts" not in name
        ]
        missing = [
            name
            for name in dict.fromkeys(wanted)
            if name not in stored and not _is_head(name) and self._found(own, name) is None
        ]
        if missing:
            raise SafeprojError(
                f"{self._tuned.checkpoint.source}: no weight for {shorten(missing)}, which "
                f"{aligned.checkpoint.source} has; is it a fine-tune of another model, or "
                "incomplete? If it is only named otherwise there, say how with --map "
                "RUNTIME=CHECKPOINT"
            )

    def _require_shape(
        self, parameter: str, shape: tuple[int, ...], other: tuple[int, ...], names: Names
    ) -> None:
        if shape == other:
            return
        raise SafeprojError(
            f"{parameter}: shapes do not fit: {list(shape)} in {self._tuned.checkpoint.source}, "
            f"{list(other)} in {names.checkpoint.source}; is it a fine-tune of another model?"
        )


def _layouts(names: Names) -> dict[str, Layout]:
    """Return the weights that a model has, single experts where there are no stacks."""
    found = names.parameters()
    if any(layout.kind == "experts" for layout in found.values()):
        return found
    return {**names.experts(), **found}


def _shape(expression: Expression, names: Names) -> tuple[int, ...]:
    return dtype_and_shape(expression, names.checkpoint)[1]


def as_matrix(whole: Expression, layout: Layout, expert: int | None) -> Expression:
    """Return a weight that maps inputs to outputs as (m, n), or of one expert of a stack."""
    if layout.kind == "conv":
        return Flat(whole)
    return oriented(whole, expert, not layout.out_first)


def _module(parameter: str, layout: Layout, expert: int | None, m: int, n: int) -> AdaptedModule:
    """Return what a report says of a weight; the rank of its change may be that of the weight."""
    name = parameter.removesuffix(".weight")
    whole = Factor(parameter)  # there are no factors: what is written is the weight
    return AdaptedModule(
        name=name if expert is None else f"{name}[{expert}]",
        parameter=parameter,
        kind=Kind.convolution if layout.kind == "conv" else Kind.linear,
        output=whole,
        input=whole,
        rank=min(m, n),
        in_features=n,
        out_features=m,
        expert=expert,
        turned=layout.out_first is False,
    )


def _is_head(parameter: str) -> bool:
    return parameter.removesuffix(".weight").rpartition(".")[2] in HEADS


def _is_tied(config: Mapping[str, Any]) -> bool:
    """Tell whether a model's config says that its head is its embedding."""
    text = config.get("text_config")
    told = text.get("tie_word_embeddings") if isinstance(text, Mapping) else None
    return bool(config.get("tie_word_embeddings", told))


def _kind(name: str) -> str:
    """Return what a tensor is, by its name."""
    module, _, leaf = name.rpartition(".")
    if leaf == "bias":
        return "bias"
    return "norm" if "norm" in module.rpartition(".")[2].lower() or "ln" in leaf else "weight"


def _warnings(tuned: Tuned, weights: Collection[PlannedWeight]) -> Iterator[str]:
    if tuned.files.codes:
        dtypes = quantised_dtypes((each.tuned for each in weights), tuned.checkpoint)
        yield (
            f"the fine-tune stores weights as {', '.join(dtypes)}: they are written as bfloat16, "
            "and the scales left out"
        )
    found = quantised_dtypes((each.before for each in weights), tuned.aligned.checkpoint)
    if found:
        yield quantised_warning("aligned", found)

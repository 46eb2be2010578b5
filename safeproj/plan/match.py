"""Pairs each update with its weight in both checkpoints, and refuses what does not fit.

Only names, shapes and dtypes are looked at: a plan is complete before the first weight is read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from safeproj.adapter import AdaptedModule, Adapter
from safeproj.adapter.experts import StackLayout, resolve
from safeproj.adapter.record import FullChange, Kind, TargetParameters
from safeproj.adapter.vocabulary import HEADS
from safeproj.checkpoint import Checkpoint
from safeproj.checkpoint.expression import (
    Expression,
    Flat,
    Head,
    Item,
    Stored,
    Swapped,
    dtype_and_shape,
    stored_names,
)
from safeproj.checkpoint.quantised import leftover_method
from safeproj.errors import SafeprojError, install
from safeproj.names import Names
from safeproj.names.layout import CONV1D_MODELS, model_types
from safeproj.plan.select import Selection
from safeproj.storage.tensorfile import DTYPES
from safeproj.text import natural_order, shorten

UP = frozenset({"gate_up_proj", "gate_proj", "up_proj", "w1", "w3", "input_linear"})
DOWN = frozenset({"down_proj", "w2", "output_linear"})
"""Names of expert parameters whose input, or whose output, is the hidden state."""

MAX_LAYERS = 10_000
"""More layers than any model has: forged ranges must not fill the memory."""


@dataclass(frozen=True)
class PlannedModule:
    """One update and where its weights are.

    Attributes:
        module: the adapter's side.
        aligned: the weight in the aligned checkpoint, (m, n).
        base: the weight in the base checkpoint, (m, n).
        note: what is special about the pair.
        scaling: `s` of the update, where the method needs it.
    """

    module: AdaptedModule
    aligned: Expression
    base: Expression
    note: str | None = None
    scaling: float | None = None


@dataclass(frozen=True)
class PlannedChange:
    """A change of a whole weight, and that weight in the aligned checkpoint, if it was found.

    Attributes:
        change: the adapter's side.
        aligned: the weight in the aligned checkpoint.
        added_rows: rows that the weight does not have, such as those of added tokens; negative
            where the adapter has fewer than it.
    """

    change: FullChange
    aligned: Expression | None
    added_rows: int = 0


@dataclass(frozen=True)
class Plan:
    """Everything that is to be scored.

    Attributes:
        modules: the updates to score, in natural order.
        excluded: the updates that `--include` and `--exclude` leave out.
        changes: whole weights that the adapter replaces.
        warnings: what the user should know about the checkpoints.
        unmatched: the updates that have no weight, or none that fits, with the reason.
    """

    modules: tuple[PlannedModule, ...]
    excluded: tuple[AdaptedModule, ...]
    changes: tuple[PlannedChange, ...]
    warnings: tuple[str, ...]
    unmatched: tuple[tuple[AdaptedModule, SafeprojError], ...] = ()


def plan(adapter: Adapter, aligned: Names, base: Names, selection: Selection) -> Plan:
    """Return the plan for one adapter.

    Args:
        adapter: the adapter.
        aligned: the weights of the aligned checkpoint.
        base: the weights of the base checkpoint.
        selection: which modules are considered.

    Returns:
        The plan. A module that has no weight in one of the checkpoints, or whose shape or dtype
        does not fit, is `unmatched`: the caller decides whether it can go on without it.

    Raises:
        SafeprojError: nothing is left to score.
    """
    sides = (_Side(adapter, aligned), _Side(adapter, base))
    modules = [*adapter.modules, *_target_modules(adapter, sides[0])]
    modules.sort(key=lambda module: natural_order(module.name))
    names = Counter(module.name for module in modules)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise SafeprojError(
            f"{adapter.source}: {shorten(twice)} has more than one pair of factors; loaders take "
            "one or the other"
        )
    considered = [m for m in modules if selection.considers(m.name)]
    excluded = tuple(m for m in modules if not selection.considers(m.name))
    if not considered:
        raise SafeprojError(
            f"--include/--exclude leave none of the {len(modules)} adapted modules; their "
            f"names look like {modules[0].name}"
        )
    unmatched: list[tuple[AdaptedModule, SafeprojError]] = []
    pairs, planned = [], []
    for module in considered:
        try:
            pairs.append(_Pair(module, *(side.find(module) for side in sides)))
        except SafeprojError as error:
            unmatched.append((module, error))
    votes = {pair.vote for pair in pairs} - {None}
    for pair in pairs:
        try:
            planned.append(_planned(adapter, sides, pair, votes))
        except SafeprojError as error:
            unmatched.append((pair.module, error))
    if not planned:
        raise unmatched[0][1]
    return Plan(
        tuple(planned),
        excluded,
        tuple(_planned_change(adapter, change, sides[0]) for change in adapter.full_changes),
        tuple(_quantised(pairs, sides)),
        tuple(unmatched),
    )


class _Side:
    """One of the two checkpoints, by the running model's names."""

    def __init__(self, adapter: Adapter, names: Names) -> None:
        self.checkpoint = names.checkpoint
        self.names = names
        self._replicated = _replication(adapter)
        self._found: dict[str, tuple[Expression, tuple[int, ...]]] = {}

    def find(self, module: AdaptedModule) -> tuple[Expression, tuple[int, ...]]:
        """Return the whole weight of a module and its shape at run time, whether it fits or not."""
        if module.parameter not in self._found:  # the experts of a stack share it
            self._found[module.parameter] = self._find(module)
        return self._found[module.parameter]

    def _find(self, module: AdaptedModule) -> tuple[Expression, tuple[int, ...]]:
        name = self.stored_name(module.parameter)
        try:
            found = self.names.find(name, lambda shape: _fits(module, shape))
        except SafeprojError as error:
            try:  # what does not fit is refused later, with the shapes of both sides
                found = self.names.find(name, lambda _: True)
            except SafeprojError:
                raise error from None
        dtype, shape = dtype_and_shape(found, self.checkpoint)
        if dtype not in DTYPES:
            raise SafeprojError(
                f"{self.checkpoint.source}: the weight of {module.name} is stored as {dtype}; "
                f"supported are {', '.join(DTYPES)}: use the checkpoint before quantisation"
            )
        return found, shape

    def stored_name(self, parameter: str) -> str:
        """Return the name without layer replication: copies of a layer share its weights."""
        if self._replicated is None:
            return parameter
        parts = parameter.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if at is None:
            return parameter
        layer = int(parts[at])
        if layer >= len(self._replicated):
            raise SafeprojError(
                f"{parameter}: layer_replication makes {len(self._replicated)} layers, so there "
                f"is no layer {layer}"
            )
        return ".".join([*parts[:at], str(self._replicated[layer]), *parts[at + 1 :]])


def _replication(adapter: Adapter) -> list[int] | None:
    """Return for each layer of the running model the stored layer that it copies."""
    given = adapter.config.get("layer_replication")
    if not given:
        return None
    fits = isinstance(given, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(i) is int for i in pair)
        for pair in given
    )
    if not fits or any(not 0 <= start <= stop for start, stop in given):
        raise SafeprojError(
            f"{adapter.source}: layer_replication is {str(given)[:80]!a}; expected pairs of "
            "layer numbers"
        )
    count = sum(stop - start for start, stop in given)
    if count > MAX_LAYERS:
        raise SafeprojError(
            f"{adapter.source}: layer_replication makes {count} layers, expected at most "
            f"{MAX_LAYERS}"
        )
    return [layer for start, stop in given for layer in range(start, stop)]


def _fits(module: AdaptedModule, shape: tuple[int, ...]) -> bool:
    """Tell whether a weight of this shape can be the module's."""
    m, n = module.out_features, module.in_features
    if module.weight_shape is not None:
        return shape == module.weight_shape
    if module.kind is Kind.embedding:
        return len(shape) == 2 and shape[1] == m  # the vocabulary may differ
    if shape in ((m, n), (n, m)) or _is_flattened(module, shape):
        return True
    return _is_head(module) and len(shape) == 2 and shape[1] == n


def _is_flattened(module: AdaptedModule, shape: tuple[int, ...]) -> bool:
    """Tell whether a module is a convolution whose kernel AdaLoRA has flattened into n."""
    m, n = module.out_features, module.in_features
    return module.gain is not None and len(shape) > 2 and (shape[0], math.prod(shape[1:])) == (m, n)


def _is_head(module: AdaptedModule) -> bool:
    return module.kind is Kind.linear and module.name.rpartition(".")[2] in HEADS


def _target_modules(adapter: Adapter, aligned: _Side) -> Iterator[AdaptedModule]:
    """Yield the updates of parameters that are adapted directly: their shapes tell which."""
    for target in adapter.targets:
        if target.plain is not None and _is_plain(target, target.plain, aligned):
            yield target.plain
            continue
        layouts, missing = {}, []
        for parameter in target.parameters:
            try:
                found = aligned.names.find(aligned.stored_name(parameter), _is_stack)
            except SafeprojError as error:  # perhaps another module's
                missing.append(error)
            else:
                layouts[parameter] = _layout(aligned, parameter, found)
        if missing and len(layouts) < len(target.pairs):
            raise missing[0]
        yield from resolve(adapter, target, layouts)


def _is_stack(shape: tuple[int, ...]) -> bool:
    return len(shape) in (2, 3)


def _is_plain(target: TargetParameters, plain: AdaptedModule, side: _Side) -> bool:
    """Tell whether a module is an ordinary layer that has none of the targeted parameters."""
    names = (side.stored_name(parameter) for parameter in target.parameters)
    if any(name in side.checkpoint.names for name in names):
        return False
    try:
        side.names.find(side.stored_name(plain.parameter), lambda shape: _fits(plain, shape))
    except SafeprojError:
        return False
    return True


def _layout(side: _Side, parameter: str, found: Expression) -> StackLayout:
    """Return how the running model stores a parameter, from its name, shape and architecture."""
    shape = dtype_and_shape(found, side.checkpoint)[1]
    known = side.names.layout(side.stored_name(parameter))
    out_first = known.out_first if known is not None else _out_first(side, parameter, shape)
    if out_first is None:
        raise SafeprojError(
            f"{side.checkpoint.source}: nothing tells which side of {parameter} {list(shape)} is "
            "the output; transformers knows the architecture, or take the parameter out of the "
            f"adapter; {install('train')}"
        )
    marked = known is not None and known.marked_transposed
    return StackLayout(shape, out_first, marked)


def _out_first(side: _Side, parameter: str, shape: tuple[int, ...]) -> bool | None:
    """Tell the output side of an expert stack by the size of the hidden state."""
    config = side.checkpoint.config
    text = config.get("text_config")
    hidden = (text if isinstance(text, dict) else config).get("hidden_size")
    leaf = parameter.removesuffix(".weight").rpartition(".")[2]
    is_hidden = [size == hidden for size in shape[1:]]
    if (leaf not in UP and leaf not in DOWN) or len(shape) != 3 or sum(is_hidden) != 1:
        return None
    return is_hidden[1] if leaf in UP else is_hidden[0]


@dataclass(frozen=True)
class _Pair:
    """A module and its whole weight in the aligned and the base checkpoint, each with its shape."""

    module: AdaptedModule
    aligned: tuple[Expression, tuple[int, ...]]
    base: tuple[Expression, tuple[int, ...]]

    @property
    def vote(self) -> bool | None:
        """Whether this weight is stored as (in, out), if its shape tells."""
        module, shape = self.module, self.aligned[1]
        if module.kind is not Kind.linear or module.in_features == module.out_features:
            return None
        return shape == (module.in_features, module.out_features)


def _planned(
    adapter: Adapter, sides: tuple[_Side, _Side], pair: _Pair, votes: set[bool | None]
) -> PlannedModule:
    module, (aligned, shape), (base, base_shape) = pair.module, pair.aligned, pair.base
    note = None
    if _is_flattened(module, shape):
        module = replace(module, kind=Kind.convolution, weight_shape=shape)
    vocabulary = module.kind is Kind.embedding or _is_head(module)
    if vocabulary and len(shape) == len(base_shape) == 2 and shape[1] == base_shape[1]:
        own = module.in_features if module.kind is Kind.embedding else module.out_features
        rows = min(shape[0], base_shape[0], own)
        if rows < max(shape[0], base_shape[0], own):
            aligned, base = Head(aligned, rows), Head(base, rows)
            note = (
                f"vocabularies differ (aligned {shape[0]}, base {base_shape[0]}, adapter {own}): "
                f"the first {rows} rows are used"
            )
            shape = base_shape = (rows, shape[1])
            if module.kind is Kind.linear:
                module = _first_rows(module, rows)
                note += ", the others are kept"
    turned = _turned(adapter, sides, module, shape, votes)
    if shape != base_shape or turned is None:
        wanted = pair.module.weight_shape or (module.out_features, module.in_features)
        shapes = (pair.aligned[1], pair.base[1])
        found = [f"{list(s)} in {d.checkpoint.source}" for s, d in zip(shapes, sides, strict=True)]
        places = list(dict.fromkeys(found))  # a file that stands for both is one place
        raise SafeprojError(
            f"{module.name}: shapes do not fit: {', '.join(places)}, {list(wanted)} "
            f"{'' if pair.module.weight_shape else '(out, in) '}in {adapter.source}; are "
            f"{'both' if len(places) == 1 else 'all three'} of the same model?"
        )
    return PlannedModule(
        module, _oriented(module, aligned, turned), _oriented(module, base, turned), note
    )


def _turned(
    adapter: Adapter,
    sides: tuple[_Side, _Side],
    module: AdaptedModule,
    shape: tuple[int, ...],
    votes: set[bool | None],
) -> bool | None:
    """Tell whether a weight is stored as (in, out); None if its shape does not fit.

    Where it is square the architecture tells, and without one the weights that are not square.
    `fan_in_fan_out` alone does not: PEFT rewrites it module by module while training.

    Raises:
        SafeprojError: the weight is square, and the signs contradict each other.
    """
    if module.kind is Kind.embedding:
        return True if shape[1:] == (module.out_features,) else None
    if module.weight_shape is not None:
        return bool(module.turned) if shape == module.weight_shape else None
    wanted = (len(module.output.view(adapter.tensors)), module.in_features)
    if shape != wanted[::-1] or shape != wanted:
        return shape != wanted if shape in (wanted, wanted[::-1]) else None
    flag = bool(adapter.config.get("fan_in_fan_out"))
    side = next((side for side in sides if side.checkpoint.config), sides[0])
    config = side.checkpoint.config
    layout = side.names.layout(side.stored_name(module.parameter))
    if layout is not None and layout.out_first is not None:
        if flag and layout.out_first and not model_types(config) & CONV1D_MODELS:
            raise SafeprojError(
                f"{module.name}: is square, and {adapter.source} says fan_in_fan_out while the "
                f"model type {config.get('model_type')!r} is not known to store weights as "
                "(in, out); leave it out with --exclude"
            )
        return not layout.out_first
    if len(votes) == 2:
        raise SafeprojError(
            f"{module.name}: is square, and the other weights do not tell how it is stored; put "
            "the model's config.json beside the checkpoint"
        )
    return next(iter(votes), flag)


def _quantised(pairs: list[_Pair], sides: tuple[_Side, _Side]) -> Iterator[str]:
    """Warn where rounding is part of what is taken for alignment."""
    parameters = {pair.module.parameter: pair.module for pair in pairs}.values()
    for role, side in zip(("aligned", "base"), sides, strict=True):
        leftover = leftover_method(side.checkpoint)
        if leftover is not None:
            yield (
                f"the {role} checkpoint's config.json says it is quantised with {leftover}, but "
                "its tensors are plain numbers, which are taken"
            )
        wholes = (side.find(module)[0] for module in parameters)
        dtypes = quantised_dtypes(wholes, side.checkpoint)
        if dtypes:
            yield quantised_warning(role, dtypes)


def quantised_dtypes(weights: Iterable[Expression], checkpoint: Checkpoint) -> list[str]:
    """Return the dtypes of the codes that weights are stored as, none where numbers are stored."""
    infos = (checkpoint.describe(name) for weight in weights for name in stored_names(weight))
    return sorted({info.quantised for info in infos if info.quantised is not None})


def quantised_warning(role: str, dtypes: Iterable[str]) -> str:
    """Return what to know about a checkpoint whose weights are stored as codes."""
    return (
        f"the {role} checkpoint stores weights as {', '.join(dtypes)}: their rounding errors are "
        "part of V, and may outweigh the alignment; prefer the checkpoint before quantisation"
    )


def _first_rows(module: AdaptedModule, rows: int) -> AdaptedModule:
    """Return the module without the output rows of which there is nothing to compare."""
    bias = module.bias
    return replace(
        module,
        output=module.output.head(rows),
        bias=None if bias is None else bias.head(rows),
    )


def _oriented(module: AdaptedModule, whole: Expression, turned: bool) -> Expression:
    """Return the module's own matrix (m, n) of a whole weight."""
    if module.kind is Kind.convolution:
        return Flat(whole)
    return oriented(whole, module.expert, turned)


def oriented(whole: Expression, expert: int | None, turned: bool) -> Expression:
    """Return a weight, or one expert of a stack, as (m, n)."""
    part = whole if expert is None else Item(whole, expert)
    return Swapped(part) if turned else part


def _planned_change(adapter: Adapter, change: FullChange, aligned: _Side) -> PlannedChange:
    """Find what a change of a whole weight replaces, if the checkpoint has it in one piece."""
    wanted = tuple(adapter.tensors[change.key].shape)

    def fits(shape: tuple[int, ...]) -> bool:
        return shape[1:] == wanted[1:] and len(shape) == len(wanted) > 0

    try:
        found = aligned.names.find(aligned.stored_name(change.parameter), fits)
    except SafeprojError:  # such as a new classification head
        return PlannedChange(change, None)
    dtype, shape = dtype_and_shape(found, aligned.checkpoint)
    if dtype not in DTYPES or not fits(shape) or (len(shape) > 2 and not isinstance(found, Stored)):
        return PlannedChange(change, None)
    added = wanted[0] - shape[0]
    if change.rows is not None:
        added = sum(row >= shape[0] for row in change.rows)
    return PlannedChange(change, Flat(found) if len(shape) > 2 else found, added)

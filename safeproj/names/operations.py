"""What transformers does with tensors while it loads them, as expressions about their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from safeproj.checkpoint.expression import (
    Chunk,
    Expression,
    Flat,
    Joined,
    Stacked,
    Stored,
    Swapped,
    dtype_and_shape,
)
from safeproj.checkpoint.interface import Checkpoint
from safeproj.errors import SafeprojError
from safeproj.text import shorten


class UnsupportedError(Exception):
    """An operation that an expression cannot say; the text names it."""


_Values = dict[str, list[Expression]]


@dataclass
class Entry:
    """What one weight is made of.

    Attributes:
        converter: transformers' operations; None if it is one tensor as it is.
        sources: the tensors' names by the converter's pattern that they match, in order.
        target: the converter's pattern that gives this weight.
        clash: tensors of more than one kind come to this name.
    """

    converter: Any
    sources: dict[str, list[str]] = field(default_factory=dict)
    target: str = ""
    clash: bool = False

    def add(self, pattern: str, name: str, converter: Any) -> None:
        """Take one more tensor."""
        self.clash |= converter is not self.converter
        self.sources.setdefault(pattern, []).append(name)

    def expand(self, name: str) -> Iterator[tuple[str, Entry]]:
        """Yield the names of all weights that the converter makes, this one's among them."""
        targets = [] if self.converter is None else self.converter.target_patterns
        first = next((target for target in targets if target in name), None)
        if first is None:
            yield name, replace(self, target=targets[0] if targets else "")
            return
        before, _, after = name.partition(first)
        for target in targets:
            yield before + target + after, replace(self, target=target)

    def expression(self, checkpoint: Checkpoint, shape: tuple[int, ...]) -> Expression:
        """Return the tensors with the operations as an expression.

        Raises:
            UnsupportedError: an operation is of another kind.
        """
        values: _Values = {
            pattern: [Stored(name) for name in names] for pattern, names in self.sources.items()
        }
        if self.clash or (self.converter is None and len(values[""]) > 1):
            raise UnsupportedError("choosing one of them")
        if self.converter is None:
            return values[""][0]
        step = _Step(self.converter, self.sources, checkpoint, shape)
        for operation in self.converter.operations:
            kind = type(operation).__name__
            if kind not in _OPERATIONS:
                raise UnsupportedError(f"transformers' operation {kind}")
            values = _OPERATIONS[kind](operation, values, step)
        found = values.get(self.target, [])
        if len(found) != 1:
            raise UnsupportedError("operations that make no single weight")
        return found[0]


@dataclass(frozen=True)
class _Step:
    """What an operation may need to know beside its values."""

    converter: Any
    names: dict[str, list[str]]
    checkpoint: Checkpoint
    shape: tuple[int, ...]

    @property
    def target(self) -> str:
        """The one weight that is made."""
        if len(self.converter.target_patterns) != 1:
            raise UnsupportedError("operations that make several weights of several tensors")
        return str(self.converter.target_patterns[0])

    def shape_of(self, expression: Expression) -> tuple[int, ...]:
        return dtype_and_shape(expression, self.checkpoint)[1]

    def require_complete(self, pattern: str) -> None:
        """Check that a list has all its items: transformers takes what there is."""
        names = self.names[pattern]
        numbers = [re.findall(r"\d+", name) for name in names]
        varying = [{row[i] for row in numbers} for i in range(min(map(len, numbers)))]
        expected = {str(number) for number in range(len(names))}
        if len(names) > 1 and [found for found in varying if len(found) > 1] != [expected]:
            raise SafeprojError(
                f"{self.checkpoint.source}: {shorten(names)} are not numbered from 0 to "
                f"{len(names) - 1}; is the checkpoint complete?"
            )


def _merge(operation: Any, values: _Values, step: _Step) -> _Values:
    if operation.dim != 0:
        raise UnsupportedError(f"stacking along dimension {operation.dim}")
    found: _Values = {}
    for pattern, parts in values.items():
        step.require_complete(pattern)
        found[step.target if len(values) == 1 else pattern] = [Stacked(tuple(parts))]
    return found


def _concatenate(operation: Any, values: _Values, step: _Step) -> _Values:
    for pattern, parts in values.items():
        if len(parts) > 1:
            step.require_complete(pattern)
    missing = [pattern for pattern in step.converter.source_patterns if pattern not in values]
    if missing:
        raise SafeprojError(
            f"{step.checkpoint.source}: {shorten(name for n in step.names.values() for name in n)} "
            f"lacks {missing[0]} to be joined with; is the checkpoint complete?"
        )
    parts = [part for pattern in step.converter.source_patterns for part in values[pattern]]
    return {step.target: [Joined(tuple(parts), _positive(operation.dim, parts[0], step))]}


def _chunk(operation: Any, values: _Values, step: _Step) -> _Values:
    if getattr(operation, "num_shards_attribute", None) is not None:
        raise UnsupportedError("cutting into as many chunks as the config says")
    part, targets = _only(values), step.converter.target_patterns
    dim = _positive(operation.dim, part, step)
    return {t: [Chunk(part, dim, i, len(targets))] for i, t in enumerate(targets)}


def _transpose(operation: Any, values: _Values, step: _Step) -> _Values:
    part = _only(values)
    shape = step.shape_of(part)
    dims = {operation.dim0 % len(shape), operation.dim1 % len(shape)}
    if dims != {len(shape) - 2, len(shape) - 1}:
        raise UnsupportedError(f"exchanging the dimensions {sorted(dims)} of {len(shape)}")
    # The loader compares the shapes, so a square weight stays as it is.
    stays = getattr(operation, "check_dims", False) and shape == step.shape
    return {_next_name(step): [part if stays else Swapped(part)]}


def _flatten(_: Any, values: _Values, step: _Step) -> _Values:
    part = _only(values)
    return {_next_name(step): [Flat(part) if len(step.shape_of(part)) == 5 else part]}


_OPERATIONS: dict[str, Callable[[Any, _Values, _Step], _Values]] = {
    "MergeModulelist": _merge,
    "Concatenate": _concatenate,
    "Chunk": _chunk,
    "Transpose": _transpose,
    "Conv3dToLinear": _flatten,
}
"""What can be said of transformers' `ConversionOps`, by the names of their classes."""


def _only(values: _Values) -> Expression:
    parts = [part for found in values.values() for part in found]
    if len(parts) != 1:
        raise UnsupportedError("choosing one of several tensors")
    return parts[0]


def _next_name(step: _Step) -> str:
    """Return what an operation on one weight calls it: the target, if there is but one."""
    targets = step.converter.target_patterns
    return str((targets if len(targets) == 1 else step.converter.source_patterns)[0])


def _positive(dim: int, part: Expression, step: _Step) -> int:
    return int(dim) if dim >= 0 else dim + len(step.shape_of(part))

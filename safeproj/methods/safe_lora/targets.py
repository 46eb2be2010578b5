"""Which weights of a model an alignment file is made for, without an adapter to say so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from safeproj.adapter.vocabulary import HEADS
from safeproj.checkpoint.expression import (
    Expression,
    Flat,
    Head,
    Stored,
    dtype_and_shape,
    key_of,
)
from safeproj.errors import SafeprojError
from safeproj.names import Layout, Names
from safeproj.plan.match import oriented
from safeproj.storage.tensorfile import DTYPES
from safeproj.text import natural_order, shorten

ALL_LINEAR = "all-linear"
"""Every linear layer but the output head, as PEFT means it."""


@dataclass(frozen=True)
class Target:
    """One weight that updates may have.

    Attributes:
        parameter: its name in the running model.
        layout: how the running model stores it.
        stored_shape: its shape there.
        expert: which item of a stack is meant.
        aligned: the weight in the aligned checkpoint, (m, n).
        base: the weight in the base checkpoint, (m, n).
        shape: (m, n).
    """

    parameter: str
    layout: Layout
    stored_shape: tuple[int, ...]
    expert: int | None
    aligned: Expression
    base: Expression
    shape: tuple[int, int]

    @property
    def key(self) -> str:
        """Its name in an alignment file."""
        whole: Expression = Stored(self.parameter)
        key = key_of(_as_matrix(whole, self.layout, self.expert))
        assert key is not None
        return key


def find_targets(aligned: Names, base: Names, wanted: Sequence[str]) -> list[Target]:
    """Return the wanted weights in natural order.

    Args:
        aligned: the weights of the aligned checkpoint.
        base: the weights of the base checkpoint.
        wanted: names of modules or their last parts, as PEFT's `target_modules`; or `all-linear`.
            Single experts count where no stack has the name: older adapters have them.

    Raises:
        SafeprojError: one of `wanted` names nothing, or a weight is not in both checkpoints in the
            same shape.
    """
    if not wanted:
        raise SafeprojError(f"--targets: names nothing; expected names of modules, or {ALL_LINEAR}")
    parameters = aligned.parameters()
    found: dict[str, Layout] = {}
    experts: dict[str, Layout] = {}
    for name in wanted:
        chosen = {p: each for p, each in parameters.items() if _is_meant(name, p, each)}
        if name != ALL_LINEAR and not any(each.kind == "experts" for each in chosen.values()):
            experts = experts or aligned.experts()
            chosen |= {p: each for p, each in experts.items() if _is_meant(name, p, each)}
        if not chosen:
            kinds = sorted({_module(parameter).rpartition(".")[2] for parameter in parameters})
            raise SafeprojError(
                f"--targets {name}: {aligned.checkpoint.source} has no such module; it has "
                f"{shorten(kinds)}"
            )
        found |= chosen
    ordered = sorted(found, key=natural_order)
    return [target for name in ordered for target in _targets(name, found[name], aligned, base)]


def _module(parameter: str) -> str:
    return parameter.removesuffix(".weight")


def _is_meant(wanted: str, parameter: str, layout: Layout) -> bool:
    module = _module(parameter)
    if wanted == ALL_LINEAR:
        return layout.kind in ("linear", "conv1d") and module.rpartition(".")[2] not in HEADS
    return module == wanted or module.endswith(f".{wanted}")


def _targets(parameter: str, layout: Layout, aligned: Names, base: Names) -> Iterator[Target]:
    wholes, shapes = [], []
    for side in (aligned, base):
        whole = side.find(parameter, lambda _: True)
        dtype, shape = dtype_and_shape(whole, side.checkpoint)
        if dtype not in DTYPES:
            raise SafeprojError(
                f"{side.checkpoint.source}: {parameter} is stored as {dtype}; supported are "
                f"{', '.join(DTYPES)}: use the checkpoint before quantisation"
            )
        wholes.append(whole)
        shapes.append(shape)
    vocabulary = layout.kind == "embedding" or _module(parameter).rpartition(".")[2] in HEADS
    if vocabulary and shapes[0] != shapes[1] and shapes[0][1:] == shapes[1][1:]:
        rows = min(shape[0] for shape in shapes)
        wholes = [Head(whole, rows) for whole in wholes]
        shapes = [(rows, *shapes[0][1:])] * 2
    if shapes[0] != shapes[1]:
        raise SafeprojError(
            f"{parameter}: shapes do not fit: {list(shapes[0])} in {aligned.checkpoint.source}, "
            f"{list(shapes[1])} in {base.checkpoint.source}; are both of the same model?"
        )
    if layout.kind == "experts" and layout.out_first is None:
        raise SafeprojError(f"{parameter}: nothing tells which side of {list(shapes[0])} is output")
    experts = range(shapes[0][0]) if layout.kind == "experts" and len(shapes[0]) == 3 else [None]
    for expert in experts:
        sides = [_as_matrix(whole, layout, expert) for whole in wholes]
        _, (m, n) = dtype_and_shape(sides[0], aligned.checkpoint)
        yield Target(parameter, layout, shapes[0], expert, sides[0], sides[1], (m, n))


def _as_matrix(whole: Expression, layout: Layout, expert: int | None) -> Expression:
    """Return a weight as (m, n)."""
    if layout.kind == "conv":
        return Flat(whole)
    return oriented(whole, expert, not layout.out_first)

"""Parameters that are adapted directly, such as stacks of experts (`target_parameters`).

On disk the factors of E experts lie in one pair: A is (r·E, a) and B is (b, r·E). Expert e has
the rows `A[e·r : (e+1)·r]`, but every E-th column `B[:, e::E]`. Three things decide which of the
two is on the output side: how the model stores the parameter, whether the model marks it, and the
version of PEFT that wrote the adapter.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from safeproj.adapter.record import AdaptedModule, Adapter, Factor, Kind, TargetParameters
from safeproj.errors import SafeprojError
from safeproj.text import shorten

CURRENT = (0, 19, 1)
"""The version of PEFT since which stacks are stored as they are today."""

UNSAID = "0.17 or one that does not say"
"""The version where the config has none."""


@dataclass(frozen=True)
class StackLayout:
    """How the running model stores a parameter.

    Attributes:
        shape: (E, d1, d2), or (d1, d2).
        out_first: d1 is the output side.
        marked: its module has `is_transposed`, which PEFT takes for (E, in, out).
    """

    shape: tuple[int, ...]
    out_first: bool
    marked: bool

    @property
    def experts(self) -> int:
        """E."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def matrix(self) -> tuple[int, int]:
        """(d1, d2)."""
        return (self.shape[-2], self.shape[-1])


def resolve(
    adapter: Adapter, target: TargetParameters, layouts: Mapping[str, StackLayout]
) -> Iterator[AdaptedModule]:
    """Yield the updates of one module's parameters, one for each expert.

    Args:
        adapter: the adapter.
        target: the module.
        layouts: name of each targeted parameter that the model has to its layout.

    Raises:
        SafeprojError: the factors fit no parameter, or more than one.
    """
    for parameter, (a_key, b_key) in _assign(adapter, target, layouts).items():
        yield from _experts(adapter, parameter, layouts[parameter], a_key, b_key)


def _assign(
    adapter: Adapter, target: TargetParameters, layouts: Mapping[str, StackLayout]
) -> dict[str, tuple[str, str]]:
    """Return which pair of factors belongs to which parameter: their keys do not name it."""
    found = [
        dict(zip(chosen, target.pairs, strict=True))
        for chosen in itertools.permutations(layouts, len(target.pairs))
        if all(
            _fits(adapter, layouts[parameter], *pair)
            for parameter, pair in zip(chosen, target.pairs, strict=True)
        )
    ]
    if len(found) > 1:  # such as up and down without a gate: one is the other turned
        found = [
            chosen
            for chosen in found
            if all(_is_as_written(adapter, layouts[p], *pair) for p, pair in chosen.items())
        ]
    if len(found) == 1:
        return found[0]
    shapes = [f"{key} {list(adapter.tensors[key].shape)}" for pair in target.pairs for key in pair]
    parameters = [f"{name} {list(layouts[name].shape)}" for name in layouts]
    raise SafeprojError(
        f"{adapter.source}: the factors of {target.module} fit "
        f"{'none' if not found else 'more than one'} of its target parameters: found "
        f"{shorten(shapes)}, parameters {shorten(parameters)}; "
        + ("is the adapter for another model?" if not found else "their shapes do not tell")
    )


def _fits(adapter: Adapter, layout: StackLayout, a_key: str, b_key: str) -> bool:
    A, B = adapter.tensors[a_key].shape, adapter.tensors[b_key].shape
    return A[0] % layout.experts == 0 and (A[1], B[0]) in (layout.matrix, layout.matrix[::-1])


def _is_as_written(adapter: Adapter, layout: StackLayout, a_key: str, b_key: str) -> bool:
    """Tell whether factors lie as the version of PEFT that wrote them has it for a parameter."""
    shape = (adapter.tensors[b_key].shape[0], adapter.tensors[a_key].shape[1])
    return shape == (layout.matrix if _is_direct_in(adapter, layout) else layout.matrix[::-1])


def _experts(
    adapter: Adapter, parameter: str, layout: StackLayout, a_key: str, b_key: str
) -> Iterator[AdaptedModule]:
    A, B = adapter.tensors[a_key], adapter.tensors[b_key]
    experts, rank = layout.experts, A.shape[0] // layout.experts
    # Where B A is ΔW as stored, B is on the side of d1; where (B A)ᵀ is, A is.
    b_on_output = _is_direct(adapter, layout, A.shape[1], B.shape[0]) == layout.out_first
    out_features, in_features = layout.matrix if layout.out_first else layout.matrix[::-1]
    name, stacked = parameter.removesuffix(".weight"), len(layout.shape) == 3
    for e in range(experts):
        rows = Factor(a_key, rows=slice(e * rank, (e + 1) * rank), turned=b_on_output is False)
        columns = Factor(b_key, columns=slice(e, None, experts), turned=b_on_output is False)
        yield AdaptedModule(
            name=f"{name}[{e}]" if stacked else name,
            parameter=parameter,
            kind=Kind.parameter,
            output=columns if b_on_output else rows,
            input=rows if b_on_output else columns,
            rank=rank,
            in_features=in_features,
            out_features=out_features,
            weight_shape=layout.shape,
            expert=e if stacked else None,
            turned=not layout.out_first,
        )


def _is_direct(adapter: Adapter, layout: StackLayout, a: int, b: int) -> bool:
    """Tell whether `B A`, not its transpose, is the update of the parameter as it is stored."""
    d1, d2 = layout.matrix
    return (b, a) == (d1, d2) if d1 != d2 else _is_direct_in(adapter, layout)


def _is_direct_in(adapter: Adapter, layout: StackLayout) -> bool:
    """Tell the same of the version of PEFT that wrote the adapter."""
    if len(layout.shape) == 2:
        return True  # every version has treated these like nn.Linear
    version = peft_version(adapter.config)
    if version >= CURRENT:
        return not layout.marked
    if version >= (0, 19, 0):
        return layout.marked
    return False


def as_today(adapter: Adapter) -> Adapter | None:
    """Return the adapter as today's PEFT reads it, where an earlier one wrote stacks of experts.

    Where their factors fit both ways, because the parameter is square, today's PEFT takes them for
    another update, without an error: it does not look at the version in the config.
    """
    if not adapter.targets or peft_version(adapter.config) >= CURRENT:
        return None
    version = ".".join(map(str, CURRENT))
    return replace(adapter, config={**adapter.config, "peft_version": version})


def peft_version(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the version of PEFT that wrote the adapter; before 0.18 it did not say."""
    text = str(config.get("peft_version") or "0.17.0")
    return tuple(int(part) for part in re.findall(r"\d+", text[:40])[:3])

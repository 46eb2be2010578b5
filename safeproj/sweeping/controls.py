"""The simple things that an intervention is compared with, as scores and tensors of an adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy

from safeproj.adapter import AdaptedModule, Adapter
from safeproj.engine import Update
from safeproj.methods import factors
from safeproj.methods.score import Score
from safeproj.storage.arrays import Array, cast, double, single

SHRINK, UNIFORM, RANDOM, COMPLEMENT = "shrink", "uniform", "random", "complement"
SWAPPED = "swapped"

Change = Callable[[Update, Score], Score]
"""Puts something else in the place of what a method makes of a factor."""


def shrunk(update: Update, score: Score) -> Score:
    """Return a score with `‖CB‖/‖B‖ · B` in the place of `C B`, the bias by the same factor."""
    if score.factor is None or score.scale is None:
        return score
    bias = None if update.bias is None else single(update.bias) * score.scale
    return replace(score, factor=single(update.B) * score.scale, bias=bias)


def complement(update: Update, score: Score) -> Score:
    """Return a score with `B - C B`, what projection removes, in the place of `C B`."""
    if score.factor is None:
        return score
    bias = None
    if update.bias is not None and score.bias is not None:
        bias = single(update.bias) - score.bias
    return replace(score, factor=single(update.B) - score.factor, bias=bias)


def scaled(adapter: Adapter, modules: Iterable[AdaptedModule], factor: float) -> dict[str, Array]:
    """Return what replaces the adapter's tensors when all its updates are multiplied by a factor.

    The output factors and the biases of `lora_B` are multiplied, in the dtypes that they have.
    """
    replaced: dict[str, Array] = {}
    for place in (place for module in modules for place in module.written("output")):
        if place.key not in replaced:
            replaced[place.key] = adapter.tensors[place.key].copy()
        there = place.view(replaced)
        there[...] = cast(single(place.view(adapter.tensors)) * factor, there.dtype)
    return replaced


class Sizes:
    """Frobenius norms of an adapter's update `ΔW`, over all its modules and with their scalings.

    Of modules with DoRA it is the update of the direction before it is renormalised.

    Args:
        adapter: as it is.
        modules: its updates.

    Raises:
        SafeprojError: the adapter's files do not tell the scalings.
    """

    def __init__(self, adapter: Adapter, modules: Iterable[AdaptedModule]) -> None:
        self._tensors = adapter.tensors
        self._modules = tuple(module for module in modules if module.rank)
        self._scalings = adapter.format.scalings(adapter, self._modules)

    @property
    def norm(self) -> float:
        """`‖ΔW‖_F` of the adapter as it is."""
        return self.norm_of({})

    def norm_of(self, replaced: Mapping[str, Array]) -> float:
        """Return `‖ΔW'‖_F` of the adapter with these tensors in place of its own."""
        tensors = {**self._tensors, **replaced}
        squares = (
            (self._scalings[module.name] * factors.norm(A, B)) ** 2
            for module in self._modules
            for B, A in [_factors(module, tensors)]
        )
        return math.sqrt(math.fsum(squares))

    def change(self, replaced: Mapping[str, Array]) -> float:
        """Return `‖ΔW' - ΔW‖_F / ‖ΔW‖_F` of the adapter with these tensors in place of its own."""
        tensors = {**self._tensors, **replaced}
        squares = []
        for module in self._modules:
            (B, A), (B_new, A_new) = (_factors(module, each) for each in (self._tensors, tensors))
            if numpy.array_equal(A, A_new):
                size = factors.norm(A, B_new - B)
            else:  # ΔW' - ΔW = [B', -B] [A'; A]
                size = factors.norm(
                    numpy.concatenate([A_new, A]), numpy.concatenate([B_new, -B], axis=1)
                )
            squares.append((self._scalings[module.name] * size) ** 2)
        norm = self.norm
        return math.sqrt(math.fsum(squares)) / norm if norm else 0.0


def _factors(module: AdaptedModule, tensors: Mapping[str, Array]) -> tuple[Array, Array]:
    """Return `B` (m, r) and `A` (r, n) in float64, `A` with AdaLoRA's gain."""
    A = double(module.input.view(tensors))
    if module.gain is not None:
        A = A * double(module.gain.view(tensors))
    return double(module.output.view(tensors)), A

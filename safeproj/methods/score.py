"""What a method made of one update, and what all of them need to make it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from safeproj.adapter.record import AdaptedModule, Factor, Side
from safeproj.checkpoint.hashes import NONE, Sides
from safeproj.engine import Buffers, Source, Update, row_width, rows_per_block
from safeproj.errors import SafeprojError
from safeproj.methods.detail import Detail
from safeproj.methods.factors import CANCELS, CancellationError, Core, cancellation, core
from safeproj.storage.arrays import Array, double, is_finite


@dataclass(frozen=True)
class Settled:
    """What was computed with in place of factors whose terms cancel.

    Attributes:
        core: of the update as `B A = M Q` where `B` is changed, and of its transpose where `A` is.
        after: what takes the place of `M`, (m, k), or (n, k).
    """

    core: Core
    after: Array


@dataclass(frozen=True)
class Score:
    """What a method found out about one update.

    Attributes:
        factor: what takes the place of the factor that the method changes, float32 on the CPU:
            `C B` (m, r); or `A'` (r, n), as it is stored. Of a method that changes both it is `B'`
            (m, r'), of any rank. None where there is nothing to compare an update with, as where
            `V = 0`.
        cosine: similarity of `ΔW` and `C ΔW`, or `ΔW'`; None where `ΔW = 0`, or `factor` is None.
        detail: what else the method says.
        bias: `C b` (m, 1) for the bias of `lora_B`, if there is one.
        scale: `‖C B‖_F / ‖B‖_F`, or that of `A'` and `A`; None where it is undefined.
        bounds: between which that cosine lies where `C` is truncated; None where it is not.
        digests: of the tensors that were read of the aligned and of the base checkpoint, as far as
            they are wanted; from a file that stands for them they are the first of the two. For
            moments those of the safety and the benign data.
        settled: what was computed with where the terms of `B A` cancel.
        other: `A'` (r', n), as it is stored, where both factors are changed.
    """

    factor: Array | None
    cosine: float | None
    detail: Detail
    bias: Array | None = None
    scale: float | None = None
    bounds: tuple[float, float] | None = None
    digests: Sides = NONE
    settled: Settled | None = None
    other: Array | None = None

    @property
    def rank(self) -> int | None:
        """That of `A'`, where both factors are changed."""
        return None if self.other is None else len(self.other)

    def placed(self, module: AdaptedModule, side: Side) -> Iterator[tuple[Factor, Array | None]]:
        """Yield the places of a module that a method of this side changes, with what goes there."""
        for place in module.written(side):
            if place == module.bias:
                yield place, self.bias
            else:
                is_other = side == "both" and place == module.input
                yield place, self.other if is_other else self.factor

    empty: ClassVar[str] = "empty update: B A is zero; kept"
    """What is said where `ΔW = 0`."""

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing to compare the update with."""
        return self.factor is None


def required(results: Sequence[Score | SafeprojError]) -> list[Score]:
    """Return the scores of updates that must all have one.

    Raises:
        SafeprojError: the first of the errors in their place.
    """
    for found in results:
        if isinstance(found, SafeprojError):
            raise found
    return [found for found in results if isinstance(found, Score)]


def core_of(name: str, update: Update, side: Side) -> Core | SafeprojError | None:
    """Return what is computed with where the terms of an update cancel, None where they do not.

    It is that of `B A`, or of its transpose where `A` is the factor that is changed. None, too,
    where the update is exactly zero.
    """
    A, B = (update.A, update.B) if side == "output" else (_gained(update).T, update.stored.T)
    if not cancellation(A, B) > CANCELS:
        return None
    try:
        return core(A, B)
    except CancellationError as error:
        return SafeprojError(f"{name}: {error}")


def _gained(update: Update) -> Array:
    """Return `B` with AdaLoRA's gain: times `A` as it is stored it is the update."""
    return update.B if update.gain is None else double(update.B) * double(update.gain).T


def diagnosis(name: str, source: Source, buffers: Buffers) -> str:
    """Name the tensor that has NaN or Inf, by reading all again."""
    for weight in source.weights:
        rows = rows_per_block(buffers.device, weight)
        staging = buffers.staging(rows * row_width(weight))[0]
        for start, stop in buffers.starts(rows, weight):
            if not is_finite(staging.load(weight, buffers.readers[0], start, stop)):
                return f"{weight.source}: {weight.label} has NaN or Inf; the file is damaged"
    return (
        f"{name}: V has a value that is not finite, though its weights are: they are too large for "
        "float32"
    )

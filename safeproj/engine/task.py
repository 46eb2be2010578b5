"""What the engine is given: plain data, one item per weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy
from numpy import array_equal

from safeproj.checkpoint import Weight
from safeproj.checkpoint.expression import Matrix
from safeproj.storage.arrays import Array, DType, cast, double, promoted, single


class Source(Protocol):
    """What is read for one weight, or for several at once."""

    @property
    def nbytes(self) -> int:
        """Bytes to read."""

    @property
    def weights(self) -> tuple[Weight, ...]:
        """What is read."""


@dataclass(frozen=True)
class Replacement:
    """What takes the place of an update's factors, where it was made by running the model.

    Attributes:
        A: `A'` (r', n), as it is stored.
        B: `B'` (m, r'); None where it stays.
        told: what else was found out, by name.
    """

    A: Array
    B: Array | None = None
    told: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """One low-rank update of a weight.

    Attributes:
        stored: `A` (r, n) as it is stored, without `gain`.
        B: (m, r).
        bias: the bias of `lora_B` (m, 1), if there is one.
        gain: AdaLoRA's singular values (r, 1), by which the rows of `A` are multiplied.
        replacement: what takes the place of its factors, where that was made beforehand.
        scaling: `s`, by which loaders multiply `B A`, where the method needs it.
    """

    stored: Array
    B: Array
    bias: Array | None = None
    gain: Array | None = None
    replacement: Replacement | None = None
    scaling: float | None = None

    @property
    def A(self) -> Array:
        """The input-side factor of the update, (r, n)."""
        return self.with_gain(self.stored)

    def with_gain(self, stored: Array) -> Array:
        """Return what the update has of a factor (r, n) that is stored."""
        if self.gain is None:
            return stored
        dtype = promoted(stored.dtype, self.gain.dtype)
        return cast(stored, dtype) * cast(self.gain, dtype)

    def cast(self, dtype: DType) -> Update | None:
        """Return the update without its bias from factors of a dtype; None if they are the same."""
        own = (self.stored, self.B, self.gain)
        found = [None if each is None else cast(each, dtype) for each in own]
        pairs = zip(own, found, strict=True)
        if all(a is None or b is None or array_equal(double(a), double(b)) for a, b in pairs):
            return None
        stored, B, gain = found
        assert stored is not None
        assert B is not None
        return Update(stored, B, gain=gain, scaling=self.scaling)

    def multiplied(self, dtype: DType, scaling: float) -> Update | None:
        """Return the update as servers have it that multiply the cast `B` by the scaling at once.

        In that dtype, which can round `B` away. It is divided by the scaling again, in float64.

        Args:
            dtype: what servers cast factors to.
            scaling: not zero.

        Returns:
            None if it is what casting alone gives.
        """
        stored, B = cast(self.stored, dtype), cast(self.B, dtype)
        scaled = double(cast(single(B) * numpy.float32(scaling), dtype)) / scaling
        if array_equal(scaled, double(B)):
            return None
        gain = None if self.gain is None else cast(self.gain, dtype)
        return Update(stored, single(scaled), gain=gain, scaling=self.scaling)


@dataclass(frozen=True)
class Task:
    """One weight, and all updates of it that are to be scored: it is read once for all of them.

    Attributes:
        name: of the module, for messages.
        origin: what is read for it.
        updates: the updates, of one adapter or of many.
    """

    name: str
    origin: Source
    updates: tuple[Update, ...]


@dataclass(frozen=True)
class Comparison:
    """A tensor of the adapter that replaces a weight, or rows of it.

    Attributes:
        name: the weight's name in the running model.
        aligned: the weight in the aligned checkpoint, as a matrix.
        replacement: what takes its place, as a matrix: an adapter's tensor, or what is stored.
        rows: the rows that it replaces, None for all.
    """

    name: str
    aligned: Matrix
    replacement: Array | Matrix
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Progress:
    """One step forward: `nbytes` of the checkpoints were read, or a module was `finished`."""

    name: str
    nbytes: int = 0
    finished: bool = False

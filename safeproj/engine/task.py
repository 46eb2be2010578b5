"""What the engine is given: plain data, one item per weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from safeproj.checkpoint import Weight
from safeproj.checkpoint.expression import Matrix

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Source(Protocol):
    """What is read for one weight, or for several at once."""

    @property
    def nbytes(self) -> int:
        """Bytes to read."""

    @property
    def weights(self) -> tuple[Weight, ...]:
        """What is read."""


@dataclass(frozen=True)
class Update:
    """One low-rank update of a weight.

    Attributes:
        stored: `A` (r, n) as it is stored, without `gain`.
        B: (m, r).
        bias: the bias of `lora_B` (m, 1), if there is one.
        gain: AdaLoRA's singular values (r, 1), by which the rows of `A` are multiplied.
        replacement: `A'` (r, n), where it was made by running the model.
    """

    stored: Tensor
    B: Tensor
    bias: Tensor | None = None
    gain: Tensor | None = None
    replacement: Tensor | None = None

    @property
    def A(self) -> Tensor:
        """The input-side factor of the update, (r, n)."""
        return self.with_gain(self.stored)

    def with_gain(self, stored: Tensor) -> Tensor:
        """Return what the update has of a factor (r, n) that is stored."""
        return stored if self.gain is None else stored * self.gain

    def cast(self, dtype: torch.dtype) -> Update | None:
        """Return the update without its bias from factors of a dtype; None if they are the same."""
        own = (self.stored, self.B, self.gain)
        cast = [None if each is None else each.to(dtype) for each in own]
        pairs = zip(own, cast, strict=True)
        if all(a is None or b is None or bool((a.double() == b.double()).all()) for a, b in pairs):
            return None
        stored, B, gain = cast
        assert stored is not None
        assert B is not None
        return Update(stored, B, gain=gain)

    def multiplied(self, dtype: torch.dtype, scaling: float) -> Update | None:
        """Return the update as servers have it that multiply the cast `B` by the scaling at once.

        In that dtype, which can round `B` away. It is divided by the scaling again, in float64.

        Args:
            dtype: what servers cast factors to.
            scaling: not zero.

        Returns:
            None if it is what casting alone gives.
        """
        stored, B = self.stored.to(dtype), self.B.to(dtype)
        scaled = (B * scaling).double() / scaling
        if bool((scaled == B.double()).all()):
            return None
        gain = None if self.gain is None else self.gain.to(dtype)
        return Update(stored, scaled.float(), gain=gain)


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
        replacement: what the adapter puts in its place, as a matrix.
        rows: the rows that it replaces, None for all.
    """

    name: str
    aligned: Matrix
    replacement: Tensor
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Progress:
    """One step forward: `nbytes` of the checkpoints were read, or a module was `finished`."""

    name: str
    nbytes: int = 0
    finished: bool = False

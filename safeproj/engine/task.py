"""What the engine is given and what it gives back: plain data, one item per weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from safeproj.checkpoint import Weight
from safeproj.checkpoint.expression import Matrix

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from safeproj.methods.factors import Core


@dataclass(frozen=True)
class Difference:
    """`V` of one weight as the difference of two checkpoints.

    Attributes:
        aligned: the weight in the aligned checkpoint, (m, n).
        base: the weight in the base checkpoint, (m, n).
    """

    aligned: Matrix
    base: Matrix

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return self.aligned.nbytes + self.base.nbytes

    @property
    def weights(self) -> tuple[Weight, ...]:
        """What is read."""
        return (self.aligned.weight, self.base.weight)


@dataclass(frozen=True)
class Kept:
    """What an alignment file holds of one weight.

    Attributes:
        form: `V` for `V` (m, n) itself, `C` for the projector (m, m), `U` for the leading
            eigenvectors of `C` (m, K).
        weight: the float32 matrix of that form; None where `V = 0`.
        alignment_norm: `‖V‖_F`.
        eigenvalues: of `C`, (K,), for form `U`.
        error: upper bound of `‖C - C_K‖_F / ‖C‖_F`.
        residual: upper bound of `‖C - C_K‖₂`.
        leak: upper bound of `‖Uᵀ (C - C_K) U‖₂`.
    """

    form: str
    weight: Weight | None
    alignment_norm: float
    eigenvalues: tuple[float, ...] = ()
    error: float = 0.0
    residual: float = 0.0
    leak: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return 0 if self.weight is None else self.weight.shape[0] * self.weight.row_bytes

    @property
    def weights(self) -> tuple[Weight, ...]:
        """What is read."""
        return () if self.weight is None else (self.weight,)


@dataclass(frozen=True)
class SafetyBasis:
    """What a safety module holds of one weight.

    Attributes:
        weight: `U` (m, k), float32, orthonormal columns, the most important first.
        rank: how many of the columns are used.
        energies: for each of the k columns the share of the safety data's output energy that it
            and those before it hold.
    """

    weight: Weight
    rank: int
    energies: tuple[float, ...]

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return self.weight.shape[0] * self.weight.row_bytes

    @property
    def weights(self) -> tuple[Weight, ...]:
        """What is read."""
        return (self.weight,)


@dataclass(frozen=True)
class StoredMoment:
    """A second moment of a layer's inputs in a file.

    Attributes:
        weight: the moment (n, n), or `X` (k, n) with `XᵀX` the moment; float32.
        whole: which of the two.
    """

    weight: Weight
    whole: bool


@dataclass(frozen=True)
class Moments:
    """The second moments of the inputs that one or several weights read.

    Attributes:
        safety: on safety data, `H`.
        benign: on benign data, `S`.
    """

    safety: StoredMoment
    benign: StoredMoment

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(weight.shape[0] * weight.row_bytes for weight in self.weights)

    @property
    def weights(self) -> tuple[Weight, ...]:
        """What is read."""
        return (self.safety.weight, self.benign.weight)


Origin = Difference | Kept | SafetyBasis | Moments
"""What the projector of one weight follows from; moments serve all weights that read one input."""


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
        origin: what the projector follows from.
        updates: the updates, of one adapter or of many.
    """

    name: str
    origin: Origin
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
class Effects:
    """How strongly an update acts on what a layer reads, without its scaling.

    Attributes:
        safety: `E ‖ΔW x‖²` on safety data.
        benign: the same on benign data, with the ridge.
    """

    safety: float
    benign: float

    @property
    def ratio(self) -> float:
        """`E_safety ‖ΔW x‖² / E_benign ‖ΔW x‖²`."""
        return self.safety / self.benign if self.benign > 0.0 else 0.0


@dataclass(frozen=True)
class Settled:
    """What the engine computed with in place of factors whose terms cancel.

    Attributes:
        core: of the update as `B A = M Q` where `B` is changed, and of its transpose where `A` is.
        after: what takes the place of `M`, (m, k), or (n, k).
    """

    core: Core
    after: Tensor


@dataclass(frozen=True)
class Score:
    """What the engine found out about one update.

    Attributes:
        alignment_norm: `‖V‖_F`; None where a method has no `V`.
        factor: what takes the place of the factor that the method changes, float32 on the CPU:
            `C B` (m, r), None where `V = 0`; or `A'` (r, n), as it is stored.
        bias: `C b` (m, 1) for the bias of `lora_B`, if there is one.
        cosine: similarity of `ΔW` and `C ΔW`, or `ΔW'`; None where `V = 0` or `ΔW = 0`.
        bounds: between which that cosine lies where `C` is truncated; None where it is not.
        truncation: upper bound of `‖C - C_K‖_F / ‖C‖_F`, 0 where `C` is not truncated.
        scale: `‖C B‖_F / ‖B‖_F`, or that of `A'` and `A`; None where it is undefined.
        rank: k of a truncated projector, or of the basis of a safety subspace.
        sha256: for the aligned and the base checkpoint, label of each tensor read to the digest of
            its bytes, if wanted; from a file that stands for them they are the first of the two.
            For moments those of the safety and the benign data.
        safety_share: `‖Uᵀ ΔW‖_F² / ‖ΔW‖_F²`, for SaLoRA; None where it is undefined.
        energies: those of the `SafetyBasis`, for SaLoRA.
        before: how strongly the update acts, for moments.
        after: the same of what takes its place.
        residual: upper bound of `‖C - C_K‖₂` where `C` is truncated, else 0.
        settled: what was computed with where the terms of `B A` cancel.
    """

    alignment_norm: float | None
    factor: Tensor | None
    bias: Tensor | None
    cosine: float | None
    scale: float | None
    rank: int | None
    sha256: tuple[dict[str, str], dict[str, str]] | None
    bounds: tuple[float, float] | None = None
    truncation: float = 0.0
    safety_share: float | None = None
    energies: tuple[float, ...] = ()
    before: Effects | None = None
    after: Effects | None = None
    residual: float = 0.0
    settled: Settled | None = None


@dataclass(frozen=True)
class Progress:
    """One step forward: `nbytes` of the checkpoints were read, or a module was `finished`."""

    name: str
    nbytes: int = 0
    finished: bool = False

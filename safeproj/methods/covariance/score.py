"""Scoring by the covariance-weighted correction: how strongly updates act on two kinds of data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from safeproj import engine
from safeproj.engine import Buffers, KeptBlocks, OnProgress, Task, Update
from safeproj.errors import SafeprojError
from safeproj.methods.covariance.detail import Acting, Effects
from safeproj.methods.covariance.formulas import (
    Correction,
    Moment,
    Reconstruction,
    SingularError,
)
from safeproj.methods.covariance.sources import Moments, StoredMoment
from safeproj.methods.detail import Detail
from safeproj.methods.factors import Core
from safeproj.methods.measures import scale, similarity
from safeproj.methods.score import Score, Settled, core_of, diagnosis
from safeproj.records.profile import Usage

T = TypeVar("T")


def score(
    task: Task, formulas: Correction | Reconstruction, buffers: Buffers, *, digests: bool
) -> tuple[Score | SafeprojError, ...]:
    """Score all updates of the weights that read one input.

    Args:
        task: the weights and their updates.
        formulas: how they are corrected.
        buffers: of the thread.
        digests: compute the SHA-256 of what is read.

    Raises:
        SafeprojError: the moments are none.
    """
    assert isinstance(task.origin, Moments)
    H, S, sha256 = _moments(task.name, task.origin, buffers, digests)
    return corrected(task, formulas, H, S, sha256)


def corrected(
    task: Task,
    formulas: Correction | Reconstruction,
    H: Moment,
    S: Moment,
    sha256: tuple[dict[str, str], dict[str, str]] | None = None,
) -> tuple[Score | SafeprojError, ...]:
    """Score all updates of the weights that read one input: their `A` lie below each other.

    Args:
        task: the weights and their updates.
        formulas: how they are corrected.
        H: of the safety data.
        S: of the benign data.
        sha256: the digests of what both were read from, if wanted.

    Raises:
        SafeprojError: the moments are none.
    """
    cores = [core_of(task.name, update, "input") for update in task.updates]
    pairs = list(zip(task.updates, cores, strict=True))
    if isinstance(formulas, Reconstruction):
        made = [_input(known, update.replacement) for update, known in pairs]
        return tuple(
            _corrected_score(task.name, update, known, own.to(H.matrix.device), (H, S), sha256)
            for (update, known), own in zip(pairs, made, strict=True)
        )
    inputs = [_input(known, update.stored) for update, known in pairs]
    A = torch.cat(inputs).to(H.matrix.device)
    try:
        found = formulas.from_moments(H, S, A).float()
    except SingularError as error:
        sources = " and ".join(dict.fromkeys(each.source for each in task.origin.weights))
        raise SafeprojError(
            f"{task.name}: {error} in the statistics of {sources}; expected those of data that "
            "reaches the layer: make them again with `safeproj stats`"
        ) from error
    parts = found.split([len(each) for each in inputs])
    return tuple(
        _corrected_score(task.name, update, known, own, (H, S), sha256)
        for (update, known), own in zip(pairs, parts, strict=True)
    )


def _input(known: Core | SafeprojError | None, stored: Tensor | None) -> Tensor:
    """Return a factor (r, n) as it is stored, or what stands for it, in float32."""
    assert stored is not None
    return known.coordinates(stored.T).T.float() if isinstance(known, Core) else stored.float()


def _moments(
    name: str, origin: Moments, buffers: Buffers, digests: bool
) -> tuple[Moment, Moment, tuple[dict[str, str], dict[str, str]] | None]:
    """Return both moments, and the digests of what was read for them."""
    try:
        H, safety = _moment(name, origin.safety, buffers, digests)
        S, benign = _moment(name, origin.benign, buffers, digests)
    except FloatingPointError as error:
        raise SafeprojError(diagnosis(name, origin, buffers)) from error
    return H, S, (safety, benign) if digests else None


def _moment(
    name: str, stored: StoredMoment, buffers: Buffers, digests: bool
) -> tuple[Moment, dict[str, str]]:
    """Return a moment in float64 on the device, and the digest of what was read for it."""
    blocks = KeptBlocks(name, stored.weight, buffers, digests=digests)
    matrix = torch.empty(stored.weight.shape, dtype=torch.float64, device=buffers.device)
    start = 0
    for block in blocks:
        matrix[start : start + len(block)] = block
        start += len(block)
    assert blocks.sha256 is not None
    return Moment(matrix, stored.whole), blocks.sha256[0]


def _corrected_score(
    name: str,
    update: Update,
    known: Core | SafeprojError | None,
    corrected: Tensor,
    moments: tuple[Moment, Moment],
    sha256: tuple[dict[str, str], dict[str, str]] | None,
) -> Score | SafeprojError:
    """Return the score of an update from its `A'`, as it is stored, or what stands for it."""
    if isinstance(known, SafeprojError):
        return known
    device, factor = corrected.device, corrected.cpu().clone()
    if not bool(factor.isfinite().all()):
        return SafeprojError(f"{name}: the corrected factor has a value that is not finite")
    if known is None:
        A, B = update.A.double(), update.B
        after = update.with_gain(factor).double()  # M acts on columns, AdaLoRA's gain on rows
        settled = None
    else:
        A, B, after = known.M.T, known.Q.T, factor.double()
        settled, factor = Settled(known, after.T), known.factor(after.T).T.float()
        if not bool(factor.isfinite().all()):
            return SafeprojError(f"{name}: the corrected factor has a value that is not finite")
    cosine = similarity(B.T, A.T, after.T)
    found = Score(factor, cosine, Detail(), sha256=sha256, settled=settled)
    if cosine is None:
        return found
    products = B.double().T @ B.double()

    def effects(factor: Tensor) -> Effects:
        on_device = factor.to(device)
        safety, benign = (
            float((products * (moment.apply(on_device) @ on_device.T).cpu()).sum())
            for moment in moments
        )
        benign += moments[1].ridge * float((products * (factor @ factor.T)).sum())
        return Effects(max(safety, 0.0), benign)

    return replace(found, scale=scale(A, after), detail=Acting(effects(A), effects(after)))


def moments(
    tasks: Sequence[Task],
    use: Callable[[Task, Moment, Moment], T],
    *,
    device: str = "auto",
    workers: int | None = None,
    on_progress: OnProgress | None = None,
    usage: Usage | None = None,
) -> Iterator[T]:
    """Yield what `use` makes of the second moments of each task, in the given order.

    Args:
        tasks: weights that read one input each, with `Moments` as their origin.
        use: called with the task, `H` and `S`; must depend on nothing else.
        device: as for `engine.run`.
        workers: as for `engine.run`; each holds two moments.
        on_progress: as for `engine.run`.
        usage: as for `engine.run`.

    Raises:
        SafeprojError: as for `engine.run`.
    """

    def work(buffers: Buffers, task: Task) -> T:
        assert isinstance(task.origin, Moments)
        H, S, _ = _moments(task.name, task.origin, buffers, digests=False)
        return use(task, H, S)

    yield from engine.run(
        tasks,
        work,
        device=device,
        wide=True,
        workers=workers,
        on_progress=on_progress,
        usage=usage,
    )

"""Scoring by the covariance-weighted correction: how strongly updates act on two kinds of data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TypeVar

import numpy

from safeproj import engine
from safeproj.checkpoint.hashes import NONE, Digests, Hash, Sides
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
from safeproj.storage.arrays import Array, double, is_finite, on_device, single, to_host

T = TypeVar("T")


def score(
    task: Task,
    formulas: Correction | Reconstruction,
    buffers: Buffers,
    *,
    hashes: Collection[Hash],
) -> tuple[Score | SafeprojError, ...]:
    """Score all updates of the weights that read one input.

    Args:
        task: the weights and their updates.
        formulas: how they are corrected.
        buffers: of the thread.
        hashes: by which what is read is hashed.

    Raises:
        SafeprojError: the moments are none.
    """
    assert isinstance(task.origin, Moments)
    H, S, digests = read_moments(task.name, task.origin, buffers, hashes)
    return corrected(task, formulas, H, S, digests)


def corrected(
    task: Task,
    formulas: Correction | Reconstruction,
    H: Moment,
    S: Moment,
    digests: Sides = NONE,
) -> tuple[Score | SafeprojError, ...]:
    """Score all updates of the weights that read one input: their `A` lie below each other.

    Args:
        task: the weights and their updates.
        formulas: how they are corrected.
        H: of the safety data.
        S: of the benign data.
        digests: of what both were read from, if wanted.

    Raises:
        SafeprojError: the moments are none.
    """
    cores = [core_of(task.name, update, "input") for update in task.updates]
    pairs = list(zip(task.updates, cores, strict=True))
    if isinstance(formulas, Reconstruction):
        made = [_input(known, _replaced(update)) for update, known in pairs]
        return tuple(
            _corrected_score(task.name, update, known, own, (H, S), digests)
            for (update, known), own in zip(pairs, made, strict=True)
        )
    inputs = [_input(known, update.stored) for update, known in pairs]
    A = on_device(numpy.concatenate(inputs), H.matrix)
    try:
        found = single(to_host(formulas.from_moments(H, S, A)))
    except SingularError as error:
        raise singular(task, error) from error
    parts = numpy.split(found, list(accumulate(map(len, inputs)))[:-1])
    return tuple(
        _corrected_score(task.name, update, known, own, (H, S), digests)
        for (update, known), own in zip(pairs, parts, strict=True)
    )


def singular(task: Task, error: SingularError) -> SafeprojError:
    """Return the error of moments that cannot be corrected by."""
    sources = " and ".join(dict.fromkeys(each.source for each in task.origin.weights))
    return SafeprojError(
        f"{task.name}: {error} in the statistics of {sources}; expected those of data that "
        "reaches the layer: make them again with `safeproj stats`"
    )


def _replaced(update: Update) -> Array:
    assert update.replacement is not None
    return update.replacement.A


def _input(known: Core | SafeprojError | None, stored: Array) -> Array:
    """Return a factor (r, n) as it is stored, or what stands for it, in float32."""
    return single(known.coordinates(stored.T).T if isinstance(known, Core) else stored)


def read_moments(
    name: str, origin: Moments, buffers: Buffers, hashes: Collection[Hash]
) -> tuple[Moment, Moment, Sides]:
    """Return both moments, and the digests of what was read for them."""
    try:
        H, safety = _moment(name, origin.safety, buffers, hashes)
        S, benign = _moment(name, origin.benign, buffers, hashes)
    except FloatingPointError as error:
        raise SafeprojError(diagnosis(name, origin, buffers)) from error
    return H, S, (safety, benign)


def _moment(
    name: str, stored: StoredMoment, buffers: Buffers, hashes: Collection[Hash]
) -> tuple[Moment, Digests]:
    """Return a moment in float64 on the device, and the digest of what was read for it."""
    blocks = KeptBlocks(name, stored.weight, buffers, hashes)
    matrix = buffers.device.empty(stored.weight.shape, "float64")
    start = 0
    for block in blocks:
        matrix[start : start + len(block), :] = block
        start += len(block)
    return Moment(matrix, stored.whole), blocks.digests


def _corrected_score(
    name: str,
    update: Update,
    known: Core | SafeprojError | None,
    corrected: Array,
    moments: tuple[Moment, Moment],
    digests: Sides,
) -> Score | SafeprojError:
    """Return the score of an update from its `A'`, as it is stored, or what stands for it."""
    if isinstance(known, SafeprojError):
        return known
    factor = corrected.copy()  # the others' may be let go
    if not is_finite(factor):
        return SafeprojError(f"{name}: the corrected factor has a value that is not finite")
    if known is None:
        A, B = double(update.A), update.B
        after = double(update.with_gain(factor))  # M acts on columns, AdaLoRA's gain on rows
        settled = None
    else:
        A, B, after = known.M.T, known.Q.T, double(factor)
        settled, factor = Settled(known, after.T), single(known.factor(after.T).T)
        if not is_finite(factor):
            return SafeprojError(f"{name}: the corrected factor has a value that is not finite")
    cosine = similarity(B.T, A.T, after.T)
    found = Score(factor, cosine, Detail(), digests=digests, settled=settled)
    if cosine is None:
        return found
    products = double(B).T @ double(B)

    def effects(factor: Array) -> Effects:
        there = on_device(numpy.ascontiguousarray(factor), moments[0].matrix)
        safety, benign = (
            float((products * to_host(moment.apply(there) @ there.T)).sum()) for moment in moments
        )
        benign += moments[1].ridge * float((products * (factor @ factor.T)).sum())
        return Effects(max(safety, 0.0), benign)

    return replace(found, scale=scale(A, after), detail=Acting(effects(A), effects(after)))


def moments(
    tasks: Sequence[Task],
    use: Callable[[Task, Moment, Moment, Sides], T],
    *,
    device: str = "auto",
    workers: int | None = None,
    on_progress: OnProgress | None = None,
    usage: Usage | None = None,
    hashes: Collection[Hash] = (),
) -> Iterator[T]:
    """Yield what `use` makes of the second moments of each task, in the given order.

    Args:
        tasks: weights that read one input each, with `Moments` as their origin.
        use: called with the task, `H`, `S` and the digests of both; must depend on nothing else.
        device: as for `engine.run`.
        workers: as for `engine.run`; each holds two moments.
        on_progress: as for `engine.run`.
        usage: as for `engine.run`.
        hashes: by which what is read is hashed.

    Raises:
        SafeprojError: as for `engine.run`.
    """

    def work(buffers: Buffers, task: Task) -> T:
        assert isinstance(task.origin, Moments)
        return use(task, *read_moments(task.name, task.origin, buffers, hashes))

    yield from engine.run(
        tasks,
        work,
        device=device,
        wide=True,
        workers=workers,
        on_progress=on_progress,
        usage=usage,
    )

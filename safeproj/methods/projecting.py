"""Scoring by methods that project: `ΔW` becomes `C ΔW`, by `C B` in the place of `B`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy

from safeproj.checkpoint.hashes import Sides
from safeproj.engine import Buffers, Task, Update
from safeproj.errors import SafeprojError
from safeproj.methods.blocks import Projected
from safeproj.methods.factors import Core
from safeproj.methods.measures import scale
from safeproj.methods.score import Score, Settled, core_of, diagnosis
from safeproj.storage.arrays import Array, double, is_finite, single, to_host

Project = Callable[[Array], tuple[Projected, Sides]]
"""Makes `C B` of `B` (m, r), float32 on the device, and the digests of what was read for it."""

Measure = Callable[[Array, Array, Projected], Score]
"""Makes the score of `A`, `B` and what they were projected to, as far as its cosine goes."""


def projected(
    task: Task, buffers: Buffers, project: Project, measure: Measure
) -> tuple[Score | SafeprojError, ...]:
    """Score all updates of one weight in one reading: their factors lie side by side.

    Args:
        task: the weight and its updates.
        buffers: of the thread.
        project: reads the weight.
        measure: says how an update and its projection compare.

    Raises:
        SafeprojError: the weight has a value that is not finite.
    """
    cores = [core_of(task.name, update, "output") for update in task.updates]
    pairs = zip(task.updates, cores, strict=True)
    factors = [_output(update, known) for update, known in pairs]
    B = buffers.device.put(numpy.concatenate(factors, axis=1))
    try:
        found, digests = project(B)
    except FloatingPointError as error:
        raise SafeprojError(diagnosis(task.name, task.origin, buffers)) from error
    widths = [factor.shape[1] for factor in factors]
    CBs, UBs = (
        [None] * len(widths) if each is None else _parts(to_host(each), widths)
        for each in (found.CB, found.UB)
    )
    return tuple(
        known
        if isinstance(known, SafeprojError)
        else _update_score(task, update, known, found, CB, UB, digests, measure)
        for update, known, CB, UB in zip(task.updates, cores, CBs, UBs, strict=True)
    )


def _parts(whole: Array, widths: Sequence[int]) -> Sequence[Array]:
    """Return the columns of a matrix in parts of these widths."""
    return numpy.split(whole, list(accumulate(widths))[:-1], axis=1)


def _output(update: Update, known: Core | SafeprojError | None) -> Array:
    """Return `B`, or what stands for it, in float32 with the bias as a further column."""
    B = known.M if isinstance(known, Core) else update.B
    parts = [B] if update.bias is None else [B, update.bias]
    return numpy.concatenate([single(part) for part in parts], axis=1)


def _update_score(
    task: Task,
    update: Update,
    known: Core | None,
    found: Projected,
    CB: Array | None,
    UB: Array | None,
    digests: Sides,
    measure: Measure,
) -> Score | SafeprojError:
    if CB is None:
        return replace(measure(update.A, update.B, found), digests=digests)
    if not is_finite(CB):
        return SafeprojError(
            f"{task.name}: the projected factor has a value that is not finite, though its weights "
            "are: they are too large for float32"
        )
    A, B = (update.A, update.B) if known is None else (known.Q, known.M)
    rank = B.shape[1]
    Cb = None if update.bias is None else CB[:, rank:].copy()
    CB = CB[:, :rank].copy()  # the others' may be let go
    UB = None if UB is None else UB[:, :rank]
    score = measure(A, B, replace(found, CB=CB, UB=UB))
    if known is not None:
        settled = Settled(known, double(CB))
        score = replace(score, factor=single(known.factor(CB)), settled=settled)
    if score.cosine is not None and not math.isfinite(score.cosine):
        return SafeprojError(
            f"{task.name}: the cosine is not finite; the adapter's factors are too large"
        )
    return replace(
        score,
        bias=Cb,
        scale=None if score.cosine is None else scale(B, CB),
        digests=digests,
    )

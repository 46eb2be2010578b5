"""Scoring by merging: Safe LoRA's cosine, and what takes the place of an update."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy

from safeproj.checkpoint.hashes import Hash
from safeproj.engine import Buffers, Task, Update
from safeproj.errors import SafeprojError
from safeproj.methods.detail import Detail
from safeproj.methods.factors import CancellationError, cosine, norm, settled
from safeproj.methods.merge.detail import Mixed
from safeproj.methods.merge.forms import Merging
from safeproj.methods.merge.formulas import Factors, merged
from safeproj.methods.merge.sources import Both
from safeproj.methods.safe_lora.method import SafeLora
from safeproj.methods.score import Score
from safeproj.storage.arrays import double, is_finite, single


def score(
    task: Task,
    formulas: Any,
    buffers: Buffers,
    *,
    hashes: Collection[Hash],
    deciding: SafeLora | None,
    merging: Merging,
) -> tuple[Score | SafeprojError, ...]:
    """Score all updates of one weight, and merge each with the safe one.

    Args:
        task: the weight and its updates.
        formulas: nothing.
        buffers: of the thread.
        hashes: by which what is read is hashed.
        deciding: by whose cosine modules are chosen; None for that of `ΔW` and `ΔW'`.
        merging: how updates are merged.

    Raises:
        SafeprojError: a weight has a value that is not finite.
    """
    del formulas
    scores = decided(task, buffers, deciding, hashes)
    assert isinstance(task.origin, Both)
    return merged_scores(task, scores, task.origin.safe, merging, is_alone=deciding is None)


def decided(
    task: Task, buffers: Buffers, deciding: SafeLora | None, hashes: Collection[Hash] = ()
) -> tuple[Score | SafeprojError, ...]:
    """Return Safe LoRA's scores of all updates of one weight, by which modules are chosen."""
    if deciding is None:
        return tuple(Score(update.B, None, Detail()) for update in task.updates)
    assert isinstance(task.origin, Both)
    assert task.origin.deciding is not None
    own = replace(task, origin=task.origin.deciding)
    return deciding.kernel()(own, deciding.formulas, buffers, hashes=hashes)


def merged_scores(
    task: Task,
    scores: Sequence[Score | SafeprojError],
    safe: Update | None,
    merging: Merging,
    *,
    is_alone: bool,
) -> tuple[Score | SafeprojError, ...]:
    """Return these scores with what merging makes of the updates.

    Args:
        task: the weight and its updates.
        scores: of them, from `decided`.
        safe: the safe update, None where that is zero.
        merging: how they are merged.
        is_alone: whether there are no models, so that the cosine is that of `ΔW` and `ΔW'`.
    """
    return tuple(
        each
        if isinstance(each, SafeprojError)
        else _merged(task.name, update, each, safe, merging, is_alone=is_alone)
        for update, each in zip(task.updates, scores, strict=True)
    )


def _merged(
    name: str,
    update: Update,
    score: Score,
    other: Update | None,
    merging: Merging,
    *,
    is_alone: bool,
) -> Score | SafeprojError:
    """Return the score with what merging makes of the update, where that is not zero."""
    detail = Mixed(score.detail, merging.form)
    if score.factor is None:
        return replace(score, detail=detail)
    try:
        own = _factors(update)
        safe = None if other is None else _factors(other)
    except CancellationError as error:
        return SafeprojError(f"{name}: {error}")
    size = norm(*own)
    if size == 0.0:
        return replace(score, factor=single(update.B), settled=None, detail=detail)
    assert update.scaling is not None
    ratio = 1.0 if other is None else (other.scaling or 0.0) / update.scaling
    ranks = len(update.stored), 0 if other is None else len(other.stored)
    found = merged(merging, own, safe, ratio, merging.written_rank(*ranks))
    factor, replaced = single(found.B), single(found.A)
    if not (is_finite(factor) and is_finite(replaced)):
        return SafeprojError(f"{name}: the merged factors have a value that is not finite")
    change = norm(
        numpy.concatenate([found.A, own[0]]), numpy.concatenate([found.B, -own[1]], axis=1)
    )
    return replace(
        score,
        factor=factor,
        other=replaced,
        settled=None,
        cosine=cosine(own, (found.A, found.B)) if is_alone else score.cosine,
        scale=norm(found.A, found.B) / size,
        bias=_bias(update, other, merging.weight, ratio),
        detail=replace(detail, rank=len(replaced), change=change / size, error=found.error),
    )


def _factors(update: Update) -> Factors:
    """Return factors in whose product no terms cancel.

    Raises:
        CancellationError: the product is not known.
    """
    A, B = settled(update.A, update.B)
    return A, B


def _bias(update: Update, other: Update | None, weight: float, ratio: float) -> Any:
    """Return the merged bias of `lora_B`, which is an update of the output, if there is one."""
    if update.bias is None:
        return None
    own = (1.0 - weight) * double(update.bias)
    safe = None if other is None else other.bias
    return single(own if safe is None else own + weight * ratio * double(safe))

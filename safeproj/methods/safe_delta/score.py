"""Scoring by Safe Delta: the cosine of an update and of what takes its place."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from safeproj.checkpoint.hashes import Hash
from safeproj.engine import Buffers, Task, Update
from safeproj.errors import SafeprojError
from safeproj.methods.factors import CancellationError, cosine, norm, settled
from safeproj.methods.safe_delta.detail import Kept
from safeproj.methods.score import Score
from safeproj.storage.arrays import is_finite, single


def score(
    task: Task, formulas: Any, buffers: Buffers, *, hashes: Collection[Hash]
) -> tuple[Score | SafeprojError, ...]:
    """Score all updates of one weight, whose replacements were made by running the model.

    Args:
        task: the weight and its updates.
        formulas: nothing.
        buffers: of the thread; nothing is read.
        hashes: likewise.
    """
    del formulas, buffers, hashes
    return tuple(_score(task.name, update) for update in task.updates)


def _score(name: str, update: Update) -> Score | SafeprojError:
    made = update.replacement
    assert made is not None
    assert made.B is not None
    bias = None if update.bias is None else single(update.bias)
    if not (is_finite(made.A) and is_finite(made.B)):
        return SafeprojError(f"{name}: the corrected factors have a value that is not finite")
    try:
        own = settled(update.A, update.B)
    except CancellationError as error:
        return SafeprojError(f"{name}: {error}")
    size = norm(*own)
    if size == 0.0 or not math.isfinite(size):
        return Score(single(made.B), None, Kept(), bias, other=single(made.A))
    after = (made.A, made.B)
    detail = Kept(made.told["kept"], len(made.A), made.told["error"])
    return Score(
        single(made.B),
        cosine(own, after),
        detail,
        bias,
        scale=norm(*after) / size,
        other=single(made.A),
    )

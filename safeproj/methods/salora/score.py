"""Scoring by SaLoRA: what of an update lies in the safety subspace."""

from __future__ import annotations

import math
from collections.abc import Collection

from safeproj.checkpoint.hashes import Hash, Sides
from safeproj.engine import Buffers, KeptBlocks, Task
from safeproj.errors import SafeprojError
from safeproj.methods.blocks import Projected
from safeproj.methods.measures import share
from safeproj.methods.projecting import projected
from safeproj.methods.salora.detail import Safety
from safeproj.methods.salora.formulas import Complement, NotOrthonormalError
from safeproj.methods.salora.sources import SafetyBasis
from safeproj.methods.score import Score
from safeproj.storage.arrays import Array


def score(
    task: Task, formulas: Complement, buffers: Buffers, *, hashes: Collection[Hash]
) -> tuple[Score | SafeprojError, ...]:
    """Score all updates of one weight.

    Args:
        task: the weight and its updates.
        formulas: the projector.
        buffers: of the thread.
        hashes: by which what is read is hashed.

    Raises:
        SafeprojError: the basis has a value that is not finite, or is none.
    """
    source = task.origin
    assert isinstance(source, SafetyBasis)

    def project(B: Array) -> tuple[Projected, Sides]:
        U = KeptBlocks(task.name, source.weight, buffers, hashes)
        return formulas.from_U(U, source.rank, B), (U.digests, {})

    def measure(A: Array, B: Array, found: Projected) -> Score:
        CB, UB = found.CB, found.UB
        assert CB is not None
        assert UB is not None
        left = share(A, B, CB)  # C is an orthogonal projector: ⟨ΔW, C ΔW⟩ = ‖C ΔW‖²
        cosine = None if left is None else math.sqrt(left)
        inside = share(A, B, UB)
        return Score(CB, cosine, Safety(source.rank, inside, source.energies))

    try:
        return projected(task, buffers, project, measure)
    except NotOrthonormalError as error:
        weight = source.weight
        raise SafeprojError(f"{weight.source}: {weight.label}: {error}") from error

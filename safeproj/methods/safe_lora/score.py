"""Scoring by Safe LoRA: what of an update lies where alignment moved the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TypeVar

import numpy

from safeproj import engine
from safeproj.checkpoint.hashes import NEW, NONE, Hash, Sides
from safeproj.engine import Buffers, Cluster, KeptBlocks, OnProgress, Task
from safeproj.errors import SafeprojError
from safeproj.methods.blocks import Projected
from safeproj.methods.differences import Difference, DifferenceBlocks
from safeproj.methods.measures import similarity
from safeproj.methods.projecting import projected
from safeproj.methods.safe_lora.decomposition import cosine_bounds
from safeproj.methods.safe_lora.detail import Alignment
from safeproj.methods.safe_lora.formulas import Approx, Exact
from safeproj.methods.safe_lora.sources import Kept
from safeproj.methods.score import Score, diagnosis
from safeproj.records.profile import Usage
from safeproj.storage.arrays import Array

T = TypeVar("T")


def score(
    task: Task, formulas: Approx | Exact, buffers: Buffers, *, hashes: Collection[Hash]
) -> tuple[Score | SafeprojError, ...]:
    """Score all updates of one weight.

    Args:
        task: the weight and its updates.
        formulas: which `C`.
        buffers: of the thread.
        hashes: by which what is read is hashed.

    Raises:
        SafeprojError: the weight has a value that is not finite.
    """
    source = task.origin
    assert isinstance(source, Difference | Kept)

    def project(B: Array) -> tuple[Projected, Sides]:
        return _project(task.name, source, formulas, buffers, B, hashes)

    def measure(A: Array, B: Array, found: Projected) -> Score:
        CB, UB, norm = found.CB, found.UB, found.alignment_norm
        assert norm is not None
        if CB is None:
            return Score(None, None, Alignment(norm, found.rank))
        cosine = similarity(A, B, CB)
        if not isinstance(source, Kept) or UB is None:
            detail = Alignment(norm, found.rank, is_determined=found.is_determined)
            return Score(CB, cosine, detail)
        bounds = cosine_bounds(A, B, CB, UB, source.residual, source.leak)
        error = None if bounds is None else source.error
        detail = Alignment(norm, found.rank, error, source.residual)
        return Score(CB, cosine, detail, bounds=bounds)

    return projected(task, buffers, project, measure)


def _project(
    name: str,
    source: Difference | Kept,
    formulas: Approx | Exact,
    buffers: Buffers,
    B: Array,
    hashes: Collection[Hash],
) -> tuple[Projected, Sides]:
    """Return `C B` and the digests of what was read for it."""
    if isinstance(source, Difference):
        V = DifferenceBlocks(name, source, buffers, hashes)
        return formulas.from_V(V, B), V.digests
    norm = source.alignment_norm
    if source.weight is None:
        return Projected(None, norm), NONE
    kept = KeptBlocks(name, source.weight, buffers, hashes)
    if source.form == "V":
        return formulas.from_V(kept, B), (kept.digests, {})
    if source.form == "C":
        return formulas.from_C(kept, norm, B), (kept.digests, {})
    assert isinstance(formulas, Approx)  # `SafeLora` refuses the exact projector of a truncated C
    eigenvalues = buffers.device.put(numpy.array(source.eigenvalues, numpy.float32))
    return formulas.from_U(kept, eigenvalues, norm, B), (kept.digests, {})


def differences(
    tasks: Sequence[tuple[str, Difference]],
    use: Callable[[Array], T],
    *,
    device: str = "auto",
    workers: int | None = None,
    where: Cluster | None = None,
    on_progress: OnProgress | None = None,
    usage: Usage | None = None,
) -> Iterator[tuple[T, Sides]]:
    """Yield what `use` makes of `V` (m, n), float32, of each weight, and the digests of both sides.

    In the given order; each worker holds one `V`.

    Args:
        tasks: name and source of each weight.
        use: called with `V`, which is only valid meanwhile; must depend on nothing else, and raise
            FloatingPointError where `V` is not finite.
        device: as for `engine.run`.
        workers: as for `engine.run`.
        where: as for `engine.run`.
        on_progress: as for `engine.run`.
        usage: as for `engine.run`.

    Raises:
        SafeprojError: as for `engine.run`.
    """

    def work(buffers: Buffers, task: Task) -> tuple[T, Sides]:
        assert isinstance(task.origin, Difference)
        blocks = DifferenceBlocks(task.name, task.origin, buffers, (NEW,), keep=True)
        V = blocks.whole()
        try:
            return use(V), blocks.digests
        except FloatingPointError as error:
            message = diagnosis(task.name, task.origin, buffers)
            raise SafeprojError(message) from error

    without = [Task(name, source, ()) for name, source in tasks]
    yield from engine.run(
        without,
        work,
        device=device,
        wide=True,
        workers=workers,
        on_progress=on_progress,
        usage=usage,
        where=where,
    )

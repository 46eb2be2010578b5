"""Merging one adapter in several ways, in one reading of the models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from typing import TypeVar

from safeproj import engine
from safeproj.adapter import Adapter
from safeproj.checkpoint.hashes import Hash
from safeproj.engine import Buffers, OnProgress, Task, Update
from safeproj.methods.merge.forms import Merging
from safeproj.methods.merge.method import Merge
from safeproj.methods.merge.score import decided, merged_scores
from safeproj.methods.merge.sources import Both
from safeproj.methods.reference import Reference
from safeproj.methods.score import Score, required
from safeproj.plan.match import Plan
from safeproj.plan.updates import update_of
from safeproj.records.profile import Usage

Way = tuple[Merging, Callable[[str, Update], Update]]
"""How to merge, and what takes the place of a module's safe update."""

K = TypeVar("K", bound=Hashable)


def variants(
    adapter: Adapter,
    plan: Plan,
    reference: Reference,
    method: Merge,
    ways: Mapping[K, Way],
    *,
    device: str = "auto",
    workers: int | None = None,
    on_start: Callable[[int, int], None] | None = None,
    on_progress: OnProgress | None = None,
    usage: Usage | None = None,
    hashes: Collection[Hash] = (),
) -> dict[K, dict[str, Score]]:
    """Return the scores of every way to merge an adapter: by module.

    Args:
        adapter: the adapter.
        plan: its updates.
        reference: the safe adapter and the models.
        method: by whose cosine modules are chosen.
        ways: the ways, by any key.
        device: where the arithmetic runs.
        workers: threads over weights on the CPU.
        on_start: told how many weights are read, and how many bytes.
        on_progress: told what was read and is done.
        usage: what the workers do is added to it.
        hashes: by which what is read is hashed.

    Raises:
        SafeprojError: a weight cannot be read.
    """
    tasks = [
        Task(item.module.name, reference.origin(item), (update_of(adapter, item),))
        for item in plan.modules
    ]
    deciding = method.deciding

    def work(buffers: Buffers, task: Task) -> dict[K, Score]:
        assert isinstance(task.origin, Both)
        own, safe = decided(task, buffers, deciding, hashes), task.origin.safe
        found: dict[K, Score] = {}
        for key, (merging, change) in ways.items():
            other = None if safe is None else change(task.name, safe)
            made = merged_scores(task, own, other, merging, is_alone=deciding is None)
            (found[key],) = required(made)
        return found

    if on_start is not None:
        on_start(len(tasks), sum(task.origin.nbytes for task in tasks))
    results = engine.run(
        tasks,
        work,
        device=device,
        wide=method.is_wide,
        workers=workers,
        on_progress=on_progress,
        usage=usage,
    )
    scores: dict[K, dict[str, Score]] = {key: {} for key in ways}
    for task, each in zip(tasks, results, strict=True):
        for key, score in each.items():
            scores[key][task.name] = score
    return scores

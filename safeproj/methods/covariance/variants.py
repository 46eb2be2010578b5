"""The correction of one adapter in several ways, in one reading of the statistics."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from typing import TypeVar

from safeproj.adapter import Adapter
from safeproj.checkpoint.hashes import Hash, Sides
from safeproj.engine import OnProgress, Task
from safeproj.methods.covariance.file import Statistics
from safeproj.methods.covariance.formulas import Correction, Moment
from safeproj.methods.covariance.score import corrected, moments
from safeproj.methods.score import Score, required
from safeproj.plan.match import Plan
from safeproj.plan.updates import update_of
from safeproj.records.profile import Usage

Way = tuple[Correction, Callable[[Task, Moment, Moment], tuple[Moment, Moment]]]
"""How to correct: the numbers, and which moments take the places of `H` and `S`."""

K = TypeVar("K", bound=Hashable)


def as_they_are(_: Task, H: Moment, S: Moment) -> tuple[Moment, Moment]:
    """Return both moments: the correction itself."""
    return H, S


def tasks_of(adapter: Adapter, plan: Plan, statistics: Statistics) -> dict[tuple[str, ...], Task]:
    """Return what is to be computed: names of modules that read one input, and their updates."""
    groups: dict[Hashable, list[int]] = {}
    for number, item in enumerate(plan.modules):
        groups.setdefault(statistics.group(item), []).append(number)
    tasks = {}
    for numbers in groups.values():
        items = [plan.modules[number] for number in numbers]
        names = tuple(item.module.name for item in items)
        updates = tuple(update_of(adapter, item) for item in items)
        tasks[names] = Task(names[0], statistics.origin(items[0]), updates)
    return tasks


def variants(
    tasks: Mapping[tuple[str, ...], Task],
    ways: Mapping[K, Way],
    *,
    device: str = "auto",
    workers: int | None = None,
    on_progress: OnProgress | None = None,
    usage: Usage | None = None,
    hashes: Collection[Hash] = (),
) -> dict[K, dict[str, Score]]:
    """Return the scores of every way to correct an adapter: by module.

    Args:
        tasks: as `tasks_of` returns them.
        ways: the ways, by any key.
        device: where the arithmetic runs.
        workers: threads over weights on the CPU.
        on_progress: told what was read and is done.
        usage: what the workers do is added to it.
        hashes: by which what is read is hashed.

    Raises:
        SafeprojError: the statistics cannot be used.
    """

    def use(task: Task, H: Moment, S: Moment, digests: Sides) -> dict[K, list[Score]]:
        return {
            key: required(corrected(task, formulas, *change(task, H, S), digests))
            for key, (formulas, change) in ways.items()
        }

    found = moments(
        list(tasks.values()),
        use,
        device=device,
        workers=workers,
        on_progress=on_progress,
        usage=usage,
        hashes=hashes,
    )
    scores: dict[K, dict[str, Score]] = {key: {} for key in ways}
    for names, results in zip(tasks, found, strict=True):
        for key, own in results.items():
            scores[key].update(zip(names, own, strict=True))
    return scores

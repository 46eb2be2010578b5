"""Runs tasks: on this machine, or on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

from safeproj.engine import cluster, local
from safeproj.engine.blocks import Buffers, OnProgress
from safeproj.engine.cluster import Cluster
from safeproj.engine.task import Task
from safeproj.records.profile import Usage

T = TypeVar("T")
One = TypeVar("One", bound=Task)


def run(
    tasks: Sequence[One],
    work: Callable[[Buffers, One], T],
    *,
    device: str = "auto",
    wide: bool = False,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
    usage: Usage | None = None,
    where: Cluster | None = None,
) -> Iterator[T]:
    """Yield what `work` makes of each task, in order, while others are worked on.

    Args:
        tasks: the weights and their updates.
        work: called with the buffers of a thread and a task; must depend on nothing else.
        device: as for `resolve_devices`.
        wide: whether it computes in float64, which MPS does not have.
        workers: threads over weights on the CPU; default the number of cores, at most 8, and on a
            cluster one for each part of the work.
        on_progress: called from the workers' threads.
        usage: what the workers do is added to it.
        where: None for this machine.

    Raises:
        SafeprojError: a weight cannot be read, or the device or cluster is not there; what `work`
            raises.
    """
    begin = local.run if where is None else partial(cluster.run, cluster=where)
    return begin(
        tasks,
        work,
        device=device,
        wide=wide,
        workers=workers,
        on_progress=on_progress,
        usage=usage,
    )

"""Runs tasks on a Ray cluster: slices of them are tasks of Ray, which the local engine runs there.

What a slice returns is what the local engine makes of its tasks, so that the results are the same.
Ray places the slices, and runs those of a lost worker again.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar

from safeproj import __version__
from safeproj.engine import local
from safeproj.engine.blocks import Buffers, OnProgress
from safeproj.engine.device import resolve_device
from safeproj.engine.task import Progress, Task
from safeproj.errors import SafeprojError, explained, install
from safeproj.records.profile import Usage
from safeproj.text import first_line

SLICES = 4
"""Slices for each worker: enough that the last ones end together, and that few are lost."""

SLICE_BYTES = 64 << 20
"""Bytes that a slice reads at least: sending one takes some milliseconds."""

RETRIES = 8
"""How often a slice is run again whose worker was lost."""

POLL = 0.2
"""Seconds between looks for an interruption."""

PATIENCE = 10.0
"""Seconds in which a cluster must answer."""

SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""What is set where it is not: nothing is sent to Ray's makers, and no warning is printed."""

T = TypeVar("T")
One = TypeVar("One", bound=Task)


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster whose workers have the same safeproj, and the same files at the same paths.

    Attributes:
        address: as `ray.init` takes it; None for what it finds by itself: `RAY_ADDRESS`, one that
            runs on this machine, or else a new one of this machine alone.
    """

    address: str | None = None


@dataclass(frozen=True)
class _Slice(Generic[T]):
    """What became of some of the tasks.

    Attributes:
        results: one for each.
        error: what stopped it, if something did.
        node: where it was.
        usage: what its worker did.
    """

    results: tuple[T, ...] = ()
    error: Exception | None = None
    node: str = ""
    usage: Usage = field(default_factory=Usage)


def run(
    tasks: Sequence[One],
    work: Callable[[Buffers, One], T],
    *,
    cluster: Cluster,
    device: str = "auto",
    wide: bool = False,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
    usage: Usage | None = None,
) -> Iterator[T]:
    """Yield what `work` makes of each task, in order; as `local.run`, on a cluster.

    Args:
        tasks: as for `local.run`.
        work: as for `local.run`; it is sent to the workers.
        cluster: where they run.
        device: as for `local.run`. What `auto` is on this machine is used on all.
        wide: as for `local.run`.
        workers: threads of a slice, each of which takes one CPU of the cluster; default one.
        on_progress: called as slices end.
        usage: what the workers do is added to it.

    Raises:
        SafeprojError: Ray is not installed or finds no cluster, or a worker has another safeproj or
            lacks a file; and as for `local.run`.
    """
    if not tasks:
        return
    where = resolve_device(device, wide=wide)
    with _connected(cluster) as ray:
        threads = workers or 1
        needs = {"num_cpus": threads, "num_gpus": int(where.name.startswith("cuda"))}
        slots = max(1, int(ray.cluster_resources().get("CPU", 1)) // threads)
        slices = sliced([task.origin.nbytes for task in tasks], SLICES * slots)
        remote = ray.remote(run_slice).options(
            **needs, max_retries=RETRIES, scheduling_strategy="SPREAD"
        )
        shared = ray.put(work)
        kind = "torch" if (where.engine, where.name) == ("torch", "cpu") else where.name
        told: dict[str, Any] = {
            "device": kind.partition(":")[0],  # a worker sees the GPU that Ray gives it alone
            "wide": wide,
            "workers": threads,
            "version": __version__,
            "directory": str(Path.cwd()),
        }
        pending = {
            remote.remote(tuple(tasks[each]), shared, **told): index
            for index, each in enumerate(slices)
        }
        done: dict[int, _Slice[T]] = {}
        turn, begin = 0, time.perf_counter()
        try:
            while turn < len(slices):
                for reference in ray.wait([*pending], timeout=POLL)[0]:
                    index = pending.pop(reference)
                    done[index] = found = _got(ray, reference)
                    if on_progress is not None:
                        for task in tasks[slices[index]]:
                            on_progress(Progress(task.name, task.origin.nbytes))
                            on_progress(Progress(task.name, finished=True))
                    _add(usage, found.usage)
                while turn in done:
                    yield from done.pop(turn).results
                    turn += 1
        finally:
            for reference in pending:
                ray.cancel(reference)
        if usage is not None:
            usage.workers = max(usage.workers, min(slots, len(slices)) * threads)
            usage.wall_seconds += time.perf_counter() - begin


def sliced(sizes: Sequence[int], most: int) -> list[slice]:
    """Return consecutive slices of about as many bytes each, in order.

    >>> sliced([1 << 30] * 5, 2)
    [slice(0, 3, None), slice(3, 5, None)]
    """
    wanted = max(SLICE_BYTES, -(-sum(sizes) // most))
    found, start, held = [], 0, 0
    for stop, size in enumerate(sizes, start=1):
        held += size
        if held >= wanted or stop == len(sizes):
            found.append(slice(start, stop))
            start, held = stop, 0
    return found


def run_slice(
    tasks: Sequence[One],
    work: Callable[[Buffers, One], T],
    *,
    version: str,
    directory: str,
    device: str,
    wide: bool,
    workers: int,
) -> _Slice[T]:
    """Run tasks on a worker: this is what Ray calls.

    Args:
        tasks: as for `local.run`.
        work: as for `local.run`.
        version: of safeproj where the run began.
        directory: in which that was: paths may be relative to it.
        device: as for `local.run`.
        wide: as for `local.run`.
        workers: as for `local.run`.
    """
    node, usage = platform.node(), Usage()
    if version != __version__:
        told = f"safeproj {__version__} is installed, and {version} where the run began"
        return _Slice(error=SafeprojError(f"{told}; install the same on all nodes"), node=node)
    with suppress(OSError):  # a file that is not found will say so
        os.chdir(directory)
    try:
        found = local.run(tasks, work, device=device, wide=wide, workers=workers, usage=usage)
        return _Slice(tuple(found), node=node, usage=usage)
    except Exception as error:  # told where the run began, like one of its own
        return _Slice(error=error, node=node)


def _got(ray: Any, reference: Any) -> _Slice[Any]:
    """Return what became of a slice.

    Raises:
        SafeprojError: it failed for a reason that a user can do something about.
    """
    try:
        found: _Slice[Any] = ray.get(reference)
    except ray.exceptions.RayError as error:
        raise SafeprojError(f"a slice was lost on the Ray cluster ({first_line(error)})") from error
    if found.error is None:
        return found
    told = explained(found.error)
    if told is None:
        raise found.error
    raise SafeprojError(f"{told} (on {found.node})") from found.error


def _add(total: Usage | None, more: Usage) -> None:
    if total is not None:
        total.busy_seconds += more.busy_seconds
        total.read_seconds += more.read_seconds
        total.hash_seconds += more.hash_seconds
        total.read_bytes += more.read_bytes


@contextmanager
def _connected(cluster: Cluster) -> Iterator[Any]:
    """Yield Ray, connected to the cluster; as it was before afterwards.

    Raises:
        SafeprojError: it is not installed, or finds no cluster there.
    """
    if find_spec("ray") is None:
        raise SafeprojError(f"Ray is not installed; {install('ray')}")
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():  # by whoever calls this from Python
        yield ray
        return
    place = cluster.address or os.environ.get("RAY_ADDRESS") or "this machine"
    try:
        _reach(place)
        ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise SafeprojError(
            f"no Ray cluster at {place} ({first_line(error)}); start one with "
            "`ray start --head`, and give its address as --ray-address"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _reach(place: str) -> None:
    """Connect to HOST:PORT: Ray itself tries for minutes where nobody answers.

    Raises:
        OSError: nobody does.
    """
    host, _, port = place.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()

"""Runs tasks on one machine: worker threads over weights on the CPU, a pipeline for each GPU.

Each weight is computed by one thread in a fixed order of fixed blocks, so that its result does not
depend on how many workers there are. What is computed is the caller's.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

from safeproj.checkpoint import settle
from safeproj.engine.blocks import Buffers, OnProgress
from safeproj.engine.device import Device, resolve_devices
from safeproj.engine.task import Progress, Task
from safeproj.records.profile import Usage
from safeproj.storage.origins import StoppedError
from safeproj.storage.ranges import forget

MAX_WORKERS = 8
"""Default bound on worker threads: each holds up to `CPU_HOLD` bytes, and disks saturate early."""

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
) -> Iterator[T]:
    """Yield what `work` makes of each task, in order, while threads work on the next ones.

    Args:
        tasks: the weights and their updates.
        work: called with the buffers of the thread and the task; must depend on nothing else.
        device: as for `resolve_devices`.
        wide: whether it computes in float64, which MPS does not have.
        workers: threads over weights on the CPU; default the number of cores, at most 8.
        on_progress: called from the workers' threads.
        usage: what the workers do is added to it.

    Raises:
        SafeprojError: a weight cannot be read, or the device is not there; what `work` raises.
    """
    where = resolve_devices(device, wide=wide)
    yield from in_order(tasks, work, where, workers, on_progress, usage)


def in_order(
    tasks: Sequence[One],
    work: Callable[[Buffers, One], T],
    devices: Sequence[Device],
    workers: int | None,
    on_progress: OnProgress | None,
    usage: Usage | None,
) -> Iterator[T]:
    """Yield `work(buffers, task)` of all tasks in order, while threads work on the next ones.

    Each device takes the next weight once it is done with one: the processor in several threads.
    """
    if not devices[0].is_host:
        workers = len(devices)
    elif workers is None:
        workers = min(os.cpu_count() or 1, MAX_WORKERS)
    stop = threading.Event()
    local = threading.local()
    free = itertools.cycle(devices)
    made: list[Buffers] = []
    failures: list[Exception] = []
    busy: list[float] = []

    def begin_thread() -> None:
        local.buffers = Buffers(next(free), stop, on_progress)
        made.append(local.buffers)

    def one(task: One, following: Sequence[One]) -> T:
        start = time.perf_counter()
        try:
            for other in following:
                local.buffers.prefetch(other.origin.weights)
            with local.buffers.device.scope():
                found = work(local.buffers, task)
        except Exception as error:
            if not isinstance(error, StoppedError):
                failures.append(error)
            stop.set()  # the other workers give up
            raise
        busy.append(time.perf_counter() - start)
        if on_progress is not None:
            on_progress(Progress(task.name, finished=True))
        return found

    begin = time.perf_counter()
    settle(weight for task in tasks for weight in task.origin.weights)
    with ExitStack() as stack:
        for device in devices:
            stack.enter_context(device.session())
        pool = stack.enter_context(ThreadPoolExecutor(workers, "safeproj", begin_thread))
        try:
            # The task so many places on is most likely the thread's next.
            futures = deque(
                pool.submit(one, task, tasks[later : later + 1])
                for later, task in enumerate(tasks, start=workers)
            )
            while futures:
                yield futures.popleft().result()
        except StoppedError:
            raise failures[0] from None
        finally:
            stop.set()
            forget()
            pool.shutdown(wait=True, cancel_futures=True)
            for buffers in made:
                buffers.close()
    if usage is not None:
        readers = [reader for buffers in made for reader in buffers.all_readers]
        usage.workers = max(usage.workers, len(made))
        usage.wall_seconds += time.perf_counter() - begin
        usage.busy_seconds += sum(busy)
        usage.read_seconds += sum(reader.seconds for reader in readers)
        usage.hash_seconds += sum(reader.hash_seconds for reader in readers)
        usage.read_bytes += sum(reader.nbytes for reader in readers)

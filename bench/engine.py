"""Where the engine's time goes, and how its constants were chosen.

    python -m bench --skip-dense      # makes the pair of checkpoints, once
    python -m bench.engine

Prints Markdown tables for the all-linear adapter, files in the page cache: seconds per block size,
with and without keeping `V`, and per number of workers; and the share of each step in one thread.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy
from threadpoolctl import threadpool_limits

from safeproj.adapter import read_adapter
from safeproj.checkpoint import Reader
from safeproj.engine import Buffers, Task, run
from safeproj.engine.device import CPU_BLOCK, Host
from safeproj.methods import differences as weights
from safeproj.methods.differences import Difference, subtract
from safeproj.methods.safe_lora.formulas import Approx
from safeproj.methods.safe_lora.pair import Pair
from safeproj.methods.safe_lora.score import score
from safeproj.plan.select import Selection
from safeproj.plan.updates import update_of
from safeproj.storage.arrays import FLOAT32, single

PAIR = Path(tempfile.gettempdir()) / "safeproj-bench" / "pair-1.1b"
KIB = 1 << 10
STEPS = ("reading", "conversion and subtraction", "norm", "T = Vᵀ B")


def tasks_of_pair(pair: Path) -> list[Task]:
    """Return the engine's tasks for the all-linear adapter."""
    adapter = read_adapter(str(pair / "adapter-all-linear"))
    models = Pair(str(pair / "aligned"), str(pair / "base"))
    return [
        Task(item.module.name, models.origin(item), (update_of(adapter, item),))
        for item in models.plan(adapter, Selection(all=True)).modules
    ]


def score_all(tasks: list[Task], workers: int | None = None) -> None:
    """Score all updates of all tasks with the fast projector."""

    def work(buffers: Buffers, task: Task) -> object:
        return score(task, Approx(), buffers, hashes=())

    for _ in run(tasks, work, device="cpu", workers=workers):
        pass


def seconds(tasks: list[Task], workers: int = 2) -> float:
    """Return the best of three runs."""
    found = []
    for _ in range(3):
        start = time.perf_counter()
        score_all(tasks, workers)
        found.append(time.perf_counter() - start)
    return min(found)


def constants(tasks: list[Task]) -> None:
    """Print seconds per block size, with `V` kept and read twice, and per number of workers."""
    hold = weights.CPU_HOLD
    print("| block per weight | `V` kept up to 64 MiB | every `V` read twice |\n|---|---:|---:|")
    for size in (256, 512, 1024, 2048):
        Host.block = size * KIB
        cells = []
        for weights.CPU_HOLD in (hold, 0):
            cells.append(f"{seconds(tasks):.2f}")
        print(f"| {size} KiB | {' | '.join(cells)} |", flush=True)
    Host.block, weights.CPU_HOLD = CPU_BLOCK, hold
    print("\n| workers | seconds |\n|---|---:|")
    for workers in (1, 2, 4):
        print(f"| {workers} | {seconds(tasks, workers):.2f} |", flush=True)


def shares(tasks: list[Task]) -> None:
    """Print the share of each step in one thread."""
    readers = (Reader(), Reader())
    buffers = [numpy.empty(CPU_BLOCK, numpy.uint8) for _ in readers]
    pairs = [task.origin for task in tasks if isinstance(task.origin, Difference)]
    kept = numpy.empty(max(math.prod(pair.after.weight.shape) for pair in pairs), FLOAT32)
    spent: Counter[str] = Counter()
    clock = time.perf_counter_ns
    for task, pair in zip(tasks, pairs, strict=True):
        m, n = pair.after.weight.shape
        B = single(task.updates[0].B)
        V, T = kept[: m * n].reshape(m, n), numpy.zeros((B.shape[1], n), FLOAT32)
        step = CPU_BLOCK // (2 * n)  # rows of a bfloat16 block
        for start in range(0, m, step):
            rows = slice(start, min(start + step, m))
            times = [clock()]
            aligned = pair.after.weight.read_rows(readers[0], rows.start, rows.stop, buffers[0])
            base = pair.before.weight.read_rows(readers[1], rows.start, rows.stop, buffers[1])
            times.append(clock())
            subtract(aligned, base, V[rows])
            times.append(clock())
            numpy.sum(V[rows] * V[rows])
            times.append(clock())
            T += B[rows].T @ V[rows]
            times.append(clock())
            for name, begin, end in zip(STEPS, times[:-1], times[1:], strict=True):
                spent[name] += end - begin
        P = numpy.empty((m, len(T)), FLOAT32)
        begin = clock()
        for start in range(0, m, step):
            P[start : start + step] = V[start : start + step] @ T.T
        spent["P = V T"] += clock() - begin
    print("\n| step | seconds | share |\n|---|---:|---:|")
    for name, time_spent in spent.items():
        share = time_spent / sum(spent.values())
        print(f"| {name} | {time_spent / 1e9:.2f} | {share:.0%} |")


def main() -> None:
    """Run the measurements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pair", type=Path, default=PAIR, help="made by python -m bench")
    tasks = tasks_of_pair(parser.parse_args().pair)
    constants(tasks)
    with threadpool_limits(1, "blas"):
        shares(tasks)


if __name__ == "__main__":
    main()

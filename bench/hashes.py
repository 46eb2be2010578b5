"""What hashing costs beside reading: seconds of one thread, with the blocks of the engine.

    python -m bench --skip-dense      # makes the pair of checkpoints, once
    python -m bench.hashes

Prints a Markdown table. Every weight of the all-linear adapter is read and hashed by one way after
the other, files in the page cache, so that other work on the machine is shared by all; the time is
that of the processor.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

import numpy

from bench.engine import PAIR, tasks_of_pair
from safeproj.checkpoint import Reader, Weight
from safeproj.checkpoint.hashes import HASHES, Hash
from safeproj.engine import rows_per_block
from safeproj.engine.device import CPU_BLOCK, Host
from safeproj.storage.arrays import Array


def read(weight: Weight, hashes: tuple[Hash, ...], reader: Reader, buffer: Array) -> None:
    """Read all of a weight, and hash it."""
    reader.start(hashes)
    rows, step = weight.shape[0], rows_per_block(Host(), weight)
    for start in range(0, rows, step):
        weight.read_rows(reader, start, min(start + step, rows), buffer)


def main() -> None:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pair", type=Path, default=PAIR, help="made by python -m bench")
    parser.add_argument("--runs", type=int, default=3, help="the least of so many counts")
    given = parser.parse_args()
    weights = [each for task in tasks_of_pair(given.pair) for each in task.origin.weights]
    ways: tuple[tuple[Hash, ...], ...] = ((), *((name,) for name in HASHES))
    reader, buffer = Reader(), numpy.empty(CPU_BLOCK, numpy.uint8)
    best: dict[tuple[Hash, ...], float] = {}
    for _ in range(given.runs):
        spent: Counter[tuple[Hash, ...]] = Counter()
        for weight in weights:
            for way in ways:
                begin = time.thread_time_ns()
                read(weight, way, reader, buffer)
                spent[way] += time.thread_time_ns() - begin
        for way in ways:
            best[way] = min(best.get(way, float("inf")), spent[way] / 1e9)
    size = sum(weight.shape[0] * weight.row_bytes for weight in weights) / 1e9
    print(f"{size:.2f} GB\n\n| step | seconds | GB/s | beside reading |\n|---|---:|---:|---:|")
    for way in ways:
        taken = best[way] - (best[()] if way else 0.0)
        name = f"{way[0]}, of what was read" if way else "reading"
        print(f"| {name} | {taken:.2f} | {size / taken:.1f} | {taken / best[()]:.2f} |")


if __name__ == "__main__":
    main()

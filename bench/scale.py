"""What more workers of a Ray cluster give where each reads at a bounded rate.

    python -m bench.scale                       # 1, 2 and 3 nodes on this machine: two minutes
    python -m bench.scale --workers 1 2 4 8     # others

Storage that is shared gives each reader so many bytes per second. Here every node of the cluster
has one worker, which reads the weights of its slices from a file of this machine, at 40 MB/s, by
the engine's own way to the cluster and back; what it returns is as large as the factor of an
update. Two cores are enough, because waiting takes none. Efficiency is the time of one worker,
divided by that of so many and by how many; the time to reach the cluster is shown beside it. The
local engine reads the same at the same rate with one thread.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from bench.costs import simulated
from safeproj import engine
from safeproj.engine import Buffers, Cluster, Task
from safeproj.storage.arrays import Array

RATE = 40e6
SIZE = 16 << 20
WEIGHTS = 96
FACTOR = (2048, 16)


@dataclass(frozen=True)
class Part:
    """Some bytes of a file.

    Attributes:
        path: the file.
        offset: the first of them.
        nbytes: how many there are.
    """

    path: Path
    offset: int
    nbytes: int
    weights: tuple[Any, ...] = ()


def read(_: Buffers, task: Task) -> Array:
    """Read one weight no faster than the rate, and return a factor."""
    part: Any = task.origin
    begin = time.perf_counter()
    with part.path.open("rb") as file:
        file.seek(part.offset)
        content = file.read(part.nbytes)
    time.sleep(max(0.0, part.nbytes / RATE - (time.perf_counter() - begin)))
    found: Array = numpy.full(FACTOR, len(content) / part.nbytes, numpy.float32)
    return found


def seconds(tasks: list[Task], where: Cluster | None) -> float:
    """Return how long it takes to have all factors."""
    begin = time.perf_counter()
    found = list(engine.run(tasks, read, device="cpu", workers=1, where=where))
    assert len(found) == len(tasks)
    assert all((each == 1.0).all() for each in found)
    return time.perf_counter() - begin


def main() -> None:
    """Print the table."""
    import ray
    from ray.cluster_utils import Cluster as Nodes

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--weights", type=int, default=WEIGHTS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="safeproj-bench-") as place:
        path = Path(place) / "weights"
        with path.open("wb") as file:
            file.truncate(given.weights * SIZE)
        tasks = [Task(f"{n}", Part(path, n * SIZE, SIZE), ()) for n in range(given.weights)]
        total = given.weights * SIZE / 1e9
        print(f"{total:.2f} GB in {given.weights} weights, {RATE / 1e6:.0f} MB/s for each worker\n")
        print("| workers | seconds | ideal | simulated | efficiency | to reach the cluster |")
        print("|---|---:|---:|---:|---:|---:|")
        print(f"| local engine | {seconds(tasks, None):.1f} | {total * 1e9 / RATE:.1f} | | | |")
        nodes = Nodes()
        alone, begun = 0.0, 0
        for count in given.workers:
            for _ in range(count - begun):
                nodes.add_node(num_cpus=1)
            begun = max(begun, count)
            begin = time.perf_counter()
            ray.init(nodes.address, log_to_driver=False, logging_level=logging.ERROR)
            reached = time.perf_counter() - begin
            seconds(tasks[:count], Cluster())  # its workers start
            took = seconds(tasks, Cluster())
            ray.shutdown()
            alone = alone or took * count
            ideal = total * 1e9 / RATE / count
            told = simulated([SIZE] * len(tasks), [SIZE / RATE] * len(tasks), count)
            cells = [f"{each:.1f}" for each in (took, ideal, told)]
            cells += [f"{alone / count / took:.2f}", f"{reached:.1f} s"]
            print(f"| {count} | {' | '.join(cells)} |", flush=True)
        nodes.shutdown()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()

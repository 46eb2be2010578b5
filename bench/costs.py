"""What a run costs: bytes, multiplications and memory, from the shapes of a model alone.

    python -m bench.costs

Prints Markdown tables for models of 7B to 671B. Bytes, multiplications and memory follow from
shapes; the seconds are computed from rates that are stated in the output, not measured. Those of a
cluster come from a simulation of how slices of the weights go to workers, which `bench.scale` holds
against what it measures.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from safeproj.engine import cluster

RANK = 16
BLOCK = 1 << 20  # bytes of one weight that a worker reads at a time
HOLD = 64 << 20  # largest float32 V that a worker on the CPU keeps


@dataclass(frozen=True)
class Model:
    """The shapes of a model's linear layers."""

    name: str
    layers: int
    hidden: int
    kv: int
    intermediate: int
    size: int = 2  # bytes of a stored number

    def weights(self, kinds: str) -> list[tuple[int, int]]:
        """Return (m, n) of every weight of one layer that an adapter on `kinds` needs."""
        h, kv, i = self.hidden, self.kv, self.intermediate
        if kinds == "q+v":
            return [(h, h), (kv, h)]
        return [(h, h), (kv, h), (kv, h), (h, h), (i, h), (i, h), (h, i)]

    def count(self, kinds: str) -> int:
        """Return the number of weights' elements in all layers."""
        return self.layers * sum(m * n for m, n in self.weights(kinds))


@dataclass(frozen=True)
class Mixture(Model):
    """The same of DeepSeek V3: latent attention, and experts, as if all layers had them."""

    experts: int = 257

    def weights(self, kinds: str) -> list[tuple[int, int]]:
        """Return the same; of `attention`, and of a layer with experts for `all linear`."""
        h, i = self.hidden, self.intermediate
        attention = [(1536, h), (24576, 1536), (576, h), (32768, 512), (h, 16384)]
        if kinds != "all linear":
            return attention
        return attention + self.experts * [(i, h), (i, h), (h, i)]


MODELS = (
    Model("7B (Llama 2)", 32, 4096, 4096, 11008),
    Model("70B (Llama 3)", 80, 8192, 1024, 28672),
    Model("405B (Llama 3.1)", 126, 16384, 1024, 53248),
)


MIXTURE = Mixture("671B (DeepSeek V3, FP8)", 61, 7168, 0, 2048, size=1)

PER_SLICE = 0.03
"""Seconds of a worker for the way of a slice to it and back; measured by `bench.scale`."""

REACHED = 5.0
"""Seconds until a cluster is reached and its workers have imported what they need; likewise."""


@dataclass(frozen=True)
class Nodes:
    """Nodes that read from one storage, each with workers on its cores.

    Attributes:
        count: of the nodes.
        workers: of each.
        read: bytes per second that a node reads.
        storage: bytes per second that the storage gives to all of them.
    """

    count: int
    workers: int = 16
    read: float = 3e9
    storage: float = 100e9

    @property
    def rate(self) -> float:
        """Bytes per second of one worker while all read."""
        return min(self.read, self.storage / self.count) / self.workers


def simulated(sizes: Sequence[int], seconds: Sequence[float], workers: int) -> float:
    """Return the seconds in which workers do weights, in slices as the engine makes them.

    Args:
        sizes: bytes of the weights.
        seconds: that a worker takes for each.
        workers: how many there are; each takes the next slice once it is free.
    """
    free = [0.0] * workers
    for part in cluster.sliced(sizes, cluster.SLICES * workers):
        heapq.heappush(free, heapq.heappop(free) + PER_SLICE + sum(seconds[part]))
    return max(free)


def on_nodes(nodes: Nodes, model: Model, kinds: str, columns: int) -> float:
    """Return the simulated seconds of one pass over a model."""
    shapes = model.weights(kinds) * model.layers
    sizes = [2 * model.size * m * n for m, n in shapes]
    seconds = [
        max(size / nodes.rate, m * n / 2.5e9 + 4 * m * n * columns / 70e9)
        for size, (m, n) in zip(sizes, shapes, strict=True)
    ]
    return REACHED + simulated(sizes, seconds, nodes.count * nodes.workers)


@dataclass(frozen=True)
class Machine:
    """Rates that the seconds are computed from."""

    name: str
    read: float  # bytes per second
    elements: float  # weights that are converted, subtracted and summed per second
    flops: float  # float32 operations per second


MACHINES = (
    Machine("laptop: 2 workers, disk of 1 GB/s", 1e9, 2 * 2.5e9, 2 * 70e9),
    Machine("server: 8 workers, disk of 5 GB/s", 5e9, 8 * 2.5e9, 8 * 70e9),
    Machine("GPU: files in the page cache, copied at 10 GB/s", 10e9, 200e9, 20e12),
)


def flops(model: Model, kinds: str, columns: int) -> float:
    """Return the operations of `Vᵀ B` and `V T` for `B` with so many columns."""
    return 4.0 * model.count(kinds) * columns


def seconds(machine: Machine, model: Model, kinds: str, columns: int) -> float:
    """Return the larger of reading and computing, which go on side by side."""
    elements = model.count(kinds)
    computing = elements / machine.elements + flops(model, kinds, columns) / machine.flops
    return max(4 * elements / machine.read, computing)


def worker_memory(model: Model) -> int:
    """Return the bytes that a worker holds beside the adapters: blocks, `V` or a block of it, T."""
    largest = max(m * n * 4 for m, n in model.weights("all linear"))
    widest = max(n for _, n in model.weights("all linear"))
    kept = max((m * n * 4 for m, n in model.weights("all linear") if m * n * 4 <= HOLD), default=0)
    V = kept if largest <= HOLD else max(kept, 2 * BLOCK)
    return 2 * BLOCK + V + 4 * RANK * widest


def align_memory(model: Model) -> int:
    """Return the bytes that a worker of `align` holds: the largest `V` and its Gram matrix."""
    return max(4 * (m * n + min(m, n) ** 2) for m, n in model.weights("all linear"))


def file_bytes(model: Model, kinds: str, K: int) -> int:
    """Return the size of an alignment file of rank K."""
    return model.layers * sum(4 * (m + 1) * min(K, m, n) for m, n in model.weights(kinds))


def main() -> None:
    """Print the tables."""
    print(f"Bytes and operations for bfloat16 checkpoints and one adapter of rank {RANK}:\n")
    print("| model | adapter | read, GB | operations, TFLOP | alignment file, rank 64, MB |")
    print("|---|---|---:|---:|---:|")
    for model in MODELS:
        for kinds in ("q+v", "all linear"):
            read = 4 * model.count(kinds) / 1e9
            work = flops(model, kinds, RANK) / 1e12
            size = file_bytes(model, kinds, 64) / 1e6
            print(f"| {model.name} | {kinds} | {read:.1f} | {work:.2f} | {size:.0f} |")
    print("\nMemory of a worker, all linear, MB:\n")
    print("| model | `inspect`, `patch` on the CPU | `align` |\n|---|---:|---:|")
    for model in MODELS:
        memory = (worker_memory(model), align_memory(model))
        print(f"| {model.name} | {memory[0] / 1e6:.0f} | {memory[1] / 1e6:.0f} |")
    for columns in (RANK, 32 * RANK):
        print(f"\nSeconds, {columns // RANK} adapters of rank {RANK}, all linear (computed):\n")
        print(f"| machine | {' | '.join(model.name for model in MODELS)} |")
        print(f"|---|{'---:|' * len(MODELS)}")
        for machine in MACHINES:
            cells = (f"{seconds(machine, model, 'all linear', columns):.0f}" for model in MODELS)
            print(f"| {machine.name} | {' | '.join(cells)} |")

    print_nodes()


def print_nodes() -> None:
    """Print the tables of clusters."""
    counts = (1, 4, 16, 64)
    rate = "16 workers and 3 GB/s for each node, 100 GB/s for all of them"
    print(f"\nSeconds on a cluster (simulated: {rate}):\n")
    print(f"| model | adapter | {' | '.join(f'{n} nodes' for n in counts)} |")
    print(f"|---|---|{'---:|' * len(counts)}")
    jobs = [(model, "all linear") for model in MODELS[1:]]
    for model, kinds in [*jobs, (MIXTURE, "attention"), (MIXTURE, "all linear")]:
        cells = (f"{on_nodes(Nodes(n), model, kinds, RANK):.0f}" for n in counts)
        print(f"| {model.name} | {kinds} | {' | '.join(cells)} |")
    model = MODELS[0]
    print("\nHours for 10,000 adapters of rank 16 on 50 models of 7B, q+v (simulated):\n")
    print(f"| {' | '.join(f'{n} nodes' for n in counts)} |\n|{'---:|' * len(counts)}")
    each = (50 * on_nodes(Nodes(n), model, "q+v", 200 * RANK) / 3600 for n in counts)
    print(f"| {' | '.join(f'{hours:.2f}' for hours in each)} |")


if __name__ == "__main__":
    main()

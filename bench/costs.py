"""What a run costs: bytes, multiplications and memory, from the shapes of a model alone.

    python -m bench.costs

Prints Markdown tables for models of 7B, 70B and 405B. Bytes, multiplications and memory follow from
shapes; the seconds are computed from rates that are stated in the output, not measured.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    def weights(self, kinds: str) -> list[tuple[int, int]]:
        """Return (m, n) of every weight of one layer that an adapter on `kinds` needs."""
        h, kv, i = self.hidden, self.kv, self.intermediate
        if kinds == "q+v":
            return [(h, h), (kv, h)]
        return [(h, h), (kv, h), (kv, h), (h, h), (i, h), (i, h), (h, i)]

    def count(self, kinds: str) -> int:
        """Return the number of weights' elements in all layers."""
        return self.layers * sum(m * n for m, n in self.weights(kinds))


MODELS = (
    Model("7B (Llama 2)", 32, 4096, 4096, 11008),
    Model("70B (Llama 3)", 80, 8192, 1024, 28672),
    Model("405B (Llama 3.1)", 126, 16384, 1024, 53248),
)


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


if __name__ == "__main__":
    main()

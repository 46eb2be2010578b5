"""Measure safeproj on a GPU beside the processor, and beside plain reading and copying.

    python -m bench.device                          # an 8B pair in memory: 36 GB, some minutes
    python -m bench.device --size small --device cpu

The pair is that of ``files.py`` in bfloat16, in files that are kept in memory, with adapters of
rank 16 on q and v and on all linear layers. The plain loop reads the same weights by one buffer and
copies each to the device, and does nothing else. Everything runs in this process, what is short
once before it is timed; the memory of the GPU is what torch has allocated at most. Prints one
Markdown table.
"""

from __future__ import annotations

import argparse
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import safeproj
from bench.files import KINDS, RANK, SEED, SIZES, Adapter, Size, folder_of, make_adapter, make_pair
from safeproj import Form, Options, SafeLora, Selection
from safeproj.adapter import read_adapter
from safeproj.checkpoint import Reader, Weight
from safeproj.methods.safe_lora.pair import Pair

MANY = 32
BLOCK = 32 << 20
"""Bytes that the plain loop reads at a time."""


@dataclass(frozen=True)
class Bench:
    """The files, and where the arithmetic runs.

    Attributes:
        root: the folder of all files.
        device: `cuda` or `cpu`.
    """

    root: Path
    device: str

    def method(self, **options: object) -> SafeLora:
        """Return Safe LoRA with the pair."""
        base, aligned = str(self.root / "base"), str(self.root / "aligned")
        return SafeLora(base=base, aligned=aligned, **options)  # type: ignore[arg-type]

    def options(self, device: str | None = None) -> Options:
        """Return the options of a run that projects everything."""
        return Options(Selection(all=True), device=device or self.device)

    def adapter(self, label: str) -> str:
        """Return the place of an adapter."""
        return str(self.root / folder_of(label))

    def weights(self, label: str) -> list[Weight]:
        """Return the weights that an adapter needs, of both checkpoints."""
        adapter = read_adapter(self.adapter(label))
        pair = Pair(str(self.root / "aligned"), str(self.root / "base"))
        modules = pair.plan(adapter, Selection(all=True)).modules
        return [each for item in modules for each in pair.origin(item).weights]

    def plain(self, label: str) -> None:
        """Read those weights and copy them to the device."""
        buffer = torch.empty(BLOCK, dtype=torch.uint8, pin_memory=self.device == "cuda")
        target = torch.empty(BLOCK, dtype=torch.uint8, device=self.device)
        reader, host = Reader(), buffer.numpy()
        for weight in self.weights(label):
            step = max(1, BLOCK // weight.row_bytes)
            for start in range(0, weight.shape[0], step):
                rows = weight.read_rows(reader, start, min(start + step, weight.shape[0]), host)
                target[: rows.nbytes].copy_(buffer[: rows.nbytes])
        settle(self.device)

    def patch(self, label: str, device: str | None = None) -> None:
        """Patch an adapter."""
        out = self.root / "out"
        safeproj.patch(
            self.method(), self.adapter(label), out, self.options(device), overwrite=True
        )

    def many(self, label: str) -> None:
        """Score 32 adapters in one pass."""
        names = [str(self.root / f"{folder_of(label)}-{number:02d}") for number in range(MANY)]
        list(safeproj.inspect_many(self.method(), names, self.options()))

    def align(self, device: str | None = None) -> None:
        """Make an alignment file for q and v."""
        safeproj.align(
            str(self.root / "base"),
            str(self.root / "aligned"),
            self.root / "out.alignment.safetensors",
            Form(rank=64),
            KINDS["q+v"],
            self.options(device),
            overwrite=True,
        )

    def exact(self, device: str | None = None) -> None:
        """Score an adapter with the exact projector."""
        method = self.method(projector="exact", rank=64)
        safeproj.inspect(method, self.adapter("q+v"), self.options(device))


def settle(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(device: str, work: Callable[[], object], warm: bool = True) -> float:
    """Return how long something takes, once it ran before."""
    if warm:
        work()
    begin = time.perf_counter()
    work()
    settle(device)
    return time.perf_counter() - begin


def make(root: Path, size: Size, device: str) -> None:
    """Write the pair and its adapters."""
    make_pair(root, size, device)
    for label, kinds in KINDS.items():
        make_adapter(root, size, Adapter(folder_of(label), kinds, RANK, SEED))
        for number in range(MANY):
            name = f"{folder_of(label)}-{number:02d}"
            make_adapter(root, size, Adapter(name, kinds, RANK, SEED - number))


def rows(bench: Bench, slow: bool) -> Iterator[tuple[str, float, float | None]]:
    """Yield what is measured: its name, its seconds, and what they are compared with.

    Args:
        bench: the files.
        slow: whether the processor is measured at what takes minutes there.
    """
    device = bench.device
    for label in KINDS:
        plain = seconds(device, lambda label=label: bench.plain(label))  # type: ignore[misc]
        yield f"plain read and copy, {label}", plain, None
        one = seconds(device, lambda label=label: bench.patch(label))  # type: ignore[misc]
        yield f"patch, {label}", one, plain
        if device != "cpu":
            host = seconds("cpu", lambda label=label: bench.patch(label, "cpu"))  # type: ignore[misc]
            yield f"patch, {label}, on the processor", host, plain
        many = seconds(device, lambda label=label: bench.many(label), warm=False)  # type: ignore[misc]
        yield f"inspect, {MANY} adapters, {label}", many, one
    for name, work in (("align, q+v, rank 64", bench.align), ("exact, q+v, rank 64", bench.exact)):
        own = seconds(device, work, warm=False)
        yield name, own, None
        if device != "cpu" and slow:
            yield f"{name}, on the processor", seconds("cpu", lambda: work("cpu"), False), own  # noqa: B023


def main() -> None:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="8b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"), help="files kept in memory")
    parser.add_argument("--slow", action="store_true", help="the processor at everything")
    given = parser.parse_args()
    place = given.dir if given.dir.is_dir() else Path(tempfile.gettempdir())
    root = Path(tempfile.mkdtemp(prefix="safeproj-device-", dir=place))
    try:
        begin = time.perf_counter()
        make(root, SIZES[given.size], given.device)
        card = torch.cuda.get_device_name() if given.device == "cuda" else platform.processor()
        made = time.perf_counter() - begin
        print(f"{card or 'CPU'}, torch {torch.__version__}; files made in {made:.0f} s\n")
        print(f"| {SIZES[given.size].label}, bfloat16 | seconds | beside |\n|---|---:|---:|")
        for name, own, other in rows(Bench(root, given.device), given.slow):
            ratio = "" if other is None else f"{own / other:.2f} ×"
            print(f"| {name} | {own:.2f} | {ratio} |", flush=True)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"| peak memory of the process, GB | {peak:.1f} | |")
        if given.device == "cuda":
            print(
                f"| peak memory of the GPU, GB | {torch.cuda.max_memory_allocated() / 1e9:.1f} | |"
            )
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

import safeproj
from bench.files import (
    KINDS,
    MANY,
    RANK,
    SIZES,
    Size,
    adapters,
    folder_of,
    make_adapter,
    make_pair,
    many_folders,
)
from safeproj import Form, Options, SafeLora, Selection
from safeproj.adapter import read_adapter
from safeproj.checkpoint import Reader, Weight
from safeproj.methods.safe_lora.pair import Pair

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

    @property
    def method(self) -> SafeLora:
        """Safe LoRA with the pair."""
        return SafeLora(base=str(self.root / "base"), aligned=str(self.root / "aligned"))

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

    def plain(self, weights: Sequence[Weight]) -> None:
        """Read weights and copy them to the device."""
        buffer = torch.empty(BLOCK, dtype=torch.uint8, pin_memory=self.device == "cuda")
        target = torch.empty(BLOCK, dtype=torch.uint8, device=self.device)
        reader, host = Reader(), buffer.numpy()
        for weight in weights:
            step = max(1, BLOCK // weight.row_bytes)
            for start in range(0, weight.shape[0], step):
                rows = weight.read_rows(reader, start, min(start + step, weight.shape[0]), host)
                target[: rows.nbytes].copy_(buffer[: rows.nbytes])
        settle(self.device)

    def patch(self, label: str, device: str | None = None) -> None:
        """Patch an adapter."""
        out = self.root / "out"
        safeproj.patch(self.method, self.adapter(label), out, self.options(device), overwrite=True)

    def many(self, label: str) -> None:
        """Score 32 adapters in one pass."""
        names = [str(self.root / name) for name in many_folders(label)]
        list(safeproj.inspect_many(self.method, names, self.options()))

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
        method = replace(self.method, projector="exact", rank=64)
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
    for adapter in adapters():
        if adapter.rank == RANK:
            make_adapter(root, size, adapter)


def rows(bench: Bench, slow: bool) -> Iterator[tuple[str, float, float | None]]:
    """Yield what is measured: its name, its seconds, and what they are compared with.

    Args:
        bench: the files.
        slow: whether the processor is measured at what takes minutes there.
    """
    device = bench.device
    for label in KINDS:
        plain = seconds(device, partial(bench.plain, bench.weights(label)))
        yield f"plain read and copy, {label}", plain, None
        one = seconds(device, partial(bench.patch, label))
        yield f"patch, {label}", one, plain
        if device != "cpu":
            host = seconds("cpu", partial(bench.patch, label, "cpu"))
            yield f"patch, {label}, on the processor", host, plain
        many = seconds(device, partial(bench.many, label), warm=False)
        yield f"inspect, {MANY} adapters, {label}", many, one
    for name, work in (("align, q+v, rank 64", bench.align), ("exact, q+v, rank 64", bench.exact)):
        own = seconds(device, work, warm=False)
        yield name, own, None
        if device != "cpu" and slow:
            host = seconds("cpu", partial(work, "cpu"), warm=False)
            yield f"{name}, on the processor", host, own


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

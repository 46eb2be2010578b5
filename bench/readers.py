"""Ways to read the weights that an adapter needs, side by side; on Linux 5.14 or later.

    python -m bench --skip-dense      # makes the pair of checkpoints, once: 8 GB
    python -m bench.readers           # about ten minutes; --runs 1 takes four

Prints a Markdown table for the adapter on all linear layers (3.9 GB of weights, bfloat16): seconds
with the files in the page cache; the same, and the processor time, after they were dropped from it;
and the peak memory above what the process held before. Mapped file pages count as memory.

Each measurement is a process of its own, and its imports do not count. While it reads, a reader
adds up one byte of each 64 (a cache line) of what it gets, so that a map or a lazy tensor is read
as much as a buffer is; the sums must agree.

* readinto: into one reused buffer of 1 MiB per thread.
* readinto after posix_fadvise: the same, and 1 MiB that lies 32 MiB further on is asked for first.
* safe_open: the safetensors library, which maps the file; whole tensors, or slices of 1 MiB.
* mmap: one map per weight, with nothing, SEQUENTIAL, WILLNEED or POPULATE_READ as advice.
* runai-model-streamer, fastsafetensors: with their default settings, the weights of one file at a
  time. By default the latter reads past the page cache. Left out where not installed:
  `pip install runai-model-streamer fastsafetensors`.
* safeproj: its engine, which reads and scores all modules.

Dropped are the pages of these files (fsync, then POSIX_FADV_DONTNEED, which needs no privileges),
and that they are gone is checked. What a drive, or the host of a virtual machine, keeps is not.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import math
import mmap
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from safeproj.storage.tensorfile import read_header

if TYPE_CHECKING:
    from safeproj.engine import Task

PAIR = Path(tempfile.gettempdir()) / "safeproj-bench" / "pair-1.1b"
ADAPTER = Path("adapter-all-linear") / "adapter_model.safetensors"
PREFIX, SUFFIX = "base_model.model.", ".lora_B.weight"
BLOCK = 1 << 20
AHEAD = 32 << 20
CACHE_LINE = 64
POPULATE_READ = 22  # of linux/mman.h; the mmap module does not name it


class BenchError(Exception):
    """Something that stops the benchmark; its text is the message to print."""


@dataclass(frozen=True)
class Stored:
    """A weight and where it lies."""

    name: str
    path: Path
    shape: tuple[int, ...]
    start: int
    nbytes: int


def needed(pair: Path) -> list[Stored]:
    """Return the weights in both checkpoints that the adapter needs, in file order."""
    keys = read_header(pair / ADAPTER).tensors
    names = {f"{key[len(PREFIX) : -len(SUFFIX)]}.weight" for key in keys if key.endswith(SUFFIX)}
    return [
        Stored(name, path, entry.shape, entry.start, entry.nbytes)
        for path in sorted(pair.glob("*/model-*.safetensors"))
        for name, entry in sorted(read_header(path).tensors.items(), key=lambda i: i[1].start)
        if name in names
    ]


def by_file(stored: Sequence[Stored]) -> Iterator[tuple[Path, list[Stored]]]:
    """Yield each file and its weights."""
    for path, found in groupby(stored, key=lambda weight: weight.path):
        yield path, list(found)


def touch(data: Any) -> int:
    """Return the sum of one byte per cache line."""
    return int(np.frombuffer(data, np.uint8)[::CACHE_LINE].sum(dtype=np.uint64))


def touch_tensor(tensor: Any) -> int:
    """Do the same with a torch tensor."""
    import torch

    return touch(tensor.flatten().view(torch.uint8).numpy())


# --- readers: each returns the sum over its share of the weights ---------------------------------


def readinto(stored: Sequence[Stored]) -> int:
    """Read into one reused buffer."""
    return _readinto(stored, 0)


def readinto_ahead(stored: Sequence[Stored]) -> int:
    """Read into one reused buffer, with read-ahead across the ends of weights and files."""
    return _readinto(stored, AHEAD // BLOCK)


def _readinto(stored: Sequence[Stored], ahead: int) -> int:
    buffer = memoryview(bytearray(BLOCK))
    files = {path: path.open("rb", buffering=0) for path, _ in by_file(stored)}
    blocks = [
        (files[weight.path], weight.start + start, min(BLOCK, weight.nbytes - start))
        for weight in stored
        for start in range(0, weight.nbytes, BLOCK)
    ]
    total = asked = 0
    for index, (file, start, length) in enumerate(blocks):
        while ahead and asked < min(index + ahead + 1, len(blocks)):
            later, begin, size = blocks[asked]
            os.posix_fadvise(later.fileno(), begin, size, os.POSIX_FADV_WILLNEED)
            asked += 1
        file.seek(start)
        if file.readinto(buffer[:length]) != length:
            raise BenchError("a file ends early")
        total += touch(buffer[:length])
    for file in files.values():
        file.close()
    return total


def safe_open_tensors(stored: Sequence[Stored]) -> int:
    """Ask the safetensors library for whole tensors."""
    from safetensors import safe_open

    total = 0
    for path, weights in by_file(stored):
        with safe_open(path, framework="pt") as file:
            for weight in weights:
                total += touch_tensor(file.get_tensor(weight.name))
    return total


def safe_open_slices(stored: Sequence[Stored]) -> int:
    """Ask the safetensors library for rows."""
    from safetensors import safe_open

    total = 0
    for path, weights in by_file(stored):
        with safe_open(path, framework="pt") as file:
            for weight in weights:
                rows = file.get_slice(weight.name)
                step = max(1, BLOCK * weight.shape[0] // weight.nbytes)
                for start in range(0, weight.shape[0], step):
                    total += touch_tensor(rows[start : start + step])
    return total


def mapped(advice: int | None) -> Callable[[Sequence[Stored]], int]:
    """Return a reader that maps weight by weight with this advice."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise  # without the interpreter's lock
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def read(stored: Sequence[Stored]) -> int:
        total = 0
        for weight in stored:
            offset = weight.start % mmap.ALLOCATIONGRANULARITY
            length = offset + weight.nbytes
            with weight.path.open("rb") as file:
                data = mmap.mmap(
                    file.fileno(), length, access=mmap.ACCESS_READ, offset=weight.start - offset
                )
            view = np.frombuffer(data, np.uint8)
            if advice is not None and madvise(view.ctypes.data, length, advice):
                raise BenchError(f"madvise: {os.strerror(ctypes.get_errno())}")
            total += touch(view[offset:])
        return total

    return read


def runai(stored: Sequence[Stored]) -> int:
    """Stream with runai-model-streamer, each tensor dropped before the next."""
    streamers = importlib.import_module("runai_model_streamer")
    total = 0
    for path, weights in by_file(stored):
        with streamers.SafetensorsStreamer() as streamer:
            names = [weight.name for weight in weights]
            streamer.stream_files([str(path)], tensor_names=names, owned=False)
            for _, tensor in streamer.get_tensors():
                total += touch_tensor(tensor)
    return total


def fast(stored: Sequence[Stored]) -> int:
    """Load with fastsafetensors."""
    loaders = importlib.import_module("fastsafetensors")
    group = loaders.SingleGroup()
    total = 0
    for path, weights in by_file(stored):
        names = {weight.name for weight in weights}
        loader = loaders.SafeTensorsFileLoader(group, "cpu", nogds=True, set_numa=False)
        loader.set_tensor_filter(names.__contains__)
        loader.add_filenames({0: [str(path)]})
        loaded = loader.copy_files_to_device()
        for name in names:
            total += touch_tensor(loaded.get_tensor(name))
        loaded.close()
        loader.close()
    return total


@dataclass(frozen=True)
class Way:
    """One way to read: a row of the table for each number of threads, 0 where it has its own.

    What it returns is the sum; None if there is none.
    """

    read: Callable[[Sequence[Stored]], int | None]
    threads: tuple[int, ...]
    module: str = ""
    package: str = ""


def ways() -> dict[str, Way]:
    """Return all ways by the name in the table."""
    return {
        "readinto": Way(readinto, (1, 2, 4, 8)),
        "readinto after posix_fadvise": Way(readinto_ahead, (1, 2, 4, 8)),
        "safe_open, get_tensor": Way(safe_open_tensors, (1, 2), "torch"),
        "safe_open, get_slice": Way(safe_open_slices, (1, 2), "torch"),
        "mmap": Way(mapped(None), (1, 2)),
        "mmap, SEQUENTIAL": Way(mapped(mmap.MADV_SEQUENTIAL), (1, 2)),
        "mmap, WILLNEED": Way(mapped(mmap.MADV_WILLNEED), (1, 2)),
        "mmap, POPULATE_READ": Way(mapped(POPULATE_READ), (1, 2)),
        "runai-model-streamer": Way(runai, (0,), "runai_model_streamer", "runai-model-streamer"),
        "fastsafetensors": Way(fast, (0,), "fastsafetensors", "fastsafetensors"),
        "safeproj": Way(score, (0,), "safeproj.engine"),
    }


@cache
def tasks(pair: Path) -> list[Task]:
    """Return what safeproj's engine is given."""
    from bench.engine import tasks_of_pair

    return tasks_of_pair(pair)


def score(stored: Sequence[Stored]) -> None:
    """Read and score all modules with safeproj's engine."""
    from bench.engine import score_all

    score_all(tasks(stored[0].path.parents[1]))


# --- measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What one measurement gave; `total` is the sum that shows what was read."""

    seconds: float
    cpu_seconds: float
    peak_mb: float
    total: int | None


def measure(pair: Path, name: str, threads: int, cold: bool) -> Found:
    """Read all weights one way; in a process of its own."""
    way = ways()[name]
    stored = needed(pair)
    shares = shared(stored, max(1, threads))
    if way.module:
        importlib.import_module(way.module)
    if way.read is score:
        tasks(pair)
    if cold:
        drop(stored)
    else:
        readinto(stored)
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    with ThreadPoolExecutor(len(shares)) as pool:
        sums = [found for found in pool.map(way.read, shares) if found is not None]
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    return Found(
        seconds=seconds,
        cpu_seconds=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        peak_mb=(after.ru_maxrss - before.ru_maxrss) * 1024 / 1e6,
        total=sum(sums) if sums else None,
    )


def shared(stored: Sequence[Stored], threads: int) -> list[list[Stored]]:
    """Split the weights, each to the thread with the fewest bytes so far."""
    shares: list[list[Stored]] = [[] for _ in range(threads)]
    loads = [0] * threads
    for weight in stored:
        lightest = loads.index(min(loads))
        shares[lightest].append(weight)
        loads[lightest] += weight.nbytes
    return shares


def drop(stored: Sequence[Stored]) -> None:
    """Drop the files from the page cache, and check that they are gone.

    Raises:
        BenchError: they are not.
    """
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    for path, _ in by_file(stored):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        view = np.frombuffer(data, np.uint8)
        pages = np.zeros(math.ceil(len(data) / mmap.PAGESIZE), np.uint8)
        if mincore(view.ctypes.data, len(data), pages.ctypes.data):
            raise BenchError(f"mincore: {os.strerror(ctypes.get_errno())}")
        held = int((pages & 1).sum()) / len(pages)
        if held > 0.01:
            raise BenchError(f"{held:.0%} of {path} stays in the page cache; is it in use?")


def compare(pair: Path, runs: int) -> None:
    """Print the table: the best of some runs, interleaved so that a slow spell hits all alike."""
    rows = [(name, n) for name, way in ways().items() for n in way.threads if installed(way)]
    found: dict[tuple[str, int, bool], list[Found]] = {}
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:
        for _ in range(runs):
            for name, threads in rows:
                for cold in (True, False):
                    result = pool.apply(measure, (pair, name, threads, cold))
                    found.setdefault((name, threads, cold), []).append(result)
    totals = {result.total for results in found.values() for result in results} - {None}
    if len(totals) != 1:
        raise BenchError("the readers do not agree on what they read")
    gigabytes = sum(weight.nbytes for weight in needed(pair)) / 1e9
    print(f"{gigabytes:.3f} GB, best of {runs}:\n")
    print("| reader | threads | in cache, s | GB/s | cold, s | GB/s | cold, CPU s | peak, MB |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, way in ways().items():
        if not installed(way):
            print(f"| {name} | not installed: `pip install {way.package}` | | | | | | |")
            continue
        for threads in way.threads:
            warm, dropped = (
                min(found[name, threads, cold], key=lambda result: result.seconds)
                for cold in (False, True)
            )
            cells = (
                name,
                str(threads or "its own"),
                f"{warm.seconds:.2f}",
                f"{gigabytes / warm.seconds:.1f}",
                f"{dropped.seconds:.2f}",
                f"{gigabytes / dropped.seconds:.2f}",
                f"{dropped.cpu_seconds:.1f}",
                f"{max(warm.peak_mb, dropped.peak_mb):.0f}",
            )
            print(f"| {' | '.join(cells)} |", flush=True)


def installed(way: Way) -> bool:
    """Say whether what a reader needs is there."""
    return not way.module or importlib.util.find_spec(way.module) is not None


def main() -> int:
    """Run the measurements and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    about = "made by python -m bench (%(default)s)"
    parser.add_argument("--pair", type=Path, default=PAIR, help=about)
    parser.add_argument("--runs", type=int, default=3, help="runs per figure (%(default)s)")
    args = parser.parse_args()
    if sys.platform != "linux":
        print("error: this script drops files from the page cache as Linux does", file=sys.stderr)
        return 2
    if not (args.pair / ADAPTER).is_file():
        about = f"{args.pair}: no pair; run python -m bench --skip-dense first"
        print(f"error: {about}", file=sys.stderr)
        return 2
    try:
        compare(args.pair, args.runs)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

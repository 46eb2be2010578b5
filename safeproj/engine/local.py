"""Runs tasks on one machine: worker threads over modules on the CPU, one pipeline on a GPU.

Each module is computed by one thread in a fixed order of fixed blocks, so that its result does not
depend on how many workers there are.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager

import torch
from torch import Tensor

from safeproj.checkpoint import Reader, Weight
from safeproj.engine.staging import CudaStaging, DirectStaging, Staging
from safeproj.engine.task import Comparison, Progress, Score, Task
from safeproj.errors import SafeprojError
from safeproj.profile import Usage
from safeproj.projection import Projector, alignment, scale, similarity
from safeproj.tensorfile import DTYPES

CPU_BLOCK = 1 << 20
"""Bytes of one weight per block on the CPU: two of them and their float32 difference stay in the
cache, and larger and smaller ones are slower."""

GPU_BLOCK = 32 << 20
"""Bytes per block on a GPU: enough to hide the latency of a copy."""

CPU_HOLD = 64 << 20
"""Largest float32 `V`, in bytes, that a CPU worker keeps for its second pass. A larger one is read
again, most likely from the page cache, so that memory does not grow with the size of a weight."""

GPU_HOLD = 2 << 30
"""The same on a GPU."""

MAX_WORKERS = 8
"""Default bound on worker threads: each holds up to `CPU_HOLD` bytes, and disks saturate early."""

OnProgress = Callable[[Progress], None]


class _StoppedError(Exception):
    """Another worker failed, or the run was interrupted."""


def run(
    tasks: Sequence[Task],
    projector: Projector,
    *,
    device: str = "auto",
    workers: int | None = None,
    digests: bool = False,
    on_progress: OnProgress | None = None,
    usage: Usage | None = None,
) -> list[Score]:
    """Score all tasks and return the scores in the same order.

    Args:
        tasks: the modules.
        projector: which `C`.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        workers: threads over modules on the CPU; default the number of cores, at most 8.
        digests: compute the SHA-256 of what is read.
        on_progress: called from the workers' threads.
        usage: filled in with what the workers did.

    Raises:
        SafeprojError: a weight cannot be read or has a value that is not finite, or the device
            is not there.
    """
    where = resolve_device(device)
    if where.type == "mps" and projector.kind == "exact":
        where = torch.device("cpu")  # MPS has no float64
    if where.type != "cpu":
        workers = 1
    elif workers is None:
        workers = min(os.cpu_count() or 1, MAX_WORKERS)
    stop = threading.Event()
    local = threading.local()
    made: list[_Worker] = []

    def work(task: Task) -> Score:
        if not hasattr(local, "worker"):
            torch.set_num_threads(1)  # applies to this thread
            local.worker = _Worker(projector, where, digests, stop, on_progress)
            made.append(local.worker)
        start = time.perf_counter()
        score: Score = local.worker.score(task)
        local.worker.seconds += time.perf_counter() - start
        if on_progress is not None:
            on_progress(Progress(task.name, finished=True))
        return score

    begin = time.perf_counter()
    with _exact_arithmetic(), ThreadPoolExecutor(workers, "safeproj") as pool:
        futures = [pool.submit(work, task) for task in tasks]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future.done():
                    future.result()  # raises what the worker raised
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            for worker in made:
                worker.close()
    if usage is not None:
        readers = [reader for worker in made for reader in worker.readers]
        usage.workers = len(made)
        usage.wall_seconds = time.perf_counter() - begin
        usage.busy_seconds = sum(worker.seconds for worker in made)
        usage.read_seconds = sum(reader.seconds for reader in readers)
        usage.read_bytes = sum(reader.nbytes for reader in readers)
    return [future.result() for future in futures]


def resolve_device(device: str) -> torch.device:
    """Return the torch device for `--device`; `auto` is CUDA, then MPS, then the CPU.

    Raises:
        SafeprojError: unknown, or not on this machine.
    """
    kind, _, index = device.partition(":")
    available: dict[str, Callable[[], bool]] = {
        "cpu": lambda: True,
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
    }
    if kind == "auto" and not index:
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if available[name]()))
    if kind not in available or (index and (kind != "cuda" or not index.isdecimal())):
        raise SafeprojError(f"--device {device}: expected auto, cpu, cuda, cuda:N or mps")
    if not available[kind]():
        raise SafeprojError(f"--device {device}: this machine has none that torch can use")
    if index and int(index) >= torch.cuda.device_count():
        raise SafeprojError(f"--device {device}: there are {torch.cuda.device_count()} devices")
    return torch.device(device)


class _Worker:
    """The buffers and files of one thread."""

    def __init__(
        self,
        projector: Projector,
        device: torch.device,
        digests: bool,
        stop: threading.Event,
        on_progress: OnProgress | None,
    ) -> None:
        self.device = device
        self.stop = stop
        self.on_progress = on_progress
        self.readers = (Reader(), Reader())
        self.seconds = 0.0
        self._projector = projector
        self._digests = digests
        self._V = torch.empty(0, device=device)
        self._staging: tuple[int, tuple[Staging, Staging]] | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @torch.inference_mode()
    def score(self, task: Task) -> Score:
        B = task.B if task.bias is None else torch.cat([task.B, task.bias], dim=1)
        blocks = _AlignmentBlocks(task, self, self._digests)
        try:
            found = self._projector(
                blocks, B.to(self.device, torch.float32, copy=True).contiguous()
            )
        except FloatingPointError as error:
            raise SafeprojError(self._diagnose(task, error)) from error
        rank = task.B.shape[1]
        CB = None if found.CB is None else found.CB[:, :rank].cpu()
        cosine = None if CB is None else similarity(task.A, task.B, CB)
        return Score(
            alignment_norm=found.alignment_norm,
            CB=CB,
            Cb=None if found.CB is None or task.bias is None else found.CB[:, rank:].cpu(),
            cosine=cosine,
            scale=None if CB is None or cosine is None else scale(task.B, CB),
            rank=found.rank,
            sha256=blocks.sha256,
        )

    def staging(self, nbytes: int) -> tuple[Staging, Staging]:
        """Return the staging of the aligned and the base weight for loads of up to `nbytes`."""
        if self._staging is None or self._staging[0] < nbytes:
            if self._stream is not None:
                pair: tuple[Staging, Staging] = (
                    CudaStaging(nbytes, self.device, self._stream),
                    CudaStaging(nbytes, self.device, self._stream),
                )
            else:
                pair = (DirectStaging(nbytes, self.device), DirectStaging(nbytes, self.device))
            self._staging = (nbytes, pair)
        return self._staging[1]

    def buffer(self, rows: int, columns: int) -> Tensor:
        """Return the reused float32 buffer of `V` as (rows, columns), on the device."""
        if self._V.numel() < rows * columns:
            self._V = torch.empty(rows * columns, device=self.device)
        return self._V[: rows * columns].view(rows, columns)

    def _diagnose(self, task: Task, error: FloatingPointError) -> str:
        """Name the tensor that has NaN or Inf, by reading both again."""
        for weight in (task.aligned.weight, task.base.weight):
            rows = _rows_per_block(weight, weight, self.device)
            staging = self.staging(rows * _width(weight))[0]
            for start in range(0, weight.shape[0], rows):
                stop = min(start + rows, weight.shape[0])
                if not bool(staging.load(weight, self.readers[0], start, stop).isfinite().all()):
                    return f"{weight.source}: {weight.label} has NaN or Inf; the file is damaged"
        return f"{task.name}: {error}, though its weights are: they are too large for float32"

    def close(self) -> None:
        for reader in self.readers:
            reader.close()


class _AlignmentBlocks:
    """`V` of one task as row blocks that can be iterated again.

    The first pass reads both weights; it keeps `V` if that is small enough, otherwise a further
    pass reads again. Weights that are stored transposed are always kept: their rows are columns of
    the file.
    """

    def __init__(self, task: Task, worker: _Worker, digests: bool) -> None:
        self.sha256: tuple[dict[str, str], dict[str, str]] | None = None
        self._task = task
        self._worker = worker
        self._digests = digests
        self._aligned, self._base = task.aligned.weight, task.base.weight
        self._rows = _rows_per_block(self._aligned, self._base, worker.device)
        self._mixed = task.aligned.transposed != task.base.transposed
        limit = GPU_HOLD if worker.device.type == "cuda" else CPU_HOLD
        small = math.prod(self._aligned.shape) * 4 <= limit
        self._keeps = task.aligned.transposed or self._mixed or small
        self._kept: Tensor | None = None
        self._seen = False

    def __iter__(self) -> Iterator[Tensor]:
        if self._kept is None and not self._task.aligned.transposed:
            yield from self._stored_blocks()
            return
        if self._kept is None:
            for _ in self._stored_blocks():
                pass
        assert self._kept is not None
        yield from self._kept.split(self._rows)

    def _stored_blocks(self) -> Iterator[Tensor]:
        """Yield `V` in the orientation in which the aligned weight is stored, by rows."""
        worker, readers = self._worker, self._worker.readers
        for reader in readers:
            reader.start(digests=self._digests and not self._seen)
        rows, columns = self._aligned.shape
        widest = max(_width(self._aligned), _width(self._base))
        staging = worker.staging(min(max(rows, columns), self._rows) * widest)
        out = worker.buffer(rows if self._keeps else min(rows, self._rows), columns)
        if self._mixed:
            self._load_turned(staging[1], out.T)
        for start in range(0, rows, self._rows):
            if worker.stop.is_set():
                raise _StoppedError
            stop = min(start + self._rows, rows)
            V = out[start:stop] if self._keeps else out[: stop - start]
            W_aligned = staging[0].load(self._aligned, readers[0], start, stop)
            if self._mixed:
                W_base = V.clone()
            else:
                W_base = staging[1].load(self._base, readers[1], start, stop)
                self._advance(stop - start, self._base)
            yield alignment(W_aligned, W_base, out=V)
            self._advance(stop - start, self._aligned)
        if self._keeps:
            self._kept = out.T if self._task.aligned.transposed else out
        if self._digests and not self._seen:
            self.sha256 = (_digests(readers[0]), _digests(readers[1]))
        self._seen = True

    def _load_turned(self, staging: Staging, out: Tensor) -> None:
        """Read all of the base weight, which is stored the other way round, into `out`."""
        for start in range(0, out.shape[0], self._rows):
            if self._worker.stop.is_set():
                raise _StoppedError
            stop = min(start + self._rows, out.shape[0])
            out[start:stop] = staging.load(self._base, self._worker.readers[1], start, stop)
            self._advance(stop - start, self._base)

    def _advance(self, rows: int, weight: Weight) -> None:
        if self._worker.on_progress is not None and not self._seen:
            self._worker.on_progress(Progress(self._task.name, rows * weight.row_bytes))


def relative_changes(comparisons: Sequence[Comparison]) -> list[float | None]:
    """Return `‖W_adapter - W_aligned‖_F / ‖W_aligned‖_F` of whole weights that adapters replace.

    Rows that the aligned weight does not have count as zero there, those that the replacement does
    not have are left out. None where the aligned weight is zero.

    Raises:
        SafeprojError: a weight cannot be read.
    """
    reader = Reader()
    try:
        return [_relative_change(comparison, reader) for comparison in comparisons]
    finally:
        reader.close()


@torch.inference_mode()
def _relative_change(comparison: Comparison, reader: Reader) -> float | None:
    weight, replacement = comparison.aligned.weight, comparison.replacement
    if comparison.aligned.transposed:
        replacement = replacement.T
    step = _rows_per_block(weight, weight, torch.device("cpu"))
    buffer = torch.empty(step * _width(weight), dtype=torch.uint8)
    change = size = 0.0
    for start, own, count in _runs(comparison, len(replacement), step):
        W_aligned = weight.read_rows(reader, start, start + count, buffer).double()
        size += float(W_aligned.square().sum())
        change += float((replacement[own : own + count].double() - W_aligned).square().sum())
    if comparison.rows is None:
        # Rows that the aligned weight does not have, such as added tokens, change from nothing.
        change += float(replacement[weight.shape[0] :].double().square().sum())
    return math.sqrt(change / size) if size else None


def _runs(comparison: Comparison, length: int, step: int) -> Iterator[tuple[int, int, int]]:
    """Yield which rows of the aligned weight and of the replacement belong together, and how many.

    Trainable tokens name their rows; otherwise the first rows of both.
    """
    if comparison.rows is not None:
        yield from ((row, own, 1) for own, row in enumerate(comparison.rows))
        return
    common = min(length, comparison.aligned.weight.shape[0])
    for start in range(0, common, step):
        yield start, start, min(step, common - start)


def _digests(reader: Reader) -> dict[str, str]:
    assert reader.digests is not None
    return {label: digest.hexdigest() for label, digest in reader.digests.items()}


def _rows_per_block(aligned: Weight, base: Weight, device: torch.device) -> int:
    block = CPU_BLOCK if device.type == "cpu" else GPU_BLOCK
    return max(1, block // max(_width(aligned), _width(base), 1))


def _width(weight: Weight) -> int:
    """Return the bytes of one row, as it is stored or as it is computed with, whichever is more."""
    return max(weight.row_bytes, weight.shape[1] * DTYPES[weight.dtype][1])


@contextmanager
def _exact_arithmetic() -> Iterator[None]:
    """Full float32 products (no TF32), and the caller's thread count put back afterwards."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)

"""Runs tasks on one machine: worker threads over weights on the CPU, one pipeline on a GPU.

Each weight is computed by one thread in a fixed order of fixed blocks, so that its result does not
depend on how many workers there are.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from safeproj.adapter.record import Side
from safeproj.engine.blocks import (
    AlignmentBlocks,
    Buffers,
    KeptBlocks,
    OnProgress,
    StoppedError,
    row_width,
    rows_per_block,
)
from safeproj.engine.profile import Usage
from safeproj.engine.task import (
    Difference,
    Effects,
    Kept,
    Moments,
    Origin,
    Progress,
    SafetyBasis,
    Score,
    Settled,
    StoredMoment,
    Task,
    Update,
)
from safeproj.errors import SafeprojError
from safeproj.methods.factors import CANCELS, CancellationError, Core, cancellation, core
from safeproj.methods.projection import (
    Approx,
    Complement,
    Correction,
    Exact,
    Moment,
    NotOrthonormalError,
    Projected,
    Projector,
    Reconstruction,
    SingularError,
    scale,
    share,
    similarity,
)
from safeproj.methods.safe_lora.decomposition import cosine_bounds

MAX_WORKERS = 8
"""Default bound on worker threads: each holds up to `CPU_HOLD` bytes, and disks saturate early."""

WIDE = frozenset({"exact", "covariance", "reconstruction"})
"""Kinds of projectors that compute in float64."""

T = TypeVar("T")


def run(
    tasks: Sequence[Task],
    projector: Projector,
    *,
    device: str = "auto",
    workers: int | None = None,
    digests: bool = False,
    on_progress: OnProgress | None = None,
    usage: Usage | None = None,
) -> list[tuple[Score | SafeprojError, ...]]:
    """Score all updates of all tasks and return their scores in the same order.

    Args:
        tasks: the weights and their updates.
        projector: which `C`.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        workers: threads over weights on the CPU; default the number of cores, at most 8.
        digests: compute the SHA-256 of what is read.
        on_progress: called from the workers' threads.
        usage: what the workers do is added to it.

    Returns:
        For each task the scores of its updates; an error in place of a score is about that update
        alone.

    Raises:
        SafeprojError: a weight cannot be read or has a value that is not finite, or the device
            is not there.
    """
    where = _device(device, wide=projector.kind in WIDE)

    def score(buffers: Buffers, task: Task) -> tuple[Score | SafeprojError, ...]:
        return _score(task, projector, buffers, digests)

    return list(_in_order(tasks, score, where, workers, on_progress, usage))


def differences(
    tasks: Sequence[tuple[str, Difference]],
    use: Callable[[Tensor], T],
    *,
    device: str = "auto",
    workers: int | None = None,
    on_progress: OnProgress | None = None,
    usage: Usage | None = None,
) -> Iterator[tuple[T, tuple[dict[str, str], dict[str, str]]]]:
    """Yield what `use` makes of `V` (m, n), float32, of each weight, and the digests of both sides.

    In the given order; each worker holds one `V`.

    Args:
        tasks: name and source of each weight.
        use: called with `V`, which is only valid meanwhile; must depend on nothing else, and raise
            FloatingPointError where `V` is not finite.
        device: as for `run`.
        workers: as for `run`.
        on_progress: as for `run`.
        usage: as for `run`.

    Raises:
        SafeprojError: as for `run`.
    """

    def work(buffers: Buffers, task: Task) -> tuple[T, tuple[dict[str, str], dict[str, str]]]:
        assert isinstance(task.origin, Difference)
        blocks = AlignmentBlocks(task.name, task.origin, buffers, digests=True, keep=True)
        V = blocks.whole()
        assert blocks.sha256 is not None
        try:
            return use(V), blocks.sha256
        except FloatingPointError as error:
            message = _diagnosis(task.name, task.origin, buffers)
            raise SafeprojError(message) from error

    where = _device(device, wide=True)
    without = [Task(name, source, ()) for name, source in tasks]
    yield from _in_order(without, work, where, workers, on_progress, usage)


def moments(
    tasks: Sequence[Task],
    use: Callable[[Task, Moment, Moment], T],
    *,
    device: str = "auto",
    workers: int | None = None,
    on_progress: OnProgress | None = None,
    usage: Usage | None = None,
) -> Iterator[T]:
    """Yield what `use` makes of the second moments of each task, in the given order.

    Args:
        tasks: weights that read one input each, with `Moments` as their origin.
        use: called with the task, `H` and `S`; must depend on nothing else.
        device: as for `run`.
        workers: as for `run`; each holds two moments.
        on_progress: as for `run`.
        usage: as for `run`.

    Raises:
        SafeprojError: as for `run`.
    """

    def work(buffers: Buffers, task: Task) -> T:
        assert isinstance(task.origin, Moments)
        H, S, _ = _moments(task.name, task.origin, buffers, digests=False)
        return use(task, H, S)

    where = _device(device, wide=True)
    yield from _in_order(tasks, work, where, workers, on_progress, usage)


def _device(device: str, *, wide: bool) -> torch.device:
    """Return the device for a projector; MPS has no float64, which some need."""
    where = resolve_device(device)
    return torch.device("cpu") if where.type == "mps" and wide else where


def _in_order(
    tasks: Sequence[Task],
    work: Callable[[Buffers, Task], T],
    device: torch.device,
    workers: int | None,
    on_progress: OnProgress | None,
    usage: Usage | None,
) -> Iterator[T]:
    """Yield `work(buffers, task)` of all tasks in order, while threads work on the next ones."""
    if device.type != "cpu":
        workers = 1
    elif workers is None:
        workers = min(os.cpu_count() or 1, MAX_WORKERS)
    stop = threading.Event()
    local = threading.local()
    made: list[Buffers] = []
    failures: list[Exception] = []
    busy: list[float] = []

    @torch.inference_mode()
    def one(task: Task, following: Sequence[Task]) -> T:
        if not hasattr(local, "buffers"):
            torch.set_num_threads(1)  # applies to this thread
            local.buffers = Buffers(device, stop, on_progress)
            made.append(local.buffers)
        start = time.perf_counter()
        try:
            for other in following:
                local.buffers.prefetch(other.origin.weights)
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
    with _exact_arithmetic(), ThreadPoolExecutor(workers, "safeproj") as pool:
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
            pool.shutdown(wait=True, cancel_futures=True)
            for buffers in made:
                buffers.close()
    if usage is not None:
        readers = [reader for buffers in made for reader in buffers.readers]
        usage.workers = max(usage.workers, len(made))
        usage.wall_seconds += time.perf_counter() - begin
        usage.busy_seconds += sum(busy)
        usage.read_seconds += sum(reader.seconds for reader in readers)
        usage.read_bytes += sum(reader.nbytes for reader in readers)


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


def _score(
    task: Task, projector: Projector, buffers: Buffers, digests: bool
) -> tuple[Score | SafeprojError, ...]:
    """Score all updates of one weight in one reading: their factors lie side by side."""
    if isinstance(task.origin, Moments):
        return _corrected(task, task.origin, projector, buffers, digests)
    cores = [_core(task.name, update, "output") for update in task.updates]
    pairs = zip(task.updates, cores, strict=True)
    factors = [_output(update, known) for update, known in pairs]
    B = torch.cat(factors, dim=1).to(buffers.device)
    try:
        found, sha256 = _project(task, projector, buffers, B, digests)
    except FloatingPointError as error:
        raise SafeprojError(_diagnosis(task.name, task.origin, buffers)) from error
    except NotOrthonormalError as error:
        (weight,) = task.origin.weights
        raise SafeprojError(f"{weight.source}: {weight.label}: {error}") from error
    widths = [factor.shape[1] for factor in factors]
    CBs, UBs = (
        [None] * len(widths) if each is None else each.cpu().split(widths, dim=1)
        for each in (found.CB, found.UB)
    )
    return tuple(
        known
        if isinstance(known, SafeprojError)
        else _update_score(task, update, known, found, CB, UB, sha256)
        for update, known, CB, UB in zip(task.updates, cores, CBs, UBs, strict=True)
    )


def _core(name: str, update: Update, side: Side) -> Core | SafeprojError | None:
    """Return what is computed with where the terms of an update cancel, None where they do not.

    It is that of `B A`, or of its transpose where `A` is the factor that is changed. None, too,
    where the update is exactly zero.
    """
    A, B = (update.A, update.B) if side == "output" else (_gained(update).T, update.stored.T)
    if not cancellation(A, B) > CANCELS:
        return None
    try:
        return core(A, B)
    except CancellationError as error:
        return SafeprojError(f"{name}: {error}")


def _gained(update: Update) -> Tensor:
    """Return `B` with AdaLoRA's gain: times `A` as it is stored it is the update."""
    return update.B if update.gain is None else update.B.double() * update.gain.double().T


def _output(update: Update, known: Core | SafeprojError | None) -> Tensor:
    """Return `B`, or what stands for it, in float32 with the bias as a further column."""
    B = known.M if isinstance(known, Core) else update.B
    parts = [B] if update.bias is None else [B, update.bias]
    return torch.cat([part.float() for part in parts], dim=1)


def _project(
    task: Task, projector: Projector, buffers: Buffers, B: Tensor, digests: bool
) -> tuple[Projected, tuple[dict[str, str], dict[str, str]] | None]:
    """Return `C B` and the digests of what was read for it."""
    source = task.origin
    if isinstance(source, SafetyBasis):
        assert isinstance(projector, Complement)  # `job` has it so
        U = KeptBlocks(task.name, source.weight, buffers, digests=digests)
        return projector.from_U(U, source.rank, B), U.sha256
    assert isinstance(projector, Approx | Exact)
    if isinstance(source, Difference):
        V = AlignmentBlocks(task.name, source, buffers, digests=digests)
        return projector.from_V(V, B), V.sha256
    assert isinstance(source, Kept)
    norm = source.alignment_norm
    if source.weight is None:
        return Projected(None, norm), ({}, {})
    kept = KeptBlocks(task.name, source.weight, buffers, digests=digests)
    if source.form == "V":
        return projector.from_V(kept, B), kept.sha256
    if source.form == "C":
        return projector.from_C(kept, norm, B), kept.sha256
    assert isinstance(projector, Approx)  # `api` refuses the exact projector of a truncated C
    eigenvalues = torch.tensor(source.eigenvalues, dtype=torch.float32, device=B.device)
    return projector.from_U(kept, eigenvalues, norm, B), kept.sha256


def _corrected(
    task: Task, origin: Moments, projector: Projector, buffers: Buffers, digests: bool
) -> tuple[Score | SafeprojError, ...]:
    """Correct all updates of the weights that read one input."""
    assert isinstance(projector, Correction | Reconstruction)
    H, S, sha256 = _moments(task.name, origin, buffers, digests)
    return corrected(task, projector, H, S, sha256)


def corrected(
    task: Task,
    projector: Correction | Reconstruction,
    H: Moment,
    S: Moment,
    sha256: tuple[dict[str, str], dict[str, str]] | None = None,
) -> tuple[Score | SafeprojError, ...]:
    """Score all updates of the weights that read one input: their `A` lie below each other.

    Args:
        task: the weights and their updates.
        projector: how they are corrected.
        H: of the safety data.
        S: of the benign data.
        sha256: the digests of what both were read from, if wanted.

    Raises:
        SafeprojError: the moments are none.
    """
    cores = [_core(task.name, update, "input") for update in task.updates]
    pairs = list(zip(task.updates, cores, strict=True))
    if isinstance(projector, Reconstruction):
        made = [_input(known, update.replacement) for update, known in pairs]
        return tuple(
            _corrected_score(task.name, update, known, own.to(H.matrix.device), (H, S), sha256)
            for (update, known), own in zip(pairs, made, strict=True)
        )
    inputs = [_input(known, update.stored) for update, known in pairs]
    A = torch.cat(inputs).to(H.matrix.device)
    try:
        found = projector.from_moments(H, S, A).float()
    except SingularError as error:
        sources = " and ".join(dict.fromkeys(each.source for each in task.origin.weights))
        raise SafeprojError(
            f"{task.name}: {error} in the statistics of {sources}; expected those of data that "
            "reaches the layer: make them again with `safeproj stats`"
        ) from error
    parts = found.split([len(each) for each in inputs])
    return tuple(
        _corrected_score(task.name, update, known, own, (H, S), sha256)
        for (update, known), own in zip(pairs, parts, strict=True)
    )


def _input(known: Core | SafeprojError | None, stored: Tensor | None) -> Tensor:
    """Return a factor (r, n) as it is stored, or what stands for it, in float32."""
    assert stored is not None
    return known.coordinates(stored.T).T.float() if isinstance(known, Core) else stored.float()


def required(results: Sequence[Score | SafeprojError]) -> list[Score]:
    """Return the scores of updates that must all have one.

    Raises:
        SafeprojError: the first of the errors in their place.
    """
    for found in results:
        if isinstance(found, SafeprojError):
            raise found
    return [found for found in results if isinstance(found, Score)]


def _moments(
    name: str, origin: Moments, buffers: Buffers, digests: bool
) -> tuple[Moment, Moment, tuple[dict[str, str], dict[str, str]] | None]:
    """Return both moments, and the digests of what was read for them."""
    try:
        H, safety = _moment(name, origin.safety, buffers, digests)
        S, benign = _moment(name, origin.benign, buffers, digests)
    except FloatingPointError as error:
        raise SafeprojError(_diagnosis(name, origin, buffers)) from error
    return H, S, (safety, benign) if digests else None


def _moment(
    name: str, stored: StoredMoment, buffers: Buffers, digests: bool
) -> tuple[Moment, dict[str, str]]:
    """Return a moment in float64 on the device, and the digest of what was read for it."""
    blocks = KeptBlocks(name, stored.weight, buffers, digests=digests)
    matrix = torch.empty(stored.weight.shape, dtype=torch.float64, device=buffers.device)
    start = 0
    for block in blocks:
        matrix[start : start + len(block)] = block
        start += len(block)
    assert blocks.sha256 is not None
    return Moment(matrix, stored.whole), blocks.sha256[0]


def _corrected_score(
    name: str,
    update: Update,
    known: Core | SafeprojError | None,
    corrected: Tensor,
    moments: tuple[Moment, Moment],
    sha256: tuple[dict[str, str], dict[str, str]] | None,
) -> Score | SafeprojError:
    """Return the score of an update from its `A'`, as it is stored, or what stands for it."""
    if isinstance(known, SafeprojError):
        return known
    device, factor = corrected.device, corrected.cpu().clone()
    if not bool(factor.isfinite().all()):
        return SafeprojError(f"{name}: the corrected factor has a value that is not finite")
    if known is None:
        A, B = update.A.double(), update.B
        after = update.with_gain(factor).double()  # M acts on columns, AdaLoRA's gain on rows
        settled = None
    else:
        A, B, after = known.M.T, known.Q.T, factor.double()
        settled, factor = Settled(known, after.T), known.factor(after.T).T.float()
        if not bool(factor.isfinite().all()):
            return SafeprojError(f"{name}: the corrected factor has a value that is not finite")
    cosine = similarity(B.T, A.T, after.T)
    found = Score(None, factor, None, cosine, None, None, sha256, settled=settled)
    if cosine is None:
        return found
    products = B.double().T @ B.double()

    def effects(factor: Tensor) -> Effects:
        on_device = factor.to(device)
        safety, benign = (
            float((products * (moment.apply(on_device) @ on_device.T).cpu()).sum())
            for moment in moments
        )
        benign += moments[1].ridge * float((products * (factor @ factor.T)).sum())
        return Effects(max(safety, 0.0), benign)

    return replace(found, scale=scale(A, after), before=effects(A), after=effects(after))


def _update_score(
    task: Task,
    update: Update,
    known: Core | None,
    found: Projected,
    CB: Tensor | None,
    UB: Tensor | None,
    sha256: tuple[dict[str, str], dict[str, str]] | None,
) -> Score | SafeprojError:
    if CB is None:
        return Score(found.alignment_norm, None, None, None, None, found.rank, sha256)
    if not bool(CB.isfinite().all()):
        return SafeprojError(
            f"{task.name}: the projected factor has a value that is not finite, though its weights "
            "are: they are too large for float32"
        )
    A, B = (update.A, update.B) if known is None else (known.Q, known.M)
    rank = B.shape[1]
    Cb = None if update.bias is None else CB[:, rank:].clone()
    CB = CB[:, :rank].clone()  # the others' may be let go
    UB = None if UB is None else UB[:, :rank]
    score = _measured(task.origin, A, B, CB, UB)
    if known is not None:
        settled = Settled(known, CB.double())
        score = replace(score, factor=known.factor(CB).float(), settled=settled)
    if score.cosine is not None and not math.isfinite(score.cosine):
        return SafeprojError(
            f"{task.name}: the cosine is not finite; the adapter's factors are too large"
        )
    return replace(
        score,
        alignment_norm=found.alignment_norm,
        bias=Cb,
        scale=None if score.cosine is None else scale(B, CB),
        rank=found.rank,
        sha256=sha256,
    )


def _measured(origin: Origin, A: Tensor, B: Tensor, CB: Tensor, UB: Tensor | None) -> Score:
    """Return the score of an update as far as its cosine, and what is known of that, go."""
    score = Score(None, CB, None, None, None, None, None)
    if isinstance(origin, SafetyBasis):
        assert UB is not None
        left = share(A, B, CB)  # C is an orthogonal projector: ⟨ΔW, C ΔW⟩ = ‖C ΔW‖²
        return replace(
            score,
            cosine=None if left is None else math.sqrt(left),
            safety_share=share(A, B, UB),
            energies=origin.energies,
        )
    score = replace(score, cosine=similarity(A, B, CB))
    if isinstance(origin, Kept) and UB is not None:
        bounds = cosine_bounds(A, B, CB, UB, origin.residual, origin.leak)
        residual = origin.residual
        return replace(score, bounds=bounds, truncation=origin.error, residual=residual)
    return score


def _diagnosis(name: str, source: Origin, buffers: Buffers) -> str:
    """Name the tensor that has NaN or Inf, by reading all again."""
    for weight in source.weights:
        rows = rows_per_block(buffers.device, weight)
        staging = buffers.staging(rows * row_width(weight))[0]
        for start, stop in buffers.starts(rows, weight):
            if not bool(staging.load(weight, buffers.readers[0], start, stop).isfinite().all()):
                return f"{weight.source}: {weight.label} has NaN or Inf; the file is damaged"
    return (
        f"{name}: V has a value that is not finite, though its weights are: they are too large for "
        "float32"
    )


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

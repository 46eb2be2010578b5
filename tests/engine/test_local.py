"""The engine on real files: blocks, memory rules, digests, progress, failures, devices."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file
from threadpoolctl import threadpool_info, threadpool_limits
from torch import Tensor

from safeproj import engine
from safeproj.checkpoint import open_checkpoint
from safeproj.checkpoint.expression import Matrix
from safeproj.checkpoint.hashes import HASHES, Hash
from safeproj.checkpoint.safetensors import SafetensorsWeight
from safeproj.engine import Buffers, Progress, Task, Update, blocks, local
from safeproj.engine.device import CPU_BLOCK, Host
from safeproj.engine.torch_device import TorchDevice
from safeproj.errors import SafeprojError
from safeproj.methods import differences as weights
from safeproj.methods.differences import CPU_HOLD, Difference
from safeproj.methods.safe_lora.formulas import Approx, Exact
from safeproj.methods.safe_lora.score import score
from safeproj.methods.score import Score
from safeproj.records.profile import Usage
from safeproj.storage.arrays import Array, to_torch
from tests.checkpoint.reading import hashed
from tests.support import hosts


def stored(path: Path, **tensors: Tensor) -> Path:
    """Write tensors as a checkpoint of one file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def task_of(
    tmp_path: Path,
    W_aligned: Tensor,
    W_base: Tensor,
    *,
    transposed: bool = False,
    base_transposed: bool | None = None,
) -> Task:
    """Return the task for a pair of weights given as (m, n)."""
    base_transposed = transposed if base_transposed is None else base_transposed
    r = 4
    generator = torch.Generator().manual_seed(7)
    m, n = W_aligned.shape
    sides = []
    for name, W, turned in (
        ("aligned", W_aligned, transposed),
        ("base", W_base, base_transposed),
    ):
        path = stored(tmp_path / f"{name}.safetensors", w=W.T if turned else W)
        sides.append(Matrix(open_checkpoint(str(path)).weight("w"), turned))
    A, B = torch.randn(r, n, generator=generator), torch.randn(m, r, generator=generator)
    factors = tuple(hosts(A, B))
    return Task("w", Difference(*sides), (Update(factors[0], factors[1]),))


def pair(m: int, n: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m * n)
    W_base = torch.randn(m, n, generator=generator)
    return (W_base + 0.1 * torch.randn(m, n, generator=generator)).to(dtype), W_base.to(dtype)


def oracle(task: Task, W_aligned: Tensor, W_base: Tensor) -> tuple[Tensor, float]:
    """Return `C B` and the cosine in float64, from the smaller of the dense products."""
    V = W_aligned.double() - W_base.double()
    (update,) = task.updates
    A, B = (to_torch(factor).double() for factor in (update.A, update.B))
    delta = B @ A
    projected = (V @ V.T) @ delta if V.shape[0] < V.shape[1] else V @ (V.T @ delta)
    cosine = (delta * projected).sum() / (delta.norm() * projected.norm())
    return V @ (V.T @ B) / V.norm(), float(cosine)


def run(
    tasks: Sequence[Task],
    formulas: Approx | Exact,
    *,
    hashes: Collection[Hash] = (),
    device: str = "cpu",
    **options: Any,
) -> list[tuple[Score | SafeprojError, ...]]:
    def work(buffers: Buffers, task: Task) -> tuple[Score | SafeprojError, ...]:
        return score(task, formulas, buffers, hashes=hashes)

    wide = isinstance(formulas, Exact)
    return list(engine.run(tasks, work, device=device, wide=wide, **options))


def tensor_of(found: Score) -> Tensor:
    """Return the factor that a score has."""
    assert found.factor is not None
    return to_torch(found.factor)


def error_of(found: Array | None, expected: Tensor) -> float:
    assert found is not None
    return float((to_torch(found).double() - expected).norm() / expected.norm())


both_devices = pytest.mark.parametrize("device", ["cpu", "torch"])


def run_one(task: Task, projector: Approx | Exact | None = None, device: str = "cpu") -> Score:
    ((score,),) = run([task], projector or Approx(), device=device)
    assert isinstance(score, Score)
    return score


@both_devices
@pytest.mark.parametrize("transposed", [(False, False), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize(
    ("m", "n"), [(700, 1200), (1200, 700), (3, 60_000), (60_000, 3), (2000, 1)]
)
def test_weights_of_many_blocks_agree_with_the_oracle(
    tmp_path: Path, m: int, n: int, transposed: tuple[bool, bool], device: str
) -> None:
    W_aligned, W_base = pair(m, n)
    task = task_of(
        tmp_path, W_aligned, W_base, transposed=transposed[0], base_transposed=transposed[1]
    )
    score = run_one(task, device=device)

    expected, cosine = oracle(task, W_aligned, W_base)
    assert error_of(score.factor, expected) < 1e-5
    assert score.cosine == pytest.approx(cosine, abs=2e-6)


@both_devices
def test_a_weight_too_large_to_keep_is_read_again(tmp_path: Path, device: str) -> None:
    m = n = math.isqrt(CPU_HOLD // 4) + 50
    W_aligned, W_base = pair(m, n)
    task = task_of(tmp_path, W_aligned, W_base)
    read: list[int] = []
    ((score,),) = run([task], Approx(), device=device, on_progress=lambda e: read.append(e.nbytes))
    assert isinstance(score, Score)

    expected, cosine = oracle(task, W_aligned, W_base)
    assert error_of(score.factor, expected) < 1e-5
    assert score.cosine == pytest.approx(cosine, abs=2e-6)
    assert len(read) > W_aligned.nbytes // CPU_BLOCK
    assert sum(read) == 2 * W_aligned.nbytes  # the second reading is not progress


@pytest.mark.parametrize("projector", [Approx(), Exact(rank=3)], ids=["approx", "exact"])
@pytest.mark.parametrize("hold", [0, CPU_HOLD])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("block", [1, 5000, CPU_BLOCK])
def test_digests_are_those_of_the_stored_bytes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    block: int,
    workers: int,
    hold: int,
    projector: Approx | Exact,
) -> None:
    """Whatever the blocks, the workers, and whether a weight is read twice."""
    monkeypatch.setattr(Host, "block", block)
    monkeypatch.setattr(weights, "CPU_HOLD", hold)
    matrices = pair(60, 110)
    for transposed in (False, True):
        task = task_of(tmp_path, *matrices, transposed=transposed, base_transposed=False)
        stored = (matrices[0].T if transposed else matrices[0]), matrices[1]
        expected = tuple(hashed({"w": W}) for W in stored)
        for (found,) in run([task] * 4, projector, workers=workers, hashes=HASHES):
            assert isinstance(found, Score)
            assert found.digests == expected


def test_only_what_is_asked_for_is_hashed(tmp_path: Path) -> None:
    task, usage = task_of(tmp_path, *pair(60, 110)), Usage()
    ((score,),) = run([task], Approx(), usage=usage)
    assert isinstance(score, Score)
    assert (score.digests, usage.hash_seconds) == (({}, {}), 0.0)
    ((score,),) = run([task], Approx(), usage=usage, hashes=HASHES[:1])
    assert isinstance(score, Score)
    assert [set(side) for side in score.digests] == [{HASHES[0]}, {HASHES[0]}]
    assert 0.0 < usage.hash_seconds < usage.busy_seconds


def test_progress_covers_all_bytes_and_all_modules(tmp_path: Path) -> None:
    task = task_of(tmp_path, *pair(600, 1100))
    events: list[Progress] = []
    run([task] * 3, Approx(), on_progress=events.append)
    assert sum(event.nbytes for event in events) == 3 * task.origin.nbytes
    assert sum(event.finished for event in events) == 3


def test_usage_counts_the_bytes_and_the_time_of_all_workers(tmp_path: Path) -> None:
    task, usage = task_of(tmp_path, *pair(600, 1100)), Usage()
    run([task] * 4, Approx(), workers=2, usage=usage)
    assert usage.read_bytes == 4 * task.origin.nbytes
    assert 1 <= usage.workers <= 2
    assert 0 < usage.read_seconds < usage.busy_seconds <= usage.workers * usage.wall_seconds


@pytest.mark.parametrize("culprit", ["aligned", "base"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_tensor_with_a_bad_value_is_named(tmp_path: Path, culprit: str, value: float) -> None:
    weights = dict(zip(("aligned", "base"), pair(600, 1100), strict=True))
    weights[culprit][599, 1099] = value
    task = task_of(tmp_path, weights["aligned"], weights["base"])
    with pytest.raises(SafeprojError, match=f"{culprit}.safetensors: w has NaN or Inf"):
        run_one(task)


def test_finite_weights_that_overflow_are_not_called_damaged(tmp_path: Path) -> None:
    huge = torch.full((4, 4), 3e38)
    with pytest.raises(SafeprojError, match="too large for float32"):
        run_one(task_of(tmp_path, huge, -huge))


def test_a_file_that_shrinks_after_the_plan_is_an_error(tmp_path: Path) -> None:
    task = task_of(tmp_path, *pair(600, 1100))
    file = tmp_path / "base.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SafeprojError, match="truncated"):
        run_one(task)


def test_the_callers_thread_counts_are_left_alone(tmp_path: Path) -> None:
    task = task_of(tmp_path, *pair(60, 40))
    with threadpool_limits(3, "blas"):
        before = torch.get_num_threads(), threadpool_info()
        run_one(task)
        run_one(task, device="torch")
        assert (torch.get_num_threads(), threadpool_info()) == before


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:0", ""])
def test_unknown_devices_are_refused(device: str) -> None:
    with pytest.raises(SafeprojError, match="expected auto, cpu, cuda"):
        engine.resolve_device(device)


@pytest.mark.parametrize(
    ("device", "told"),
    [
        ("cuda:0,cpu", "several must be GPUs"),
        ("torch,torch", "several must be GPUs"),
        ("cuda:0,", "several must be GPUs"),
        ("cuda:0,cuda:0", "names one twice"),
    ],
)
def test_several_devices_are_different_gpus(device: str, told: str) -> None:
    with pytest.raises(SafeprojError, match=told):
        engine.resolve_devices(device)


def test_each_of_several_devices_takes_weights(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    task = task_of(tmp_path / "w", *pair(60, 40))
    both = threading.Barrier(2, timeout=60)  # neither goes on alone
    used = []

    def work(buffers: Buffers, task: Task) -> tuple[Score | SafeprojError, ...]:
        both.wait()
        used.append(buffers.device)
        return score(task, Approx(), buffers, hashes=())

    devices = [TorchDevice(torch.device("cpu")) for _ in range(2)]
    found = list(local.in_order([task] * 8, work, devices, 2, None, None))
    assert [used.count(device) for device in devices] == [4, 4]
    one = tensor_of(run_one(task, device="torch"))
    for (each,) in found:
        assert isinstance(each, Score)
        assert torch.equal(one, tensor_of(each))


@pytest.mark.cuda
def test_all_gpus_give_what_one_gives(tmp_path: Path) -> None:
    task = task_of(tmp_path, *pair(300, 200))
    one, all_ = run_one(task, device="cuda"), run_one(task, device="cuda:all")
    assert torch.equal(tensor_of(one), tensor_of(all_))


@pytest.mark.parametrize("device", ["torch", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("projector", [Approx(), Exact(rank=4), Exact(energy=0.5)], ids=repr)
def test_torch_agrees_with_numpy(
    tmp_path: Path, projector: Approx | Exact, transposed: bool, device: str
) -> None:
    task = task_of(tmp_path, *pair(1300, 900), transposed=transposed)
    cpu, other = run_one(task, projector), run_one(task, projector, device)
    assert cpu.factor is not None
    assert error_of(other.factor, to_torch(cpu.factor).double()) < 1e-5
    assert other.cosine == pytest.approx(cpu.cosine, abs=2e-6)


@pytest.mark.cuda
def test_cuda_overlaps_blocks_without_mixing_them(tmp_path: Path) -> None:
    W_aligned, W_base = pair(9000, 9000)  # several blocks in both staging buffers
    task = task_of(tmp_path, W_aligned, W_base)
    expected, _ = oracle(task, W_aligned, W_base)
    first, second = run_one(task, device="cuda").factor, run_one(task, device="cuda").factor
    assert error_of(first, expected) < 1e-5
    assert first is not None
    assert second is not None
    assert numpy.array_equal(first, second)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's /proc")
def test_what_is_read_was_asked_for_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read-ahead asks for every byte but the first window of the first weight, and no other."""
    asked: dict[str, set[int]] = {}
    real = os.posix_fadvise

    def recorded(file: int, start: int, length: int, advice: int) -> None:
        name = Path(f"/proc/self/fd/{file}").readlink().name
        asked.setdefault(name, set()).update(range(start, start + length))
        real(file, start, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", recorded)
    monkeypatch.setattr(blocks, "AHEAD", 300_000)
    task = task_of(tmp_path, *pair(600, 1100))
    plain = run_one(task)
    run([task] * 3, Approx(), workers=1)
    assert isinstance(task.origin, Difference)
    for matrix in (task.origin.after, task.origin.before):
        weight = matrix.weight
        assert isinstance(weight, SafetensorsWeight)
        assert isinstance(weight.path, Path)
        start, nbytes = weight.entry.start, weight.entry.nbytes
        assert asked[weight.path.name] == set(range(start, start + nbytes))

    monkeypatch.delattr(os, "posix_fadvise")  # as where the system has no such call
    without = run_one(task)
    assert plain.factor is not None
    assert without.factor is not None
    assert numpy.array_equal(plain.factor, without.factor)

"""Eigenpairs and their bounds against float64 oracles written from `C = V Vᵀ / ‖V‖_F` alone."""

from __future__ import annotations

import doctest
import math
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from safeproj.methods.factors import CancellationError
from safeproj.methods.measures import similarity
from safeproj.methods.safe_lora import decomposition
from safeproj.methods.safe_lora.decomposition import (
    Eigenpairs,
    smaller_form,
)
from safeproj.storage.arrays import AnyArray, from_torch, to_torch
from tests.support import Put, both_engines, hosts, tensor_of

EPS = torch.finfo(torch.float32).eps

relaxed = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

SPECTRA = [
    "flat",
    "decaying",
    "steep",
    "low rank",
    "repeated rows",
    "constant",
    "one entry",
    "bfloat16",
]


def case(spectrum: str, m: int, n: int, seed: int, size: float = 1.0) -> Tensor:
    """Return `V` (m, n), float32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def with_singular_values(sigma: Tensor) -> Tensor:
        k = len(sigma)
        left, right = torch.linalg.qr(normal(m, k))[0], torch.linalg.qr(normal(n, k))[0]
        V: Tensor = (left * sigma) @ right.T
        return V

    i = torch.arange(1, min(m, n) + 1, dtype=torch.float64)
    if spectrum == "flat":
        V = normal(m, n)
    elif spectrum == "decaying":
        V = with_singular_values(1.0 / i)
    elif spectrum == "steep":
        V = with_singular_values(10.0 ** -(i - 1.0))
    elif spectrum == "low rank":
        V = normal(m, 3) @ normal(3, n)
    elif spectrum == "repeated rows":
        V = normal(2, n)[torch.arange(m) % 2]
    elif spectrum == "constant":
        V = torch.full((m, n), 0.1, dtype=torch.float64)
    elif spectrum == "one entry":
        V = torch.zeros(m, n, dtype=torch.float64)
        V[m // 2, n // 2] = -1.0
    else:
        base = normal(m, n)
        aligned = base + 0.01 * normal(m, n)
        V = aligned.bfloat16().double() - base.bfloat16().double()
        if not bool(V.any()):
            V[0, 0] = 2**-7
    return (size * V).float()


def eigenpairs(put: Put, V: Tensor, **options: Any) -> Eigenpairs:
    """Return what is found of `V`, in tensors."""
    found = decomposition.eigenpairs(put(V), float(V.double().norm()), **options)
    assert isinstance(found.U, numpy.ndarray)
    return replace(found, U=to_torch(found.U), eigenvalues=to_torch(found.eigenvalues))


def oracle_C(V: Tensor) -> Tensor:
    return torch.mm(V.double(), V.double().T).div(V.double().norm())


def cosine_bounds(
    A: AnyArray, B: AnyArray, CB: AnyArray, UB: AnyArray, residual: float, leak: float
) -> tuple[float, float] | None:
    """Return the bounds for factors in arrays of either library."""
    A, B, CB, UB = hosts(A, B, CB, UB)
    return decomposition.cosine_bounds(A, B, CB, UB, residual, leak)


def form(put: Put, V: Tensor) -> tuple[str, Tensor]:
    """Return the smaller form of `V`, in a tensor."""
    kind, stored = smaller_form(put(V), float(V.double().norm()))
    return kind, tensor_of(stored)


def oracle_eigenvalues(V: Tensor) -> Tensor:
    """Return the eigenvalues of `C` that can differ from 0, in descending order."""
    sigma: Tensor = torch.linalg.svdvals(V.double())
    return sigma.square().div(V.double().norm())


def oracle_similarity(delta: Tensor, C: Tensor) -> float:
    projected = C @ delta
    norm = float(projected.norm())
    if norm == 0.0:
        return 0.0
    cosine = float((delta * projected).sum()) / (float(delta.norm()) * norm)
    return min(max(cosine, 0.0), 1.0)  # as C is positive semidefinite


def dense(found: Eigenpairs) -> Tensor:
    """Return `C_K`."""
    C_K: Tensor = (found.U.double() * found.eigenvalues.double()) @ found.U.double().T
    return C_K


def spectral(M: Tensor) -> float:
    return float(torch.linalg.matrix_norm(M, 2))


def allowance(V: Tensor, found: Eigenpairs) -> float:
    """Return what float32 may add to a bound."""
    norm = float(V.double().norm())
    return EPS * (math.sqrt(max(V.shape)) * norm + 8 * float(found.eigenvalues[0]))


sizes = st.integers(1, 70)
shapes = st.one_of(
    st.tuples(sizes, sizes),
    st.tuples(sizes, st.just(1)),
    st.tuples(st.just(1), sizes),
    st.tuples(st.integers(50, 70), st.integers(50, 70)),
    sizes.map(lambda m: (m, m)),
)
seeds = st.integers(0, 2**32 - 1)
magnitudes = st.sampled_from([1e-6, 1.0, 1e3])


@both_engines
@relaxed
@given(
    shape=shapes,
    K=st.integers(1, 80),
    spectrum=st.sampled_from(SPECTRA),
    size=magnitudes,
    seed=seeds,
)
@example(shape=(64, 64), K=3, spectrum="flat", size=1.0, seed=0)
@example(shape=(40, 70), K=2, spectrum="decaying", size=1.0, seed=0)
@example(shape=(70, 40), K=2, spectrum="decaying", size=1.0, seed=0)
@example(shape=(60, 70), K=2, spectrum="constant", size=1.0, seed=0)
@example(shape=(70, 60), K=2, spectrum="constant", size=1e-6, seed=0)
@example(shape=(40, 70), K=8, spectrum="repeated rows", size=1.0, seed=1)
@example(shape=(1, 70), K=2, spectrum="constant", size=1.0, seed=0)
def test_the_recorded_bounds_hold_and_are_close(
    put: Put, shape: tuple[int, int], K: int, spectrum: str, size: float, seed: int
) -> None:
    V = case(spectrum, *shape, seed, size)
    found = eigenpairs(put, V, rank=K)
    U, C = found.U.double(), oracle_C(V)
    E = C - dense(found)
    free = allowance(V, found)

    assert found.U.dtype == found.eigenvalues.dtype == torch.float32
    assert found.U.shape == (shape[0], len(found.eigenvalues))
    assert 1 <= len(found.eigenvalues) <= min(K, *shape)
    assert float((U.T @ U - torch.eye(U.shape[1])).abs().max()) < 1e-5
    assert bool((found.eigenvalues > 0).all())
    assert bool((found.eigenvalues.diff() <= 0).all())

    # U is rounded to float32; but for that, E has no negative eigenvalue.
    assert float(torch.linalg.eigvalsh(E)[0]) >= -2 * EPS * float(found.eigenvalues[0])
    error, residual, leak = float(E.norm()), spectral(E), spectral(U.T @ E @ U)
    assert error <= found.error * float(C.norm()) <= 1.001 * error + 2 * free
    assert residual <= found.residual <= 1.2 * residual + 2 * free
    assert leak <= found.leak <= 1.001 * leak + 6 * EPS * float(found.eigenvalues[0])


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Let matrices of these sizes be sketched; tells of each whether it was."""
    done: list[bool] = []
    sketch = decomposition._sketch

    def spied(*arguments: Any) -> Eigenpairs | None:
        found = sketch(*arguments)
        done.append(found is not None)
        return found

    monkeypatch.setattr(decomposition, "WHOLE", 16)
    monkeypatch.setattr(decomposition, "_sketch", spied)
    return done


large = st.tuples(st.integers(64, 96), st.integers(64, 96))


@both_engines
@relaxed
@given(
    shape=large,
    K=st.integers(1, 10),
    spectrum=st.sampled_from(SPECTRA),
    size=magnitudes,
    seed=seeds,
)
@example(shape=(64, 64), K=3, spectrum="flat", size=1.0, seed=0)
@example(shape=(64, 96), K=2, spectrum="constant", size=1.0, seed=0)
@example(shape=(96, 64), K=2, spectrum="constant", size=1e-6, seed=0)
def test_the_bounds_of_a_sketch_hold(
    put: Put,
    sketched: list[bool],
    shape: tuple[int, int],
    K: int,
    spectrum: str,
    size: float,
    seed: int,
) -> None:
    V = case(spectrum, *shape, seed, size)
    found = eigenpairs(put, V, rank=K)
    assert sketched.pop()
    U, C = found.U.double(), oracle_C(V)
    E = C - dense(found)
    free = allowance(V, found)
    first = float(found.eigenvalues[0])

    assert 1 <= len(found.eigenvalues) <= K
    assert float((U.T @ U - torch.eye(U.shape[1])).abs().max()) < 1e-5
    assert bool((found.eigenvalues > 0).all())
    # U is rounded to float32; but for that, E has no negative eigenvalue.
    assert float(torch.linalg.eigvalsh(E)[0]) >= -2 * EPS * first
    error, residual, leak = float(E.norm()), spectral(E), spectral(U.T @ E @ U)
    assert error <= found.error * float(C.norm()) <= 1.5 * error + 2 * free
    assert residual <= found.residual <= 1.3 * residual + 2 * free
    assert leak <= found.leak <= 1.001 * leak + 6 * EPS * first


@pytest.mark.parametrize("spectrum", ["flat", "decaying", "low rank", "bfloat16"])
@pytest.mark.parametrize("shape", [(600, 900), (900, 600)])
@pytest.mark.parametrize("K", [4, 64])
def test_a_large_weight_is_sketched_almost_as_well_as_it_can_be(
    spectrum: str, shape: tuple[int, int], K: int
) -> None:
    V = case(spectrum, *shape, seed=11)
    found = eigenpairs(from_torch, V, rank=K)
    C, E = oracle_C(V), oracle_C(V) - dense(found)
    best = oracle_eigenvalues(V)[len(found.eigenvalues) :]
    free = allowance(V, found)
    error, residual = float(E.norm()), spectral(E)
    assert error <= 1.05 * float(best.norm()) + free
    assert residual <= 1.2 * float(best[0]) + free
    assert error <= found.error * float(C.norm()) <= 1.2 * error + 2 * free
    assert residual <= found.residual <= 1.3 * residual + 2 * free


@both_engines
@relaxed
@given(shape=shapes, K=st.integers(1, 80), size=magnitudes, seed=seeds)
def test_a_decaying_spectrum_gets_almost_its_best_approximation(
    put: Put, shape: tuple[int, int], K: int, size: float, seed: int
) -> None:
    V = case("decaying", *shape, seed, size)
    found = eigenpairs(put, V, rank=K)
    E = oracle_C(V) - dense(found)
    best = oracle_eigenvalues(V)
    K = min(K, *shape)
    assert len(found.eigenvalues) == K
    noise = 4 * EPS * float(best[0])
    assert float(E.norm()) <= 1.001 * float(best[K:].norm()) + noise
    assert spectral(E) <= 1.01 * float(best[K] if len(best) > K else 0.0) + noise
    assert found.eigenvalues.double() == pytest.approx(best[:K], rel=1e-2)


@both_engines
@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (50, 50), (1, 9), (9, 1), (1, 1)])
def test_all_eigenpairs_are_those_of_C(put: Put, shape: tuple[int, int]) -> None:
    V = case("flat", *shape, seed=3)
    found = eigenpairs(put, V, rank=1000)
    assert found.eigenvalues.double() == pytest.approx(oracle_eigenvalues(V), rel=1e-5)
    assert float((dense(found) - oracle_C(V)).norm()) <= 1e-6 * float(oracle_C(V).norm())
    assert found.error < 1e-5


@both_engines
@pytest.mark.parametrize("shape", [(30, 70), (70, 30), (70, 70)])
@pytest.mark.parametrize("K", [4, 60], ids=["sketch", "eigenvectors"])
@pytest.mark.parametrize(
    ("spectrum", "rank"), [("low rank", 3), ("repeated rows", 2), ("constant", 1), ("one entry", 1)]
)
def test_rounding_noise_is_no_eigenpair(
    put: Put, shape: tuple[int, int], K: int, spectrum: str, rank: int
) -> None:
    V = case(spectrum, *shape, seed=4)
    assert len(eigenpairs(put, V, rank=K).eigenvalues) == rank
    assert len(eigenpairs(put, V, energy=1.0).eigenvalues) == rank


@both_engines
@relaxed
@given(
    shape=shapes,
    energy=st.floats(0.05, 1.0),
    spectrum=st.sampled_from(["flat", "decaying", "low rank", "bfloat16"]),
    size=magnitudes,
    seed=seeds,
)
def test_energy_chooses_the_smallest_rank_that_holds_it(
    put: Put, shape: tuple[int, int], energy: float, spectrum: str, size: float, seed: int
) -> None:
    V = case(spectrum, *shape, seed, size)
    found = eigenpairs(put, V, energy=energy)
    shares = torch.linalg.svdvals(V.double()).square().cumsum(0)
    shares = shares / shares[-1]
    K = len(found.eigenvalues)
    assert shares[K - 1] >= energy - 1e-6
    assert K == 1 or shares[K - 2] < energy + 1e-9


@both_engines
@pytest.mark.parametrize("shape", [(90, 130), (130, 90)])
@pytest.mark.parametrize("spectrum", ["decaying", "flat", "low rank"])
@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9, 0.99, 1.0])
def test_a_sketch_grows_until_it_holds_the_energy(
    put: Put, shape: tuple[int, int], spectrum: str, energy: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decomposition, "START", 1)
    V = case(spectrum, *shape, seed=5)
    found = eigenpairs(put, V, energy=energy)
    K, norm = len(found.eigenvalues), float(V.double().norm())
    values = oracle_eigenvalues(V)
    smallest = int((values.cumsum(0) < energy * norm * (1 - 1e-6)).sum()) + 1
    # A sketch holds a little less than the best subspace of its rank.
    assert smallest <= K <= math.ceil(1.05 * smallest) + (spectrum == "flat")
    assert float(found.eigenvalues.double().sum()) >= energy * norm * (1 - 1e-6)


@both_engines
@relaxed
@given(
    shape=shapes,
    r=st.integers(1, 12),
    K=st.integers(1, 80),
    spectrum=st.sampled_from(SPECTRA),
    kind=st.sampled_from(
        ["random", "in U", "outside U", "next", "mixed", "parallel", "cancelling"]
    ),
    size=magnitudes,
    seed=seeds,
)
@example(shape=(64, 64), r=4, K=3, spectrum="flat", kind="next", size=1.0, seed=0)
@example(shape=(64, 64), r=4, K=3, spectrum="decaying", kind="outside U", size=1.0, seed=0)
@example(shape=(70, 60), r=4, K=3, spectrum="low rank", kind="outside U", size=1.0, seed=0)
@example(shape=(27, 1), r=8, K=1, spectrum="repeated rows", kind="mixed", size=1e-6, seed=67108863)
def test_the_true_cosine_lies_within_its_bounds(
    put: Put,
    shape: tuple[int, int],
    r: int,
    K: int,
    spectrum: str,
    kind: str,
    size: float,
    seed: int,
) -> None:
    V = case(spectrum, *shape, seed, size)
    found = eigenpairs(put, V, rank=K)
    A, B = update(V, found, r, kind, seed)

    UB = found.U.T @ B
    CB = found.U @ (found.eigenvalues[:, None] * UB)
    bounds = cosine_bounds(A, B, CB, UB, found.residual, found.leak)
    estimate = similarity(*hosts(A, B, CB))
    if estimate is None:
        assert bounds is None
        return
    assert bounds is not None
    lower, upper = bounds
    assert 0.0 <= lower <= estimate <= upper <= 1.0
    assert lower <= oracle_similarity(B.double() @ A.double(), oracle_C(V)) <= upper


def update(V: Tensor, found: Eigenpairs, r: int, kind: str, seed: int) -> tuple[Tensor, Tensor]:
    """Return `A` and `B`, float32, with a `B` of the given kind."""
    generator = torch.Generator().manual_seed(seed + 1)
    m, n = V.shape
    A = torch.randn(r, n, generator=generator)
    B = torch.randn(m, r, generator=generator)
    U = found.U
    if kind == "in U":
        B = U @ torch.randn(U.shape[1], r, generator=generator)
    elif kind == "outside U":
        B = (B.double() - U.double() @ (U.double().T @ B.double())).float()
    elif kind == "next":  # the worst direction that C_K leaves out
        E = oracle_C(V) - dense(found)
        B = torch.linalg.eigh(E)[1][:, -1:].float() * torch.randn(1, r, generator=generator)
    elif kind == "mixed":  # it and the weakest direction that C_K keeps
        E = oracle_C(V) - dense(found)
        B = torch.linalg.eigh(E)[1][:, -1:].float() + U[:, -1:] * torch.rand(
            1, r, generator=generator
        )
    elif kind == "parallel":
        B = B[:, :1].expand(m, r) + 1e-3 * B
    elif kind == "cancelling":  # the terms of B A nearly do
        signs = torch.arange(r).remainder(2).mul(-2.0).add(1.0)
        A, B = A[:1] + 1e-3 * A, (B[:, :1] + 1e-3 * B) * signs
    return A, B


@relaxed
@given(
    m=st.integers(2, 12),
    K=st.integers(1, 6),
    r=st.integers(1, 3),
    kappa=st.sampled_from([0.0, 1e-4, 0.1]),
    seed=seeds,
)
def test_the_bounds_hold_for_any_rest_that_is_positive_semidefinite(
    m: int, K: int, r: int, kappa: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    K = min(K, m)
    U = torch.linalg.qr(normal(m, K))[0]
    eigenvalues = torch.rand(K, generator=generator, dtype=torch.float64) + 0.01
    outside = normal(m, m)
    outside = outside - U @ (U.T @ outside)
    root = float(normal(1).abs()) * (outside + math.sqrt(kappa) * normal(m, m))
    root = root / m * 10.0 ** -float(3 * torch.rand(1, generator=generator))
    E = root @ root.T
    A, B = normal(r, 9), normal(m, r)
    kappa, epsilon = spectral(U.T @ E @ U), spectral(E)

    C_K = (U * eigenvalues) @ U.T
    bounds = cosine_bounds(A, B, C_K @ B, U.T @ B, epsilon, kappa)
    assert bounds is not None
    assert bounds[0] <= oracle_similarity(B @ A, C_K + E) <= bounds[1]


@relaxed
@given(
    a=st.floats(0.0, 1.0),
    share=st.floats(0.0, 1.0),
    residual=st.floats(1e-6, 2.0),
    leak=st.floats(0.0, 0.1),
)
@example(a=0.0, share=0.0, residual=0.5, leak=0.0)
@example(a=1e-4, share=0.01, residual=0.01, leak=1e-4)
@example(a=0.5, share=1.0, residual=0.5, leak=0.1)
def test_the_bounds_are_the_extremes_over_t(
    a: float, share: float, residual: float, leak: float
) -> None:
    """`X` is a unit vector, `share` of it in the range of `U`, and `y` is at an angle to it."""
    A, B = torch.ones(1, 1), torch.tensor([[1.0], [0.0]])
    CB, UB = torch.tensor([[a], [a / 2]]), torch.tensor([[math.sqrt(share)]])
    a, y = float(CB[0, 0]), float(CB.double().norm())
    inside = float(UB.double() ** 2)
    outside = max(1.0 - inside, 0.0) + decomposition.SLACK

    T = (math.sqrt(residual * outside) + math.sqrt(leak * inside)) ** 2
    t = torch.linspace(0.0, 1.0, 100001, dtype=torch.float64).square() * T
    N = y * y + 2 * math.sqrt(leak * T) * y
    D = y * y - 2 * math.sqrt(leak * T) * y
    assume(min(abs(D), N) > 1e-3 or y == 0.0)

    found = cosine_bounds(A, B, CB, UB, residual, leak)
    assert found is not None
    lower = ((a + t) / (N + residual * t).sqrt()).nan_to_num(0.0).min()
    upper = ((a + t) / (D + t * t).sqrt()).max() if D > 0.0 else float(T > 0.0)
    assert found == pytest.approx((float(lower), min(float(upper), 1.0)), abs=1e-5)


@both_engines
@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (50, 50)])
def test_all_eigenpairs_determine_the_cosine(put: Put, shape: tuple[int, int]) -> None:
    m, n = shape
    V = case("flat", m, m + 30, seed=6) if m < n else case("flat", m, n, seed=6)
    found = eigenpairs(put, V, rank=1000)
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(4, V.shape[1], generator=generator)
    B = V @ torch.randn(V.shape[1], 4, generator=generator)
    UB = found.U.T @ B
    CB = found.U @ (found.eigenvalues[:, None] * UB)
    bounds = cosine_bounds(A, B, CB, UB, found.residual, found.leak)
    assert bounds is not None
    assert bounds[1] - bounds[0] < 1e-5
    cosine = oracle_similarity(B.double() @ A.double(), oracle_C(V))
    assert bounds == pytest.approx((cosine, cosine), abs=1e-5)


def test_an_empty_update_has_no_bounds() -> None:
    A, B, U = hosts(torch.randn(2, 5), torch.randn(4, 2), torch.randn(3, 2))
    assert cosine_bounds(0 * A, B, B, U, 0.1, 0.1) is None
    assert cosine_bounds(A, 0 * B, 0 * B, 0 * U, 0.1, 0.1) is None
    for seed in range(10):  # terms that cancel, to nothing or but for rounding
        generator = torch.Generator().manual_seed(seed)
        row, column = hosts(*(torch.randn(n, generator=generator).double() for n in (5, 4)))
        A = numpy.stack([row, row, row])
        B = numpy.stack([column, 2.0 * column, -3.0 * column], axis=1)  # exact: from float32
        assert cosine_bounds(A, B, 0.5 * B, B, 0.1, 0.1) is None
        B = numpy.stack([0.1 * column, 0.2 * column, -0.3 * column], axis=1)
        with pytest.raises(CancellationError):
            cosine_bounds(A, B, 0.5 * B, B, 0.1, 0.1)


def test_an_update_outside_all_of_C_has_cosine_zero() -> None:
    A, B, nothing = numpy.ones((1, 3)), numpy.ones((4, 1)), numpy.zeros((4, 1))
    assert cosine_bounds(A, B, nothing, nothing[:2], 0.0, 0.0) == (0.0, decomposition.SLACK)
    assert cosine_bounds(A, B, nothing, nothing[:2], 1e-3, 0.0) == (0.0, 1.0)


@both_engines
@pytest.mark.parametrize("K", [3, 40], ids=["sketch", "eigenvectors"])
def test_the_result_follows_from_V_alone(put: Put, K: int) -> None:
    V = case("flat", 64, 90, seed=7)
    torch.manual_seed(0)
    first = eigenpairs(put, V, rank=K)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    second = eigenpairs(put, V.clone(), rank=K)
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())
    assert first.U.numpy().tobytes() == second.U.numpy().tobytes()
    assert first.eigenvalues.numpy().tobytes() == second.eigenvalues.numpy().tobytes()
    assert (first.error, first.residual, first.leak) == (
        second.error,
        second.residual,
        second.leak,
    )


@both_engines
@pytest.mark.parametrize("shape", [(64, 90), (90, 64)])
@pytest.mark.parametrize("power", [-90, 60])
def test_the_size_of_V_changes_nothing_but_the_unit(
    put: Put, shape: tuple[int, int], power: int
) -> None:
    V = case("decaying", *shape, seed=8)
    unit = 2.0**power
    one, other = eigenpairs(put, V, rank=3), eigenpairs(put, unit * V, rank=3)
    assert float((dense(other) / unit - dense(one)).norm()) < 1e-6 * float(dense(one).norm())
    assert other.error == pytest.approx(one.error)
    assert other.residual == pytest.approx(unit * one.residual)
    assert other.leak == pytest.approx(unit * one.leak)


@both_engines
@relaxed
@given(shape=shapes, spectrum=st.sampled_from(SPECTRA), size=magnitudes, seed=seeds)
def test_the_smaller_form_gives_the_projection(
    put: Put, shape: tuple[int, int], spectrum: str, size: float, seed: int
) -> None:
    V = case(spectrum, *shape, seed, size)
    kind, stored = form(put, V)
    assert kind == ("C" if shape[0] <= shape[1] else "V")
    assert stored.dtype == torch.float32
    assert stored.shape == (shape[0], min(shape))

    B = torch.randn(shape[0], 4, generator=torch.Generator().manual_seed(seed))
    expected = oracle_C(V) @ B.double()
    CB = stored @ B if kind == "C" else stored @ (stored.T @ B) / V.norm()
    scale = float(oracle_eigenvalues(V)[0]) * float(B.norm())
    assert float((CB.double() - expected).norm()) <= 1e-5 * max(float(expected.norm()), 0.1 * scale)
    if kind == "C":
        assert torch.equal(stored, stored.T)


@both_engines
@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_blocks_do_not_show(
    put: Put, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    V = case("decaying", *shape, seed=9)
    whole = eigenpairs(put, V, rank=4)
    monkeypatch.setattr(decomposition, "BLOCK", 7)
    parts = eigenpairs(put, V, rank=4)
    assert float((dense(parts) - dense(whole)).norm()) < 1e-6 * float(dense(whole).norm())
    assert parts.error == pytest.approx(whole.error, rel=1e-4)
    assert parts.residual == pytest.approx(whole.residual, rel=1e-3)
    kind, stored = form(put, V)
    if kind == "C":
        assert float((stored.double() - oracle_C(V)).norm()) < 1e-6 * float(stored.norm())
        assert torch.equal(stored, stored.T)


@pytest.mark.parametrize("options", [{}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 1.5}])
def test_eigenpairs_need_a_rank_or_an_energy_in_range(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"rank|energy"):
        eigenpairs(from_torch, torch.ones(2, 3), **options)


def test_the_examples_in_the_docstrings_hold() -> None:
    found = doctest.testmod(decomposition)
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
@pytest.mark.parametrize("K", [4, 40], ids=["sketch", "eigenvectors"])
def test_cuda_agrees_with_the_cpu(shape: tuple[int, int], K: int) -> None:
    V = case("decaying", *shape, seed=10)
    cpu, cuda = eigenpairs(from_torch, V, rank=K), eigenpairs(Tensor.cuda, V, rank=K)
    assert float((dense(cuda) - dense(cpu)).norm()) < 1e-5 * float(dense(cpu).norm())
    assert cuda.error == pytest.approx(cpu.error, rel=1e-3, abs=1e-5)

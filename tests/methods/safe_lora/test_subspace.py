"""The leading subspace of `V` against float64 singular vectors, however its spectrum looks."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from safeproj.methods import eigenpairs
from safeproj.methods.blocks import Projected
from safeproj.methods.safe_lora import subspace
from safeproj.methods.safe_lora.formulas import DETERMINED, Exact
from safeproj.methods.safe_lora.subspace import Gram, Leading, leading
from safeproj.storage.arrays import AnyArray, Array, from_torch
from tests.support import Put, both_engines, tensor_of

EPS = 2.0**-52

relaxed = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

SPECTRA: dict[str, Callable[[Array], Array]] = {
    "decaying": lambda i: i**-1.0,
    "steep": lambda i: 0.7**i,
    "slow": lambda i: i**-0.2,
    "one dominates": lambda i: numpy.where(i == 1, 1e2, 1.0 / i),
    "clusters": lambda i: 1.0 + numpy.floor((48 - i) / 12) + 1e-7 * i,
    "low rank": lambda i: numpy.where(i <= 10, 1.0 / i, 0.0),
    "a step": lambda i: numpy.where(i <= 8, 2.0, 1.0) + 0.1 / i,
    "a narrow gap": lambda i: numpy.where(i <= 8, 1.0 + 1e-6, 1.0) / numpy.maximum(i, 8),
}


def drawn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def case(spectrum: str, m: int, n: int, seed: int, size: float = 1.0) -> Tensor:
    """Return `V` (m, n), float32, of these singular values but for rounding."""
    if spectrum == "noise":
        return (size * drawn(m, n, seed=seed)).float()
    i = numpy.arange(1, min(m, n) + 1, dtype=numpy.float64)
    sigma = torch.from_numpy(numpy.asarray(SPECTRA[spectrum](i)))
    left = torch.linalg.qr(drawn(m, len(i), seed=seed))[0]
    right = torch.linalg.qr(drawn(n, len(i), seed=seed + 1))[0]
    V: Tensor = (left * (size * sigma)) @ right.T
    return V.float()


def oracle(V: Tensor, k: int) -> Tensor:
    U: Tensor = torch.linalg.svd(V.double(), full_matrices=False)[0][:, :k]
    return U @ U.T


def is_told_apart(V: Tensor, k: int) -> bool:
    """Tell whether float64 can tell the k leading left singular vectors, and then some."""
    sigma = torch.linalg.svdvals(V.double()).square()
    after = sigma[k] if k < len(sigma) else torch.zeros(())
    return k == len(V) or float(sigma[k - 1] - after) > 1e-8 * float(sigma[0])


@pytest.fixture
def spaces(monkeypatch: pytest.MonkeyPatch) -> list[Leading | None]:
    """Let small matrices be looked at as large ones are; what Krylov spaces told of each."""
    told: list[Leading | None] = []

    def spied(*arguments: Any) -> Leading | None:
        told.append(eigenpairs.from_space(*arguments))
        return told[-1]

    monkeypatch.setattr(subspace, "WHOLE", 16)
    monkeypatch.setattr(eigenpairs, "EARLY", 2)
    monkeypatch.setattr(eigenpairs, "LATE", 1)
    monkeypatch.setattr(f"{subspace.__name__}.from_space", spied)
    return told


@pytest.mark.usefixtures("spaces")
@both_engines
@relaxed
@given(
    shape=st.tuples(st.integers(80, 150), st.integers(80, 150)),
    rank=st.integers(1, 20),
    spectrum=st.sampled_from([*SPECTRA, "noise"]),
    size=st.sampled_from([1e-12, 1.0, 1e9]),
    seed=st.integers(0, 2**31),
)
@example(shape=(150, 150), rank=8, spectrum="a narrow gap", size=1.0, seed=0)
@example(shape=(150, 120), rank=12, spectrum="clusters", size=1.0, seed=0)
@example(shape=(120, 150), rank=7, spectrum="clusters", size=1.0, seed=0)
@example(shape=(120, 150), rank=15, spectrum="low rank", size=1e9, seed=0)
@example(shape=(150, 150), rank=20, spectrum="noise", size=1.0, seed=1)
def test_what_is_found_is_the_projector_or_said_not_to_be_certain(
    put: Put,
    shape: tuple[int, int],
    rank: int,
    spectrum: str,
    size: float,
    seed: int,
) -> None:
    V = case(spectrum, *shape, seed, size)
    B = drawn(shape[0], 3, seed=seed + 2).float()
    found = Exact(rank=rank).from_V([put(V)], put(B))
    assert found.CB is not None
    assert found.rank is not None
    assert found.rank == rank or spectrum in ("low rank", "steep")
    if is_told_apart(V, found.rank):
        error = tensor_of(found.CB).double() - oracle(V, found.rank) @ B.double()
        assert float(error.norm()) <= 1.5e-6 * float(B.double().norm())
        assert found.is_determined
    elif not found.is_determined:  # one of those that are as good
        CB = tensor_of(found.CB)
        again = Exact(rank=rank).from_V([put(V)], put(CB)).CB
        assert float((tensor_of(again) - CB).norm()) <= 1e-6 * float(B.norm())


@pytest.mark.usefixtures("spaces")
@both_engines
@relaxed
@given(
    size=st.integers(80, 150),
    rank=st.integers(1, 20),
    spectrum=st.sampled_from([*SPECTRA, "noise"]),
    seed=st.integers(0, 2**31),
)
def test_the_bound_of_the_error_holds(
    put: Put,
    size: int,
    rank: int,
    spectrum: str,
    seed: int,
) -> None:
    V = case(spectrum, size, size + 20, seed).double()
    rounding = math.sqrt(size + 20) * EPS * float(V.square().sum())

    def count(values: AnyArray) -> int:
        return min(rank, int((values > 1e-13 * values[0]).sum()))

    found = leading(Gram(put(V)), count, rank, rounding)
    rows = tensor_of(found.rows)
    k = len(rows)
    assert float((rows @ rows.T - torch.eye(k)).abs().max()) < 1e-12
    sigma = torch.linalg.svdvals(V).square()
    assert tensor_of(found.values) == pytest.approx(sigma[:k], abs=1e-9 * float(sigma[0]))
    distance = float(torch.linalg.matrix_norm(rows.T @ rows - oracle(V, k), 2))
    unsure = 1e-15 * math.sqrt(size) * float(sigma[0]) / max(float(sigma[k - 1] - sigma[k]), 1e-300)
    assert distance <= found.error + unsure


def peak(projector: Exact, V: Tensor, B: Tensor) -> tuple[Projected, float]:
    """Return what a projector gives, and the most numbers it held, in those of a Gram matrix."""
    arrays = from_torch(V), from_torch(B)
    tracemalloc.start()
    try:
        found = projector.from_V(arrays[:1], arrays[1])
        return found, tracemalloc.get_traced_memory()[1] / (8 * min(V.shape) ** 2)
    finally:
        tracemalloc.stop()


def off(found: Projected, V: Tensor, B: Tensor) -> float:
    """Return how far `C B` is from that of the oracle, relative to `B`."""
    assert found.CB is not None
    assert found.rank is not None
    error = tensor_of(found.CB).double() - oracle(V, found.rank) @ B.double()
    return float(error.norm() / B.double().norm())


@pytest.mark.parametrize("shape", [(1100, 1200), (1200, 1100)])
@pytest.mark.parametrize("spectrum", ["decaying", "steep", "a narrow gap", "one dominates"])
def test_a_large_weight_is_not_decomposed_whole(spectrum: str, shape: tuple[int, int]) -> None:
    """It holds `V`, and fewer vectors than a Gram matrix and its eigenvectors have."""
    V, B = case(spectrum, *shape, seed=3), drawn(shape[0], 4, seed=4).float()
    found, held = peak(Exact(rank=8), V, B)
    assert held < 2.5
    assert found.is_determined
    assert off(found, V, B) <= 1.5e-6


@pytest.mark.parametrize("shape", [(1100, 1200), (1200, 1100)])
@pytest.mark.parametrize("spectrum", ["noise", "slow"])
def test_a_flat_spectrum_is_decomposed_whole(spectrum: str, shape: tuple[int, int]) -> None:
    """No other way is faster: the Gram matrix, its eigenvectors, and what they are copied from."""
    V, B = case(spectrum, *shape, seed=3), drawn(shape[0], 4, seed=4).float()
    found, held = peak(Exact(rank=64), V, B)
    assert held > 3.0
    assert found.is_determined
    assert off(found, V, B) <= 1e-7


@pytest.mark.parametrize("shape", [(1100, 1200), (1200, 1100)])
@pytest.mark.parametrize(("energy", "whole"), [(0.3, False), (0.95, False), (1.0, True)])
def test_an_energy_is_held_by_the_smallest_rank(
    shape: tuple[int, int], energy: float, whole: bool
) -> None:
    V, B = case("decaying", *shape, seed=5), drawn(shape[0], 4, seed=6).float()
    found, held = peak(Exact(energy=energy), V, B)
    share = torch.linalg.svdvals(V.double()).square().cumsum(0)
    assert found.rank == 1 + int((share < energy * share[-1] * (1 - 1e-12)).sum())
    assert off(found, V, B) <= 1.5e-6
    assert (held > 3.0) == whole


@both_engines
def test_a_space_tells_as_far_as_rounding_lets_anything_tell(
    put: Put, spaces: list[Leading | None]
) -> None:
    """A gap of a few roundings is reported, not decomposed once more, as that tells no more."""
    sigma = numpy.arange(1.0, 121.0) ** -1.0
    sigma[8] = sigma[7] * (1 - 1e-15)
    left, right = (torch.linalg.qr(drawn(120, 120, seed=seed))[0] for seed in (1, 2))
    V = (left * torch.from_numpy(sigma)) @ right.T
    rounding = math.sqrt(120) * EPS * float(V.square().sum())
    found = leading(Gram(put(V)), lambda values: min(8, len(values)), 8, rounding)
    assert spaces == [found]
    assert found.error > DETERMINED
    rows = tensor_of(found.rows)
    outside = rows - rows @ left[:, :9] @ left[:, :9].T
    assert float(outside.norm()) <= 1e-6  # among the nine that are candidates
    inside = rows @ left[:, :7]
    assert float((inside.T @ inside - torch.eye(7)).abs().max()) <= 1e-6


@pytest.mark.usefixtures("spaces")
@both_engines
@pytest.mark.parametrize(
    ("rank", "is_determined"), [(8, True), (30, False), (48, True), (49, False), (100, True)]
)
def test_singular_values_that_are_equal_at_the_cut_leave_the_projector_open(
    put: Put, rank: int, is_determined: bool
) -> None:
    """More of them than a block has vectors, so that a Krylov space does not see all."""
    sigma = torch.ones(600)
    sigma[:48], sigma[:8], sigma[100:] = 2.0, 3.0, 0.0
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    V = torch.diag(sigma)[order]
    B = drawn(600, 4, seed=7).float()
    found = Exact(rank=rank).from_V([put(V)], put(B))
    assert found.rank == rank
    assert found.is_determined == is_determined
    if is_determined:
        assert found.CB is not None
        kept = torch.argsort(order)[:rank]
        expected = torch.zeros_like(B)
        expected[kept] = B[kept]
        assert float((tensor_of(found.CB) - expected).norm()) <= 1e-6 * float(B.norm())


def test_a_wrong_space_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Krylov space that knows nothing of the largest singular value."""
    sigma = torch.arange(1.0, 1101.0).double() ** -1.0
    gaussian = eigenpairs.gaussian

    def blind(*arguments: Any) -> AnyArray:
        found = gaussian(*arguments)
        found[:, 0] = 0.0
        return found

    monkeypatch.setattr(eigenpairs, "gaussian", blind)
    found = leading(Gram(torch.diag(sigma).numpy()), lambda each: min(4, len(each)), 4, 1e-16)
    assert numpy.abs(found.rows[:, :4]).sum() == pytest.approx(4.0)


@both_engines
def test_no_gap_before_the_noise_is_needed(put: Put, spaces: list[Leading | None]) -> None:
    """Where rank 10 is all there is, a larger one is cut."""
    V, B = case("low rank", 150, 200, seed=8), drawn(150, 2, seed=9).float()
    for rank in (10, 11, 20, 24):
        found = Exact(rank=rank).from_V([put(V)], put(B))
        assert found.rank is not None
        assert found.rank >= 10
    assert spaces[0] is not None


def test_the_tolerance_is_stricter_than_what_is_promised() -> None:
    assert subspace.TOLERANCE < DETERMINED

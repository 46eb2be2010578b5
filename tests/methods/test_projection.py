"""The formulas against a float64 oracle written from the paper's formulas alone."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from safeproj import text
from safeproj.checkpoint import expression
from safeproj.methods import differences, measures
from safeproj.methods.differences import subtract
from safeproj.methods.measures import pdst, scale, share, similarity
from safeproj.methods.safe_lora.formulas import Approx, Exact
from safeproj.methods.salora.formulas import Complement, NotOrthonormalError
from safeproj.records import scores
from safeproj.storage import arrays
from safeproj.storage.arrays import AnyArray
from tests.support import (
    Put,
    both_engines,
    for_each,
    hosts,
    oracle_C,
    oracle_cosine,
    tensor_of,
)

COSINE = 2e-6
"""Absolute; the bound that the project sets itself."""

RELATIVE = 1e-5
"""Of a projected factor in float32, in the Frobenius norm."""

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

relaxed = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def case(
    m: int, n: int, r: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return W_aligned, W_base, A, B as a checkpoint and an adapter would store them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    W_base = normal(m, n)
    # Real differences have a decaying spectrum; a flat one is the easy case.
    decay = torch.logspace(0, -2, min(m, n), dtype=torch.float64)
    V = normal(m, min(m, n)) * decay @ normal(min(m, n), n) / math.sqrt(n)
    return (
        (W_base + 0.1 * V).to(dtype),
        W_base.to(dtype),
        normal(r, n).to(dtype),
        normal(m, r).to(dtype),
    )


def blocks_of(put: Put, W_aligned: Tensor, W_base: Tensor, rows: int = 1000) -> list[AnyArray]:
    """Return `V` as the engine would hand it over."""
    V = put(torch.empty(W_aligned.shape))
    subtract(put(W_aligned), put(W_base), V)
    return [V[start : start + rows] for start in range(0, len(V), rows)]


def relative_error(found: AnyArray, expected: Tensor) -> float:
    return float((tensor_of(found).double() - expected).norm() / expected.norm())


SHAPES = [(48, 80, 8), (80, 48, 8), (64, 64, 4), (8, 40, 8), (1, 7, 1), (7, 1, 1), (33, 129, 16)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@for_each(("m", "n", "r"), SHAPES)
@for_each("projector", [Approx(), Exact(rank=1), Exact(rank=5)])
@for_each("seed", range(3))
@both_engines
def test_agrees_with_the_dense_oracle(
    put: Put, m: int, n: int, r: int, dtype: torch.dtype, projector: Approx | Exact, seed: int
) -> None:
    W_aligned, W_base, A, B = case(m, n, r, dtype, seed)

    found = projector.from_V(blocks_of(put, W_aligned, W_base, rows=13), put(B.float()))

    rank = None if isinstance(projector, Approx) else min(projector.rank or 0, m, n)
    C = oracle_C(W_aligned, W_base, rank)
    assert found.CB is not None
    assert relative_error(found.CB, C @ B.double()) < RELATIVE
    cosine = similarity(*hosts(A, B, found.CB))
    assert cosine == pytest.approx(oracle_cosine(B.double() @ A.double(), C), abs=COSINE)
    V = W_aligned.double() - W_base.double()
    assert found.alignment_norm == pytest.approx(float(V.norm()), rel=1e-6)
    assert scale(*hosts(B, found.CB)) == pytest.approx(
        float((C @ B.double()).norm() / B.double().norm()), rel=RELATIVE
    )


@both_engines
@relaxed
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 70),
    r=st.integers(1, 20),
    rows=st.integers(1, 80),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
)
def test_agrees_with_the_oracle_on_any_shape(
    put: Put, m: int, n: int, r: int, rows: int, seed: int, dtype: torch.dtype
) -> None:
    W_aligned, W_base, A, B = case(m, n, r, dtype, seed)
    found = Approx().from_V(blocks_of(put, W_aligned, W_base, rows), put(B.float()))
    C = oracle_C(W_aligned, W_base)
    if found.CB is None:  # a 1×1 weight whose change was rounded away
        assert torch.equal(W_aligned, W_base)
        return
    # Sums of m and of n products in float32, each of which may cancel: their errors are relative
    # to the sums of magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, 3.5).
    V = W_aligned.double() - W_base.double()
    magnitudes = V.abs() @ (V.abs().T @ B.double().abs()) / V.norm()
    bound = (m + n + 4) * 2.0**-24 * magnitudes
    assert bool(((tensor_of(found.CB).double() - C @ B.double()).abs() <= bound).all())
    cosine = similarity(*hosts(A, B, found.CB))
    assert cosine == pytest.approx(oracle_cosine(B.double() @ A.double(), C), abs=COSINE)


@both_engines
@relaxed
@given(seed=st.integers(0, 2**32 - 1), energy=st.floats(0.05, 0.999))
def test_energy_chooses_the_smallest_rank_that_holds_it(put: Put, seed: int, energy: float) -> None:
    W_aligned, W_base, _, B = case(24, 37, 3, torch.float32, seed)
    found = Exact(energy=energy).from_V(blocks_of(put, W_aligned, W_base), put(B))

    shares = torch.linalg.svdvals(W_aligned.double() - W_base.double()).square().cumsum(0)
    shares = shares / shares[-1]
    assert found.rank is not None
    assert shares[found.rank - 1] >= energy - 1e-6
    assert found.rank == 1 or shares[found.rank - 2] < energy + 1e-6


@both_engines
def test_all_of_the_energy_is_the_projector_onto_the_column_space(put: Put) -> None:
    W_aligned, W_base, _, B = case(12, 30, 3, torch.float32, seed=0)
    found = Exact(energy=1.0).from_V(blocks_of(put, W_aligned, W_base), put(B))
    assert found.rank == 12
    assert found.CB is not None
    assert relative_error(found.CB, B.double()) < RELATIVE


@both_engines
def test_a_rank_above_the_numerical_rank_is_cut(put: Put) -> None:
    V = torch.outer(torch.arange(1.0, 7.0), torch.arange(1.0, 10.0))
    B = torch.eye(6)[:, :2]
    found = Exact(rank=5).from_V([put(V)], put(B))
    u = torch.arange(1.0, 7.0, dtype=torch.float64)
    assert found.rank == 1
    assert found.CB is not None
    assert relative_error(found.CB, torch.outer(u, u)[:, :2] / u.dot(u)) < RELATIVE


@both_engines
def test_the_exact_projector_is_idempotent_and_the_fast_one_is_not(put: Put) -> None:
    W_aligned, W_base, _, B = case(30, 20, 4, torch.float32, seed=1)
    V = blocks_of(put, W_aligned, W_base)
    for projector, idempotent in ((Exact(rank=6), True), (Approx(), False)):
        once = projector.from_V(V, put(B)).CB
        assert once is not None
        twice = projector.from_V(V, once).CB
        assert twice is not None
        assert (relative_error(twice, tensor_of(once).double()) < RELATIVE) is idempotent


@both_engines
def test_the_result_does_not_depend_on_the_scale_of_the_update(put: Put) -> None:
    W_aligned, W_base, A, B = case(40, 30, 4, torch.float32, seed=2)
    V = blocks_of(put, W_aligned, W_base)
    found = []
    for s in (1e-6, 1.0, 1e6):
        CB = Approx().from_V(V, put(s * B)).CB
        assert CB is not None
        found.append(similarity(*hosts(A, s * B, CB)))
    assert found == pytest.approx([found[1]] * 3, abs=COSINE)


@pytest.mark.parametrize("projector", [Approx(), Exact(rank=2)], ids=repr)
@both_engines
def test_no_alignment_leaves_C_undefined(put: Put, projector: Approx | Exact) -> None:
    found = projector.from_V([put(torch.zeros(m, 6)) for m in (4, 3)], put(torch.ones(7, 2)))
    assert found.CB is None
    assert found.alignment_norm == 0.0


@pytest.mark.parametrize("projector", [Approx(), Exact(rank=2)], ids=repr)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@both_engines
def test_values_that_are_not_finite_are_noticed(
    put: Put, projector: Approx | Exact, bad: float
) -> None:
    V = torch.ones(4, 6)
    V[2, 3] = bad
    with pytest.raises(FloatingPointError):
        projector.from_V([put(V)], put(torch.ones(4, 2)))


def test_an_empty_update_has_no_cosine() -> None:
    A, B = hosts(torch.randn(2, 5), torch.randn(4, 2))
    assert similarity(0 * A, B, B) is None
    assert similarity(A, 0 * B, 0 * B) is None


def test_factors_that_cancel_are_an_empty_update() -> None:
    row, column = torch.randn(5), torch.randn(4)
    A, B = torch.stack([row, row]), torch.stack([column, -column], dim=1)
    assert similarity(*hosts(A, B, 0.5 * B)) is None


def test_a_small_update_from_large_factors_is_not_empty() -> None:
    A, B = torch.tensor([[1e9, 0.0], [0.0, 1e-3]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    assert similarity(*hosts(A, B, 0.5 * B)) == pytest.approx(1.0)


@both_engines
def test_an_update_outside_the_subspace_has_cosine_zero(put: Put) -> None:
    V = torch.zeros(4, 6)
    V[0] = 1.0  # the column space is the first axis
    B = torch.zeros(4, 2)
    B[2] = 1.0
    A = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    for projector in (Approx(), Exact(rank=1)):
        found = projector.from_V([put(V)], put(B))
        assert found.CB is not None
        assert similarity(*hosts(A, B, found.CB)) == 0.0


@both_engines
def test_differences_of_half_precision_weights_are_not_rounded_to_half_precision(put: Put) -> None:
    W_aligned = torch.tensor([[1.0 + 2**-7]], dtype=torch.bfloat16)
    W_base = torch.tensor([[2**-10]], dtype=torch.float16)
    (V,) = blocks_of(put, W_aligned, W_base)
    assert V.item() == 1.0 + 2**-7 - 2**-10


@both_engines
def test_differences_of_double_precision_weights_are_taken_in_double_precision(put: Put) -> None:
    W_aligned = torch.tensor([[1.0 + 2**-40]], dtype=torch.float64)
    (V,) = blocks_of(put, W_aligned, torch.ones(1, 1))
    assert V.item() == 2**-40


def test_pdst_is_one_for_a_projected_module_and_falls_with_the_distance() -> None:
    (CB,) = hosts(torch.tensor([[3.0], [0.0]]))
    assert pdst(CB, CB) == 1.0
    assert pdst(0 * CB, CB) == 0.25


@pytest.mark.parametrize("options", [{}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 1.5}])
def test_the_exact_projector_needs_a_rank_or_an_energy_in_range(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"rank|energy"):
        Exact(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "module", [arrays, differences, measures, expression, text, scores], ids=lambda m: m.__name__
)
def test_the_examples_in_the_docstrings_hold(module: object) -> None:
    found = doctest.testmod(module)  # type: ignore[arg-type]
    assert found.attempted > 0
    assert found.failed == 0


# SaLoRA


def orthonormal(m: int, k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    U: Tensor = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))[0]
    return U


@both_engines
@relaxed
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 30),
    r=st.integers(1, 8),
    k=st.integers(1, 12),
    cut=st.integers(0, 11),
    rows=st.integers(1, 40),
    seed=st.integers(0, 999),
)
def test_the_complement_of_the_safety_subspace(
    put: Put, m: int, n: int, r: int, k: int, cut: int, rows: int, seed: int
) -> None:
    U = orthonormal(m, min(k, m), seed)
    rank = max(1, U.shape[1] - cut)
    _, _, A, B = case(m, n, r, torch.float32, seed)

    found = Complement().from_U(list(map(put, U.float().split(rows))), rank, put(B))

    C = torch.eye(m, dtype=torch.float64) - U[:, :rank] @ U[:, :rank].T
    delta = B.double() @ A.double()
    inside, outside = (float(X.square().sum()) for X in (U[:, :rank].T @ delta, C @ delta))
    assert found.CB is not None
    assert found.UB is not None
    assert (found.rank, found.alignment_norm) == (rank, None)
    error = (tensor_of(found.CB).double() - C @ B.double()).norm() / B.double().norm()
    assert error < RELATIVE
    size = float(delta.square().sum())
    assert share(*hosts(A, B, found.UB)) == pytest.approx(inside / size, abs=COSINE)
    left = share(*hosts(A, B, found.CB))
    assert left is not None
    # The definition of the cosine is noise where nothing is left of the update.
    if outside / size > 1e-3:
        assert math.sqrt(left) == pytest.approx(oracle_cosine(delta, C), abs=1e-5)
    else:
        assert math.sqrt(left) < 0.04


@both_engines
def test_a_safety_subspace_that_is_everything_leaves_nothing(put: Put) -> None:
    U = orthonormal(6, 6, 1)
    _, _, A, B = case(6, 5, 2, torch.float32, 1)
    found = Complement().from_U([put(U.float())], 6, put(B))
    assert found.CB is not None
    assert found.UB is not None
    left = share(*hosts(A, B, found.CB))
    assert left is not None
    assert 0.0 <= left < 1e-12
    assert share(*hosts(A, B, found.UB)) == pytest.approx(1.0, abs=1e-6)


def test_no_update_has_no_share() -> None:
    A, B, XB = hosts(torch.ones(2, 3), torch.tensor([[1.0, -1.0]]), torch.ones(1, 2))
    assert share(0 * A, abs(B), XB) is None
    assert share(A, B, XB) is None


@both_engines
def test_columns_that_are_not_orthonormal_are_noticed(put: Put) -> None:
    B = put(torch.ones(8, 2))
    U = orthonormal(8, 3, 1).float()
    for wrong in (U * 1.001, U * 0.0, torch.cat([U[:, :2], U[:, :1]], dim=1)):
        with pytest.raises(NotOrthonormalError, match="not orthonormal"):
            Complement().from_U([put(wrong)], 3, B)
    Complement().from_U([put(U * 1.0001)], 3, B)


def test_a_rank_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, found 0"):
        Complement(0)

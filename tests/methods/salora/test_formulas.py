"""The SaLoRA formulas against float64 oracles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safeproj.methods.eigenpairs import WHOLE, leading_eigenpairs
from safeproj.methods.salora.constraint import WithoutSafety
from safeproj.methods.salora.formulas import initial_factors, without
from safeproj.storage.arrays import AnyArray
from tests.methods.salora.oracle import C_S, span, start
from tests.support import Put, both_engines, tensor_of

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40))
SEEDS = st.integers(0, 2**31)


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def basis(m: int, k: int, seed: int) -> Tensor:
    """Return orthonormal columns (m, k)."""
    U: Tensor = torch.linalg.qr(drawn(m, k, seed=seed))[0]
    return U


@both_engines
@settings(deadline=None)
@given(shape=SHAPES, k=st.integers(1, 40), seed=SEEDS)
def test_what_lies_in_the_safety_subspace_is_removed(
    put: Put, shape: tuple[int, int], k: int, seed: int
) -> None:
    m, r = shape
    U, B = basis(m, min(k, m), seed), drawn(m, r, seed=seed + 1)
    found = without(put(U), put(B))
    assert torch.allclose(tensor_of(found), C_S(U) @ B, atol=1e-12)
    again = without(put(U), found)
    assert torch.allclose(tensor_of(again), tensor_of(found), atol=1e-12)  # C_S is idempotent


@both_engines
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_product_is_taken_in_float32_whatever_the_dtype(put: Put, dtype: torch.dtype) -> None:
    U, B = basis(50, 7, 0), drawn(50, 4, seed=1, dtype=dtype)
    exact = C_S(U) @ B.double()
    found = tensor_of(without(put(U.float()), put(B)))
    assert found.dtype == dtype
    # One rounding to the dtype, and float32's inside.
    assert torch.allclose(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-6)


def test_autocast_does_not_round_the_product() -> None:
    U, B = basis(50, 7, 0).float(), drawn(50, 4, seed=1, dtype=torch.float32)
    module = WithoutSafety(U)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float((U.T @ module(B)).abs().max()) > 1e-6  # products outside are rounded
        found = module(B)
    assert float((U.T @ found).abs().max()) < 1e-6


@both_engines
@settings(deadline=None)
@given(shape=SHAPES, d=st.integers(1, 40), r=st.integers(1, 12), seed=SEEDS)
def test_initial_factors_are_those_of_the_paper(
    put: Put, shape: tuple[int, int], d: int, r: int, seed: int
) -> None:
    m, n = shape
    W, U_t = drawn(m, n, seed=seed), basis(m, min(d, m), seed + 1)
    r = min(r, m, n)
    A_0, B_0 = map(tensor_of, initial_factors(put(W), put(U_t), r))
    wanted_A, wanted_B = start(W, U_t, r)
    assert A_0.shape == (r, n)
    assert B_0.shape == (m, r)
    # Singular vectors have no sign; the products that they enter have. Those of close singular
    # values may turn, which the product does not see either, unless the cut falls between them.
    values = torch.linalg.svdvals(W)
    gap = float(values[r - 1] - values[r]) / float(values[0]) if r < len(values) else 1.0
    if gap > 1e-3:
        assert torch.allclose(B_0 @ A_0, wanted_B @ wanted_A, atol=1e-7 * float(values[0]))


@both_engines
def test_a_rank_beyond_that_of_the_weight_is_refused(put: Put) -> None:
    W = drawn(6, 2, seed=0) @ drawn(2, 5, seed=1)
    with pytest.raises(ValueError, match="larger than that of the weight, 2"):
        initial_factors(put(W), put(basis(6, 3, 2)), 3)


@both_engines
@pytest.mark.parametrize(
    ("size", "rank", "iterated"),
    [(20, 5, False), (WHOLE, 5, False), (WHOLE + 77, 5, True), (WHOLE + 77, 260, False)],
    ids=["small", "whole", "large", "many"],
)
def test_leading_eigenpairs_are_those_of_the_whole_matrix(
    put: Put, size: int, rank: int, iterated: bool
) -> None:
    Q = basis(size, size, 3)
    values = torch.arange(1, size + 1, dtype=torch.float64) ** -1.5
    M = put((Q * values) @ Q.T)
    widths = []

    def product(X: AnyArray) -> AnyArray:
        widths.append(X.shape[1])
        return M @ X

    found, vectors = map(tensor_of, leading_eigenpairs(product, size, rank, M))
    assert (size not in widths) == iterated
    assert torch.allclose(found, values[:rank], rtol=1e-9)
    assert torch.allclose(span(vectors), span(Q[:, :rank]), atol=1e-8)


@both_engines
def test_a_spectrum_without_gaps_ends_with_the_whole_matrix(put: Put) -> None:
    size = WHOLE + 10
    M = torch.eye(size, dtype=torch.float64) + 1e-9 * torch.diag(
        torch.linspace(1, 0, size, dtype=torch.float64)
    )
    calls = []

    def product(X: AnyArray) -> AnyArray:
        calls.append(X.shape[1])
        return put(M) @ X

    values, vectors = map(tensor_of, leading_eigenpairs(product, size, 4, put(M)))
    assert calls[-1] == size
    assert float((M @ vectors - vectors * values).norm()) < 1e-9


@both_engines
def test_rounding_noise_is_no_eigenvalue(put: Put) -> None:
    X = put(drawn(3, 30, seed=0))
    values, vectors = leading_eigenpairs(lambda Q: X.T @ (X @ Q), 30, 8, X)
    assert values.shape == (3,)
    assert vectors.shape == (30, 3)


@both_engines
def test_zero_has_no_eigenpairs(put: Put) -> None:
    values, _ = leading_eigenpairs(lambda Q: 0.0 * Q, 10, 3, put(torch.empty(0)))
    assert len(values) == 0


@both_engines
@pytest.mark.parametrize("size", [10, WHOLE + 1])
def test_what_is_not_finite_is_refused(put: Put, size: int) -> None:
    with pytest.raises(FloatingPointError):
        leading_eigenpairs(lambda Q: Q * float("nan"), size, 3, put(torch.empty(0)))

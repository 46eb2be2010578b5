"""`A' = A μS (H + μS)⁻¹` against the oracle, in both of its forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safeproj.methods.covariance.formulas import Correction, Moment, SingularError
from safeproj.storage.arrays import from_torch
from tests.methods.covariance import oracle
from tests.support import Put, both_engines, tensor_of


def drawn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def moment(put: Put, rows: Tensor, *, whole: bool) -> Moment:
    """Return the second moment of rows (N, n), whole or as the product of these."""
    if whole:
        return Moment(put(oracle.moment(rows)), True)
    return Moment(put(rows / math.sqrt(len(rows))), False)


@both_engines
@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 40),
    r=st.integers(1, 9),
    m=st.integers(1, 20),
    safety=st.integers(1, 60),
    benign=st.integers(1, 60),
    mu=st.floats(1e-3, 1e3),
    forms=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_the_oracle_on_any_shape(
    put: Put,
    n: int,
    r: int,
    m: int,
    safety: int,
    benign: int,
    mu: float,
    forms: tuple[bool, bool],
    seed: int,
) -> None:
    X, Y = drawn(seed, safety, n), drawn(seed + 1, benign, n)
    A, B = drawn(seed + 2, r, n), drawn(seed + 3, m, r)
    H, S = oracle.moment(X), oracle.ridged(oracle.moment(Y))
    expected = oracle.corrected(B @ A, H, S, mu)
    safe, kept = moment(put, X, whole=forms[0]), moment(put, Y, whole=forms[1])
    found = tensor_of(Correction(mu).from_moments(safe, kept, put(A.float())))
    assert found.dtype == torch.float64
    # S may have few rows: its condition is up to 1e3 n, that of H + μS more for a small μ.
    condition = float(torch.linalg.cond(H + mu * S))
    scale = float(torch.linalg.norm(B @ A)) * (1.0 + float(torch.linalg.norm(H)) / mu)
    bound = 1e-6 * scale + 1e-13 * condition * scale
    assert float((B @ found - expected).norm()) <= bound


@both_engines
@pytest.mark.parametrize("whole", [True, False], ids=["dense", "low-rank"])
def test_nothing_does_better_than_it(put: Put, whole: bool) -> None:
    n, mu = 24, 0.7
    X, Y, A, B = drawn(1, 9, n), drawn(2, 11, n), drawn(3, 4, n), drawn(4, 13, 4)
    H, S = oracle.moment(X), oracle.ridged(oracle.moment(Y))
    moments = moment(put, X, whole=whole), moment(put, Y, whole=whole)
    found = B @ tensor_of(Correction(mu).from_moments(*moments, put(A)))
    best = oracle.objective(found, B @ A, H, S, mu)
    for seed in range(20):
        other = found + 1e-3 * drawn(100 + seed, 13, n)
        assert oracle.objective(other, B @ A, H, S, mu) > best


@both_engines
@pytest.mark.parametrize("whole", [True, False], ids=["dense", "low-rank"])
def test_a_large_mu_keeps_the_adapter_and_a_small_one_what_safety_inputs_cannot_see(
    put: Put, whole: bool
) -> None:
    n = 30
    X, Y, A = drawn(1, 7, n), drawn(2, 12, n), drawn(3, 4, n)
    H, S = moment(put, X, whole=whole), moment(put, Y, whole=whole)
    kept = tensor_of(Correction(1e10).from_moments(H, S, put(A)))
    assert float((kept - A).norm() / A.norm()) < 1e-5
    removed = tensor_of(Correction(1e-9).from_moments(H, S, put(A)))
    assert float((removed @ X.T).norm() / (A @ X.T).norm()) < 1e-4
    assert float(removed.norm()) > 0.1 * float(A.norm())  # n - 7 directions are left


def test_forms_and_engines_agree() -> None:
    X, Y, A = drawn(5, 9, 40), drawn(6, 10, 40), drawn(7, 3, 40)
    found = [
        tensor_of(
            Correction(0.3).from_moments(moment(put, X, whole=a), moment(put, Y, whole=b), put(A))
        )
        for put in (from_torch, Tensor.detach)
        for a in (True, False)
        for b in (True, False)
    ]
    for each in found[1:]:
        assert float((each - found[0]).norm() / found[0].norm()) < 1e-9


@both_engines
def test_safety_data_without_anything_keeps_the_adapter(put: Put) -> None:
    A = drawn(1, 3, 8)
    zero, other = (moment(put, rows, whole=True) for rows in (torch.zeros(1, 8), drawn(2, 20, 8)))
    assert torch.equal(tensor_of(Correction(1.0).from_moments(zero, other, put(A))), A)


@both_engines
def test_benign_data_without_anything_is_refused(put: Put) -> None:
    zero, other = (moment(put, rows, whole=True) for rows in (torch.zeros(1, 8), drawn(2, 20, 8)))
    with pytest.raises(SingularError, match="S is zero"):
        Correction(1.0).from_moments(other, zero, put(drawn(1, 3, 8)))


@both_engines
def test_what_is_no_moment_is_refused(put: Put) -> None:
    wrong = Moment(put(-torch.eye(8, dtype=torch.float64)), True)
    other = moment(put, drawn(2, 20, 8), whole=True)
    with pytest.raises(SingularError, match="not positive definite"):
        Correction(1e-3).from_moments(wrong, other, put(drawn(1, 3, 8)))


@pytest.mark.parametrize("mu", [0.0, -1.0, math.inf, math.nan])
def test_mu_is_positive(mu: float) -> None:
    with pytest.raises(ValueError, match="mu must be"):
        Correction(mu)

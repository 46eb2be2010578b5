"""Products whose terms cancel, against exact fractions."""

from __future__ import annotations

import doctest
import math
from fractions import Fraction

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safeproj.methods import factors
from safeproj.methods.factors import CancellationError, cancellation, core, is_zero, norm, settled
from safeproj.methods.measures import gains, share, similarity
from safeproj.methods.safe_lora.decomposition import cosine_bounds
from safeproj.methods.safe_lora.formulas import Approx
from safeproj.methods.salora.formulas import Complement
from safeproj.storage.arrays import Array, from_torch, to_host, to_torch
from tests.support import Put, both_engines, hosts, oracle_C, oracle_cosine, tensor_of


def exact(A: Tensor | Array, B: Tensor | Array) -> Tensor:
    """Return `B A` in float64, from sums that are exact."""
    A, B = tensor_of(A), tensor_of(B)
    columns = [[Fraction(value) for value in column] for column in A.double().T.tolist()]
    return torch.tensor(
        [
            [
                float(sum((Fraction(b) * a for b, a in zip(row, column, strict=True)), Fraction()))
                for column in columns
            ]
            for row in B.double().tolist()
        ],
        dtype=torch.float64,
    )


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator)


def hidden(size: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return factors of an update with two columns beside it that cancel exactly."""
    A, B, column = normal(3, 9, seed=seed), normal(12, 2, seed=seed + 1), normal(12, 1, seed=9)
    return torch.cat([A, A[2:]]), torch.cat([B, size * column, -size * column], dim=1)


def transposed(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return B.T.contiguous(), A.T.contiguous()


def nearly(size: float) -> tuple[Tensor, Tensor]:
    """Return factors that nearly cancel; no row and no column depends on the others."""
    A, B = normal(3, 9), normal(12, 3)
    A[2], B[:, 2] = A[1] + A[0] / size, -B[:, 1] * size + B[:, 0]
    B[:, 1] *= size
    return A, B


CASES = {
    "columns": hidden(1e9),
    "columns of moderate size": hidden(1e3),
    "rows": transposed(*hidden(1e9)),
    "nearly": nearly(1e4),
    "an update in another order of magnitude": (hidden(1e9)[0] * 1e-20, hidden(1e9)[1] * 1e12),
    "rows of all lengths": (
        torch.tensor([[1e12], [1e-12], [1.0], [1.0]]) * hidden(1e9)[0],
        torch.tensor([1e-12, 1e12, 1.0, 1.0]) * hidden(1e9)[1],
    ),
}


@pytest.mark.parametrize(("A", "B"), CASES.values(), ids=CASES)
def test_the_core_is_the_product(A: Tensor, B: Tensor) -> None:
    expected = exact(A, B)
    assert cancellation(*hosts(A, B)) > factors.CANCELS
    found = core(*hosts(A, B))
    assert found is not None
    error = float((to_torch(found.M @ found.Q) - expected).norm() / expected.norm())
    # Each sum is off by a few roundings of its terms, which are so many times as large.
    assert error < 64 * factors.EPS * math.sqrt(found.ratio)
    assert norm(*hosts(A, B)) == pytest.approx(float(expected.norm()), rel=1e-5)
    assert numpy.allclose(found.Q @ found.Q.T, numpy.eye(len(found.Q)), atol=1e-12)


@pytest.mark.parametrize(("A", "B"), CASES.values(), ids=CASES)
def test_a_factor_is_found_for_what_takes_the_place_of_the_core(A: Tensor, B: Tensor) -> None:
    found = core(*hosts(A, B))
    assert found is not None
    wanted = found.M[::-1]
    there = found.factor(wanted)
    assert there.shape == B.shape
    size = float(numpy.linalg.norm(wanted))
    error = float(numpy.linalg.norm(found.coordinates(there) - wanted)) / size
    assert error < 64 * factors.EPS * math.sqrt(found.ratio)
    assert float((exact(A, there) - to_torch(wanted @ found.Q)).norm()) / size < 1e-5


@both_engines
@pytest.mark.parametrize(("A", "B"), CASES.values(), ids=CASES)
def test_scores_are_those_of_the_product(put: Put, A: Tensor, B: Tensor) -> None:
    m = len(B)
    delta, V, U = exact(A, B), normal(m, 20, seed=5), torch.linalg.qr(normal(m, 3, seed=6))[0]
    (left, right), C = settled(*hosts(A, B)), oracle_C(V, torch.zeros_like(V))
    factor = put(to_torch(right).float())

    found = Approx().from_V([put(V)], factor)
    assert found.CB is not None
    cosine = similarity(left, right, to_host(found.CB))
    assert cosine == pytest.approx(oracle_cosine(delta, C), abs=2e-6)

    kept = Complement().from_U([put(U)], 3, factor)
    assert kept.UB is not None
    inside = float((U.double().T @ delta).square().sum() / delta.square().sum())
    assert share(left, right, to_host(kept.UB)) == pytest.approx(inside, abs=2e-6)


def test_the_formulas_themselves_do_not_take_large_terms_for_an_empty_update() -> None:
    A, B = hidden(1e9)
    C = torch.diag(torch.arange(12.0, dtype=torch.float64))
    delta = exact(A, B)
    cosine = similarity(*hosts(A, B, C @ B.double()))
    assert cosine == pytest.approx(oracle_cosine(delta, C), abs=1e-4)
    inside = float(delta[:3].square().sum() / delta.square().sum())
    assert share(*hosts(A, B, B[:3])) == pytest.approx(inside, abs=1e-4)


@pytest.mark.parametrize("size", [1.0, 1e9, 1e30])
def test_only_zero_is_empty(size: float) -> None:
    A, B = hosts(*hidden(size))
    B[:, :2] = 0.0
    assert is_zero(A, B)
    assert core(A, B) is None
    assert norm(A, B) == 0.0
    assert similarity(A, B, B) is None
    assert share(A, B, B) is None
    B[3, 0] = 1e-30  # the smallest thing that is left
    assert not is_zero(A, B)
    if size > 1.0:
        with pytest.raises(CancellationError, match="double precision"):
            similarity(A, B, B)
        assert norm(A, B) < 1e-13 * size * 100


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1),
    st.integers(-40, 40),
)  # fmt: skip
def test_zero_is_told_from_all_else(r: int, m: int, n: int, seed: int, power: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randint(-2, 3, (r, n), generator=generator).float() * 2.0**power
    B = torch.randint(-2, 3, (m, r), generator=generator).float() * 2.0 ** (2 * power)
    assert is_zero(*hosts(A, B)) is bool((exact(A, B) == 0.0).all())


def test_factors_that_hardly_cancel_are_left_as_they_are() -> None:
    factors_ = normal(4, 9), normal(12, 4), normal(12, 4, seed=3)
    for found, expected in zip(settled(*hosts(*factors_)), factors_, strict=True):
        assert torch.equal(to_torch(found), expected.double())


def test_bounds_of_a_cosine_know_an_empty_update() -> None:
    A, zero = hosts(normal(2, 5), torch.zeros(4, 2))
    assert cosine_bounds(A, zero, zero, zero, 0.1, 0.1) is None


def test_gains_do_not_move_where_a_part_along_alignment_is_added() -> None:
    """What is bought for a cosine leaves the rest where it was."""
    C = numpy.diag([9.0, 4.0, 1.0, 0.01, 0.01, 0.0])
    bad = numpy.zeros((6, 2))
    bad[3, 0], bad[5, 1], bad[4, 1] = 2.0, 1.0, 1.0
    rows = from_torch(torch.linalg.qr(normal(8, 4).double())[0].T)
    for price in (0.0, 1.0, 30.0):
        # In one part with the harm, so that each singular direction has half of both.
        good = price * numpy.eye(6)[:, :2]
        B = numpy.hstack([bad + good, bad - good])
        seen, sizes = gains(rows, B, C @ B)
        expected = numpy.linalg.norm(numpy.hstack([bad, bad]))
        assert numpy.linalg.norm(sizes[seen < 0.02]) == pytest.approx(expected, rel=1e-6)
        if price == 30.0:
            cosine = similarity(rows, B, C @ B)
            assert cosine is not None
            assert cosine > 0.9


def test_the_examples_in_the_docstrings_hold() -> None:
    found = doctest.testmod(factors)
    assert found.attempted > 0
    assert found.failed == 0

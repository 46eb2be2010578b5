"""The best approximation of a rank, against the singular value decomposition in float64."""

from __future__ import annotations

import numpy
import pytest
import torch

from safeproj.methods.leading import leading
from tests.support import Put, both_engines, for_each, tensor_of

SHAPES = ((120, 200), (200, 120), (30, 40))

SPECTRA = {
    "flat": lambda k: numpy.ones(k),
    "slow": lambda k: numpy.arange(1, k + 1) ** -0.5,
    "fast": lambda k: 0.8 ** numpy.arange(k),
    "a step": lambda k: numpy.where(numpy.arange(k) < 20, 1.0, 0.9),
    "close to the cut": lambda k: numpy.linspace(1.0, 0.5, k),
    "low rank and noise": lambda k: numpy.where(numpy.arange(k) < 6, 1.0, 1e-3),
}


@both_engines
@for_each("rank", [1, 6, 16])
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
@for_each("shape", SHAPES)
def test_the_error_is_that_of_the_best(
    put: Put, shape: tuple[int, int], spectrum: object, rank: int
) -> None:
    assert callable(spectrum)
    generator, k = numpy.random.default_rng(3), min(shape)
    U, V = (numpy.linalg.qr(generator.standard_normal((side, k)))[0] for side in shape)
    M = torch.from_numpy(((U * spectrum(k)) @ V.T).astype(numpy.float32))
    S = torch.linalg.svdvals(M.double())
    found = leading(put(M), rank)
    assert found is not None
    product = torch.from_numpy(found.B).double() @ torch.from_numpy(found.A).double()
    error = float((M.double() - product).norm() / M.double().norm())
    assert found.error == pytest.approx(error, rel=1e-3)
    assert error <= 1.01 * float(S[rank:].norm() / S.norm())
    assert found.norm == pytest.approx(float(S.norm()), rel=1e-6)


@both_engines
def test_a_product_of_that_rank_is_found_again(put: Put) -> None:
    torch.manual_seed(0)
    M = torch.randn(90, 4) @ torch.randn(4, 70)
    found = leading(put(M), 4)
    assert found is not None
    assert found.error < 1e-6
    assert found.A.shape == (4, 70)
    assert found.B.shape == (90, 4)


def test_there_are_not_more_directions_than_sides() -> None:
    found = leading(tensor_of(torch.randn(5, 9)).numpy(), 16)
    assert found is not None
    assert found.A.shape == (5, 9)
    assert found.error < 1e-6


def test_zero_and_what_is_not_finite() -> None:
    assert leading(numpy.zeros((4, 6), numpy.float32), 2) is None
    with pytest.raises(FloatingPointError):
        leading(numpy.full((4, 6), numpy.nan, numpy.float32), 2)

"""Leading eigenpairs, and bounds of norms, of matrices that are known by their products."""

from __future__ import annotations

import functools

import numpy
import pytest
import torch

from safeproj.methods.eigenpairs import PROBES, gaussian, leading_eigenpairs, upper_bounds
from safeproj.storage.arrays import AnyArray, Array
from tests.support import Put, both_engines, tensor_of

SIZE = 1100

SPECTRA = {
    "decaying": numpy.arange(1.0, SIZE + 1) ** -1.5,
    "tied": numpy.where(numpy.arange(SIZE) < 40, 1.0, 0.1),
    "flat": numpy.linspace(1.0, 0.9, SIZE),
    "low rank": numpy.where(numpy.arange(SIZE) < 5, 2.0, 0.0),
    "zero": numpy.zeros(SIZE),
}


@functools.cache
def known(spectrum: str) -> Array:
    """Return a symmetric matrix (SIZE, SIZE) of these eigenvalues."""
    Q = numpy.linalg.qr(numpy.random.default_rng(2).standard_normal((SIZE, SIZE)))[0]
    M: Array = (Q * SPECTRA[spectrum]) @ Q.T
    return M


@both_engines
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_leading_eigenpairs_are_those_of_the_matrix(put: Put, spectrum: str) -> None:
    M = put(torch.from_numpy(known(spectrum)))
    count, multiplied = 8, 0

    def product(Q: AnyArray) -> AnyArray:
        nonlocal multiplied
        multiplied += Q.shape[1]
        return M @ Q

    values, U = map(tensor_of, leading_eigenpairs(product, SIZE, count, M))
    expected = SPECTRA[spectrum][:count]
    assert len(values) == int((expected > 0).sum())
    assert values.numpy() == pytest.approx(expected[: len(values)], abs=1e-10)
    assert float((U.T @ U - torch.eye(len(values))).norm()) <= 1e-12
    residual = tensor_of(M) @ U - U * values
    assert float(residual.norm()) <= 1e-10 * max(float(expected[0]), 1e-300)
    if spectrum == "decaying":
        assert multiplied < SIZE / 3  # the whole matrix takes all columns
    if spectrum == "flat":
        assert SIZE < multiplied < 1.2 * SIZE


@both_engines
@pytest.mark.parametrize("spectrum", ["decaying", "tied", "flat", "low rank"])
def test_a_norm_is_less_than_its_bounds_and_soon_close_to_them(put: Put, spectrum: str) -> None:
    M = put(torch.from_numpy(known(spectrum)))
    norm = float(SPECTRA[spectrum][0])
    probes = gaussian(PROBES, SIZE, M, numpy.random.default_rng(3))
    bounds = upper_bounds(lambda Q: Q @ M, probes, 0.3 * norm)
    found = [next(bounds)[0] for _ in range(8)]
    assert min(found) >= norm
    assert found[-1] <= 1.1 * norm

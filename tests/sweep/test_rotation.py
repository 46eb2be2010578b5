"""The random orthogonal matrices: orthogonal, of each weight its own, no direction preferred."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import Tensor

from safeproj.storage.arrays import from_torch, to_torch
from safeproj.sweeping.rotation import Rotation


def dense(m: int, seed: int = 0, name: str = "w") -> Tensor:
    return to_torch(Rotation(m, seed, name).turn(numpy.eye(m)))


@pytest.mark.parametrize("m", [1, 2, 3, 16, 31, 96, 100, 257])
def test_it_is_orthogonal_and_turned_back_by_its_transpose(m: int) -> None:
    Q = dense(m)
    assert torch.allclose(Q @ Q.T, torch.eye(m, dtype=torch.float64), atol=1e-12)
    X = torch.randn(m, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rotation = Rotation(m, 0, "w")
    for turn, matrix in ((rotation.turn, Q), (rotation.turn_back, Q.T)):
        assert torch.allclose(to_torch(turn(from_torch(X))), matrix @ X, atol=1e-12)


def test_it_depends_on_the_seed_and_the_weight_and_nothing_else() -> None:
    assert torch.equal(dense(24), dense(24))
    assert not torch.equal(dense(24), dense(24, seed=1))
    assert not torch.equal(dense(24), dense(24, name="v"))


@pytest.mark.parametrize("m", [6, 7, 16])
def test_the_mean_of_a_turned_projector_is_a_multiple_of_the_identity(m: int) -> None:
    C = torch.zeros(m, m, dtype=torch.float64)
    C[0, 0], C[1, 1], C[0, 1], C[1, 0] = 3.0, 1.0, 0.5, 0.5  # one corner: as far from I as it gets
    turned = [Q @ C @ Q.T for Q in (dense(m, seed) for seed in range(1000))]
    mean = torch.stack(turned).mean(0)
    # Entries of one Q C Qᵀ are at most 3.2; the mean of 1000 is off by at most 5 standard errors.
    expected = torch.eye(m, dtype=torch.float64) * C.trace() / m
    spread = torch.stack(turned).std(0).max() / 1000**0.5
    assert float((mean - expected).abs().max()) < 5 * float(spread)


def test_a_turned_projector_has_the_spectrum_of_its_own() -> None:
    U = torch.linalg.qr(torch.randn(40, 3, dtype=torch.float64))[0]
    C = U @ torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)) @ U.T
    Q = dense(40)
    found = torch.linalg.eigvalsh(Q @ C @ Q.T)
    assert torch.allclose(found, torch.linalg.eigvalsh(C), atol=1e-12)


def test_a_direction_along_an_axis_is_spread_over_all_axes() -> None:
    m = 512
    largest = max(float(dense(m, seed)[:, 0].abs().max()) for seed in range(20))
    # Of a random unit vector of 512 coordinates none is larger than 0.25 but once in 10^5 times.
    assert largest < 0.25

"""Random orthogonal matrices that need no memory of their size, for the random projector."""

from __future__ import annotations

import math
from hashlib import sha256

import numpy
import torch

from safeproj.storage.arrays import Array, double


class Rotation:
    """A random orthogonal `Q` (m, m) `= S₃ H P S₂ H S₁`, known by 4 m numbers.

    `Sᵢ` are diagonal matrices of random signs, `P` a random permutation, and `H` is the orthonormal
    Hartley transform, `Hⱼₖ = (cos + sin)(2π j k / m) / √m`, which is symmetric and its own inverse
    and exists for every m. It takes O(m log m) for a column.

    What of a uniformly random `Q` the control needs holds here as well:

    - `Q C Qᵀ` has the rank and the spectrum of `C`, for any orthogonal `Q`;
    - `E[Q C Qᵀ] = tr(C)/m · I`, exactly: the mean over the signs `S₂` leaves the diagonal alone,
      the mean over `P` makes all its values the same, and what follows keeps a multiple of `I`;
    - any fixed direction is spread: after `H S₁` each coordinate of a unit vector is a sum of m
      terms with random signs, of variance about `1/m`, whatever the vector, and the second round
      does the same to what the permutation has mixed. So no structure of `C`, such as a few large
      rows, survives in the basis of the weight.

    It is not uniform (there are finitely many such `Q`), which a comparison of behaviour does not
    ask for.

    Args:
        m: its size.
        seed: of the run.
        name: of the weight, so that each has its own.
    """

    def __init__(self, m: int, seed: int, name: str) -> None:
        digest = sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        signs = torch.randint(0, 2, (3, m, 1), generator=generator).double().numpy() * 2 - 1
        self._first, self._second, self._third = signs[0], signs[1], signs[2]
        self._order = torch.randperm(m, generator=generator).numpy()
        self._inverse = self._order.argsort()

    def turn(self, X: Array) -> Array:
        """Return `Q X` for `X` (m, r), float64."""
        X = _hartley(self._first * double(X))
        found: Array = _hartley((self._second * X)[self._order]) * self._third
        return found

    def turn_back(self, X: Array) -> Array:
        """Return `Qᵀ X` for `X` (m, r), float64."""
        X = _hartley(self._third * double(X))[self._inverse]
        found: Array = _hartley(self._second * X) * self._first
        return found


def _hartley(X: Array) -> Array:
    """Return the orthonormal Hartley transform of each column."""
    transformed: Array = numpy.fft.fft(X, axis=0)
    found: Array = (transformed.real - transformed.imag) / math.sqrt(X.shape[0])
    return found

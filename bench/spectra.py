"""Time the exact projector, and `align`, by how fast the singular values of `V` fall.

    OMP_NUM_THREADS=1 python -m bench.spectra [--rank 64] [--shapes 2048x2048 2048x5632]

Next to it stands what takes its place where it does not tell the leading singular vectors soon:
the whole Gram matrix, decomposed with `numpy.linalg.eigh`; and what `align` does with the weight.
Processor time of this process, one run each.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy

from safeproj.methods.safe_lora.decomposition import eigenpairs
from safeproj.methods.safe_lora.formulas import Exact
from safeproj.storage.arrays import Array

SPECTRA: dict[str, float | None] = {
    "noise": None,
    "i^-0.2": 0.2,
    "i^-0.4": 0.4,
    "i^-0.6": 0.6,
    "i^-0.8": 0.8,
    "i^-1.2": 1.2,
}
"""Powers that scale the terms of a sum of random dyads; None for independent entries."""


def difference(m: int, n: int, power: float | None) -> Array:
    """Return `V` (m, n), float32."""
    generator = numpy.random.default_rng(0)
    if power is None:
        return generator.standard_normal((m, n), numpy.float32)
    s = min(m, n)
    sizes = (numpy.arange(1, s + 1) ** -power).astype(numpy.float32)
    left, right = (generator.standard_normal(shape, numpy.float32) for shape in ((m, s), (s, n)))
    V: Array = (left * sizes) @ right
    return V


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the processor time of something, and what it returns."""
    begin = time.process_time()
    found = work()
    return time.process_time() - begin, found


def whole(V: Array, B: Array, rank: int) -> Array:
    """Return `C B` by way of all eigenvectors of the smaller Gram matrix."""
    X = V.astype(numpy.float64)
    is_wide = X.shape[0] <= X.shape[1]
    values, vectors = numpy.linalg.eigh(X @ X.T if is_wide else X.T @ X)
    U = vectors[:, -rank:]
    if not is_wide:
        U = X @ U / numpy.sqrt(values[-rank:])
    CB: Array = U @ (U.T @ B)
    return CB


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--shapes", nargs="+", default=["2048x2048", "2048x5632"])
    parser.add_argument("--spectra", nargs="+", choices=SPECTRA, default=[*SPECTRA])
    given = parser.parse_args()
    print("| weight | singular values | whole, s | exact, s | times as fast | off by | align, s |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for shape in given.shapes:
        m, n = map(int, shape.split("x"))
        B = numpy.random.default_rng(1).standard_normal((m, 16), numpy.float32)
        for label in given.spectra:
            V = difference(m, n, SPECTRA[label])
            before, expected = timed(partial(whole, V, B, given.rank))
            now, projected = timed(partial(Exact(rank=given.rank).from_V, [V], B))
            norm = float(numpy.linalg.norm(V))
            aligned, _ = timed(partial(eigenpairs, V, norm, given.rank))
            error = float(numpy.linalg.norm(projected.CB - expected) / numpy.linalg.norm(B))
            print(
                f"| {m} × {n} | {label} | {before:.2f} | {now:.2f} | {before / now:.1f} "
                f"| {error:.0e} | {aligned:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

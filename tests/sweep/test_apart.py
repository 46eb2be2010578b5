"""Halves of an engine's product that have products of their own, over blocks that are read once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext

import numpy
import pytest
import torch
from torch import Tensor

from safeproj.errors import SafeprojError
from safeproj.methods.blocks import Projected
from safeproj.methods.covariance.formulas import Correction
from safeproj.methods.safe_lora.formulas import Approx, Exact
from safeproj.methods.salora.formulas import Complement
from safeproj.storage.arrays import AnyArray, namespace
from safeproj.sweeping.apart import apart, in_step
from tests.support import Put, both_engines, tensor_of


class Counted:
    """Blocks of three rows in one buffer, which counts how often they are gone through."""

    def __init__(self, V: AnyArray, damaged: int | None = None) -> None:
        self.passes = 0
        self._V, self._damaged = V, damaged

    def __iter__(self) -> Iterator[AnyArray]:
        self.passes += 1
        buffer = namespace(self._V).empty_like(self._V[:3])
        for i in range(0, len(self._V), 3):
            if i == self._damaged:
                raise FloatingPointError("damaged")
            rows = self._V[i : i + 3]
            buffer[: len(rows)] = rows
            yield buffer[: len(rows)]


def matrices(put: Put, m: int, width: int) -> tuple[AnyArray, AnyArray, AnyArray, AnyArray]:
    """Return `V`, `B`, another `B`, and both beside each other."""
    generator = torch.Generator().manual_seed(0)
    V, *halves = (torch.randn(m, n, generator=generator) for n in (40, width, width))
    return put(V), put(halves[0]), put(halves[1]), put(torch.cat(halves, dim=1))


def beside(left: AnyArray, right: AnyArray) -> Tensor:
    return torch.cat([tensor_of(left), tensor_of(right)], dim=1)


@both_engines
@pytest.mark.parametrize("width", [1, 4, 8, 9])
@pytest.mark.parametrize(
    ("projector", "passes"),
    [(Approx(), 2), (Exact(rank=3), 1), (Exact(energy=0.5), 1)],
    ids=["approx", "rank", "energy"],
)
def test_each_half_has_the_bits_that_it_has_alone(
    put: Put, projector: Approx | Exact, passes: int, width: int
) -> None:
    V, B, other, halves = matrices(put, 50, width)
    blocks = Counted(V)
    both = apart(projector)
    assert isinstance(both, Approx | Exact)
    found = both.from_V(blocks, halves)
    one, two = (projector.from_V(Counted(V), each) for each in (B, other))
    assert blocks.passes == passes
    assert found.CB is not None
    assert one.CB is not None
    assert two.CB is not None
    assert torch.equal(tensor_of(found.CB), beside(one.CB, two.CB))
    assert (found.alignment_norm, found.rank) == (one.alignment_norm, one.rank)


@both_engines
def test_a_safety_module_is_read_as_often_as_for_one(put: Put) -> None:
    _, B, other, halves = matrices(put, 50, 8)
    U = torch.linalg.qr(torch.randn(50, 6, generator=torch.Generator().manual_seed(1)))[0]
    blocks = Counted(put(U))
    both = apart(Complement())
    assert isinstance(both, Complement)
    found = both.from_U(blocks, 6, halves)
    one, two = (Complement().from_U(Counted(put(U)), 6, each) for each in (B, other))
    assert blocks.passes == 2
    for name in ("CB", "UB"):
        expected = beside(getattr(one, name), getattr(two, name))
        assert torch.equal(tensor_of(getattr(found, name)), expected)


@both_engines
def test_without_alignment_there_is_no_projection(put: Put) -> None:
    both = apart(Approx())
    assert isinstance(both, Approx)
    found = both.from_V(Counted(put(torch.zeros(9, 5))), put(torch.ones(9, 4)))
    assert found.CB is None
    assert found.alignment_norm == 0.0


@both_engines
@pytest.mark.parametrize("damaged", [0, 6])
def test_an_error_while_reading_ends_both(put: Put, damaged: int) -> None:
    V, _, _, halves = matrices(put, 20, 4)
    before = set(threading.enumerate())
    both = apart(Approx())
    assert isinstance(both, Approx)
    with pytest.raises(FloatingPointError, match="damaged"):
        both.from_V(Counted(V, damaged), halves)
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=5)
    assert set(threading.enumerate()) <= before


def test_an_error_in_one_of_them_is_that_of_both() -> None:
    def fine(blocks: object) -> Projected:
        for _ in blocks:  # type: ignore[attr-defined]
            pass
        return Projected(None, 1.0)

    def bad(blocks: object) -> Projected:
        next(iter(blocks))  # type: ignore[call-overload]
        raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        in_step(Counted(numpy.ones((9, 2))), [fine, bad], nullcontext)


@both_engines
def test_values_that_are_not_finite_are_found(put: Put) -> None:
    V, _, _, halves = matrices(put, 20, 4)
    V[7, 3] = float("nan")
    both = apart(Approx())
    assert isinstance(both, Approx)
    with pytest.raises(FloatingPointError, match="not finite"):
        both.from_V(Counted(V), halves)


@pytest.mark.parametrize(
    "projector", [Approx(), Exact(rank=2), Complement(3)], ids=["approx", "exact", "complement"]
)
def test_it_is_of_the_same_kind(projector: Approx | Exact | Complement) -> None:
    both = apart(projector)
    assert isinstance(both, type(projector))
    assert vars(both) == vars(projector)


def test_a_method_that_does_not_project_is_refused() -> None:
    with pytest.raises(SafeprojError, match="found covariance"):
        apart(Correction())

"""Halves of an engine's product that have products of their own, over blocks that are read once."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from safeproj.errors import SafeprojError
from safeproj.methods.blocks import Projected
from safeproj.methods.covariance.formulas import Correction
from safeproj.methods.safe_lora.formulas import Approx, Exact
from safeproj.methods.salora.formulas import Complement
from safeproj.sweeping.apart import apart, in_step


class Counted:
    """Blocks of three rows in one buffer, which counts how often they are gone through."""

    def __init__(self, V: Tensor, damaged: int | None = None) -> None:
        self.passes = 0
        self._V, self._damaged = V, damaged

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        buffer = torch.empty(3, self._V.shape[1])
        for i in range(0, len(self._V), 3):
            if i == self._damaged:
                raise FloatingPointError("damaged")
            rows = self._V[i : i + 3]
            yield buffer[: len(rows)].copy_(rows)


def matrices(m: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(m, 40, generator=generator),
        torch.randn(m, width, generator=generator),
        torch.randn(m, width, generator=generator),
    )


@pytest.mark.parametrize("width", [1, 4, 8, 9])
@pytest.mark.parametrize(
    ("projector", "passes"),
    [(Approx(), 2), (Exact(rank=3), 1), (Exact(energy=0.5), 1)],
    ids=["approx", "rank", "energy"],
)
def test_each_half_has_the_bits_that_it_has_alone(
    projector: Approx | Exact, passes: int, width: int
) -> None:
    V, B, other = matrices(50, width)
    blocks = Counted(V)
    both = apart(projector)
    assert isinstance(both, Approx | Exact)
    found = both.from_V(blocks, torch.cat([B, other], dim=1))
    alone, beside = (projector.from_V(Counted(V), each) for each in (B, other))
    assert blocks.passes == passes
    assert found.CB is not None
    assert alone.CB is not None
    assert beside.CB is not None
    assert torch.equal(found.CB, torch.cat([alone.CB, beside.CB], dim=1))
    assert (found.alignment_norm, found.rank) == (alone.alignment_norm, alone.rank)


def test_a_safety_module_is_read_as_often_as_for_one() -> None:
    _, B, other = matrices(50, 8)
    U = torch.linalg.qr(torch.randn(50, 6, generator=torch.Generator().manual_seed(1)))[0]
    blocks = Counted(U)
    both = apart(Complement())
    assert isinstance(both, Complement)
    found = both.from_U(blocks, 6, torch.cat([B, other], dim=1))
    alone, beside = (Complement().from_U(Counted(U), 6, each) for each in (B, other))
    assert blocks.passes == 2
    for name in ("CB", "UB"):
        expected = torch.cat([getattr(alone, name), getattr(beside, name)], dim=1)
        assert torch.equal(getattr(found, name), expected)


def test_without_alignment_there_is_no_projection() -> None:
    both = apart(Approx())
    assert isinstance(both, Approx)
    found = both.from_V(Counted(torch.zeros(9, 5)), torch.ones(9, 4))
    assert found.CB is None
    assert found.alignment_norm == 0.0


@pytest.mark.parametrize("damaged", [0, 6])
def test_an_error_while_reading_ends_both(damaged: int) -> None:
    V, B, other = matrices(20, 4)
    before = set(threading.enumerate())
    both = apart(Approx())
    assert isinstance(both, Approx)
    with pytest.raises(FloatingPointError, match="damaged"):
        both.from_V(Counted(V, damaged), torch.cat([B, other], dim=1))
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
        in_step(Counted(torch.ones(9, 2)), [fine, bad])


def test_values_that_are_not_finite_are_found() -> None:
    V, B, other = matrices(20, 4)
    V[7, 3] = float("nan")
    both = apart(Approx())
    assert isinstance(both, Approx)
    with pytest.raises(FloatingPointError, match="not finite"):
        both.from_V(Counted(V), torch.cat([B, other], dim=1))


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

"""What Safe Delta makes of one weight, against an oracle that goes entry by entry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from safeproj.methods.safe_delta import formulas
from safeproj.methods.safe_delta.formulas import UnreachedError, corrected, inverse_root
from tests.methods.safe_delta import oracle

SIZES = [(7, 13), (40, 37), (33, 150), (5, 4), (3, 1)]


def case(m: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return an aligned weight, a fine-tuned one, and inputs, one of which is always zero."""
    generator = torch.Generator().manual_seed(m * n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    W, X = normal(m, n), normal(n + 9, n) * torch.linspace(0.3, 2.0, n, dtype=torch.float64)
    if n > 4:
        X[:, 2] = 0.0
    return W, W + 0.03 * normal(m, n), X


def moment(X: Tensor) -> Tensor:
    return 2.0 / len(X) * X.T @ X


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_root_is_that_of_the_inverse(size: tuple[int, int]) -> None:
    _, _, X = case(*size)
    R = inverse_root(moment(X))
    torch.testing.assert_close(R.T @ R, torch.linalg.inv(oracle.second_moment(X)))
    assert torch.equal(R, R.triu())


@pytest.mark.parametrize("strength", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_weight_is_what_its_entries_say(size: tuple[int, int], strength: float) -> None:
    W, tuned, X = case(*size)
    made = corrected(W, tuned, inverse_root(moment(X)), strength)
    want, kept = oracle.corrected(W, tuned, X, strength)
    torch.testing.assert_close(made.weight, want, rtol=0, atol=1e-12)
    assert made.kept == pytest.approx(float(kept.double().mean()))


@pytest.mark.parametrize("panel", [4, 8, 24])
def test_columns_come_in_blocks(monkeypatch: pytest.MonkeyPatch, panel: int) -> None:
    """What is chosen in a block depends on where those before it have moved it."""
    monkeypatch.setattr(formulas, "BLOCK", 24)
    monkeypatch.setattr(formulas, "PANEL", panel)
    W, tuned, X = case(33, 150)
    made = corrected(W, tuned, inverse_root(moment(X)), 2.0)
    want, kept = oracle.corrected(W, tuned, X, 2.0, block=24)
    torch.testing.assert_close(made.weight, want, rtol=0, atol=1e-12)
    assert made.kept == pytest.approx(float(kept.double().mean()))
    assert 0.0 < made.kept < 0.85


def test_strength_is_how_much_is_kept() -> None:
    W, tuned, X = case(33, 150)
    R = inverse_root(moment(X))
    kept = [corrected(W, tuned, R, strength).kept for strength in (1e-9, 0.1, 1.0, 1e9)]
    assert kept == sorted(kept)
    assert kept[0] == 0.0
    assert kept[-1] == pytest.approx(0.85, abs=1e-3)
    assert torch.equal(corrected(W, tuned, R, 1e-9).weight, W)


def test_inputs_that_are_not_finite_are_told() -> None:
    with pytest.raises(UnreachedError):
        inverse_root(torch.full((3, 3), torch.nan, dtype=torch.float64))

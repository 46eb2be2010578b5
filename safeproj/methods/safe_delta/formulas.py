"""The formulas of Safe Delta, and nothing else.

Of the change of a weight it keeps the entries that cost least safety, and moves the others to make
up for them (arXiv 2505.12038, as its reference code computes it). Tensors are of torch, float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.01
"""What is added to the diagonal of `H`, relative to its mean."""

BLOCK = 2048
"""Columns of which the entries are chosen together."""

TOGETHER = 4
"""Columns that are written before those behind them move."""

PANEL = 128
"""Columns behind which the others move at once: this changes nothing but the time."""

DROPPED = 0.15
"""Share of a block's entries that is never kept: those that cost most safety."""

ROWS = 4096
"""Rows of a weight that the budget is meant for."""


class UnreachedError(Exception):
    """`H` has no Cholesky factorisation: an input is not finite."""


@dataclass(frozen=True)
class Corrected:
    """What takes the place of a weight.

    Attributes:
        weight: (m, n).
        kept: the share of its entries that are the fine-tune's.
    """

    weight: Tensor
    kept: float


def inverse_root(H: Tensor) -> Tensor:
    """Return the upper triangular `R` (n, n) with `RᵀR = H⁻¹`, of `H` with damping.

    With `J` the reversal of an order, `J H J = L Lᵀ`, so `H = U Uᵀ` with `U = J L J` upper
    triangular, and `R = U⁻¹`: nothing is inverted but a triangle.

    Args:
        H: (n, n), of a layer's inputs; changed.

    Raises:
        UnreachedError: it is no second moment.
    """
    diagonal = H.diagonal()
    diagonal[diagonal == 0.0] = 1.0
    diagonal += DAMPING * diagonal.mean()
    L, info = torch.linalg.cholesky_ex(H.flip(0, 1))
    if int(info) != 0:
        raise UnreachedError("what it reads on the safety data is not finite")
    eye = torch.eye(len(L), dtype=L.dtype, device=L.device)
    found: Tensor = torch.linalg.solve_triangular(L.flip(0, 1), eye, upper=True)
    return found


def corrected(aligned: Tensor, tuned: Tensor, R: Tensor, strength: float) -> Corrected:
    """Return what Safe Delta makes of a weight.

    Args:
        aligned: `W_aligned` (m, n), float64.
        tuned: `W_ft` (m, n), of any dtype.
        R: of the layer's inputs, (n, n).
        strength: `s`. The larger, the more of the fine-tune is kept.
    """
    w, d = aligned.clone(), R.diagonal()
    kept = 0
    for block in _slices(0, w.shape[1], BLOCK):
        mask = _kept(tuned[:, block] - w[:, block], d[block], strength)
        kept += int(mask.sum())
        for panel in _slices(block.start, block.stop, PANEL):
            errors = torch.empty_like(w[:, panel])
            for columns in _slices(panel.start, panel.stop, TOGETHER):
                before = w[:, columns]
                own = mask[:, columns.start - block.start : columns.stop - block.start]
                after = torch.where(own, tuned[:, columns].to(w.dtype), before)
                error = (before - after) / d[columns]
                w[:, columns] = after
                rest = slice(columns.stop, panel.stop)
                w[:, rest] -= error @ R[columns, rest]
                errors[:, columns.start - panel.start : columns.stop - panel.start] = error
            w[:, panel.stop :] -= errors @ R[panel, panel.stop :]
    return Corrected(w, kept / w.numel())


def _kept(change: Tensor, d: Tensor, strength: float) -> Tensor:
    """Return which entries of a block (m, k) are kept from the fine-tune.

    They are taken by `1/d_j²`, the least first, and within a column from above, as long as the sum
    of `(ΔW_ij/d_j)²` stays within the budget.
    """
    cost = 1.0 / d.square()
    order = torch.argsort(cost, stable=True)
    within = int(DROPPED * change.numel())
    spent = ((change / d).square().T[order]).flatten().cumsum(0)
    taken = spent <= float(cost.mean()) * strength / 2.0 * len(change) / ROWS
    taken[taken.numel() - within :] = False
    mask = torch.empty_like(change.T, dtype=torch.bool)
    mask[order] = taken.reshape(mask.shape)
    return mask.T


def _slices(start: int, stop: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]

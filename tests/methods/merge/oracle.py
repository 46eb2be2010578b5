"""Merging two updates in float64, from METHODS.md §6 alone."""

from __future__ import annotations

import torch
from torch import Tensor


def merged(delta: Tensor, safe: Tensor | None, weight: float) -> Tensor:
    """Return `(1-λ) ΔW + λ ΔW_safe` (m, n); a safe update that is missing is zero."""
    found = (1.0 - weight) * delta
    return found if safe is None else found + weight * safe


def best(M: Tensor, rank: int) -> tuple[Tensor, float]:
    """Return the best approximation of a rank, and its error relative to `‖M‖_F`."""
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    left = float(S[rank:].norm() / S.norm())
    return (U[:, :rank] * S[:rank]) @ Vh[:rank], left

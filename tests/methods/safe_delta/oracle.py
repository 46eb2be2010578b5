"""Safe Delta in float64, written from its description: entry by entry, with plain inverses."""

from __future__ import annotations

import torch
from torch import Tensor


def second_moment(X: Tensor) -> Tensor:
    """Return `H` of inputs (N, n), with damping."""
    H = 2.0 / len(X) * X.T @ X
    for j in range(len(H)):
        if H[j, j] == 0.0:
            H[j, j] = 1.0
    return H + 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def corrected(
    aligned: Tensor, tuned: Tensor, X: Tensor, s: float, block: int = 2048
) -> tuple[Tensor, Tensor]:
    """Return the weight (m, n), and which of its entries are the fine-tune's."""
    R = torch.linalg.cholesky(torch.linalg.inv(second_moment(X)), upper=True)
    d = R.diagonal()
    m, n = aligned.shape
    w, q = aligned.clone(), torch.empty_like(aligned)
    kept = torch.zeros(m, n, dtype=torch.bool)
    for start in range(0, n, block):
        columns = range(start, min(start + block, n))
        delta = tuned - w
        budget = sum(float(d[j]) ** -2 for j in columns) / len(columns) * (s / 2) * m / 4096
        entries = [(i, j) for j in columns for i in range(m)]
        entries.sort(key=lambda each: float(d[each[1]]) ** -2)
        running = 0.0
        for i, j in entries[: len(entries) - int(0.15 * len(entries))]:
            running += float(delta[i, j] / d[j]) ** 2
            kept[i, j] = running <= budget
        for first in range(start, columns.stop, 4):
            own = range(first, min(first + 4, columns.stop))
            for j in own:
                q[:, j] = torch.where(kept[:, j], tuned[:, j], w[:, j])
            for j in own:
                e = (w[:, j] - q[:, j]) / d[j]
                w[:, own.stop :] -= e[:, None] * R[j, own.stop :]
    return q, kept

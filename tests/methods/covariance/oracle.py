"""The covariance-weighted correction in float64, from METHODS.md §4 alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def inputs(model: Any, names: Sequence[str], samples: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Return what each layer reads (N, n), sample by sample without any padding, in float64."""
    layers = dict(model.named_modules())
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [
        layers[name].register_forward_pre_hook(
            lambda _, given, name=name: seen[name].append(given[0][0].detach().double())
        )
        for name in names
    ]
    with torch.no_grad():
        for tokens in samples:
            model(input_ids=torch.tensor([list(tokens)]))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def moment(rows: Tensor) -> Tensor:
    """Return the mean of `x xᵀ` (n, n) over the rows (N, n)."""
    return rows.double().T @ rows.double() / len(rows)


def ridged(S: Tensor) -> Tensor:
    """Return `S` with `1e-3 tr(S)/n` on its diagonal."""
    n = len(S)
    return S + 1e-3 * S.trace() / n * torch.eye(n, dtype=torch.float64)


def corrected(delta: Tensor, H: Tensor, S: Tensor, mu: float) -> Tensor:
    """Return `ΔW μS (H + μS)⁻¹` of an update (m, n); `S` as `ridged` returns it."""
    found: Tensor = delta.double() @ (mu * S) @ torch.linalg.inv(H + mu * S)
    return found


def objective(new: Tensor, delta: Tensor, H: Tensor, S: Tensor, mu: float) -> float:
    """Return `E_safety ‖ΔW' x‖² + μ E_benign ‖(ΔW' - ΔW) x‖²`."""
    change = new - delta
    return float((new @ H * new).sum() + mu * (change @ S * change).sum())


def ratio(delta: Tensor, H: Tensor, S: Tensor) -> float:
    """Return `E_safety ‖ΔW x‖² / E_benign ‖ΔW x‖²`."""
    delta = delta.double()
    return float((delta @ H * delta).sum() / (delta @ S * delta).sum())


def cosine(one: Tensor, other: Tensor) -> float:
    """Return the cosine of two matrices."""
    one, other = one.double(), other.double()
    return float((one * other).sum() / (one.norm() * other.norm()))

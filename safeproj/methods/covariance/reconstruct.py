"""The correction layer by layer: each makes up for what the ones before it left undone.

A layer's inputs are not what the statistics of the aligned model say once the layers before it
have an adapter. Here each layer is corrected for the inputs that it gets in the model that is
corrected up to it, towards the outputs that the aligned model has on the safety data, and the
adapted model on the benign data. The model runs over each data twice, side by side: for the targets
and as it is corrected so far, both stopping wherever layers are. Where that takes too much memory,
what cannot wait runs up to every layer anew. No gradient is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safeproj.errors import SafeprojError
from safeproj.lm.adapters import LoraLayer, lora_layer
from safeproj.lm.data import Batch
from safeproj.lm.layers import (
    MEMORY,
    OnBatch,
    add_squares,
    mirrored,
    plain_weight,
)
from safeproj.lm.passes import walking
from safeproj.methods.covariance.formulas import RIDGE, Reconstruction

Factors = dict[str, Tensor]
"""Path of a layer to its `A` (r, n)."""


def reconstructed(
    model: Any,
    names: Sequence[str],
    safety: Sequence[Batch],
    benign: Sequence[Batch],
    projector: Reconstruction,
    on_batch: OnBatch | None = None,
    memory: int = MEMORY,
) -> Factors:
    """Return the corrected `A'` (r, n) of each layer, in float32.

    Args:
        model: a `PeftModel` with the adapter; its factors are changed meanwhile, and put back.
        names: paths of the adapted layers in the model without PEFT.
        safety: the safety data.
        benign: the benign data.
        projector: μ.
        on_batch: told about the progress.
        memory: bound in bytes on what waits so that it need not be computed again.

    Raises:
        SafeprojError: a layer is no plain LoRA on a linear layer, has no weight in memory, or does
            not run once for each position.
    """
    adapted = {name: lora_layer(model, name, "--reconstruct") for name in names}
    current = {name: each.A.detach().clone() for name, each in adapted.items()}
    trained = dict(current)
    layers = {name: each.base for name, each in adapted.items()}
    try:
        with walking(model, layers, [*safety, *benign], on_batch, memory) as walk:
            aligned, before = (walk.line(data) for data in (safety, benign))
            now, now_benign = (walk.line(data) for data in (safety, benign))
            for group in walk.groups:
                with model.disable_adapter():
                    wanted = aligned.at(group[0])
                _put(adapted, trained)
                wanted_benign = before.at(group[0])
                _put(adapted, current)
                benign_goals = {name: _goal(adapted[name], trained[name]) for name in group}
                safety_goals = {name: each.unadapted for name, each in benign_goals.items()}
                solved = _solved(
                    benign_goals,
                    _equations(wanted, now.each(group[0]), safety_goals),
                    _equations(wanted_benign, now_benign.each(group[0]), benign_goals),
                    projector.mu,
                )
                for name, A in solved.items():
                    if not bool(A.isfinite().all()):
                        raise SafeprojError(
                            f"{name}: the corrected factor has a value that is not finite"
                        )
                    if bool(adapted[name].scaled_B.any()):
                        current[name] = A.to(trained[name].dtype)
    finally:
        _put(adapted, trained)
    return {name: factor.float().cpu() for name, factor in current.items()}


@dataclass(frozen=True)
class _Goal:
    """What a layer's correction is to add to its output: `change (x* - x) + target x*`.

    Attributes:
        change: (r, n), float64, in the coordinates of the columns of `s B`.
        target: (r, n), likewise.
    """

    change: Tensor
    target: Tensor

    @property
    def unadapted(self) -> _Goal:
        """That of the layer without its update."""
        return _Goal(self.change, torch.zeros_like(self.target))


def _equations(
    wanted: Sequence[Tensor], now: Iterator[Tensor], goals: Mapping[str, _Goal]
) -> tuple[Tensor, Factors]:
    """Return the normal equations of layers that read one input, means over the rows of a data set.

    Only the first is a sum of products of whole rows.

    Args:
        wanted: the inputs `x*` that are the target, batch by batch.
        now: the inputs `x`, likewise.
        goals: by the layers' names.

    Returns:
        `E x xᵀ` (n, n), and of each layer `E g xᵀ` (r, n), with `g` its goal.
    """
    own = torch.zeros(0)
    found: Factors = {}
    count = 0
    for target, x in zip(wanted, now, strict=True):
        x, target = x.double(), target.to(x.device).double()
        if not count:
            own = x.new_zeros(x.shape[1], x.shape[1])
            found = {name: torch.zeros_like(goal.change) for name, goal in goals.items()}
        add_squares(own, x)
        change = target - x
        for name, goal in goals.items():
            found[name].addmm_((change @ goal.change.T + target @ goal.target.T).T, x)
        count += len(x)
    return mirrored(own).div_(count), {name: each.div_(count) for name, each in found.items()}


def _put(adapted: Mapping[str, LoraLayer], factors: Mapping[str, Tensor]) -> None:
    """Give the model other factors of some layers."""
    with torch.no_grad():
        for name, factor in factors.items():
            adapted[name].A.copy_(factor)


def _goal(layer: LoraLayer, A: Tensor) -> _Goal:
    """Return that of a layer with its trained `A`: what it does on the benign data."""
    weight = plain_weight(layer.base)
    assert weight is not None
    inverse = torch.linalg.pinv(layer.scaled_B)
    return _Goal(inverse @ weight.double(), inverse @ layer.scaled_B @ A.double())


def _solved(
    goals: Mapping[str, _Goal],
    safety: tuple[Tensor, Factors],
    benign: tuple[Tensor, Factors],
    mu: float,
) -> Factors:
    """Return `A'` (r, n), float64, of layers that read one input.

    It is that of the least

        E ‖sB A' x - W (x₀ - x)‖² + μ E ‖sB A' s - ((W + ΔW) s₀ - W s)‖² + μρ ‖sB (A' - A)‖²

    with `x`, `s` the inputs now, `x₀` in the aligned and `s₀` in the adapted model, and `ρ` the
    ridge of `E s sᵀ`. Where `x = x₀` and `s = s₀` that is `A μS (H + μS)⁻¹`.

    Args:
        goals: of the layers on the benign data.
        safety: what `_equations` returns of the safety data.
        benign: the same of the benign data.
        mu: μ.
    """
    (H, refused), (S, kept) = safety, benign
    ridge = RIDGE * float(S.diagonal().mean())
    K = H + mu * S
    K.diagonal().add_(mu * ridge)
    factor, info = torch.linalg.cholesky_ex(K)
    if int(info) != 0:
        raise SafeprojError(
            f"{next(iter(goals))}: what it reads on the benign data is zero; expected data that "
            "reaches every layer"
        )
    found: Factors = {}
    for name, goal in goals.items():
        wanted = refused[name] + mu * (kept[name] + ridge * goal.target)
        found[name] = torch.cholesky_solve(wanted.T, factor).T
    return found

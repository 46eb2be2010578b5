"""The correction layer by layer: each makes up for what the ones before it left undone.

A layer's inputs are not what the statistics of the aligned model say once the layers before it
have an adapter. Here each layer is corrected for the inputs that it gets in the model that is
corrected up to it, towards the outputs that the aligned model has on the safety data, and the
adapted model on the benign data. Up to the layer the model runs twice over each data for each input
that layers share; no gradient is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safeproj.errors import SafeprojError
from safeproj.lm.data import Batch
from safeproj.lm.layers import OnBatch, is_linear, plain_weight, rows_at, running, sharing_inputs
from safeproj.methods.covariance.formulas import RIDGE, Reconstruction

Factors = dict[str, Tensor]
"""Path of a layer to its `A` (r, n)."""

STATES = 2
"""Runs over each data for each input: one for the targets, one for the model corrected so far."""


def reconstructed(
    model: Any,
    names: Sequence[str],
    safety: Sequence[Batch],
    benign: Sequence[Batch],
    projector: Reconstruction,
    on_batch: OnBatch | None = None,
) -> Factors:
    """Return the corrected `A'` (r, n) of each layer, in float32.

    Args:
        model: a `PeftModel` with the adapter; its factors are changed meanwhile, and put back.
        names: paths of the adapted layers in the model without PEFT.
        safety: the safety data.
        benign: the benign data.
        projector: μ.
        on_batch: told about the progress.

    Raises:
        SafeprojError: a layer is no plain LoRA on a linear layer, has no weight in memory, or does
            not run once for each position.
    """
    adapted = {name: _adapted(model, name) for name in names}
    current = {name: each.A.detach().clone() for name, each in adapted.items()}
    trained = dict(current)
    layers = {name: each.base for name, each in adapted.items()}
    done = 0
    try:
        with running(model, layers) as run:
            groups = sharing_inputs(layers, run, safety[0])
            total = len(groups) * STATES * (len(safety) + len(benign))
            for group in groups:
                sums = (_Sums(), _Sums())
                for own, data, other in zip(sums, (safety, benign), (None, trained), strict=True):
                    for batch in data:
                        wanted, now = (
                            _seen(model, adapted, group[0], run, batch, factors)
                            for factors in (other, current)
                        )
                        own.add(wanted, now)
                        done += STATES
                        if on_batch is not None:
                            on_batch(done, total)
                for name in group:
                    A = _solved(adapted[name], trained[name], *sums, projector.mu)
                    if not bool(A.isfinite().all()):
                        raise SafeprojError(
                            f"{name}: the corrected factor has a value that is not finite"
                        )
                    current[name] = A.to(trained[name].dtype)
    finally:
        _put(adapted, trained)
    return {name: factor.float().cpu() for name, factor in current.items()}


@dataclass(frozen=True)
class _Adapted:
    """A LoRA layer of PEFT.

    Attributes:
        name: its path.
        base: the linear layer that it is on.
        A: `A` (r, n), the parameter itself.
        B: `s B` (m, r), float64.
    """

    name: str
    base: nn.Module
    A: Tensor
    B: Tensor


@dataclass
class _Sums:
    """`Σ x xᵀ` and `Σ x* xᵀ` (n, n), of the inputs now and those that are the target."""

    own: Tensor | None = None
    target: Tensor | None = None
    count: int = 0

    def add(self, wanted: Tensor, now: Tensor) -> None:
        wanted, now = wanted.double(), now.double()
        if self.own is None or self.target is None:
            self.own = now.new_zeros(now.shape[1], now.shape[1])
            self.target = torch.zeros_like(self.own)
        self.own.addmm_(now.T, now)
        self.target.addmm_(wanted.T, now)
        self.count += len(now)

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """`E x xᵀ` and `E x* xᵀ`."""
        assert self.own is not None
        assert self.target is not None
        return self.own / self.count, self.target / self.count


def _adapted(model: Any, name: str) -> _Adapted:
    """Return a layer of a model, which must be plain LoRA on a linear layer."""
    layer = model.get_base_model().get_submodule(name)
    adapter = model.active_adapter
    base = getattr(layer, "base_layer", None)
    A = getattr(layer, "lora_A", {})
    dora = getattr(layer, "use_dora", {}).get(adapter)
    plain = adapter in A and isinstance(A[adapter], nn.Linear) and not dora
    if not isinstance(base, nn.Module) or not is_linear(base) or not plain:
        raise SafeprojError(
            f"{name}: --reconstruct takes plain LoRA on linear layers; leave it out with --exclude"
        )
    if plain_weight(base) is None:
        raise SafeprojError(
            f"{name}: its weight is stored as codes; --reconstruct needs the checkpoint before "
            "quantisation"
        )
    B = layer.lora_B[adapter].weight.detach().double() * layer.scaling[adapter]
    return _Adapted(name, base, A[adapter].weight, B)


def _put(adapted: Mapping[str, _Adapted], factors: Mapping[str, Tensor]) -> None:
    """Give the model other factors."""
    with torch.no_grad():
        for name, each in adapted.items():
            each.A.copy_(factors[name])


class _SeenError(Exception):
    """What was to be seen was seen; the rest of the model need not run."""


def _seen(
    model: Any,
    adapted: Mapping[str, _Adapted],
    name: str,
    run: Any,
    batch: Batch,
    factors: Mapping[str, Tensor] | None,
) -> Tensor:
    """Return what a layer reads (N, n) with these factors, or in the model without the adapter."""
    mask = batch["attention_mask"].bool()
    found: list[Tensor] = []

    def hear(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        found.append(rows_at(name, inputs[0], mask))
        raise _SeenError

    without = model.disable_adapter() if factors is None else nullcontext()
    if factors is not None:
        _put(adapted, factors)
    with ExitStack() as stack:
        stack.enter_context(without)
        stack.callback(adapted[name].base.register_forward_pre_hook(hear).remove)
        with suppress(_SeenError):
            run(batch)
    return found[0]


def _solved(layer: _Adapted, A: Tensor, safety: _Sums, benign: _Sums, mu: float) -> Tensor:
    """Return `A'` (r, n), float64.

    It is that of the least

        E ‖sB A' x - W (x₀ - x)‖² + μ E ‖sB A' s - ((W + ΔW) s₀ - W s)‖² + μρ ‖sB (A' - A)‖²

    with `x`, `s` the inputs now, `x₀` in the aligned and `s₀` in the adapted model, and `ρ` the
    ridge of `E s sᵀ`. Where `x = x₀` and `s = s₀` that is `A μS (H + μS)⁻¹`.
    """
    B = layer.B
    if not bool(B.any()):
        return A.double()
    weight = plain_weight(layer.base)
    assert weight is not None
    W, update = weight.double(), B @ A.double()
    H, aligned = safety.moments
    S, adapted = benign.moments
    ridge = RIDGE * float(S.diagonal().mean())
    wanted = W @ (aligned - H)
    wanted += mu * ((W + update) @ adapted - W @ S + ridge * update)
    K = H + mu * S
    K.diagonal().add_(mu * ridge)
    factor, info = torch.linalg.cholesky_ex(K)
    if int(info) != 0:
        raise SafeprojError(
            f"{layer.name}: what it reads on the benign data is zero; expected data that reaches "
            "every layer"
        )
    found: Tensor = torch.cholesky_solve((torch.linalg.pinv(B) @ wanted).T, factor).T
    return found

"""The correction layer by layer: each makes up for what the ones before it left undone.

A layer's inputs are not what the statistics of the aligned model say once the layers before it
have an adapter. Here each layer is corrected for the inputs that it gets in the model that is
corrected up to it, towards the outputs that the aligned model has on the safety data, and the
adapted model on the benign data. The model runs over each data twice: once for the targets, and
once stopping wherever layers are corrected. Where that takes too much memory, the targets are taken
for some layers at a time, and what cannot wait runs up to every layer anew. No gradient is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safeproj.errors import SafeprojError
from safeproj.lm.data import Batch
from safeproj.lm.layers import (
    MEMORY,
    OnBatch,
    fitting,
    in_features,
    is_linear,
    plain_weight,
    running,
    sharing_inputs,
)
from safeproj.lm.passes import Pass, stopping
from safeproj.methods.covariance.formulas import RIDGE, Reconstruction

Factors = dict[str, Tensor]
"""Path of a layer to its `A` (r, n)."""

STATES = 2
"""What each input is looked at in: the model of the targets, and the one corrected so far."""

WAITING = 3
"""What a pass that waits holds, in copies of its widest input: that, the residual, queries, …"""

THREADS = 512
"""Bound on the threads that passes wait in, together with those that torch starts for each."""


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
        memory: bound in bytes on what is kept so that it need not be computed again, half of it for
            targets, on the CPU; those of a single input may be larger.

    Raises:
        SafeprojError: a layer is no plain LoRA on a linear layer, has no weight in memory, or does
            not run once for each position.
    """
    adapted = {name: _adapted(model, name) for name in names}
    current = {name: each.A.detach().clone() for name, each in adapted.items()}
    trained = dict(current)
    layers = {name: each.base for name, each in adapted.items()}
    try:
        with running(model, layers) as run:
            groups = sharing_inputs(layers, run, safety[0])
            inputs = [_input(group, layers[group[0]], [*safety, *benign]) for group in groups]
            with stopping(run, {each.layer: layers[each.layer] for each in inputs}) as begin:
                room = memory // 2 // max(each.waiting for each in inputs)
                runs = _Runs(model, safety, benign, begin, room, len(inputs), on_batch)
                for chunk in fitting(inputs, memory // 2):
                    _put(adapted, trained)
                    targets = runs.targets([each.layer for each in chunk])
                    _put(adapted, current)
                    for each in chunk:
                        sums = runs.sums(each.layer, [seen.pop(each.layer) for seen in targets])
                        for name in each.sharing:
                            A = _solved(adapted[name], trained[name], *sums, projector.mu)
                            if not bool(A.isfinite().all()):
                                raise SafeprojError(
                                    f"{name}: the corrected factor has a value that is not finite"
                                )
                            current[name] = A.to(trained[name].dtype)
                        _put(adapted, {name: current[name] for name in each.sharing})
    finally:
        _put(adapted, trained)
    return {name: factor.float().cpu() for name, factor in current.items()}


@dataclass(frozen=True)
class _Input:
    """What some layers read.

    Attributes:
        layer: the first of them.
        sharing: all of them.
        nbytes: of it, over both data.
        waiting: bytes that a pass over the largest batch holds where it waits.
    """

    layer: str
    sharing: Sequence[str]
    nbytes: int
    waiting: int


def _input(group: Sequence[str], layer: nn.Module, batches: Sequence[Batch]) -> _Input:
    weight = plain_weight(layer)
    assert weight is not None
    row = in_features(layer) * weight.element_size()
    sizes = [batch["attention_mask"].numel() for batch in batches]
    return _Input(group[0], group, row * sum(sizes), WAITING * row * max(sizes))


class _Runs:
    """The runs of the model over both data, with the factors that it has at the time.

    Args:
        model: a `PeftModel`.
        safety: the safety data.
        benign: the benign data.
        begin: begins a pass.
        room: bound on the passes that wait.
        inputs: how many inputs there are to be looked at.
        on_batch: told about the progress.
    """

    def __init__(
        self,
        model: Any,
        safety: Sequence[Batch],
        benign: Sequence[Batch],
        begin: Callable[[Batch], Pass],
        room: int,
        inputs: int,
        on_batch: OnBatch | None,
    ) -> None:
        self._model, self._begin, self._on_batch = model, begin, on_batch
        self._safety, self._benign = safety, benign
        threads = torch.get_num_threads() if model.device.type == "cpu" else 1
        self._room = min(room, THREADS // threads)
        self._waiting: dict[int, Pass] = {}
        self._done, self._total = 0, inputs * STATES * (len(safety) + len(benign))

    def targets(self, names: Sequence[str]) -> list[dict[str, Tensor]]:
        """Return what layers read, for each batch of the safety data and then of the benign data.

        For the former it is without the adapter.
        """
        found = []
        for data, state in (
            (self._safety, self._model.disable_adapter()),
            (self._benign, nullcontext()),
        ):
            with state:
                for batch in data:
                    each = self._begin(batch)
                    found.append({name: each.until(name).cpu() for name in names})
                    each.end()
                    self._tell(len(names))
        return found

    def sums(self, name: str, targets: Sequence[Tensor]) -> tuple[_Sums, _Sums]:
        """Return those of the safety and of the benign data for what a layer reads now."""
        found = _Sums(), _Sums()
        for number, batch in enumerate((*self._safety, *self._benign)):
            each = self._waiting.pop(number, None) or self._begin(batch)
            now = each.until(name)
            if number < self._room:
                self._waiting[number] = each
            else:
                each.end()
            found[number >= len(self._safety)].add(targets[number].to(now.device), now)
            self._tell(1)
        return found

    def _tell(self, count: int) -> None:
        self._done += count
        if self._on_batch is not None:
            self._on_batch(self._done, self._total)


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
    """Give the model other factors of some layers."""
    with torch.no_grad():
        for name, factor in factors.items():
            adapted[name].A.copy_(factor)


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

"""The correction layer by layer: each makes up for what the ones before it left undone.

A layer's inputs are not what the statistics of the aligned model say once the layers before it
have an adapter. Here each layer is corrected for the inputs that it gets in the model that is
corrected up to it, towards the outputs that the aligned model has on the safety data, and the
adapted model on the benign data. The model runs over each data twice, side by side: for the targets
and as it is corrected so far, both stopping wherever layers are. Where that takes too much memory,
what cannot wait runs up to every layer anew. No gradient is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safeproj.errors import SafeprojError
from safeproj.lm.data import BATCH_SIZE, Batch
from safeproj.lm.layers import (
    MEMORY,
    OnBatch,
    add_squares,
    in_features,
    is_linear,
    mirrored,
    plain_weight,
    running,
    sharing_inputs,
)
from safeproj.lm.passes import Pass, stopping
from safeproj.methods.covariance.formulas import RIDGE, Reconstruction

Factors = dict[str, Tensor]
"""Path of a layer to its `A` (r, n)."""

WAITING = 3
"""What a pass that waits holds, in copies of its widest input: that, the residual, queries, …"""

THREADS = 2048
"""Bound on the threads that passes wait in, together with those that torch starts for each."""

MOST_BATCHES = 24
"""Of one of the data, so that their passes can wait in as many threads."""


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
    adapted = {name: _adapted(model, name) for name in names}
    current = {name: each.A.detach().clone() for name, each in adapted.items()}
    trained = dict(current)
    layers = {name: each.base for name, each in adapted.items()}
    try:
        with running(model, layers) as run:
            groups = sharing_inputs(layers, run, safety[0])
            waiting = max(_waiting(layers[group[0]], [*safety, *benign]) for group in groups)
            with stopping(run, {group[0]: layers[group[0]] for group in groups}) as begin:
                runs = _Runs(begin, _room(model, memory // waiting), len(groups), on_batch)
                aligned, before = (_Line(runs, data) for data in (safety, benign))
                now, now_benign = (_Line(runs, data) for data in (safety, benign))
                for group in groups:
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
                        if bool(adapted[name].B.any()):
                            current[name] = A.to(trained[name].dtype)
    finally:
        _put(adapted, trained)
    return {name: factor.float().cpu() for name, factor in current.items()}


def batch_size(rows: int) -> int:
    """Return how many samples of a data set run at a time."""
    return max(BATCH_SIZE, -(-rows // MOST_BATCHES))


def _waiting(layer: nn.Module, batches: Sequence[Batch]) -> int:
    """Return the bytes that a pass over the largest batch holds where it waits."""
    weight = plain_weight(layer)
    assert weight is not None
    row = in_features(layer) * weight.element_size()
    return WAITING * row * max(batch["attention_mask"].numel() for batch in batches)


def _room(model: Any, room: int) -> int:
    """Return how many passes may wait, of which memory has room for so many."""
    threads = torch.get_num_threads() if model.device.type == "cpu" else 1
    return min(room, THREADS // threads)


@dataclass
class _Runs:
    """The passes over both data in both states.

    Attributes:
        begin: begins a pass.
        room: how many more may wait.
        inputs: how many inputs there are to be looked at.
        on_batch: told about the progress.
        batches: how many there are in all.
        done: how often one has come to an input.
    """

    begin: Callable[[Batch], Pass]
    room: int
    inputs: int
    on_batch: OnBatch | None
    batches: int = 0
    done: int = 0

    def tell(self) -> None:
        self.done += 1
        if self.on_batch is not None:
            self.on_batch(self.done, self.inputs * self.batches)


class _Line:
    """The passes over one data in one state, which go on from input to input.

    Whoever looks at an input has given the model that state before.
    """

    def __init__(self, runs: _Runs, batches: Sequence[Batch]) -> None:
        self._runs, self._batches = runs, batches
        self._waiting: dict[int, Pass] = {}
        runs.batches += len(batches)

    def at(self, name: str) -> list[Tensor]:
        """Return what a layer reads, batch by batch, on the CPU."""
        return [found.cpu() for found in self.each(name)]

    def each(self, name: str) -> Iterator[Tensor]:
        """Yield what a layer reads, batch by batch."""
        for number, batch in enumerate(self._batches):
            if number not in self._waiting and self._runs.room > 0:
                self._runs.room -= 1
                self._waiting[number] = self._runs.begin(batch)
            own = self._waiting.get(number) or self._runs.begin(batch)
            yield own.until(name)
            if number not in self._waiting:
                own.end()
            self._runs.tell()


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


def _goal(layer: _Adapted, A: Tensor) -> _Goal:
    """Return that of a layer with its trained `A`: what it does on the benign data."""
    weight = plain_weight(layer.base)
    assert weight is not None
    inverse = torch.linalg.pinv(layer.B)
    return _Goal(inverse @ weight.double(), inverse @ layer.B @ A.double())


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

"""In which directions the outputs of layers lie: one forward pass over the data for many layers.

What is needed of a layer's outputs `Y = X Wᵀ` (N, m) are their top right singular vectors, the
leading eigenvectors of `Yᵀ Y`. Instead of `Y` a Gram matrix is accumulated while the model runs:
`Yᵀ Y` (m, m), or, where that is smaller, `Xᵀ X` (n, n) once for all layers that read the same
input, from which `Yᵀ Y = W (Xᵀ X) Wᵀ` follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from safeproj.errors import SafeprojError
from safeproj.lm.data import IGNORED, Batch
from safeproj.lm.layers import (
    MEMORY,
    OnBatch,
    add_squares,
    fitting,
    in_features,
    mirrored,
    out_features,
    plain_weight,
    rows_at,
    running,
    sharing_inputs,
)
from safeproj.methods.eigenpairs import leading_eigenpairs


@dataclass(frozen=True)
class Directions:
    """The leading directions of a layer's outputs.

    Attributes:
        U: (m, k), float32, orthonormal columns: the top right singular vectors of `Y` (N, m).
        singular_values: (k,), float32, those of `Y`, descending.
        energy: `‖Y‖_F²`.
        positions: N.
    """

    U: Tensor
    singular_values: Tensor
    energy: float
    positions: int

    @property
    def rank(self) -> int:
        """The number of directions, k."""
        return self.U.shape[1]

    def cut(self, rank: int | None) -> Directions:
        """Return the first directions alone; all if there are fewer, or for None."""
        return Directions(
            self.U[:, :rank], self.singular_values[:rank], self.energy, self.positions
        )


def output_directions(
    model: Any,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    rank: int,
    *,
    memory: int = MEMORY,
    on_batch: OnBatch | None = None,
) -> dict[str, Directions]:
    """Return the leading directions of the outputs, without bias, at the response positions.

    The model runs over the data once for each group of layers whose Gram matrices fit into
    `memory`, after a first batch that shows which layers share an input.

    Args:
        model: a transformers model; it may be spread over devices.
        layers: name to `nn.Linear` or `Conv1D` inside the model.
        batches: the data; iterated once for each group.
        rank: how many directions, at most; fewer are returned where the others are noise.
        memory: bound in bytes; a single matrix may be larger.
        on_batch: told about the progress.

    Raises:
        SafeprojError: a layer does not run once for each position, or its outputs are zero or not
            finite; or there is no data.
    """
    if rank < 1:
        raise SafeprojError(f"--rank must be at least 1, found {rank}")
    data = list(batches)
    if not data or not any(bool((batch["labels"] != IGNORED).any()) for batch in data):
        raise SafeprojError("the data has no response positions; expected prompts with responses")
    found: dict[str, Directions] = {}
    with running(model, layers) as run:
        groups = fitting(
            [
                gram
                for names in sharing_inputs(layers, run, data[0])
                for gram in _smaller(names, layers)
            ],
            memory,
        )
        done = 0
        for group in groups:
            with _watched(layers, group) as position:
                for batch in data:
                    position.mask = batch["labels"] != IGNORED
                    run(batch)
                    done += 1
                    if on_batch is not None:
                        on_batch(done, len(groups) * len(data))
            for gram in group:
                assert gram.matrix is not None
                gram.matrix = mirrored(gram.matrix)
                for name in gram.layers:
                    found[name] = _directions(name, layers[name], gram, rank)
                gram.matrix = None
    return {name: found[name] for name in layers}


@dataclass
class _Gram:
    """One Gram matrix that is accumulated.

    Attributes:
        layers: the layers that it is for; the first is the one that is listened to.
        of_inputs: `Xᵀ X` instead of `Yᵀ Y`.
        size: its side.
        matrix: the sum so far, what is above its diagonal until all is added.
        positions: N so far.
    """

    layers: list[str]
    of_inputs: bool
    size: int
    matrix: Tensor | None = None
    positions: int = 0

    @property
    def nbytes(self) -> int:
        return 8 * self.size * self.size

    def add(self, rows: Tensor) -> None:
        wide = rows.to(torch.float32 if rows.device.type == "mps" else torch.float64)
        if self.matrix is None:
            self.matrix = wide.new_zeros(self.size, self.size)
        add_squares(self.matrix, wide)
        self.positions += len(rows)


@dataclass
class _Positions:
    """Which positions of the current batch are responses: (batch, positions)."""

    mask: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))


def _smaller(names: list[str], layers: Mapping[str, nn.Module]) -> list[_Gram]:
    """Return the smaller Gram matrices for layers that share an input."""
    n = in_features(layers[names[0]])
    sizes = {name: out_features(layers[name]) for name in names}
    plain = all(plain_weight(layers[name]) is not None for name in names)
    if plain and n * n <= sum(m * m for m in sizes.values()):
        return [_Gram(names, True, n)]
    return [_Gram([name], False, m) for name, m in sizes.items()]


@contextmanager
def _watched(layers: Mapping[str, nn.Module], group: Sequence[_Gram]) -> Iterator[_Positions]:
    """Add to the Gram matrices whatever their layers see; yields what to set for each batch."""
    position = _Positions()
    with ExitStack() as hooks:
        for gram in group:
            inputs: list[Any] = [None]
            for name in gram.layers:
                hook = _listener(name, layers[name], gram, position, inputs)
                hooks.callback(layers[name].register_forward_hook(hook).remove)
        yield position


def _listener(
    name: str, layer: nn.Module, gram: _Gram, position: _Positions, shared: list[Any]
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    def hear(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if name != gram.layers[0]:
            if inputs[0] is not shared[0]:
                raise SafeprojError(
                    f"{name}: reads another input than {gram.layers[0]}, and in the first batch it "
                    "was the same; make a module for one of them at a time (--targets)"
                )
            return
        shared[0] = inputs[0]
        rows = rows_at(name, inputs[0], position.mask)
        gram.add(rows if gram.of_inputs else _outputs(layer, rows, output, position.mask, name))

    return hear


def _outputs(layer: nn.Module, rows: Tensor, output: Tensor, mask: Tensor, name: str) -> Tensor:
    """Return `Y` without the bias."""
    if layer.bias is None:
        return rows_at(name, output, mask)
    weight = plain_weight(layer)
    if weight is None:
        # Wherever the bias is kept, it is what the layer makes of zeros.
        bias: Tensor = layer.forward(rows.new_zeros(1, rows.shape[1]))
        return rows_at(name, output, mask) - bias
    # Not the output less the bias: that may be much larger, and has rounded what is wanted.
    return rows @ weight.T


def _directions(name: str, layer: nn.Module, gram: _Gram, rank: int) -> Directions:
    """Return the leading directions of `Y` from its Gram matrix or that of `X`."""
    G = gram.matrix
    assert G is not None
    weight = plain_weight(layer)
    if gram.of_inputs:
        assert weight is not None
        W = weight.to(G)  # as wide as the sum
        energy = float(((W @ G) * W).sum())
    else:
        W = None
        energy = float(G.diagonal().sum())

    def product(Q: Tensor) -> Tensor:
        return G @ Q if W is None else W @ (G @ (W.T @ Q))

    try:
        values, U = leading_eigenpairs(product, out_features(layer), rank, G)
    except FloatingPointError as error:
        raise SafeprojError(f"{name}: its outputs on the data are not finite") from error
    if len(values) == 0:
        raise SafeprojError(f"{name}: its outputs on the data are all zero; no direction follows")
    return Directions(
        U.float().cpu().contiguous(), values.sqrt().float().cpu(), energy, gram.positions
    )

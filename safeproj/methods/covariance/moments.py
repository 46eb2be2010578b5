"""Second moments of what layers read: one forward pass over the data for many layers."""

from __future__ import annotations

import math
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
    rows_at,
    running,
    sharing_inputs,
)

POSITIONS = ("all", "prompt", "response")
"""Which positions of the data a moment is the mean over."""


@dataclass(frozen=True)
class InputMoment:
    """The second moment `E x xᵀ` (n, n) of the input of some layers, mean over positions.

    Attributes:
        layers: the names of the layers that read it.
        matrix: the moment, or, where there are fewer than n positions, `X` (k, n) with `XᵀX` the
            moment; float32 on the CPU.
        whole: which of the two.
        positions: how many positions the mean is over.
        trace: of the moment, `E ‖x‖²`.
    """

    layers: tuple[str, ...]
    matrix: Tensor
    whole: bool
    positions: int
    trace: float


def input_moments(
    model: Any,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    *,
    positions: str = "all",
    memory: int = MEMORY,
    on_batch: OnBatch | None = None,
) -> Iterator[InputMoment]:
    """Yield the second moments of layers' inputs over positions that are not padding.

    Layers that read the same input share one. The model runs over the data once for each group of
    moments that fits into `memory`, after a first sample that shows which layers share an input.

    Args:
        model: a transformers model; it may be spread over devices.
        layers: name to `nn.Linear` or `Conv1D` inside the model.
        batches: the data; iterated once for each group.
        positions: one of `POSITIONS`: all, or those of prompts, or of responses.
        memory: bound in bytes; a single moment may be larger.
        on_batch: told about the progress.

    Raises:
        SafeprojError: a layer does not run once for each position, or its inputs are zero or not
            finite; or there is no data.
    """
    data = list(batches)
    count = sum(int(_mask(batch, positions).sum()) for batch in data)
    if not count:
        raise SafeprojError("the data has no positions; expected prompts with responses")
    with running(model, layers) as run:
        sums = [
            _Sum(tuple(names), in_features(layers[names[0]]), count)
            for names in sharing_inputs(layers, run, data[0])
        ]
        groups = fitting(sums, memory)
        done = 0
        for group in groups:
            with _watched(layers, group) as current:
                for batch in data:
                    current.mask = _mask(batch, positions)
                    run(batch)
                    done += 1
                    if on_batch is not None:
                        on_batch(done, len(groups) * len(data))
            for each in group:
                yield each.moment()
                each.matrix = None


@dataclass
class _Sum:
    """A moment that is accumulated: `Σ x xᵀ` in float64, or the inputs one below the other."""

    layers: tuple[str, ...]
    size: int
    positions: int
    matrix: Tensor | None = None
    seen: int = 0

    @property
    def whole(self) -> bool:
        return self.positions >= self.size

    @property
    def nbytes(self) -> int:
        return 8 * self.size * self.size if self.whole else 4 * self.positions * self.size

    def add(self, rows: Tensor) -> None:
        if self.matrix is None:
            shape = (self.size if self.whole else self.positions, self.size)
            wide = torch.float32 if rows.device.type == "mps" or not self.whole else torch.float64
            self.matrix = torch.zeros(shape, dtype=wide, device=rows.device)
        if self.whole:
            add_squares(self.matrix, rows.float() if rows.element_size() < 4 else rows)
        else:
            self.matrix[self.seen : self.seen + len(rows)] = rows
        self.seen += len(rows)

    def moment(self) -> InputMoment:
        assert self.matrix is not None
        if self.whole:
            found = mirrored(self.matrix).div_(self.positions)
            trace = float(found.diagonal().sum())
        else:
            found = self.matrix.div_(math.sqrt(self.positions))
            trace = float(found.double().square().sum())
        if not (math.isfinite(trace) and trace > 0.0):
            raise SafeprojError(f"{self.layers[0]}: its inputs on the data are zero or not finite")
        return InputMoment(
            self.layers, found.float().cpu().contiguous(), self.whole, self.positions, trace
        )


def _mask(batch: Batch, positions: str) -> Tensor:
    """Return which positions of a batch count: (batch, positions)."""
    present = batch["attention_mask"].bool()
    if positions == "all":
        return present
    is_response = batch["labels"] != IGNORED
    return present & (is_response if positions == "response" else ~is_response)


@dataclass
class _Current:
    """Which positions of the current batch count: (batch, positions)."""

    mask: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))


@contextmanager
def _watched(layers: Mapping[str, nn.Module], group: Sequence[_Sum]) -> Iterator[_Current]:
    """Add to the sums whatever their layers see; yields what to set for each batch."""
    current = _Current()
    with ExitStack() as hooks:
        for each in group:
            shared: list[Any] = [None]
            for name in each.layers:
                hook = _listener(name, each, current, shared)
                hooks.callback(layers[name].register_forward_pre_hook(hook).remove)
        yield current


def _listener(
    name: str, own: _Sum, current: _Current, shared: list[Any]
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hear(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        if name == own.layers[0]:
            shared[0] = inputs[0]
            own.add(rows_at(name, inputs[0], current.mask))
        elif inputs[0] is not shared[0]:
            raise SafeprojError(
                f"{name}: reads another input than {own.layers[0]}, and in the first batch it was "
                "the same; make statistics for one of them at a time (--targets)"
            )

    return hear

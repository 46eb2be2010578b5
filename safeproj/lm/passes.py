"""Forward passes that stop at a layer, and go on from there once the model is changed behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue
from threading import Thread, current_thread
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from safeproj.lm.data import BATCH_SIZE, Batch
from safeproj.lm.layers import (
    MEMORY,
    OnBatch,
    in_features,
    rows_at,
    running,
    sharing_inputs,
)

Run = Callable[[Batch], None]
"""What runs the model over a batch."""

WAITING = 3
"""What a pass that waits holds, in copies of its widest input: that, the residual, queries, …"""

THREADS = 2048
"""Bound on the threads that passes wait in, together with those that torch starts for each."""

MOST_BATCHES = 24
"""Of one of the data, so that their passes can wait in as many threads."""


def batch_size(rows: int) -> int:
    """Return how many samples of a data set run at a time."""
    return max(BATCH_SIZE, -(-rows // MOST_BATCHES))


class Walk:
    """Passes that go from input to input of a model, as far as memory lets them wait there.

    What cannot wait runs up to every input anew.

    Args:
        begin: begins a pass.
        groups: the layers in groups that read one input, in the order in which they run.
        room: how many passes may wait.
        on_batch: told how often one has come to an input.

    Attributes:
        groups: the same.
    """

    def __init__(
        self,
        begin: Callable[[Batch], Pass],
        groups: Sequence[Sequence[str]],
        room: int,
        on_batch: OnBatch | None,
    ) -> None:
        self.groups = groups
        self._begin, self._room, self._on_batch = begin, room, on_batch
        self._batches = self._done = 0

    def line(self, batches: Sequence[Batch]) -> Line:
        """Return passes over one data, in one state of the model."""
        self._batches += len(batches)
        return Line(self, batches)

    def waiting(self, batch: Batch) -> Pass | None:
        """Begin a pass that may wait, None where there is no room for one more."""
        if self._room <= 0:
            return None
        self._room -= 1
        return self._begin(batch)

    def passing(self, batch: Batch) -> Pass:
        """Begin one that is to end at the first input."""
        return self._begin(batch)

    def tell(self) -> None:
        """Say that a pass has come to an input."""
        self._done += 1
        if self._on_batch is not None:
            self._on_batch(self._done, len(self.groups) * self._batches)


class Line:
    """The passes over one data in one state of the model, which go on from input to input.

    Whoever looks at an input has given the model that state before.

    Args:
        walk: with others.
        batches: the data.
    """

    def __init__(self, walk: Walk, batches: Sequence[Batch]) -> None:
        self._walk, self._batches = walk, batches
        self._waiting: dict[int, Pass] = {}

    def at(self, name: str) -> list[Tensor]:
        """Return what a layer reads, batch by batch, on the CPU."""
        return [found.cpu() for found in self.each(name)]

    def each(self, name: str) -> Iterator[Tensor]:
        """Yield what a layer reads, batch by batch."""
        for number, batch in enumerate(self._batches):
            if number not in self._waiting and (begun := self._walk.waiting(batch)) is not None:
                self._waiting[number] = begun
            own = self._waiting.get(number) or self._walk.passing(batch)
            yield own.until(name)
            if number not in self._waiting:
                own.end()
            self._walk.tell()


@contextmanager
def walking(
    model: Any,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    on_batch: OnBatch | None = None,
    memory: int = MEMORY,
) -> Iterator[Walk]:
    """Yield what takes passes from input to input of some layers.

    Args:
        model: a transformers model.
        layers: name to layer.
        batches: all that is run; the first shows which layers read one input.
        on_batch: told about the progress.
        memory: bound in bytes on what waits so that it need not be computed again.

    Raises:
        SafeprojError: a layer does not run once in a forward pass.
    """
    with running(model, layers) as run:
        groups = sharing_inputs(layers, run, batches[0])
        first = {group[0]: layers[group[0]] for group in groups}
        waiting = max(_waiting(layer, batches) for layer in first.values())
        with stopping(run, first) as begin:
            yield Walk(begin, groups, _room(model, memory // waiting), on_batch)


def _waiting(layer: nn.Module, batches: Sequence[Batch]) -> int:
    """Return the bytes that a pass over the largest batch holds where it waits."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    row = in_features(layer) * weight.element_size()
    return WAITING * row * max(batch["attention_mask"].numel() for batch in batches)


def _room(model: Any, room: int) -> int:
    """Return how many passes may wait, of which memory has room for so many."""
    threads = torch.get_num_threads() if model.device.type == "cpu" else 1
    return min(room, THREADS // threads)


class Pass(Thread):
    """A forward pass over a batch, in a thread that waits wherever it has come to.

    It runs only while `until` is called. The layer that it waits at, and what is behind it, may be
    changed meanwhile: nothing before is ever run again.
    """

    def __init__(self, run: Run, batch: Batch) -> None:
        super().__init__(name="safeproj-pass", daemon=True)
        self._run_model, self._batch = run, batch
        self._mask = batch["attention_mask"].bool()
        self._wanted: SimpleQueue[str | None] = SimpleQueue()
        self._found: SimpleQueue[Tensor | BaseException] = SimpleQueue()
        self._next: str | None = None

    def until(self, name: str) -> Tensor:
        """Go on to a layer, and return what it reads (N, n) where the batch is no padding.

        Args:
            name: one of the layers of `stopping`, behind the last one.

        Raises:
            SafeprojError: the model does not run over the batch, or the layer not once for each
                position.
        """
        self._wanted.put(name)
        found = self._found.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def end(self) -> None:
        """Leave out the rest of the model."""
        self._wanted.put(None)
        self.join()

    def run(self) -> None:
        """Run the model: this is the thread."""
        try:
            self._wait()
            self._run_model(self._batch)
            raise RuntimeError(f"{self._next}: did not run behind the layers before it")
        except _EndError:
            pass
        except BaseException as error:
            self._found.put(error)

    def come_to(self, name: str, inputs: Tensor) -> None:
        """Wait at a layer if it is asked for: called in the thread as the layer begins."""
        if name == self._next:
            self._found.put(rows_at(name, inputs, self._mask))
            self._wait()

    def _wait(self) -> None:
        self._next = self._wanted.get()
        if self._next is None:
            raise _EndError


class _EndError(Exception):
    """The rest of the model need not run."""


@contextmanager
def stopping(run: Run, layers: Mapping[str, nn.Module]) -> Iterator[Callable[[Batch], Pass]]:
    """Yield what begins a pass that can stop at these layers; it is ended when this is left."""
    passes: WeakSet[Pass] = WeakSet()

    def begin(batch: Batch) -> Pass:
        found = Pass(run, batch)
        found.start()
        passes.add(found)
        return found

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(_listener(name)).remove)
        try:
            yield begin
        finally:
            for each in list(passes):
                each.end()


def _listener(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hear(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        thread = current_thread()
        if isinstance(thread, Pass):
            thread.come_to(name, inputs[0])

    return hear

"""Forward passes that stop at a layer, and go on from there once the model is changed behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue
from threading import Thread, current_thread
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from safeproj.lm.data import Batch
from safeproj.lm.layers import rows_at

Run = Callable[[Batch], None]
"""What runs the model over a batch."""


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

"""A projector that takes an adapter's updates and their controls apart, in one reading.

The engine puts all updates of a weight side by side into one product. How a product is rounded
depends on how wide it is, so the controls beside an update would change its last bits, and a sweep
would not measure exactly what `patch` writes. Here both halves have products of their own, over the
same blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from queue import SimpleQueue
from typing import Any

from safeproj.engine.device import scope_of
from safeproj.errors import SafeprojError
from safeproj.methods.blocks import Blocks, Projected
from safeproj.methods.safe_lora.formulas import Approx, Exact
from safeproj.methods.salora.formulas import Complement
from safeproj.storage.arrays import AnyArray, namespace

Work = Callable[[Blocks], Projected]
"""What is made of the blocks, in as many passes as it likes."""


def apart(projector: Any) -> Any:
    """Return the projector for tasks whose second half of updates are controls of the first.

    Raises:
        SafeprojError: it is none that projects.
    """
    kinds: dict[type, type] = {
        Approx: _ApartApprox,
        Exact: _ApartExact,
        Complement: _ApartComplement,
    }
    if type(projector) not in kinds:
        raise SafeprojError(
            f"a sweep over modules needs a method that projects, found {projector.method}"
        )
    return kinds[type(projector)](**vars(projector))


class _Apart:
    """Splits the columns of the last argument, `B` (m, 2 w), and does both halves in step."""

    def from_V(self, *given: Any, **named: Any) -> Any:
        return _halves(super(), "from_V", *given, **named)

    def from_C(self, *given: Any, **named: Any) -> Any:
        return _halves(super(), "from_C", *given, **named)

    def from_U(self, *given: Any, **named: Any) -> Any:
        return _halves(super(), "from_U", *given, **named)


class _ApartApprox(_Apart, Approx):
    pass


class _ApartExact(_Apart, Exact):
    pass


class _ApartComplement(_Apart, Complement):
    pass


def _halves(whole: Any, method: str, blocks: Blocks, *given: Any) -> Projected:
    """Return what a method makes of both halves of `B`, side by side again."""

    def work(B: AnyArray) -> Work:
        return lambda shared: getattr(whole, method)(shared, *given[:-1], B)

    halves = [work(half) for half in _split(given[-1])]
    first, second = in_step(blocks, halves, partial(scope_of, given[-1]))
    return Projected(
        _beside(first.CB, second.CB), first.alignment_norm, first.rank, _beside(first.UB, second.UB)
    )


def _split(B: AnyArray) -> list[AnyArray]:
    xp, width = namespace(B), B.shape[1] // 2
    return [xp.concat([half], axis=1) for half in (B[:, :width], B[:, width:])]  # row by row


def _beside(first: AnyArray | None, second: AnyArray | None) -> AnyArray | None:
    if first is None or second is None:
        return None
    found: AnyArray = namespace(first).concat([first, second], axis=1)
    return found


def in_step(
    blocks: Blocks, works: Sequence[Work], scope: Callable[[], AbstractContextManager[None]]
) -> list[Projected]:
    """Return what each makes of the blocks, which are read once for all of them.

    They take turns: each has a thread, since it asks for its blocks itself, but only one of them
    runs at a time, and each is done with a block before the next one is read.

    Raises:
        Exception: whatever reading, or one of them, raises.
    """
    lanes = [_Lane(work, scope) for work in works]
    try:
        while not all(lane.ended for lane in lanes):
            for block in blocks:
                for lane in lanes:
                    lane.give(block)
            for lane in lanes:
                lane.give(None)
    except BaseException as error:
        for lane in lanes:
            lane.give(error)
        raise
    return [lane.found() for lane in lanes]


class _Lane:
    """One of those that take turns; it runs until it waits for a block or has ended."""

    def __init__(self, work: Work, scope: Callable[[], AbstractContextManager[None]]) -> None:
        self.ended = False
        self._scope = scope
        self._found: Projected | BaseException | None = None
        self._given: SimpleQueue[AnyArray | BaseException | None] = SimpleQueue()
        self._turns: SimpleQueue[None] = SimpleQueue()
        threading.Thread(target=self._run, args=(work,), daemon=True).start()
        self._turns.get()

    def give(self, block: AnyArray | BaseException | None) -> None:
        """Hand over a block, None at the end of a pass, or an error that ends it."""
        if not self.ended:
            self._given.put(block)
            self._turns.get()

    def found(self) -> Projected:
        """Return what was made of the blocks."""
        if isinstance(self._found, Projected):
            return self._found
        assert self._found is not None
        raise self._found

    def __iter__(self) -> Iterator[AnyArray]:
        while True:
            self._turns.put(None)
            block = self._given.get()
            if block is None:
                return
            if isinstance(block, BaseException):
                raise block
            yield block

    def _run(self, work: Work) -> None:
        try:
            with self._scope():
                self._found = work(self)
        except BaseException as error:
            self._found = error
        finally:
            self.ended = True
            self._turns.put(None)

"""Weights made of parts: whatever the expression, its rows are those of the dense tensors."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safeproj.checkpoint import Checkpoint, Reader, open_checkpoint
from safeproj.checkpoint.expression import (
    Chunk,
    Expression,
    Flat,
    Head,
    Item,
    Joined,
    Matrix,
    Stacked,
    Stored,
    Swapped,
    dtype_and_shape,
    matrix,
    stored_names,
)
from safeproj.checkpoint.hashes import Digests
from safeproj.errors import SafeprojError
from safeproj.storage.ranges import RangeFile
from tests.checkpoint.reading import BLOCKS, digests, hashed, random, read, save
from tests.support import for_each

SHAPES = {"a": (6, 8), "b": (6, 8), "c": (10, 8), "d": (6, 5), "t": (8, 6)}
STACKS = {"s": (4, 6, 8), "u": (4, 6, 8), "v": (4, 10, 8), "w": (4, 6, 5), "k": (6, 3, 2, 2)}
TENSORS = {name: random(*shape, seed=len(shape)) for name, shape in {**SHAPES, **STACKS}.items()}
a, b, c, d, t, s, u, v, w, k = map(Stored, TENSORS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save(tmp_path_factory.mktemp("parts"), TENSORS))


def dense(expression: Expression, tensors: dict[str, Tensor]) -> Tensor:
    """Return what an expression means, from whole tensors."""
    if isinstance(expression, Stored):
        return tensors[expression.name]
    if isinstance(expression, Stacked):
        return torch.stack([dense(part, tensors) for part in expression.parts])
    if isinstance(expression, Joined):
        return torch.cat([dense(part, tensors) for part in expression.parts], expression.dim)
    part = dense(expression.part, tensors)
    if isinstance(expression, Swapped):
        return part.transpose(-1, -2)
    if isinstance(expression, Chunk):
        return part.chunk(expression.count, expression.dim)[expression.index]
    if isinstance(expression, Item):
        return part[expression.index]
    if isinstance(expression, Flat):
        return part.flatten(1)
    return part[: expression.rows]


def read_matrix(found: Matrix, rows: int) -> Tensor:
    whole = read(found.weight, rows)
    return whole.T if found.transposed else whole


EXPRESSIONS: dict[str, Expression] = {
    "a tensor": a,
    "turned": Swapped(a),
    "joined below": Joined((a, c, b), 0),
    "joined beside": Joined((a, d, b), 1),
    "joined beside, turned": Swapped(Joined((Swapped(a), Swapped(c)), 1)),
    "first half of the rows": Chunk(a, 0, 0, 2),
    "last third of the rows": Chunk(a, 0, 2, 3),
    "second quarter of the columns": Chunk(a, 1, 1, 4),
    "a chunk of a chunk": Chunk(Chunk(c, 0, 1, 2), 1, 3, 4),
    "a chunk across a join": Chunk(Joined((a, c), 0), 0, 1, 4),
    "a chunk of the turned": Chunk(Swapped(a), 0, 1, 2),
    "the first rows": Head(c, 7),
    "more rows than there are": Head(a, 100),
    "the first rows of the turned": Head(Swapped(a), 3),
    "the first rows across a join": Head(Joined((a, c), 0), 9),
    "an item": Item(s, 2),
    "an item of the turned": Item(Swapped(s), 3),
    "an item of what is stacked": Item(Stacked((a, b)), 1),
    "an item of gate and up, joined beside": Item(Joined((s, w), 2), 1),
    "an item of gate and up, joined below": Item(Joined((s, v), 1), 1),
    "an item of stacks, joined": Item(Joined((Stacked((a, b)), Stacked((c, c))), 1), 0),
    "an item of what was joined and turned": Item(Swapped(Joined((s, v), 1)), 2),
    "an item's half": Chunk(Item(s, 1), 0, 1, 2),
    "a half's item": Item(Chunk(s, 1, 1, 2), 3),
    "a half of the columns' item": Item(Chunk(s, 2, 1, 2), 3),
    "a half of the stack as the model has it, turned": Item(Chunk(Swapped(s), 2, 1, 2), 0),
    "the kernel of a convolution": Flat(k),
    "the first rows of a convolution": Head(Flat(k), 4),
}


@pytest.mark.parametrize("rows", BLOCKS)
@for_each("name", EXPRESSIONS)
def test_rows_are_those_of_the_dense_tensors(checkpoint: Checkpoint, name: str, rows: int) -> None:
    expression = EXPRESSIONS[name]
    expected = dense(expression, TENSORS)

    found = matrix(expression, checkpoint)

    assert dtype_and_shape(expression, checkpoint) == ("F32", tuple(expected.shape))
    assert torch.equal(read_matrix(found, rows), expected)
    assert found.weight.dtype == "F32"


class Spy(Reader):
    """Notes which bytes of which files are read and asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.was_read: list[tuple[Path | RangeFile, int]] = []
        self.asked: list[tuple[Path | RangeFile, int]] = []

    def read(self, label: str, path: Path | RangeFile, offset: int, out: memoryview) -> None:
        super().read(label, path, offset, out)
        self.was_read += [(path, offset + i) for i in range(len(out))]

    def prefetch(self, path: Path | RangeFile, start: int, stop: int) -> None:
        super().prefetch(path, start, stop)
        self.asked += [(path, i) for i in range(start, stop)]


@pytest.mark.parametrize("rows", BLOCKS)
@for_each("name", EXPRESSIONS)
def test_what_is_asked_for_is_what_is_read(checkpoint: Checkpoint, name: str, rows: int) -> None:
    weight = matrix(EXPRESSIONS[name], checkpoint).weight
    buffer = numpy.empty(rows * weight.row_bytes, numpy.uint8)
    for start in range(0, weight.shape[0], rows):
        spy, stop = Spy(), min(start + rows, weight.shape[0])
        weight.read_rows(spy, start, stop, buffer)
        weight.prefetch(spy, start, stop)
        assert spy.asked == spy.was_read


@dataclass
class Drawn:
    """Expressions of a given shape, drawn from the shape inwards; the tensors they need."""

    draw: Callable[[st.SearchStrategy[int]], int]
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def stored(self, *shape: int) -> Expression:
        name = f"t{len(self.tensors)}"
        dtype = (torch.float32, torch.bfloat16, torch.float16)[self.number(0, 2)]
        self.tensors[name] = random(*shape, seed=len(name) + sum(shape), dtype=dtype)
        return Stored(name)

    def of(self, *shape: int, depth: int) -> Expression:
        """Return an expression of two or three dimensions."""
        kinds: list[Callable[..., Expression]] = [self.stored]
        if depth:
            deeper: list[Callable[..., Expression]] = [self.swapped, self.joined, self.chunk]
            deeper += [self.item, self.head, self.flat] if len(shape) == 2 else [self.stacked]
            kinds += [lambda *s, kind=kind: kind(*s, depth=depth - 1) for kind in deeper]
        return kinds[self.number(0, len(kinds) - 1)](*shape)

    def swapped(self, *shape: int, depth: int) -> Expression:
        return Swapped(self.of(*shape[:-2], shape[-1], shape[-2], depth=depth))

    def joined(self, *shape: int, depth: int) -> Expression:
        dim = self.number(len(shape) - 2, len(shape) - 1)
        first = self.number(1, shape[dim] - 1) if shape[dim] > 1 else shape[dim]
        sizes = [first, shape[dim] - first] if first < shape[dim] else [first]
        parts = (self.of(*shape[:dim], n, *shape[dim + 1 :], depth=depth) for n in sizes)
        return Joined(tuple(parts), dim)

    def chunk(self, *shape: int, depth: int) -> Expression:
        dim, count = self.number(len(shape) - 2, len(shape) - 1), self.number(1, 3)
        part = self.of(*shape[:dim], shape[dim] * count, *shape[dim + 1 :], depth=depth)
        return Chunk(part, dim, self.number(0, count - 1), count)

    def item(self, *shape: int, depth: int) -> Expression:
        count = self.number(1, 3)
        return Item(self.of(count, *shape, depth=depth), self.number(0, count - 1))

    def stacked(self, *shape: int, depth: int) -> Expression:
        return Stacked(tuple(self.of(*shape[1:], depth=depth) for _ in range(shape[0])))

    def head(self, *shape: int, depth: int) -> Expression:
        return Head(self.of(shape[0] + self.number(0, 3), shape[1], depth=depth), shape[0])

    def flat(self, rows: int, columns: int, depth: int) -> Expression:  # noqa: ARG002
        return Flat(self.stored(rows, columns, 1))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_expression_reads_what_it_means(data: st.DataObject) -> None:
    drawn = Drawn(data.draw)
    shape = drawn.number(1, 9), drawn.number(1, 9)
    expression = drawn.of(*shape, depth=4)
    expected = dense(expression, drawn.tensors)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = open_checkpoint(save(Path(folder), drawn.tensors))
        dtype, found_shape = dtype_and_shape(expression, checkpoint)
        assert found_shape == shape
        try:
            found = matrix(expression, checkpoint)
        except SafeprojError as error:
            assert "different orientations" in str(error)
            return
        for rows in (1, drawn.number(2, 9), 1000):
            assert torch.equal(read_matrix(found, rows).float(), expected.float())
    names = list(stored_names(expression))
    assert set(names) == set(drawn.tensors)
    assert found.weight.dtype in {"F32", "F16", "BF16"}
    if len({t.dtype for t in drawn.tensors.values()}) == 1:
        assert found.weight.dtype == dtype


def test_parts_of_different_dtypes_are_read_in_one_that_holds_both(tmp_path: Path) -> None:
    tensors = {"x": random(4, 6, dtype=torch.bfloat16), "y": random(4, 6, dtype=torch.float16)}
    checkpoint = open_checkpoint(save(tmp_path, tensors))
    expression = Joined((Stored("x"), Stored("y")), 1)

    found = matrix(expression, checkpoint)

    assert found.weight.dtype == "F32"
    assert dtype_and_shape(expression, checkpoint) == ("F32", (4, 12))
    expected = torch.cat([tensors["x"].float(), tensors["y"].float()], 1)
    assert torch.equal(read_matrix(found, 3).float(), expected)


@dataclass(frozen=True)
class Refused:
    expression: Expression
    words: tuple[str, ...]


REFUSED = {
    "parts of different widths": Refused(Joined((a, d), 0), ("a and 1 more", "[6, 8]", "[6, 5]")),
    "items of different shapes": Refused(Stacked((a, c)), ("a and 1 more", "[6, 8]", "[10, 8]")),
    "a part without that dimension": Refused(Joined((a, b), 2), ("a and 1 more", "[6, 8]")),
    "chunks that are not equal": Refused(Chunk(a, 0, 0, 4), ("a and 0 more", "[6, 8]")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_parts_that_do_not_fit_are_refused_without_reading(
    checkpoint: Checkpoint, name: str
) -> None:
    refused = REFUSED[name]
    with pytest.raises(SafeprojError) as caught:
        dtype_and_shape(refused.expression, checkpoint)
    for word in (*refused.words, "do not fit together"):
        assert word in str(caught.value)


UNREADABLE: dict[str, Expression] = {
    "different orientations": Joined((a, Swapped(t)), 0),
    "items cannot be read one by one": Item(Chunk(s, 0, 1, 2), 0),
    "a convolution that the checkpoint stores in parts": Flat(Joined((k, k), 0)),
}


@pytest.mark.parametrize("words", UNREADABLE)
def test_what_cannot_be_read_by_rows_is_refused(checkpoint: Checkpoint, words: str) -> None:
    with pytest.raises(SafeprojError, match=words):
        matrix(UNREADABLE[words], checkpoint)


@pytest.mark.parametrize("rows", BLOCKS)
def test_each_part_has_the_digest_of_its_own_bytes(checkpoint: Checkpoint, rows: int) -> None:
    def found(expression: Expression) -> Digests:
        return digests(matrix(expression, checkpoint).weight, rows)

    S = TENSORS["s"]
    assert found(Item(s, 2)) == hashed({"s[2]": S[2]})
    assert found(Chunk(Item(s, 1), 0, 1, 2)) == hashed({"s[1][3:6]": S[1, 3:]})
    assert found(Joined((a, c), 0)) == hashed({name: TENSORS[name] for name in ("a", "c")})
    assert found(Joined((a, d), 1)) == hashed({name: TENSORS[name] for name in ("a", "d")})


def test_labels_name_the_parts(checkpoint: Checkpoint) -> None:
    def label(expression: Expression) -> str:
        return matrix(expression, checkpoint).weight.label

    assert label(a) == "a"
    assert label(Item(s, 2)) == "s[2]"
    assert label(Chunk(Item(s, 1), 0, 1, 2)) == "s[1][3:6]"
    assert label(Joined((a, c), 0)) == "a, c"

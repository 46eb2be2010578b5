"""The command that a sweep names is the one that does what was tried."""

from __future__ import annotations

import pytest

from safeproj import Covariance, Options, SafeLora, Salora, Selection
from safeproj.methods.interface import Method
from safeproj.sweeping.patching import patching


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (SafeLora("b", "a"), "--base b --aligned a"),
        (SafeLora(alignment="f"), "--alignment f"),
        (
            SafeLora("b", "a", projector="exact", rank=4),
            "--base b --aligned a --projector exact --rank 4",
        ),
        (Salora("m", rank=2), "--safety-module m --rank 2"),
        (
            Covariance("a", "s.jsonl", "t.jsonl"),
            "--aligned a --safety-data s.jsonl --task-data t.jsonl",
        ),
    ],
)
def test_it_gives_the_method_as_it_was_given(method: Method, words: str) -> None:
    assert patching(method, "x", Options()) == (
        *("safeproj", "patch", *words.split(), "--adapter", "x"),
    )


def test_it_leaves_out_what_was_left_out() -> None:
    options = Options(Selection(include=("a", "b"), exclude=("c",)), maps=("x=y",))
    assert patching(SafeLora("b", "a"), "x", options)[8:] == (
        *("--include", "a", "--include", "b", "--exclude", "c", "--map", "x=y"),
    )

"""What tests themselves rely on."""

from __future__ import annotations

import inspect

import pytest

from tests.support import for_each


def test_each_case_is_run_and_the_one_that_fails_is_named() -> None:
    seen: list[tuple[str, int, bool]] = []

    @for_each("word", ["a", "b"])
    @for_each(("number", "flag"), [(1, True), (2, False)])
    def check(word: str, number: int, flag: bool, bad: int) -> None:
        seen.append((word, number, flag))
        assert number != bad

    assert list(inspect.signature(check).parameters) == ["bad"]
    check(bad=3)
    assert seen == [("a", 1, True), ("a", 2, False), ("b", 1, True), ("b", 2, False)]
    named = r"^word = 'a': \('number', 'flag'\) = \(2, False\): assert 2 != 2"
    with pytest.raises(AssertionError, match=named):
        check(bad=2)


def test_what_raises_nothing_is_named_too() -> None:
    @for_each("text", ["x", "1"])
    def check(text: str) -> None:
        with pytest.raises(ValueError, match="invalid literal"):
            int(text)

    with pytest.raises(AssertionError, match=r"^text = '1': DID NOT RAISE"):
        check()

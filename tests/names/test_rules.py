"""`--map`: what the user says comes first."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from safeproj.checkpoint.expression import Joined, Stacked, Stored
from safeproj.errors import SafeprojError
from safeproj.names import Names, parse_rules
from safeproj.names.rules import rewrite
from tests.names.support import anything, checkpoint, exactly


@pytest.mark.parametrize(
    ("rule", "parameter", "expected"),
    [
        ("lm_head.weight=out.weight", "lm_head.weight", "out.weight"),
        ("lm_head=out", "lm_head.weight", "out.weight"),
        ("lm_head=out.weight", "lm_head.weight", "out.weight"),
        ("model.*=*", "model.a.weight", "a.weight"),
        ("model.*=x.*", "model.a.weight", "x.a.weight"),
        ("*.q=*.query", "m.0.q.weight", "m.0.query.weight"),
        ("m.*.a.*=n.*.b.*", "m.3.a.q.weight", "n.3.b.q.weight"),
        ("m.*.experts=n.*.moe", "m.0.experts.down_proj", "n.0.moe.down_proj"),
    ],
)
def test_a_rule_rewrites(rule: str, parameter: str, expected: str) -> None:
    assert expected in list(rewrite(parse_rules([rule])[0], parameter))


@pytest.mark.parametrize(
    ("rule", "parameter"),
    [
        ("model=x", "model.a.weight"),
        ("model.*=x.*", "my.model.a.weight"),
        ("a*a=b*b", "a"),
        ("m.+=x.y", "m.a"),
    ],
)
def test_a_rule_leaves_other_names_alone(rule: str, parameter: str) -> None:
    assert list(rewrite(parse_rules([rule])[0], parameter)) == []


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("model", "expected RUNTIME=CHECKPOINT"),
        ("=x", "expected RUNTIME=CHECKPOINT"),
        ("a=b=c", "expected RUNTIME=CHECKPOINT"),
        ("a.*=b", "1 * on the left and 0 on the right"),
        ("a.**=b.**", "two * side by side"),
    ],
)
def test_a_malformed_rule_is_refused(tmp_path: Path, rule: str, words: str) -> None:
    with pytest.raises(SafeprojError, match="maps") as error:
        Names(checkpoint(tmp_path, {"a": (1,)}), [rule])
    assert words in error.value.message


def test_many_stars_cost_little() -> None:
    rule = parse_rules(["*a" * 30 + "=" + "*b" * 30])[0]
    started = time.perf_counter()
    assert list(rewrite(rule, "a" * 5000 + "!")) == []
    assert time.perf_counter() - started < 1


def test_a_rule_comes_before_the_exact_name(tmp_path: Path) -> None:
    given = checkpoint(tmp_path, {"a.weight": (2, 3), "b.weight": (2, 3)})
    assert Names(given, ["a=b"]).find("a.weight", exactly((2, 3))) == Stored("b.weight")


def test_the_first_rule_that_finds_something_counts(tmp_path: Path) -> None:
    given = checkpoint(tmp_path, {"b.weight": (2, 3), "c.weight": (2, 3)})
    names = Names(given, ["a=missing", "a=b", "a=c"])
    assert names.find("a.weight", anything) == Stored("b.weight")


def test_a_rule_may_name_experts_that_are_stored_one_by_one(tmp_path: Path) -> None:
    tensors = {f"x.experts.{e}.{w}.weight": (2, 3) for e in range(2) for w in ("w1", "w2", "w3")}
    names = Names(checkpoint(tmp_path, tensors), ["model.*=x.*"])

    def stack(leaf: str) -> Stacked:
        return Stacked(tuple(Stored(f"x.experts.{e}.{leaf}.weight") for e in range(2)))

    found = names.find("model.experts.gate_up_proj", exactly((2, 4, 3)))
    assert found == Joined((stack("w1"), stack("w3")), 1)
    assert names.find("model.experts.down_proj", exactly((2, 2, 3))) == stack("w2")


def test_a_rule_that_finds_nothing_is_refused(tmp_path: Path) -> None:
    given = checkpoint(tmp_path, {"layers.0.query.weight": (2, 3), "a.weight": (2, 3)})
    with pytest.raises(SafeprojError) as error:
        Names(given, ["a=layers.0.querry"]).find("a.weight", anything)
    message = error.value.message
    assert "'a=layers.0.querry' makes layers.0.querry.weight of a.weight" in message
    assert "closest is layers.0.query.weight" in message


def test_a_rule_to_another_shape_is_refused(tmp_path: Path) -> None:
    given = checkpoint(tmp_path, {"b.weight": (5, 3)})
    with pytest.raises(SafeprojError, match=r"a\.weight is b\.weight \[5, 3\]"):
        Names(given, ["a=b"]).find("a.weight", exactly((2, 3)))

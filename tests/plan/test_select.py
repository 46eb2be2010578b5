"""Which modules are projected."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safeproj.errors import SafeprojError
from safeproj.plan.select import Selection
from safeproj.text import natural_order

COSINES = {
    "layers.10.q": 0.2,
    "layers.2.q": 0.2,
    "layers.1.q": 0.9,
    "layers.3.q": 0.35,
    "layers.4.q": None,
}


def test_the_default_is_tau_of_0_35_inclusive() -> None:
    assert Selection().mode == "threshold"
    assert Selection().choose(COSINES) == {"layers.10.q", "layers.2.q", "layers.3.q"}


def test_another_default_is_for_those_who_give_none() -> None:
    assert Selection().or_all() == Selection(all=True)
    assert Selection(include=("q",)).or_all() == Selection(all=True, include=("q",))
    for given_ in (Selection(threshold=0.0), Selection(layers=0), Selection(all=True)):
        assert given_.or_all() == given_


@pytest.mark.parametrize(
    ("tau", "expected"), [(0.0, set()), (0.2, {"layers.2.q", "layers.10.q"}), (1.0, None)]
)
def test_threshold(tau: float, expected: set[str] | None) -> None:
    scored = {name for name, cosine in COSINES.items() if cosine is not None}
    assert Selection(threshold=tau).choose(COSINES) == (scored if expected is None else expected)


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (0, set()),
        (1, {"layers.2.q"}),  # tied with layer 10, which comes later in natural order
        (2, {"layers.2.q", "layers.10.q"}),
        (3, {"layers.2.q", "layers.10.q", "layers.3.q"}),
    ],
)
def test_number_projects_exactly_that_many(n: int, expected: set[str]) -> None:
    assert Selection(layers=n).choose(COSINES) == expected


def test_all_leaves_out_only_what_has_no_cosine() -> None:
    assert Selection(all=True).choose(COSINES) == set(COSINES) - {"layers.4.q"}


def test_include_and_exclude_match_anywhere_in_the_name() -> None:
    selection = Selection(include=("q_proj", "v_proj"), exclude=(r"layers\.0\.",))
    assert selection.considers("model.layers.1.self_attn.q_proj")
    assert not selection.considers("model.layers.1.self_attn.k_proj")
    assert not selection.considers("model.layers.0.self_attn.v_proj")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"threshold": 0.5, "layers": 3}, "--threshold and --layers"),
        ({"layers": 3, "all": True}, "--layers and --all"),
        ({"threshold": 1.01}, "1.01"),
        ({"threshold": float("nan")}, "nan"),
        ({"layers": -1}, "-1"),
        ({"include": ("(",)}, "--include '('"),
    ],
)
def test_refusals_name_the_option(settings: dict[str, object], words: str) -> None:
    with pytest.raises(SafeprojError) as caught:
        Selection(**settings)  # type: ignore[arg-type]
    assert words in caught.value.message


def test_natural_order_puts_layer_2_before_layer_10() -> None:
    names = ["m.10.a", "m.2.b", "m.2.a", "head", "m.a"]
    assert sorted(names, key=natural_order) == ["head", "m.2.a", "m.2.b", "m.10.a", "m.a"]


BOUNDS = {
    "layers.10.q": (0.1, 0.4),
    "layers.2.q": (0.2, 0.2),
    "layers.1.q": (0.5, 1.0),
    "layers.3.q": (0.3, 0.36),
}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"threshold": 0.05}, set()),
        ({"threshold": 0.1}, {"layers.10.q"}),  # at most tau: the lower bound is projected
        ({"threshold": 0.2}, {"layers.10.q"}),
        ({"threshold": 0.35}, {"layers.10.q", "layers.3.q"}),
        ({"threshold": 0.36}, {"layers.10.q"}),  # at most tau: the upper bound is projected too
        ({"threshold": 0.4}, set()),
        ({"threshold": 1.0}, set()),
        ({"all": True}, set()),
        ({"layers": 0}, set()),
        ({"layers": 1}, {"layers.2.q", "layers.10.q"}),
        ({"layers": 2}, {"layers.10.q", "layers.3.q"}),
        ({"layers": 3}, set()),
        ({"layers": 9}, set()),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",  # sets have no order
)
def test_what_a_cosine_within_its_bounds_might_change(
    settings: dict[str, float], expected: set[str]
) -> None:
    found = Selection(**settings).uncertain(COSINES, BOUNDS)  # type: ignore[arg-type]
    assert found == expected


def test_what_is_known_exactly_can_be_overtaken() -> None:
    cosines, bounds = {"a": 0.3, "b": 0.5, "c": 0.9}, {"b": (0.2, 0.6)}
    assert Selection(layers=1).uncertain(cosines, bounds) == {"a", "b"}
    assert Selection(threshold=0.4).uncertain(cosines, bounds) == {"b"}


def test_without_bounds_everything_is_certain() -> None:
    assert Selection(layers=2).uncertain(COSINES, {}) == set()
    assert Selection().uncertain(COSINES, {}) == set()


def test_bounds_that_touch_are_a_tie_which_the_name_may_decide() -> None:
    cosines = {"layers.1.q": 0.6, "layers.2.q": 0.4}
    bounds = {"layers.1.q": (0.5, 0.7), "layers.2.q": (0.3, 0.5)}
    assert Selection(layers=1).choose(cosines) == {"layers.2.q"}
    assert Selection(layers=1).choose(dict.fromkeys(cosines, 0.5)) == {"layers.1.q"}
    assert Selection(layers=1).uncertain(cosines, bounds) == set(cosines)


@settings(deadline=None)
@given(data=st.data(), tau=st.integers(0, 10), layers=st.integers(0, 6), seed=st.integers(0, 99))
def test_no_cosines_within_the_bounds_change_what_is_certain(
    data: st.DataObject, tau: int, layers: int, seed: int
) -> None:
    """Multiples of 0.1, so that ties and cosines at the threshold are as common as others."""
    tenths = st.lists(st.integers(0, 10), min_size=3, max_size=3).map(sorted)
    given_ = data.draw(st.lists(tenths, min_size=1, max_size=6))
    names = [f"layers.{i}.q" for i in range(len(given_))]
    cosines = {name: each[1] / 10 for name, each in zip(names, given_, strict=True)}
    bounds = {n: (each[0] / 10, each[2] / 10) for n, each in zip(names, given_, strict=True)}
    random = Random(seed)
    for selection in (Selection(threshold=tau / 10), Selection(layers=layers)):
        uncertain = selection.uncertain(cosines, bounds)
        for _ in range(20):
            truth = {
                n: random.randint(each[0], each[2]) / 10
                for n, each in zip(names, given_, strict=True)
            }
            changed = selection.choose(truth) ^ selection.choose(cosines)
            assert changed <= uncertain

"""Which modules are projected."""

from __future__ import annotations

import pytest

from safeproj.errors import SafeprojError
from safeproj.select import Selection, natural_order

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
    assert words in str(caught.value)


def test_natural_order_puts_layer_2_before_layer_10() -> None:
    names = ["m.10.a", "m.2.b", "m.2.a", "head", "m.a"]
    assert sorted(names, key=natural_order) == ["head", "m.2.a", "m.2.b", "m.10.a", "m.a"]

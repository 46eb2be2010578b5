"""Which method is meant by what is given, what does not go together, and what a record says."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from safeproj import Covariance, Merge, Policy, SafeDelta, SafeLora, Salora, inspect
from safeproj.cli.options import Given
from safeproj.errors import SafeprojError
from safeproj.methods import registry
from safeproj.methods.covariance.formulas import Correction, Reconstruction
from safeproj.methods.interface import Method
from safeproj.methods.registry import METHODS, method_beside, method_of
from safeproj.methods.safe_lora.formulas import Approx, Exact
from safeproj.methods.salora.formulas import Complement
from tests.conformance.oracle import save
from tests.conftest import Trio
from tests.methods.covariance.test_command import Place, lora, make
from tests.support import assert_refused, safeproj, save_adapter, save_safety_module

STATISTICS = {"safety_data": "s.stats.safetensors", "task_data": "t.stats.safetensors"}
GIVEN = {
    "base": "org/base",
    "aligned": "org/aligned",
    "alignment": "org/file",
    "safety_module": "org/module",
    **STATISTICS,
    "safe_adapter": "org/safe",
    "safe_model": "org/safe-model",
}
"""Every source that a method can have."""

WAYS: dict[frozenset[str], type[Method]] = {
    frozenset({"base", "aligned"}): SafeLora,
    frozenset({"alignment"}): SafeLora,
    frozenset({"safety_module"}): Salora,
    frozenset({"safety_data", "aligned"}): Covariance,
    frozenset({"safety_data", "task_data"}): Covariance,
    frozenset({"safety_data", "task_data", "aligned"}): Covariance,
    frozenset({"base", "aligned", "safe_adapter"}): Merge,
    frozenset({"alignment", "safe_adapter"}): Merge,
    frozenset({"safe_adapter"}): Merge,
}
"""Those that go together, and what they are for."""

ALONE = frozenset({"safety_data"})
"""Enough to tell the method, and too little to run it."""

SETTINGS: dict[str, Any] = {
    "projector": "exact",
    "rank": 3,
    "energy": 0.5,
    "mu": 1.0,
    "reconstruct": True,
    "weight": 0.5,
    "merge_form": "low-rank",
    "merge_rank": 4,
    "strength": 0.5,
    "delta_rank": 6,
}
"""Every setting that a method can have."""

OWN: dict[type[Method], set[str]] = {
    SafeLora: {"projector", "rank", "energy"},
    Salora: {"rank"},
    Covariance: {"mu", "reconstruct"},
    Merge: {"projector", "rank", "energy", "weight", "merge_form", "merge_rank"},
    SafeDelta: {"strength", "delta_rank"},
}

NEEDS = {
    "safe-lora": "--base and --aligned, or --alignment",
    "salora": "--safety-module",
    "covariance": "--safety-data, and --aligned unless it and --task-data are statistics",
    "merge": "--safe-adapter, and --base and --aligned or --alignment to choose by",
    "safe-delta": "--aligned and --safety-data",
}


def subsets(names: Any) -> list[frozenset[str]]:
    ordered = list(names)
    return [frozenset(each) for n in range(len(ordered) + 1) for each in combinations(ordered, n)]


def named(names: object) -> str:
    return "+".join(sorted(names)) if isinstance(names, frozenset) and names else "none"


def sources(names: frozenset[str]) -> dict[str, str]:
    return {name: GIVEN[name] for name in names}


OTHERS = {each for each in subsets(GIVEN) if each not in {*WAYS, ALONE}}
"""Sources that are no method's for adapters."""

WHOLE = set(Merge.whole_ways)
"""Those of one for full fine-tunes."""


def refusal(given: dict[str, Any], name: str | None = None) -> str:
    with pytest.raises(SafeprojError, match=r"^[^\n]+$") as caught:
        method_of(given, name)
    return caught.value.message


# --- which method


def test_every_source_and_setting_is_looked_at_here() -> None:
    assert set(registry.options()) == {*GIVEN, *SETTINGS}
    assert {method: set(method.options()) - set(GIVEN) for method in METHODS} == OWN
    assert {method.name: method.needs for method in METHODS} == NEEDS
    assert tuple(NEEDS) == tuple(registry.by_name())


@pytest.mark.parametrize("names", WAYS, ids=named)
def test_what_is_given_tells_the_method(names: frozenset[str]) -> None:
    found = method_of(sources(names))
    assert type(found) is WAYS[names]
    assert found.sources == sources(names)
    assert found.settings == {}
    assert found.inputs(["a"]) == [
        *((f"--{name.replace('_', '-')}", GIVEN[name]) for name in GIVEN if name in names),
        ("--adapter", "a"),
    ]


@pytest.mark.parametrize("names", WAYS, ids=named)
def test_what_is_not_given_counts_for_nothing(names: frozenset[str]) -> None:
    """As a command hands all of its options over."""
    absent = {**dict.fromkeys(GIVEN), **dict.fromkeys(SETTINGS), "reconstruct": False}
    assert method_of({**absent, **sources(names)}) == method_of(sources(names))


def test_sources_that_do_not_go_together_are_refused() -> None:
    for names in OTHERS - WHOLE:
        assert refusal(sources(names)) == (
            "give --base and --aligned, --alignment, --safety-module, --safety-data with "
            "--aligned, or --safe-adapter"
        ), named(names)


def test_those_of_full_fine_tunes_say_so() -> None:
    for names in WHOLE - {frozenset({"base", "aligned"})}:
        assert refusal(sources(names)) == (
            "--safe-model goes with a full fine-tune; give --model"
        ), named(names)


@pytest.mark.parametrize("names", Merge.whole_ways, ids=named)
def test_a_full_fine_tune_has_ways_of_its_own(names: frozenset[str]) -> None:
    """And the aligned model beside every one."""
    given: dict[str, Any] = {**sources(names), "weight": 0.5}
    found, aligned = method_beside({**given, "aligned": "a"}, "merge")
    own = {"aligned": "a"} if "base" in names else {}
    assert found == Merge(**{**given, **own})
    assert aligned == "a"
    if names != {"base", "aligned"}:
        assert method_beside({**sources(names), "aligned": "a"})[0] == replace(found, weight=None)
    else:
        assert isinstance(method_beside({**sources(names)})[0], SafeLora)


@pytest.mark.parametrize("data", [{"safety_data": "s.jsonl"}, {"safety_data": "s.safetensors"}])
def test_data_needs_a_model_to_run_or_statistics_of_both(data: dict[str, str]) -> None:
    wanted = "give --aligned, which is run on the data; or statistics for both --safety-data and"
    assert refusal(data).startswith(wanted)
    if data["safety_data"].endswith(".jsonl"):
        assert refusal({**STATISTICS, **data}).startswith(wanted)
    assert refusal({**STATISTICS, "task_data": "t.jsonl"}).startswith(wanted)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: str(method.name))
def test_a_method_is_made_of_its_own_sources_alone(method: type[Method]) -> None:
    for names in subsets(GIVEN):
        known = {name: GIVEN[name] for name in names if name in method.options()}
        if "safety_data" in known and method is SafeDelta:
            known["safety_data"] = "s.jsonl"
        ways = {*method.ways, *method.whole_ways} - {ALONE}
        if known.keys() == names and names in ways:
            assert method(**known).sources == known
        elif frozenset(known) in ways:
            with pytest.raises(TypeError, match="unexpected keyword"):
                method(**sources(names))
        else:
            with pytest.raises(SafeprojError, match=r"needs|give aligned"):
                made = method(**known)
                assert frozenset(known) in method.in_memory  # enough for a model in memory alone
                made.open()


# --- settings


@pytest.mark.parametrize("names", WAYS, ids=named)
def test_settings_of_another_method_are_refused(names: frozenset[str]) -> None:
    method = WAYS[names]
    way = "--alignment" if names == {"alignment"} else method.mark
    for settings in subsets(SETTINGS):
        own = {name: SETTINGS[name] for name in SETTINGS if name in settings}
        others = [name for name in SETTINGS if name in settings - OWN[method]]
        if not others:
            continue
        text = refusal({**sources(names), **own})
        flags = [f"--{name.replace('_', '-')}" for name in others]
        listed = flags[0] if len(flags) == 1 else f"{', '.join(flags[:-1])} and {flags[-1]}"
        assert text.startswith(f"{listed} {'goes' if len(flags) == 1 else 'go'} with --")
        assert f"and not with {way}; leave {'it' if len(flags) == 1 else 'them'} out" in text


@pytest.mark.parametrize(
    ("names", "settings", "text"),
    [
        (
            {"base", "aligned"},
            {"mu": 1.0},
            "--mu goes with --safety-data, for the covariance-weighted correction, and not with "
            "--base and --aligned; leave it out",
        ),
        (
            {"alignment"},
            {"reconstruct": True},
            "--reconstruct goes with --safety-data, for the covariance-weighted correction, and "
            "not with --alignment; leave it out",
        ),
        (
            {"safety_module"},
            {"projector": "exact", "energy": 0.5, "rank": 3},
            "--projector and --energy go with --base and --aligned, for Safe LoRA, and not with "
            "--safety-module; leave them out, and give --rank to use fewer directions of the "
            "safety module",
        ),
        (
            {"safety_module"},
            {"mu": 0.3},
            "--mu goes with --safety-data, for the covariance-weighted correction, and not with "
            "--safety-module; leave it out, and give --rank to use fewer directions of the safety "
            "module",
        ),
        (
            {"safety_data", "aligned"},
            {"projector": "exact", "rank": 3, "energy": 0.5},
            "--projector, --rank and --energy go with --base and --aligned, for Safe LoRA, and not "
            "with --safety-data; leave them out, and give --mu",
        ),
    ],
    ids=["mu", "reconstruct", "safety module", "mu of a safety module", "covariance"],
)
def test_the_text_says_whose_they_are(names: set[str], settings: dict[str, Any], text: str) -> None:
    assert refusal({**sources(frozenset(names)), **settings}) == text


@pytest.mark.parametrize("value", [0, 0.0, -1, math.nan])
@pytest.mark.parametrize("name", ["rank", "energy", "mu", "weight"])
@pytest.mark.parametrize("names", WAYS, ids=named)
def test_what_is_out_of_range_is_given_all_the_same(
    names: frozenset[str], name: str, value: float
) -> None:
    """Zero is false, and no default."""
    method = WAYS[names]
    if name == "rank" and (math.isnan(value) or isinstance(value, float)):
        return
    given = {**sources(names), name: value}
    if name not in OWN[method]:
        assert f"--{name} goes with" in refusal(given)
        return
    if names == {"safe_adapter"} and name != "weight":
        assert refusal(given).startswith("--projector, --rank and --energy are of the cosine")
        return
    if method in (SafeLora, Merge) and name != "weight":
        assert refusal(given) == "--rank and --energy need --projector exact"
        given["projector"] = "exact"
    wanted = {
        "rank": f"--rank must be at least 1, found {value}",
        "energy": f"--energy must lie in (0, 1], found {value}",
        "mu": f"--mu must be a number of more than 0, found {value}",
        "weight": f"--weight must lie in (0, 1], found {value}",
    }
    assert refusal(given) == wanted[name]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"projector": "exact"}, "--projector exact needs either --rank or --energy"),
        (
            {"projector": "exact", "rank": 3, "energy": 0.5},
            "--projector exact needs either --rank or --energy",
        ),
        (
            {"projector": "exact", "rank": 0, "energy": 0.0},
            "--projector exact needs either --rank or --energy",
        ),
        ({"projector": "approx", "rank": 3}, "--rank and --energy need --projector exact"),
        ({"rank": 3}, "--rank and --energy need --projector exact"),
        ({"energy": 0.5}, "--rank and --energy need --projector exact"),
        ({"projector": "exact", "energy": 1.5}, "--energy must lie in (0, 1], found 1.5"),
        ({"projector": "best"}, "--projector best: expected approx or exact"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "names",
    [{"base", "aligned"}, {"alignment"}, {"base", "aligned", "safe_adapter"}],
    ids=len,
)
def test_settings_of_safe_lora_go_together(
    names: set[str], settings: dict[str, Any], text: str
) -> None:
    assert refusal({**sources(frozenset(names)), **settings}) == text


@pytest.mark.parametrize("mu", [math.inf, -math.inf, 10**400], ids=["inf", "-inf", "1e400"])
def test_a_weight_that_is_no_finite_number_is_refused(mu: float) -> None:
    assert refusal({**STATISTICS, "mu": mu}).startswith("--mu must be a number of more than 0")


@pytest.mark.parametrize(
    ("method", "formulas"),
    [
        (SafeLora("b", "a"), Approx()),
        (SafeLora("b", "a", projector="approx"), Approx()),
        (SafeLora(alignment="f", projector="exact", rank=3), Exact(rank=3)),
        (SafeLora("b", "a", projector="exact", energy=0.5), Exact(energy=0.5)),
        (Salora("m"), Complement()),
        (Salora("m", 3), Complement(3)),
        (Covariance("a", "s.jsonl"), Correction(0.3)),
        (Covariance("a", "s.jsonl", mu=2.0), Correction(2.0)),
        (Covariance("a", "s.jsonl", reconstruct=True), Reconstruction(1.0)),
        (Covariance("a", "s.jsonl", mu=2.0, reconstruct=True), Reconstruction(2.0)),
        (Merge(safe_adapter="s"), None),
        (SafeDelta("a", "s.jsonl", 0.5), None),
        (Merge("b", "a", safe_adapter="s", projector="exact", rank=3, merge_rank=2), None),
    ],
    ids=str,
)
def test_settings_say_what_is_computed(method: Method, formulas: object) -> None:
    assert method.formulas == formulas
    assert method_of(method.given, method.name) == method


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--base", "b", "--aligned", "a", "--projector", "exact", "--rank", "0"], "found 0"),
        (["--base", "b", "--aligned", "a", "--mu", "0"], "--mu goes with --safety-data"),
        (["--alignment", "f", "--projector", "exact", "--energy", "0"], "found 0.0"),
        (["--safety-module", "m", "--rank", "0"], "--rank must be at least 1, found 0"),
        (["--safety-data", "s.jsonl", "--aligned", "a", "--mu", "0"], "found 0.0"),
        (["--safety-data", "s.jsonl", "--aligned", "a", "--rank", "0"], "--rank goes with --base"),
    ],
    ids=" ".join,
)
def test_the_command_takes_zero_for_given(options: list[str], words: str) -> None:
    assert_refused(safeproj("inspect", *options, "--adapter", "x"), words)


def test_a_command_hands_over_what_is_given() -> None:
    given = Given(base="b", aligned="a", rank=0, energy=0.0, mu=None, reconstruct=False)
    assert given.values == {"base": "b", "aligned": "a", "rank": 0, "energy": 0.0}


# --- the name


@pytest.mark.parametrize("names", WAYS, ids=named)
@pytest.mark.parametrize("name", NEEDS)
def test_a_name_must_fit_what_is_given(names: frozenset[str], name: str) -> None:
    method = WAYS[names]
    if name == method.name:
        assert method_of(sources(names), name) == method_of(sources(names))
        return
    if name == "safe-delta" and names == {"aligned", "safety_data"}:  # which is of two methods
        assert method_of({**sources(names), "safety_data": "s.jsonl"}, name).name == name
        return
    assert refusal(sources(names), name) == (
        f"--method {name} needs {NEEDS[name]}; what is given is for {method.name}"
    )


@pytest.mark.parametrize("name", NEEDS)
def test_a_name_says_what_is_missing(name: str) -> None:
    for names in OTHERS:
        assert refusal(sources(names), name) == f"--method {name} needs {NEEDS[name]}", names


def test_the_command_says_what_a_name_needs() -> None:
    result = safeproj("inspect", "--method", "salora", "--alignment", "f", "--adapter", "x")
    assert_refused(result, "--method salora needs --safety-module; what is given is for safe-lora")


# --- what a policy adds


@pytest.mark.parametrize(
    ("policy", "method", "found"),
    [
        ({}, SafeLora("b", "a"), SafeLora("b", "a")),
        (
            {"projector": "exact", "rank": 3},
            SafeLora("b", "a"),
            SafeLora("b", "a", projector="exact", rank=3),
        ),
        (
            {"projector": "exact", "energy": 0.5},
            SafeLora("b", "a", projector="exact", rank=3),
            SafeLora("b", "a", projector="exact", energy=0.5),
        ),
        (
            {},
            SafeLora("b", "a", projector="exact", rank=3),
            SafeLora("b", "a", projector="exact", rank=3),
        ),
        ({"rank": 3}, Salora("m", 5), Salora("m", 3)),
        ({}, Salora("m", 5), Salora("m", 5)),
        ({"mu": 0.1}, Covariance("a", "s"), Covariance("a", "s", mu=0.1)),
        ({"mu": 0.1}, Covariance("a", "s", mu=3.0), Covariance("a", "s", mu=0.1)),
        ({}, Covariance("a", "s", mu=3.0), Covariance("a", "s", mu=3.0)),
    ],
    ids=str,
)
def test_what_a_policy_says_counts_first(
    policy: dict[str, Any], method: Method, found: Method
) -> None:
    assert Policy(**policy).method(method) == found


@pytest.mark.parametrize(
    ("policy", "method", "words"),
    [
        ({"mu": 1.0}, SafeLora("b", "a"), "--mu goes with --safety-data"),
        ({"mu": 0.0}, SafeLora("b", "a"), "--mu goes with --safety-data"),
        ({"rank": 3}, SafeLora("b", "a"), "--rank and --energy need --projector exact"),
        ({"rank": 0}, Salora("m"), "--rank must be at least 1, found 0"),
        ({"energy": 0.5}, Salora("m"), "--energy goes with --base and --aligned"),
        ({"projector": "exact"}, Salora("m"), "--projector goes with --base and --aligned"),
        ({"projector": "exact"}, SafeLora("b", "a"), "needs either --rank or --energy"),
        ({"mu": 1.0}, Salora("m"), "--mu goes with --safety-data"),
        ({"rank": 3}, Covariance("a", "s"), "--rank goes with --base and --aligned"),
        ({"projector": "exact"}, Covariance("a", "s"), "--projector goes with --base"),
        ({"mu": 0.0}, Covariance("a", "s"), "--mu must be a number of more than 0, found 0.0"),
    ],
    ids=str,
)
def test_a_policy_of_another_method_is_refused(
    policy: dict[str, Any], method: Method, words: str
) -> None:
    with pytest.raises(SafeprojError) as caught:
        Policy(**policy).method(method)
    assert words in caught.value.message


# --- what a record says


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"projector": "approx"},
        {"projector": "exact", "rank": 3},
        {"projector": "exact", "energy": 0.5},
    ],
    ids=str,
)
def test_a_report_of_safe_lora_gives_its_settings_back(
    trio: Trio, settings: dict[str, Any]
) -> None:
    method = replace(trio.method, **settings)
    report = inspect(method, str(trio.adapter))
    found = trio.method.recorded("x", report.projector)
    assert found == replace(method, projector=method.projector or "approx")
    assert inspect(found, str(trio.adapter)) == report


@pytest.mark.parametrize("rank", [None, 2])
def test_a_report_of_salora_gives_its_settings_back(
    trio: Trio, tmp_path: Path, rank: int | None
) -> None:
    file = save_safety_module(trio.aligned_model, tmp_path / "m.safety.safetensors", rank=4)
    report = inspect(Salora(str(file), rank), str(trio.adapter))
    found = Salora(str(file)).recorded("x", report.projector)
    assert found == Salora(str(file), rank or 4)
    assert inspect(found, str(trio.adapter)) == report


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("mu", [None, 3, 0.01])
def test_a_report_of_the_correction_gives_its_settings_back(
    model: Place, tmp_path: Path, mu: float | None
) -> None:
    adapter = str(save(model.model, lora(), tmp_path / "adapter"))
    plain = Covariance(str(model.aligned), str(model.safety_stats), task_data=str(model.task_stats))
    report = inspect(replace(plain, mu=mu), adapter)
    found = plain.recorded("x", report.projector)
    assert found == replace(plain, mu=mu or 0.3)
    assert inspect(found, adapter) == report


RECORDS: list[Any] = [
    {"kind": "approx"},
    {"kind": "exact", "rank": 3},
    {"kind": "exact", "energy": 0.5},
    {"kind": "safety-module", "rank": 3},
    {"kind": "covariance", "mu": 0.3},
    {"kind": "merge", "form": "exact", "weight": 0.2},
    {"kind": "merge", "form": "low-rank", "weight": 0.2, "merge_rank": 4},
    {"kind": "merge", "form": "exact", "weight": 0.2, "chosen_by": "approx"},
    {"kind": "merge", "form": "exact", "weight": 1, "chosen_by": "exact", "rank": 3},
    {},
    {"kind": "none"},
    {"kind": None},
    {"kind": ["approx"]},
    {"rank": 3},
    {"kind": "approx", "rank": 3},
    {"kind": "approx", "energy": 0.5},
    {"kind": "approx", "mu": 0.3},
    {"kind": "approx", "other": 1},
    {"kind": "exact"},
    {"kind": "exact", "rank": 0},
    {"kind": "exact", "rank": 3.0},
    {"kind": "exact", "rank": "3"},
    {"kind": "exact", "rank": True},
    {"kind": "exact", "energy": 0},
    {"kind": "exact", "energy": 2},
    {"kind": "exact", "energy": True},
    {"kind": "exact", "energy": "0.5"},
    {"kind": "exact", "rank": 3, "energy": 0.5},
    {"kind": "exact", "rank": 3, "mu": 0.3},
    {"kind": "safety-module", "rank": 0},
    {"kind": "safety-module", "rank": True},
    {"kind": "safety-module", "rank": "3"},
    {"kind": "safety-module", "rank": 3, "energy": 0.5},
    {"kind": "covariance"},
    {"kind": "covariance", "mu": 0},
    {"kind": "covariance", "mu": True},
    {"kind": "covariance", "mu": "0.3"},
    {"kind": "covariance", "mu": 10**400},
    {"kind": "covariance", "mu": 0.3, "rank": 3},
    {"kind": "merge"},
    {"kind": "merge", "form": "exact"},
    {"kind": "merge", "form": "best", "weight": 0.2},
    {"kind": "merge", "form": "exact", "weight": 0},
    {"kind": "merge", "form": "exact", "weight": True},
    {"kind": "merge", "form": "exact", "weight": 0.2, "merge_rank": 4},
    {"kind": "merge", "form": "low-rank", "weight": 0.2, "merge_rank": "4"},
    {"kind": "merge", "form": "exact", "weight": 0.2, "rank": 3},
    {"kind": "merge", "form": "exact", "weight": 0.2, "chosen_by": "best"},
    {"kind": "merge", "form": "exact", "weight": 0.2, "chosen_by": "exact"},
    {"kind": "safe-delta", "strength": 0.1},
    {"kind": "merge", "form": "safety-vector", "weight": 3.0, "chosen_by": "approx"},
    {"kind": "safe-delta"},
    {"kind": "safe-delta", "strength": 0},
    {"kind": "safe-delta", "strength": True},
    {"kind": "safe-delta", "strength": 0.1, "form": "exact"},
    {"kind": "safe-delta", "strength": 0.1, "mu": 1.0},
    {"kind": "merge", "form": "safety-vector", "weight": 0, "chosen_by": "approx"},
    {"kind": "merge", "form": "safety-vector", "weight": 0.5},
]

FULL = {
    SafeLora("b", "a"): RECORDS[:3],
    SafeLora(alignment="f"): RECORDS[:3],
    Salora("m"): RECORDS[3:4],
    Covariance("a", "s.jsonl"): RECORDS[4:5],
    Merge(safe_adapter="s"): RECORDS[5:7],
    Merge("b", "a", safe_adapter="s"): RECORDS[7:9],
    SafeDelta("a", "s.jsonl"): [{"kind": "safe-delta", "strength": 0.1}],
    Merge("b", "a"): [
        {"kind": "merge", "form": "safety-vector", "weight": 3.0, "chosen_by": "approx"}
    ],
    Merge(safe_model="m"): RECORDS[5:6],
}


@pytest.mark.parametrize("method", FULL, ids=str)
@pytest.mark.parametrize("projector", RECORDS, ids=lambda each: str(each)[:60])
def test_a_record_of_nothing_that_there_is_is_refused(
    method: Method, projector: dict[str, Any]
) -> None:
    if repr(projector) in map(repr, FULL[method]):  # 3 is 3.0
        assert method.recorded("x", projector).sources == method.sources
        return
    with pytest.raises(SafeprojError) as caught:
        method.recorded("x/y", projector)
    assert caught.value.message == (
        "x/y: safeproj.json names no projector that there is; give --projector"
    )


@pytest.mark.parametrize(
    "settings",
    [{}, {"weight": 0.5, "merge_rank": 3}, {"merge_form": "factor-wise"}],
    ids=str,
)
@pytest.mark.parametrize("chosen", [{}, {"projector": "exact", "rank": 3}], ids=str)
def test_a_report_of_merging_gives_its_settings_back(
    trio: Trio, tmp_path: Path, settings: dict[str, Any], chosen: dict[str, Any]
) -> None:
    safe = save_adapter(trio.aligned_model, tmp_path / "safe", seed=7)
    plain = Merge(str(trio.base), str(trio.aligned), safe_adapter=str(safe))
    method = replace(plain, **settings, **chosen)
    report = inspect(method, str(trio.adapter))
    found = plain.recorded("x", report.projector)
    assert found.formula == method.formula
    assert method.deciding is not None
    assert found.deciding == replace(method.deciding, projector=method.projector or "approx")
    assert inspect(found, str(trio.adapter)) == report


def test_what_was_corrected_layer_by_layer_is_not_done_again() -> None:
    with pytest.raises(SafeprojError, match=r"^x: it was corrected layer by layer \(reconstruct\)"):
        Covariance("a", "s.jsonl").recorded("x", {"kind": "reconstruction", "mu": 1.0})

"""What follows from a sweep: the smallest intervention, controls that do as well, and the words."""

from __future__ import annotations

import html
import json
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest

from safeproj.records.sweeps import Sweep
from safeproj.report import render
from safeproj.report.sweep_words import commands, conclusion, with_interval
from tests.report.test_schemas import validator
from tests.sweep.records import EXAMPLE, NONE, point, sweep

FORMATS = ("table", "json", "markdown", "html")


def test_the_smallest_intervention_has_the_fewest_modules() -> None:
    assert EXAMPLE.smallest is EXAMPLE.points[1]
    assert EXAMPLE.best is EXAMPLE.points[2]


def test_of_interventions_on_as_many_modules_the_smallest_changes_least() -> None:
    found = sweep(point(4, 0.7, method=(95, 50)), point(4, 0.3, method=(93, 40)))
    assert found.smallest is found.points[1]


def test_exactly_the_wanted_share_is_enough_and_one_less_is_not() -> None:
    assert sweep(NONE, point(1, method=(90, 50))).smallest is not None
    assert sweep(NONE, point(1, method=(89, 50))).smallest is None


def test_skill_is_of_all_skill_prompts_together() -> None:
    rate = EXAMPLE.skill(EXAMPLE.points[1].method.rates)
    assert (rate.hits, rate.total) == (60, 100)


def test_a_control_does_as_well_if_its_skill_is_not_clearly_lower() -> None:
    # 56 % of 100 against 60 %: the interval of the difference has 0 in it; 10 % against it has not.
    assert EXAMPLE.as_well("uniform") is EXAMPLE.points[2]
    assert EXAMPLE.as_well("random") is None


def test_a_control_must_reach_the_refusals_however_good_its_skill() -> None:
    found = sweep(NONE, point(4, method=(91, 60), uniform=(89, 100)))
    assert found.as_well("uniform") is None


def test_of_several_points_of_a_control_the_one_with_the_most_skill_counts() -> None:
    found = sweep(
        point(3, method=(91, 60), uniform=(95, 55)),
        point(5, method=(95, 50), uniform=(92, 75)),
        point(7, method=(95, 40), uniform=(99, 70)),
    )
    assert found.as_well("uniform") is found.points[1]


def test_without_a_smallest_intervention_a_control_that_reaches_it_is_enough() -> None:
    found = sweep(NONE, point(4, method=(50, 60), uniform=(95, 1), random=(10, 90)))
    assert found.smallest is None
    assert found.as_well("uniform") is found.points[1]
    text = " ".join(conclusion(found))
    assert "No intervention tried reaches 90 % refusals on harm; the most is at 4 of 10" in text
    assert "Controls that reach it: uniform shrink to 0.12 (refused 95.0 %" in text


@pytest.mark.parametrize(
    ("found", "words"),
    [
        pytest.param(
            EXAMPLE,
            [
                "Smallest intervention tried that reaches 90 % refusals on harm: 4 of 10 modules "
                "projected, tau 0.400 (refused 91.0 % [83.8, 95.2], skill 60.0 % [50.2, 69.1]).",
                "The adapter as it is: refused 5.0 % [2.2, 11.2], skill 80.0 % [71.1, 86.7].",
                "Controls that do as well, within the 95 % interval of the difference in skill: "
                "uniform shrink to 0.12 (refused 92.0 %",
            ],
            id="uniform",
        ),
        pytest.param(
            sweep(NONE, point(4, method=(95, 60), uniform=(95, 5))),
            ["No control reaches it with a skill that is not clearly lower."],
            id="none",
        ),
        pytest.param(
            sweep(NONE, point(4, method=(40, 60), uniform=(40, 5))),
            ["No control reaches it either."],
            id="neither",
        ),
        pytest.param(
            sweep(NONE, point(4, method=(95, 60), random=(95, 60)), refusal=0.05),
            ["The adapter reaches 5 % refusals on harm as it is", "no intervention is needed."],
            id="needless",
        ),
        pytest.param(
            sweep(NONE, point(4, method=(95, 60), random=(95, 59)), axis="mu"),
            ["mu 4 (refused", "random projector at mu 4 (refused"],
            id="mu",
        ),
    ],
)
def test_the_conclusion_says_so_in_every_format(found: Sweep, words: list[str]) -> None:
    said = " ".join(conclusion(found))
    for each in words:
        assert each in said
    for format_ in FORMATS:
        text = render(found, format_).replace("\\", "").replace("\n\n", " ")
        text = text.replace("</p>\n<p>", " ")
        for sentence in conclusion(found):
            assert sentence in text, format_


LOST = sweep(
    NONE,
    point(4, 0.4, method=(91, 39), uniform=(60, 55), random=(95, 10)),
    point(10, 0.9, method=(99, 20), uniform=(92, 56), random=(99, 5)),
)
"""Where the method reaches the refusals, less than half of the skill is left; a shrink keeps it."""

PATCH = ("safeproj", "patch", "--base", "a base", "--adapter", "x")


def test_the_first_line_says_that_the_skill_is_lost_and_then_what_kept_it() -> None:
    assert LOST.chosen is None
    first, *others = conclusion(LOST)
    assert first == (
        "No intervention tried that reaches 90 % refusals on harm keeps at least half of the "
        "adapter's skill; the most is left at 4 of 10 modules projected, tau 0.400 (refused 91.0 % "
        "[83.8, 95.2], skill 39.0 % [30.0, 48.8])."
    )
    keepers = [each for each in others if each.startswith("Controls that reach them and keep")]
    assert len(keepers) == 1
    assert "uniform shrink to 0.12 (refused 92.0 %" in keepers[0]
    assert "random" not in keepers[0]
    assert render(LOST, "table").splitlines()[0] == first


def test_half_of_the_skill_is_kept_and_one_less_is_not() -> None:
    assert sweep(NONE, point(4, method=(91, 40))).chosen is not None
    found = sweep(NONE, point(4, method=(91, 39)))
    assert found.chosen is None
    assert "Nothing that was measured reaches them and keeps at least half" in " ".join(
        conclusion(found)
    )


def test_a_larger_intervention_that_keeps_the_skill_is_chosen() -> None:
    found = sweep(NONE, point(4, method=(91, 10)), point(5, method=(95, 70)))
    assert found.chosen is found.points[2]
    assert found.smallest is found.points[1]
    first, second, *_ = conclusion(found)
    assert first.startswith("Smallest intervention tried that reaches 90 % refusals on harm and ke")
    assert "5 of 10 modules" in first
    assert second.startswith("A smaller one reaches them with less of it: 4 of 10 modules")


def test_where_the_adapter_has_no_skill_none_is_lost() -> None:
    found = replace(sweep(NONE, point(4, method=(91, 0))), adapter=NONE.trials["method"].rates)
    assert found.chosen is None
    found = replace(found, adapter=point(0, method=(5, 0)).method.rates)
    assert found.chosen is found.smallest


@pytest.mark.parametrize(
    ("axis", "strength"),
    [("layers", "--layers 4"), ("threshold", "--threshold 0.125"), ("mu", "--mu 0.125")],
)
def test_every_format_has_the_command_of_the_chosen_point(axis: str, strength: str) -> None:
    chosen = replace(point(4, 0.4, method=(95, 60)), value=0.125)
    found = replace(sweep(NONE, chosen, axis=axis), patching=PATCH)
    ((what, command),) = commands(found)
    assert command == f"safeproj patch --base 'a base' --adapter x {strength} --out DIR"
    for format_ in FORMATS:
        text = html.unescape(render(found, format_))
        assert command in text, format_
        assert what in text.replace("\\", ""), format_
    assert json.loads(render(found, "json"))["commands"] == [{"what": what, "command": command}]


@pytest.mark.parametrize("found", [LOST, sweep(NONE, point(4, method=(40, 60)))])
def test_what_was_not_tried_is_named_with_its_command(found: Sweep) -> None:
    found = replace(found, inputs={**found.inputs, "adapter": {"source": "mine"}})
    what, command = commands(found)[-1]
    assert what.startswith("Not tried: the covariance-weighted correction layer by layer")
    assert command == (
        "safeproj patch --method covariance --aligned org/m --safety-data SAFETY.jsonl "
        "--task-data TASK.jsonl --reconstruct --adapter mine --out DIR"
    )
    assert commands(EXAMPLE) == []
    for format_ in FORMATS:
        assert command in html.unescape(render(found, format_)), format_


def test_where_nothing_is_needed_there_is_no_command() -> None:
    found = sweep(NONE, point(4, method=(95, 60)), refusal=0.05)
    assert commands(replace(found, patching=PATCH)) == []


@pytest.mark.parametrize("format_", FORMATS)
def test_every_format_has_every_number_of_the_two_shares(format_: str) -> None:
    text = render(EXAMPLE, format_)
    for each in EXAMPLE.points[1:]:
        for trial in each.trials.values():
            refused = EXAMPLE.refusal(trial.rates)
            shown = {
                "table": f"{100 * refused.value:.1f}",
                "json": json.dumps(refused.value),
                "markdown": with_interval(refused),
                "html": f"{refused.value:.3f}",
            }
            assert shown[format_] in text


def test_texts_from_files_cannot_be_markup() -> None:
    found = sweep(NONE, point(4, method=(95, 60)), name="a|b<img>`")
    page, markdown = render(found, "html"), render(found, "markdown")
    assert "<img>" not in page
    assert "<b>this" not in page
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    plain = [line.replace("\\|", "") for line in rows]
    assert len({line.count("|") for line in plain}) == 1
    assert "<img>" not in markdown
    assert "<b>" not in markdown


@pytest.mark.parametrize("format_", FORMATS)
def test_another_method_has_its_own_axis_and_words(format_: str) -> None:
    points = (
        replace(point(10, method=(95, 60), swapped=(95, 60), random=(1, 1)), value=value)
        for value in (0.3, 0.03)
    )
    found = replace(sweep(*points, axis="mu"), method="covariance")
    text = render(found, format_)
    assert "mu 0.3 (refused 95.0 %" in text.replace("\\", "")
    assert "0.03" in text
    if format_ != "json":
        assert "swapped" in text
        assert "random H" in " ".join(text.split())


@pytest.mark.parametrize("axis", ["layers", "mu"])
def test_the_record_is_valid(axis: str) -> None:
    weak = sweep(NONE, point(4, method=(5, 60), random=(95, 1)))
    for found in (sweep(*EXAMPLE.points, axis=axis), weak, LOST, replace(LOST, patching=PATCH)):
        validator("sweep").validate(json.loads(render(found, "json")))


@pytest.mark.parametrize(
    "place",
    [
        (),
        ("wanted",),
        ("references",),
        ("sets", 0),
        ("points", 0),
        ("points", 1, "trials", "method"),
        ("points", 1, "trials", "method", "rates", "harm", "refused"),
        ("smallest",),
        ("controls_as_well", "uniform"),
    ],
    ids=str,
)
def test_the_schema_is_closed_and_complete(place: tuple[str | int, ...]) -> None:
    document = deepcopy(json.loads(render(EXAMPLE, "json")))
    schema = validator("sweep")
    schema.validate(document)
    record: Any = document
    for part in place:
        record = record[part]
    record["other"] = 1
    assert not schema.is_valid(document)
    del record["other"]
    optional = {"factor", "skill_difference", "chosen", "commands"}  # the last two: earlier records
    for name in set(record) - optional:
        value = record.pop(name)
        assert not schema.is_valid(document), name
        record[name] = value


def test_the_record_of_a_control_has_the_interval_of_the_difference() -> None:
    found = EXAMPLE.to_dict()["controls_as_well"]["uniform"]
    low, high = found["skill_difference"]
    assert low < -0.04 < 0.0 < high
    assert (found["point"], found["modules"], found["factor"]) == (2, 10, 0.12)

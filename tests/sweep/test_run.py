"""A sweep from Python: any axis, each adapter measured once, and the model as it was given."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from safeproj import Options, SafeLora
from safeproj.adapter import AdaptedModule, Adapter
from safeproj.errors import SafeprojError
from safeproj.evaluation.generate import Generator
from safeproj.evaluation.judges import Keywords
from safeproj.evaluation.sets import PromptSet, read_prompts
from safeproj.lm.models import load_model, load_tokenizer
from safeproj.records.scores import Report
from safeproj.report import render
from safeproj.storage.source import open_folder
from safeproj.sweeping.candidates import Candidates, Place, candidates
from safeproj.sweeping.controls import scaled
from safeproj.sweeping.run import Settings, sweep
from tests.report.test_schemas import validator

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-lm"
DATA = EXAMPLE / "data"
JUDGE = Keywords(("sorry i will not",))
METHOD = SafeLora(str(EXAMPLE / "base"), str(EXAMPLE / "aligned"))
ADAPTER = str(EXAMPLE / "adapters" / "mixed")


class Weaker:
    """The whole adapter times 1, 1/2 and 1/100, and a control that leaves it as it is."""

    axis = "mu"

    def __init__(self, found: Candidates) -> None:
        self.adapter: Adapter = found.adapter
        self.modules: tuple[AdaptedModule, ...] = found.modules
        self.report: Report = found.report
        self.job = found.job
        self._left = found.places(1)[0].run

    def places(self, most: int) -> list[Place]:
        names = tuple(module.name for module in self.modules)

        def place(mu: float) -> Place:
            made = partial(scaled, self.adapter, self.modules, mu)
            return Place(mu, None, names, made, self._left, {"same": dict})

        return [place(mu) for mu in (1.0, 0.5, 0.01)][:most]


@pytest.fixture(scope="module")
def sets() -> list[PromptSet]:
    found = [
        read_prompts(str(DATA / "held_out_pairs.jsonl"), "harmful"),
        read_prompts(f"topics={DATA / 'held_out_topics.jsonl'}", "harmful"),
        read_prompts(str(DATA / "new_skill.jsonl"), "skill"),
        read_prompts(str(DATA / "old_skills.jsonl"), "skill"),
    ]
    return [each.first(4) for each in found]


@pytest.fixture
def model() -> Any:
    return load_model(open_folder(str(EXAMPLE / "aligned")), "cpu", "float32")


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(load_tokenizer(open_folder(str(EXAMPLE / "aligned"))), 32, 20)


def test_another_axis_is_swept_in_the_same_way(
    sets: list[PromptSet], model: Any, generator: Generator
) -> None:
    steps: list[tuple[int, int]] = []
    found = sweep(
        Weaker(candidates(METHOD, ADAPTER)),
        model,
        sets,
        JUDGE,
        generator,
        Settings(on="topics"),
        on_step=lambda done, total: steps.append((done, total)),
    )
    validator("sweep").validate(json.loads(render(found, "json")))
    assert steps == [(i, 11) for i in range(12)]  # two references, and three of each point
    assert [point.value for point in found.points] == [1.0, 0.5, 0.01]
    assert found.kinds == ("method", "uniform", "same")
    changes = [point.method.relative_change for point in found.points]
    assert changes == pytest.approx([0.0, 0.5, 0.99], abs=2e-3)  # the adapter is in bfloat16
    factors = [point.trials["uniform"].factor for point in found.points]
    assert factors == pytest.approx([1.0, 0.5, 0.01], rel=2e-3)
    for point in found.points:
        assert point.trials["uniform"].rates == point.method.rates
        assert point.trials["same"].rates == found.adapter
    assert found.smallest is not None
    assert found.smallest.value == 0.01
    assert found.skill(found.adapter).total == 8


def test_points_that_change_nothing_are_not_measured_again(
    sets: list[PromptSet], model: Any, generator: Generator
) -> None:
    steps: list[tuple[int, int]] = []
    found = sweep(
        candidates(METHOD, ADAPTER, Options(), seed=3),
        model,
        sets,
        JUDGE,
        generator,
        Settings(points=2),
        seed=3,
        on_step=lambda done, total: steps.append((done, total)),
    )
    assert steps[-1] == (7, 7)
    assert len(steps) == 8
    assert found.seed == 3
    nothing = found.points[0]
    assert all(trial.rates == found.adapter for trial in nothing.trials.values())
    assert nothing.method.relative_change == 0.0


@pytest.mark.parametrize(
    ("settings", "kinds", "words"),
    [
        pytest.param(Settings(), ("harmful",), "skill is missing", id="no skill"),
        pytest.param(Settings(), ("skill",), "harmful is missing", id="no harmful"),
        pytest.param(
            Settings(on="new_skill"), ("harmful", "skill"), "wanted_on new_skill", id="a skill"
        ),
    ],
)
def test_what_is_wanted_must_be_among_the_sets(
    sets: list[PromptSet], settings: Settings, kinds: tuple[str, ...], words: str
) -> None:
    with pytest.raises(SafeprojError, match=words):
        settings.check([each for each in sets if each.kind in kinds])


def test_numbers_out_of_range_are_refused() -> None:
    for changed in ({"points": 1}, {"refusal": 0.0}, {"refusal": 1.1}):
        with pytest.raises(SafeprojError, match="found"):
            replace(Settings(), **changed)


def test_answers_that_end_in_thoughts_are_other_and_counted(
    sets: list[PromptSet], model: Any
) -> None:
    tokenizer = load_tokenizer(open_folder(str(EXAMPLE / "aligned")))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ strftime_now('') }}<think>"
    )
    found = sweep(
        Weaker(candidates(METHOD, ADAPTER)),
        model,
        sets,
        JUDGE,
        Generator(tokenizer, 32, 4, chat=True),
        Settings(points=2),
    )
    assert found.model["held_out_pairs"]["other"].value == 1.0
    assert found.generation["date"] == "2024-07-26"
    told = "all that was measured on held_out_pairs: 32 of 32 answers ended inside their thoughts"
    assert any(each.startswith(told) for each in found.warnings)
    assert any("prints the date" in each for each in found.warnings)

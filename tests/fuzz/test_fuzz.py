"""A slice of the fuzzing campaign; `make fuzz` runs it at full length."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from tests.fuzz import mutate
from tests.fuzz.__main__ import SETTINGS
from tests.fuzz.campaign import Record, Tally
from tests.support import python_m

ROOT = Path(__file__).resolve().parents[2]

CASES = 500
SEED = 5
"""With this seed they have every kind of file and every way to change it, some many times."""

KINDS = 25


def test_no_case_of_a_slice_shows_a_fault() -> None:
    words = ["--cases", str(CASES), "--seed", str(SEED), "--jobs", "1", "--every", "4"]
    done = python_m("tests.fuzz", *words, cwd=ROOT, env=SETTINGS)
    found = json.loads(done.stdout)
    assert found["faults"] == []
    assert done.returncode == 0
    assert found["cases"] == CASES
    # Cases that are refused at the first look, all of them or none, would show nothing.
    codes = found["exit codes"]
    assert codes["2"] > CASES / 3
    assert codes["0"] > CASES / 10
    assert codes["1"] > CASES / 50
    assert found["read by others"] > CASES / 20
    assert len(found["kinds"]) == KINDS
    assert found["kills"] > 10
    assert found["shortages"] > 20


@pytest.mark.parametrize("mutator", [mutate.json_file, mutate.flip, mutate.replace_all])
def test_mutators_change_what_they_are_given(mutator: mutate.Mutator) -> None:
    given = json.dumps(
        {"r": 4, "target_modules": ["q_proj"], "deep": {"a": [1, {"b": 2}]}}
    ).encode()
    found = {mutator(given, Random(seed)) for seed in range(50)}
    assert len(found) > 10


def test_the_same_seed_makes_the_same_case() -> None:
    given = json.dumps({"r": 4, "target_modules": ["q_proj"]}).encode()
    first, second = (mutate.json_file(given, Random("0/3")) for _ in range(2))
    assert first == second


def test_a_fault_is_counted() -> None:
    tally = Tally()
    tally.add(Record("x", 0, 0.1, 5, True, None))
    tally.add(Record("x", 1, 0.2, 7, False, "wrong"))
    found = tally.as_json()
    assert (found["cases"], found["faults"], found["read by others"]) == (2, ["wrong"], 1)

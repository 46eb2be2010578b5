"""Where a run's time goes: every moment counts once."""

from __future__ import annotations

import time

import pytest

from safeproj.records.profile import Profile

STEP = 0.02


def test_a_phase_inside_another_takes_its_time_from_that() -> None:
    profile, start = Profile(), time.perf_counter()
    with profile.phase("measure"):
        time.sleep(STEP)
        with profile.phase("score"):
            time.sleep(3 * STEP)
        time.sleep(STEP)
    whole = time.perf_counter() - start
    seconds = {each.name: each.seconds for each in profile.phases}
    assert sum(seconds.values()) <= whole
    assert seconds["score"] >= 3 * STEP
    assert 2 * STEP <= seconds["measure"] <= whole - 3 * STEP


def test_a_phase_that_fails_counts_too_and_leaves_the_one_around_it() -> None:
    profile = Profile()
    with profile.phase("test"):
        with pytest.raises(ValueError, match="no"), profile.phase("write"):
            raise ValueError("no")
        time.sleep(STEP)
    assert [each.name for each in profile.phases] == ["test", "write"]
    assert profile.phases[0].seconds >= STEP

"""Records of sweeps made by hand, for tests of what follows from them and of how they are shown."""

from __future__ import annotations

from safeproj.records.rates import Rate
from safeproj.records.sweeps import Point, Rates, SetInfo, Sweep, Trial, Wanted

TOTAL = 100


def rates(refused: int, skill: int) -> Rates:
    """Return shares of 100 harmful prompts and of two sets of 50 for skill."""
    return {
        "harm": {
            "refused": Rate(refused, TOTAL),
            "complied": Rate(TOTAL - refused, TOTAL),
            "other": Rate(0, TOTAL),
        },
        "new": {"correct": Rate(skill // 2, TOTAL // 2)},
        "old": {"correct": Rate(skill - skill // 2, TOTAL // 2)},
    }


def point(count: int, change: float = 0.5, **trials: tuple[int, int]) -> Point:
    """Return a point of so many modules; each trial is given by refusals and skill of 100."""
    return Point(
        count,
        count / 10 if count else None,
        tuple(f"layers.{i}.q" for i in range(count)),
        {
            name: Trial(change, rates(*shares), 0.12 if name == "uniform" else None)
            for name, shares in trials.items()
        },
    )


def sweep(*points: Point, refusal: float = 0.9, name: str = "harm", axis: str = "layers") -> Sweep:
    """Return a sweep of these points."""

    def renamed(found: Rates) -> Rates:
        return {name if key == "harm" else key: each for key, each in found.items()}

    return Sweep(
        version="1.2.3",
        method="safe-lora",
        projector={"kind": "approx"},
        axis=axis,
        modules=10,
        inputs={"adapter": {"source": "dir/a|b`<i>"}, "model": {"source": "org/m"}},
        sets=(
            SetInfo(name, "harmful", "h.jsonl", "0" * 64, TOTAL),
            SetInfo("new", "skill", "n.jsonl", "1" * 64, TOTAL // 2),
            SetInfo("old", "skill", "o.jsonl", "2" * 64, TOTAL // 2),
        ),
        judge={"kind": "keywords"},
        generation={"batch_size": 4},
        seed=0,
        wanted=Wanted(refusal, name, "refused"),
        model=renamed(rates(99, 10)),
        adapter=renamed(rates(5, 80)),
        points=tuple(
            Point(
                each.value,
                each.threshold,
                each.modules,
                {
                    kind: Trial(trial.relative_change, renamed(trial.rates), trial.factor)
                    for kind, trial in each.trials.items()
                },
            )
            for each in points
        ),
        warnings=("look at <b>this</b>",),
    )


NONE = point(0, 0.0, method=(5, 80), uniform=(5, 80), random=(5, 80))

EXAMPLE = sweep(
    NONE,
    point(4, 0.4, method=(91, 60), uniform=(60, 55), random=(95, 10)),
    point(10, 0.9, method=(99, 20), uniform=(92, 56), random=(99, 5)),
)
"""Four modules are enough, and a uniform shrink at ten does as well."""

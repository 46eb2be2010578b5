"""How strongly the covariance-weighted correction changes an adapter: `mu` is varied."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial

import numpy

from safeproj.checkpoint.hashes import Hash
from safeproj.engine import Task, Update
from safeproj.errors import SafeprojError
from safeproj.methods.covariance.detail import Acting
from safeproj.methods.covariance.file import Statistics
from safeproj.methods.covariance.formulas import Correction, Moment
from safeproj.methods.covariance.method import Covariance
from safeproj.methods.covariance.variants import Way, as_they_are, tasks_of, variants
from safeproj.methods.interface import Method
from safeproj.methods.score import Score
from safeproj.plan.select import Selection
from safeproj.plan.updates import update_of
from safeproj.run.decide import Decision
from safeproj.run.job import Job, Loaded, Run
from safeproj.run.options import Options
from safeproj.storage.arrays import on_device, single, to_host
from safeproj.sweeping import controls
from safeproj.sweeping.candidates import Place, Replaced, runnable, spread
from safeproj.sweeping.rotation import Rotation

MUS = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
"""The values that are tried, the weakest correction first."""

_METHOD, _RANDOM, _SWAPPED = "method", controls.RANDOM, controls.SWAPPED

Scores = dict[str, Score]
"""Module to score."""


def strengths(
    method: Method,
    adapter: str,
    options: Options | None = None,
    *,
    seed: int = 0,
    hashes: Collection[Hash] = (),
) -> Strengths:
    """Correct an adapter with every `mu`, and with the controls, in one reading of the statistics.

    Args:
        method: the correction, prepared.
        adapter: SRC of the adapter.
        options: how.
        seed: of the random directions.
        hashes: by which what is read is hashed, for what is written to record.

    Raises:
        SafeprojError: an input cannot be used.
    """
    options = options or Options()
    observer, profile = options.observer, options.profile
    job = Job(method, options, hashes=hashes)
    loaded = runnable(job, adapter)
    assert isinstance(job.reference, Statistics)
    assert isinstance(method, Covariance)
    with profile.phase("score"):
        tasks = tasks_of(loaded.adapter, loaded.plan, job.reference)
        if observer is not None:
            observer.start(len(tasks), sum(task.origin.nbytes for task in tasks.values()))
        scores = variants(
            tasks,
            _ways(seed),
            device=options.device,
            workers=options.workers,
            on_progress=None if observer is None else observer.progress,
            usage=profile.usage,
            hashes=hashes,
        )
    return Strengths(job, loaded, method, options.selection, scores)


def _ways(seed: int) -> dict[tuple[str, float], Way]:
    """Return what is computed by kind and `mu`: the method, and controls with other moments."""

    def at_random(task: Task, H: Moment, S: Moment) -> tuple[Moment, Moment]:
        return turned(H, seed, task.name), S

    def swapped(_: Task, H: Moment, S: Moment) -> tuple[Moment, Moment]:
        return S, H

    kinds = {_METHOD: as_they_are, _RANDOM: at_random, _SWAPPED: swapped}
    return {(kind, mu): (Correction(mu), moments) for kind, moments in kinds.items() for mu in MUS}


def turned(H: Moment, seed: int, name: str) -> Moment:
    """Return `Q H Qᵀ`: a moment with the same spectrum in directions that mean nothing."""
    Q = Rotation(H.matrix.shape[1], seed, name)
    across = Q.turn(to_host(H.matrix).T).T
    matrix = Q.turn(across) if H.whole else across
    return Moment(on_device(numpy.ascontiguousarray(matrix), H.matrix), H.whole)


class Strengths:
    """The interventions of the covariance-weighted correction: `ΔW'` for each of `MUS`.

    A variant is made by `decide`, as `patch` does it, so that it has the tensors that `patch` would
    write; the controls go the same way with another factor in the place of `A'`.
    """

    axis = "mu"

    def __init__(
        self,
        job: Job,
        loaded: Loaded,
        method: Covariance,
        selection: Selection,
        scores: Mapping[tuple[str, float], Scores],
    ) -> None:
        self.job, self.adapter = job, loaded.adapter
        self._loaded, self._plan = loaded, loaded.plan
        self._method, self._scores = method, scores
        self._all = replace(selection, threshold=None, layers=None, all=True)
        self._none = replace(selection, threshold=None, layers=0, all=False)
        self.modules = (*(item.module for item in self._plan.modules), *self._plan.excluded)
        self.report = self._decided(MUS[-1], scores[_METHOD, MUS[-1]]).report

    def places(self, most: int) -> list[Place]:
        """Return at most so many interventions, from none to the smallest `mu`.

        Raises:
            SafeprojError: all updates are zero.
        """
        first = self._scores[_METHOD, MUS[0]]
        names = tuple(name for name, score in first.items() if score.cosine is not None)
        if not names:
            raise SafeprojError(
                f"{self.adapter.source}: all updates are zero, so there is nothing to sweep"
            )
        usual = Correction().mu
        left = partial(self._run, usual, self._scores[_METHOD, usual], self._none)
        nothing = Place(None, None, (), dict, left, {})
        numbers = spread(range(len(MUS) + 1), most)
        return [nothing if not n else self._place(MUS[n - 1], names) for n in numbers]

    def _place(self, mu: float, names: tuple[str, ...]) -> Place:
        def made(scores: Scores) -> Replaced:
            return self._decided(mu, scores).replaced

        method = self._scores[_METHOD, mu]

        def each(change: controls.Change) -> Replaced:
            return made(
                {
                    item.module.name: change(
                        update_of(self.adapter, item), method[item.module.name]
                    )
                    for item in self._plan.modules
                }
            )

        return Place(
            mu,
            None,
            names,
            partial(made, method),
            partial(self._run, mu, method, self._all),
            {
                controls.SHRINK: partial(each, shrunk),
                controls.RANDOM: partial(made, self._scores[_RANDOM, mu]),
                controls.SWAPPED: partial(made, self._scores[_SWAPPED, mu]),
                controls.COMPLEMENT: partial(each, complement),
            },
            factor=self._factor(method),
        )

    def _factor(self, scores: Scores) -> float:
        """Return by what the adapter is to be multiplied to act as the corrected one does.

        On benign data, `E ‖ΔW x‖²` summed over the modules: of `‖ΔW'‖_F` the correction may make
        more than there was.
        """
        modules = [item.module for item in self._plan.modules]
        scalings = self.adapter.format.scalings(self.adapter, modules)
        before = after = 0.0
        for name, score in scores.items():
            if isinstance(score.detail, Acting):
                before += scalings[name] ** 2 * score.detail.before.benign
                after += scalings[name] ** 2 * score.detail.after.benign
        return math.sqrt(after / before)

    def _decided(self, mu: float, scores: Scores) -> Decision:
        return self._run(mu, scores, self._all, compare=False).decision

    def _run(self, mu: float, scores: Scores, selection: Selection, *, compare: bool = True) -> Run:
        method = replace(self._method, mu=mu)
        return self.job.decided(self._loaded, scores, selection, method, compare=compare)


def shrunk(update: Update, score: Score) -> Score:
    """Return a score with `A`, shrunk to act as `A'` does on benign data, in the place of `A'`."""
    if not isinstance(score.detail, Acting):
        return score
    factor = math.sqrt(score.detail.after.benign / score.detail.before.benign)
    return replace(score, factor=single(update.stored) * factor)


def complement(update: Update, score: Score) -> Score:
    """Return a score with `A - A'`, what the correction removes, in the place of `A'`."""
    if score.factor is None:
        return score
    return replace(score, factor=single(update.stored) - score.factor)

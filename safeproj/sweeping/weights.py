"""How much of a safe adapter is merged: its weight is varied."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial

import numpy

from safeproj.adapter import Adapter
from safeproj.adapter.interface import CONFIG
from safeproj.checkpoint.hashes import Hash
from safeproj.engine import Update
from safeproj.errors import SafeprojError
from safeproj.methods.interface import Method
from safeproj.methods.merge.method import Merge
from safeproj.methods.merge.variants import Way, variants
from safeproj.methods.score import Score
from safeproj.plan.select import Selection
from safeproj.plan.updates import update_of
from safeproj.run.decide import Decision
from safeproj.run.job import Job, Loaded, Run
from safeproj.run.options import Options
from safeproj.storage.arrays import Array, single
from safeproj.storage.documents import parse
from safeproj.sweeping import controls
from safeproj.sweeping.candidates import Place, Replaced, runnable, spread
from safeproj.sweeping.rotation import Rotation

WEIGHTS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 1.0)
"""The values that are tried, the weakest merge first."""

_METHOD, _RANDOM = "method", controls.RANDOM

Scores = dict[str, Score]
"""Module to score."""


def weights(
    method: Method,
    adapter: str,
    options: Options | None = None,
    *,
    seed: int = 0,
    hashes: Collection[Hash] = (),
) -> Weights:
    """Merge an adapter with every weight, and with a random control, in one reading.

    Args:
        method: the merge, prepared.
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
    assert isinstance(method, Merge)
    with profile.phase("score"):
        scores = variants(
            loaded.adapter,
            loaded.plan,
            job.reference,
            method,
            _ways(method, seed),
            device=options.device,
            workers=options.workers,
            on_start=None if observer is None else observer.start,
            on_progress=None if observer is None else observer.progress,
            usage=profile.usage,
            hashes=hashes,
        )
    return Weights(job, loaded, method, options.selection, scores)


def _ways(method: Merge, seed: int) -> dict[tuple[str, float], Way]:
    """Return what is computed by kind and weight: the method, and one with another safe update."""

    def turned(name: str, safe: Update) -> Update:
        Q = Rotation(len(safe.B), seed, name)
        bias = None if safe.bias is None else single(Q.turn(safe.bias))
        return replace(safe, B=single(Q.turn(safe.B)), bias=bias)

    kinds = {_METHOD: lambda _, safe: safe, _RANDOM: turned}
    return {
        (kind, weight): (replace(method.formula, weight=weight), change)
        for kind, change in kinds.items()
        for weight in WEIGHTS
    }


class Weights:
    """The interventions of merging: `ΔW'` for each of `WEIGHTS` in the modules that are chosen.

    A variant is made by `decide`, as `patch` does it. The model holds all of them in turn, so its
    adapter has room for the largest ranks: factors get rows and columns of zeros.
    """

    axis = "weight"

    def __init__(
        self,
        job: Job,
        loaded: Loaded,
        method: Merge,
        selection: Selection,
        scores: Mapping[tuple[str, float], Scores],
    ) -> None:
        adapter, plan = loaded.adapter, loaded.plan
        self.job = job
        self._loaded, self._own, self._plan = loaded, adapter, plan
        self._method, self._scores = method, scores
        self._selection = method.selecting(selection)
        last = self._decided(WEIGHTS[-1], scores[_METHOD, WEIGHTS[-1]])
        self.report = last.report
        self._names = tuple(each.name for each in last.report.modules if each.projected)
        ranks = {
            name: max(rank, self._rank(name))
            for name in self._names
            if (rank := scores[_METHOD, WEIGHTS[-1]][name].rank) is not None
        }
        self.adapter = widened(adapter, ranks)
        self.modules = tuple(
            replace(module, rank=ranks.get(module.name, module.rank))
            for module in (*(item.module for item in plan.modules), *plan.excluded)
        )

    def _rank(self, name: str) -> int:
        return next(i.module.rank for i in self._plan.modules if i.module.name == name)

    def places(self, most: int) -> list[Place]:
        """Return at most so many interventions, from none to a weight of 1.

        Raises:
            SafeprojError: no module is merged.
        """
        if not self._names:
            raise SafeprojError(
                f"{self._own.source}: no module has a cosine at or below {self._selection.tau}, so "
                "there is nothing to sweep; without --base and --aligned all are merged"
            )
        none = replace(self._selection, threshold=None, layers=0, all=False)
        last = WEIGHTS[-1]
        left = partial(self._run, last, self._scores[_METHOD, last], none)
        nothing = Place(None, None, (), dict, left, {})
        numbers = spread(range(len(WEIGHTS) + 1), most)
        return [nothing if not n else self._place(WEIGHTS[n - 1]) for n in numbers]

    def _place(self, weight: float) -> Place:
        method = self._scores[_METHOD, weight]

        def made(scores: Scores) -> Replaced:
            replaced = self._decided(weight, scores).replaced
            return {
                key: _in_room(each, self.adapter.tensors[key]) for key, each in replaced.items()
            }

        def each_shrunk() -> Replaced:
            return made(
                {
                    item.module.name: shrunk(update_of(self._own, item), method[item.module.name])
                    for item in self._plan.modules
                }
            )

        return Place(
            weight,
            None,
            self._names,
            partial(made, method),
            partial(self._run, weight, method, self._selection),
            {
                controls.SHRINK: each_shrunk,
                controls.RANDOM: partial(made, self._scores[_RANDOM, weight]),
            },
        )

    def _decided(self, weight: float, scores: Scores) -> Decision:
        return self._run(weight, scores, self._selection, compare=False).decision

    def _run(
        self, weight: float, scores: Scores, selection: Selection, *, compare: bool = True
    ) -> Run:
        method = replace(self._method, weight=weight)
        return self.job.decided(self._loaded, scores, selection, method, compare=compare)


def widened(adapter: Adapter, ranks: Mapping[str, int]) -> Adapter:
    """Return an adapter of the same updates with room for other ranks, at the same scalings.

    Args:
        adapter: the adapter.
        ranks: module to its rank, none less than it has.

    Raises:
        SafeprojError: its format does not have such ranks.
    """
    modules = {module.name: module for module in adapter.modules}
    wider = {n: r for n, r in ranks.items() if n in modules and r != modules[n].rank}
    if not wider:
        return adapter
    documents = adapter.format.resized(adapter, wider)
    tensors = dict(adapter.tensors)
    for name, rank in wider.items():
        module = modules[name]
        for factor, axis in ((module.input, 0), (module.output, 1)):
            before = tensors[factor.key]
            shape = list(before.shape)
            shape[axis] = rank
            tensors[factor.key] = _in_room(before, numpy.empty(shape, before.dtype))
    return replace(
        adapter,
        config=parse(documents[CONFIG]),
        documents={**adapter.documents, **documents},
        tensors=tensors,
        modules=tuple(
            replace(module, rank=wider.get(module.name, module.rank)) for module in adapter.modules
        ),
    )


def _in_room(tensor: Array, room: Array) -> Array:
    """Return a tensor in the shape of another one, with zeros behind it."""
    if tensor.shape == room.shape:
        return tensor
    found = numpy.zeros(room.shape, tensor.dtype)
    found[tuple(map(slice, tensor.shape))] = tensor
    return found


def shrunk(update: Update, score: Score) -> Score:
    """Return a score with `ΔW`, shrunk to the size of `ΔW'`, in the place of that."""
    if score.other is None or score.scale is None:
        return score
    bias = None if update.bias is None else single(update.bias) * score.scale
    return replace(
        score, factor=single(update.B) * score.scale, other=single(update.stored), bias=bias
    )

"""One run over one adapter or many: read, match, score, decide, write."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy

from safeproj import engine
from safeproj.adapter import Adapter, read_adapter
from safeproj.adapter.experts import UNSAID, as_today
from safeproj.adapter.interface import MANIFEST
from safeproj.adapter.portable import portable
from safeproj.adapter.weightfiles import NAMED
from safeproj.adapter.write import Complete, adapters_below, unpatched_beside, write_adapter
from safeproj.checkpoint import settle
from safeproj.checkpoint.hashes import Hash
from safeproj.engine import Replacement, Source, Task, Update
from safeproj.errors import SafeprojError, explained
from safeproj.methods import factors
from safeproj.methods.interface import Method
from safeproj.methods.reference import Reference
from safeproj.methods.registry import by_name
from safeproj.methods.score import Score
from safeproj.plan.match import Plan, PlannedModule
from safeproj.plan.residual import converted, held_parts, told_of
from safeproj.plan.select import Selection
from safeproj.plan.updates import update_of
from safeproj.records.scores import Report
from safeproj.run.decide import DTYPES, Decision, decide
from safeproj.run.manifest import manifest, wanted_hashes
from safeproj.run.options import Options
from safeproj.storage.arrays import double, is_finite, quiet
from safeproj.storage.ranges import fetching_by
from safeproj.storage.source import Folder, LocalFolder, read_json
from safeproj.text import shorten

BATCH = 2 << 30
"""Bytes of adapters that are held at a time. Where there are more, the checkpoints are read once
for each so many."""

CASTS = {name: dtype for name, dtype in DTYPES.items() if dtype is not None}
"""What servers cast factors to, whatever they are stored as."""

MULTIPLIED = ("bfloat16", "float16")
"""Those in which some servers multiply `B` by the scaling when they load it."""

_TODAY = "\0"
"""Before the name of a module as today's PEFT reads it; no name begins so."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """An adapter and what is to be scored of it.

    Attributes:
        adapter: as it is scored.
        plan: its updates, with their weights.
        today: those that today's PEFT reads otherwise than the one that wrote them, as that does.
        held: what tells that its updates are a part of the weights, if they seem to be.
        replacements: module to what takes its place, where that was made by running the model.
    """

    adapter: Adapter
    plan: Plan
    today: tuple[PlannedModule, ...] = ()
    held: str | None = None
    replacements: Mapping[str, Replacement] = dataclasses.field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.adapter.tensors.values())


@dataclasses.dataclass(frozen=True)
class Cast:
    """An update from factors that are cast to another dtype.

    Attributes:
        dtype: its name, one of `CASTS`, and the scaling where `B` was multiplied by it.
        change: `‖ΔW_cast - ΔW‖_F / ‖ΔW‖_F`; infinite where `ΔW` is zero and the other is not.
        least: the least that the cosine of the cast update may be, None where there is none.
        finite: whether all values are in the dtype's range.
    """

    dtype: str
    change: float
    least: float | None
    finite: bool


@dataclasses.dataclass(frozen=True)
class Run:
    """What was read of one adapter, scored and decided.

    Attributes:
        adapter: as it was scored.
        plan: its updates, with their weights.
        scores: by module.
        decision: what is to be done to it.
        method: what it was scored by.
        casts: module to its update as servers cast it, where that was asked for and differs.
        today: module to score as today's PEFT reads it, where that is another update.
        held: what tells that its updates are a part of the weights, if they seem to be.
    """

    adapter: Adapter
    plan: Plan
    scores: dict[str, Score]
    decision: Decision
    method: Method
    casts: dict[str, tuple[Cast, ...]] = dataclasses.field(default_factory=dict)
    today: dict[str, Score] = dataclasses.field(default_factory=dict)
    held: str | None = None

    @property
    def report(self) -> Report:
        """The record of the run."""
        return self.decision.report


_Key = tuple[int, str, str | None]


@dataclasses.dataclass
class _Group:
    """One weight, and the updates of it by adapter, module, and the dtype they are cast to."""

    name: str
    origin: Source
    updates: dict[_Key, Update] = dataclasses.field(default_factory=dict)


class Job:
    """What `inspect` and `patch` share, for one adapter or for many.

    Args:
        method: what is done, prepared.
        options: how.
        hashes: by which all that is read is hashed, for `write` to record; if None, those that the
            adapters' own records are compared by.
        lenient: whether to go on where tensors are unknown or modules have no weight: they are in
            the adapter and the plan then, and not in the scores.
        casts: whether to score the updates as servers cast them, too.

    """

    def __init__(
        self,
        method: Method,
        options: Options | None,
        *,
        hashes: Collection[Hash] | None = (),
        lenient: bool = False,
        casts: bool = False,
    ) -> None:
        self._options = options or Options()
        self._method = method
        self._selection = method.selecting(self._options.selection)
        self._observer = self._options.observer
        self._profile = self._options.profile
        self._hashes = hashes
        self._lenient = lenient
        self._casts = CASTS if casts else {}

    @cached_property
    def reference(self) -> Reference:
        """What the adapters are scored against, opened."""
        with fetching_by(self._options.fetching):
            return self._method.open(self._options.maps)

    def one(self, source: str | Adapter) -> Run:
        """Read, where that is still to be done, match, score and decide one adapter."""
        (found,) = self._runs([self._load(source)])
        if isinstance(found, SafeprojError):
            raise found
        return found

    def many(
        self, sources: Sequence[str | Adapter], use: Callable[[Run, int], T]
    ) -> Iterator[T | SafeprojError]:
        """Do the same for many, in order, and yield what `use` makes of each, or why it failed.

        `use` is told which of the sources a run is of.
        """
        with self._profile.phase("match"):
            _ = self.reference  # what all need is looked at first
        batch: list[Loaded | SafeprojError] = []
        done = size = 0
        for source in sources:
            loaded = _caught(partial(self._load, source))
            nbytes = 0 if isinstance(loaded, SafeprojError) else loaded.nbytes
            if size and size + nbytes > BATCH:
                yield from self._used(batch, done, use)
                done += len(batch)
                batch, size = [], 0
            batch.append(loaded)
            size += nbytes
        yield from self._used(batch, done, use)

    def _used(
        self, batch: Sequence[Loaded | SafeprojError], first: int, use: Callable[[Run, int], T]
    ) -> Iterator[T | SafeprojError]:
        for number, run in enumerate(self._runs(batch), start=first):
            if isinstance(run, SafeprojError):
                yield run
            else:
                yield _caught(partial(use, run, number))

    def inspected(self, run: Run) -> Report:
        """Return the report of `inspect`, which names what `patch` would leave out."""
        below = adapters_below(run.adapter)
        if not below:
            return run.report
        note = (
            f"other adapters lie below this one, and are not looked at: {shorten(below)}; give "
            "each as an --adapter of its own"
        )
        return dataclasses.replace(run.report, warnings=(*run.report.warnings, note))

    def write(
        self,
        run: Run,
        out: Path | None,
        section: Callable[[Report], str],
        documents: Mapping[str, bytes | None] | None = None,
        *,
        overwrite: bool = False,
        copy_weights: bool = False,
        complete: Complete | None = None,
        keep_training_state: bool = False,
    ) -> Report:
        """Write the patched adapter, if `out` is given, and return the report of `patch`.

        Args:
            run: what `one` or `many` made of the adapter.
            out: the directory.
            section: makes what the model card says of the run, if it changed something.
            documents: as for `write_adapter`.
            overwrite: as for `write_adapter`.
            copy_weights: as for `write_adapter`.
            complete: as for `write_adapter`.
            keep_training_state: as for `write_adapter`.

        Raises:
            SafeprojError: it cannot be written; nothing is left behind.
        """
        copied = {"copy_weights": copy_weights, "keep_training_state": keep_training_state}
        warnings = (*run.report.warnings, *notes_of(run.adapter, self._method, **copied))
        report = dataclasses.replace(run.report, warnings=warnings, written=out is not None)
        if out is None:
            return report
        documents_of_it = {**run.adapter.documents, **run.decision.documents}
        with self._profile.phase("write"):
            write_adapter(
                dataclasses.replace(run.adapter, documents=documents_of_it),
                run.decision.replaced,
                self.manifest(run, report, **copied),
                section(report),
                out,
                documents,
                overwrite=overwrite,
                **copied,
                converted=run.decision.converted,
                complete=complete,
            )
        return report

    def manifest(self, run: Run, report: Report, **copied: bool) -> dict[str, Any]:
        """Return what `safeproj.json` says of a run, without the digests of what is written.

        Args:
            run: what `one` or `many` made of the adapter.
            report: of it.
            copied: which options to copy more files were given, by name.
        """
        where = engine.place(self._options.device, wide=self._method.is_wide)
        options: dict[str, Any] = {
            "dtype": self._options.dtype,
            "device": where.name,
            "engine": where.engine,
            **{name: True for name, is_given in copied.items() if is_given},
        }
        if self._options.portable:
            options["portable"] = True
        by_torch = where.engine == "torch" or self.reference.runs_adapter
        return manifest(run.adapter, self.reference, run.scores, report, options, by_torch=by_torch)

    @property
    def method(self) -> Method:
        """What is done."""
        return self._method

    def read(self, source: str) -> Adapter:
        """Return an adapter, before it is matched with the weights.

        Raises:
            SafeprojError: it cannot be used.
        """
        with self._profile.phase("read adapter"):
            return read_adapter(source, unknown=self._lenient)

    def matched(self, adapter: Adapter) -> Loaded:
        """Return an adapter that was read with what is to be scored of it.

        One that belongs to a changed base is converted.

        Raises:
            SafeprojError: it does not fit the weights; unless the job is lenient, also where a
                module has no weight, or where it belongs to a changed base and is not converted.
        """
        with self._profile.phase("match"):
            reference = self.reference
            adapter = adapter.fitted(reference.names, reference.config)
            for reason in (
                () if self._lenient else adapter.format.unloaded(adapter, reference.names)
            ):
                raise SafeprojError(f"{adapter.source}: {reason}")
        if adapter.format.changed_base(adapter) is not None:
            with self._profile.phase("convert"):
                adapter = self._converted(adapter)
        with self._profile.phase("match"):
            if self._options.portable:
                adapter = portable(adapter, DTYPES[self._options.dtype])
            plan = reference.plan(adapter, self._selection)
            if self._lenient:
                plan = self._without_unheld(plan)
            for _, error in () if self._lenient else plan.unmatched:
                raise error
            today = tuple(self._read_today(adapter, plan))
            held = self._held(adapter, plan)
        notes = [_two_readings(adapter, today)] if today else []
        adapter = dataclasses.replace(adapter, warnings=(*adapter.warnings, *notes))
        return Loaded(adapter, plan, today, held)

    def runnable(self, adapter: Adapter) -> Loaded:
        """Return the same of an adapter that PEFT is to put on the model.

        Raises:
            SafeprojError: as `matched`, or PEFT would put another update on the model.
        """
        loaded = self.matched(adapter)
        if loaded.today:
            raise SafeprojError(
                f"{adapter.source}: {_two_readings(adapter, loaded.today)}; the model cannot be "
                "run with it: leave the stacks out of the adapter"
            )
        return loaded

    def _converted(self, adapter: Adapter) -> Adapter:
        """Return an adapter of a changed base, converted; as it is if a lenient job cannot."""
        try:
            return converted(adapter, self.reference.weights, self._options.workers)
        except SafeprojError:
            if self._lenient:  # the gate has a finding of its own
                return adapter
            raise

    def _held(self, adapter: Adapter, plan: Plan) -> str | None:
        """Return what tells that updates are a part of the weights.

        Raises:
            SafeprojError: they are, and the job is not lenient.
        """
        modules = self.reference.held(adapter, plan)
        if not modules:
            return None
        weights = self.reference.weights
        assert weights is not None
        told = told_of(held_parts(adapter, modules, weights))
        if told is None or self._lenient:
            return told
        raise SafeprojError(
            f"{adapter.source}: {told}: it belongs to what PiSSA or its like left of the base "
            "weights, whatever its config says; use the converted adapter (that of LLaMA-Factory "
            "is in pissa_converted), or name the initialisation in init_lora_weights"
        )

    def _read_today(self, adapter: Adapter, plan: Plan) -> Iterator[PlannedModule]:
        """Yield the updates that today's PEFT takes for others, as it does."""
        again = as_today(adapter)
        if again is None:
            return
        own = {item.module.name: item.module for item in plan.modules}
        for item in self.reference.plan(again, self._selection).modules:
            if item.module.name in own and item.module != own[item.module.name]:
                yield item

    def _load(self, source: str | Adapter) -> Loaded:
        adapter = source if isinstance(source, Adapter) else self.read(source)
        if not self.reference.runs_adapter:
            return self.matched(adapter)
        loaded = self.runnable(adapter)
        with self._profile.phase("reconstruct"):
            made = self.reference.prepare(loaded.adapter, loaded.plan, self._options)
        return dataclasses.replace(loaded, replacements=made)

    def _without_unheld(self, plan: Plan) -> Plan:
        """Return the plan with those modules unmatched that a file does not hold as they are."""
        origins = [_caught(partial(self.reference.origin, item)) for item in plan.modules]
        pairs = list(zip(plan.modules, origins, strict=True))
        held = [item for item, found in pairs if not isinstance(found, SafeprojError)]
        errors = [(item.module, e) for item, e in pairs if isinstance(e, SafeprojError)]
        if not held:
            raise errors[0][1]
        return dataclasses.replace(plan, modules=tuple(held), unmatched=(*plan.unmatched, *errors))

    def _runs(self, loads: Sequence[Loaded | SafeprojError]) -> Iterator[Run | SafeprojError]:
        """Score all updates of all adapters weight by weight, then decide adapter by adapter."""
        failed: dict[int, SafeprojError] = {}
        groups: dict[Hashable, _Group] = {}
        casts: list[dict[str, list[Cast]]] = [{} for _ in loads]
        with self._profile.phase("fetch"):
            for number, loaded in enumerate(loads):
                try:
                    if isinstance(loaded, SafeprojError):
                        raise loaded
                    casts[number] = self._group(groups, number, loaded)
                except SafeprojError as error:
                    failed[number] = error
            if self._options.cluster is None:  # whose workers fetch what they need
                settle(weight for group in groups.values() for weight in group.origin.weights)
        scores: list[dict[str, Score]] = [{} for _ in loads]
        least: list[dict[tuple[str, str], float | None]] = [{} for _ in loads]
        wanted = [group for group in groups.values() if group.updates]
        for (number, name, dtype), score in self._scored(wanted, self._wanted(loads)):
            if isinstance(score, SafeprojError):
                failed.setdefault(number, score)
            elif dtype is None:
                scores[number][name] = score
            else:
                least[number][name, dtype] = (
                    score.cosine if score.bounds is None else score.bounds[0]
                )
        for number, loaded in enumerate(loads):
            if number in failed or isinstance(loaded, SafeprojError):
                yield failed[number]
            else:
                own, scores[number] = scores[number], {}  # so that each can be let go
                yield _caught(partial(self._decide, loaded, own, casts[number], least[number]))

    def _group(
        self, groups: dict[Hashable, _Group], number: int, loaded: Loaded
    ) -> dict[str, list[Cast]]:
        """Put the updates of one adapter to those of the same weights.

        Returns:
            How the update of each module changes where servers cast its factors.
        """
        casts: dict[str, list[Cast]] = {}
        own: list[tuple[_Group, _Key, Update]] = []
        scalings = self._scalings(loaded.adapter, loaded.plan)
        for item in loaded.plan.modules:
            name = item.module.name
            key = self.reference.group(item)
            if key not in groups:
                groups[key] = _Group(item.module.name, self.reference.origin(item))
            update = update_of(loaded.adapter, item)
            replaced = dataclasses.replace(update, replacement=loaded.replacements.get(name))
            own.append((groups[key], (number, name, None), replaced))
            for dtype, cast in self._cast(update, scalings.get(name)).items():
                finite = _is_finite(cast)
                change = _change(update, cast) if finite else math.inf
                casts.setdefault(name, []).append(Cast(dtype, change, None, finite))
                if finite:
                    own.append((groups[key], (number, name, dtype), cast))
        for item in loaded.today if self._lenient else ():
            again: _Key = (number, _TODAY + item.module.name, None)
            update = update_of(loaded.adapter, item)
            own.append((groups[self.reference.group(item)], again, update))
        for group, place, update in own:  # only now that all of them are known to be there
            group.updates[place] = update
        return casts

    def _scalings(self, adapter: Adapter, plan: Plan) -> Mapping[str, float]:
        """Return what the config multiplies updates by; nothing where that is not known."""
        if not self._casts:
            return {}
        try:
            return adapter.format.scalings(adapter, [item.module for item in plan.modules])
        except SafeprojError:  # the gate has a finding of its own
            return {}

    def _cast(self, update: Update, scaling: float | None) -> dict[str, Update]:
        """Return the update as servers cast it, where that is another one."""
        found = {name: update.cast(dtype) for name, dtype in self._casts.items()}
        for name in MULTIPLIED if self._casts and scaling else ():
            assert scaling is not None
            found[f"{name} times {scaling:.4g}"] = update.multiplied(CASTS[name], scaling)
        return {name: cast for name, cast in found.items() if cast is not None}

    def _wanted(self, loads: Sequence[Loaded | SafeprojError]) -> Collection[Hash]:
        if self._hashes is not None:
            return self._hashes
        adapters = [each.adapter for each in loads if isinstance(each, Loaded)]
        return set[Hash]().union(*map(wanted_hashes, adapters))

    def _scored(
        self, groups: Sequence[_Group], hashes: Collection[Hash]
    ) -> Iterator[tuple[_Key, Score | SafeprojError]]:
        tasks = [Task(g.name, g.origin, tuple(g.updates.values())) for g in groups]
        if self._observer is not None:
            self._observer.start(len(tasks), sum(task.origin.nbytes for task in tasks))
        with self._profile.phase("score"):
            running = engine.run(
                tasks,
                self._method.scorer(hashes=hashes),
                device=self._options.device,
                wide=self._method.is_wide,
                workers=self._options.workers,
                on_progress=self._observer.progress if self._observer is not None else None,
                usage=self._profile.usage,
                where=self._options.cluster,
            )
            found = list(running)
        for group, scores in zip(groups, found, strict=True):
            yield from zip(group.updates, scores, strict=True)

    def _decide(
        self,
        loaded: Loaded,
        scores: dict[str, Score],
        casts: Mapping[str, Sequence[Cast]],
        least: Mapping[tuple[str, str], float | None],
    ) -> Run:
        today = {
            name.removeprefix(_TODAY): score
            for name, score in scores.items()
            if name.startswith(_TODAY)
        }
        own = {item.module.name: scores[item.module.name] for item in loaded.plan.modules}
        scored = {
            name: tuple(
                dataclasses.replace(each, least=least.get((name, each.dtype))) for each in found
            )
            for name, found in casts.items()
        }
        return dataclasses.replace(self.decided(loaded, own), casts=scored, today=today)

    def decided(
        self,
        loaded: Loaded,
        scores: dict[str, Score],
        selection: Selection | None = None,
        method: Method | None = None,
        *,
        compare: bool = True,
    ) -> Run:
        """Return what is to be done to an adapter, by its scores.

        Args:
            loaded: the adapter.
            scores: of all its updates.
            selection: which are changed; the job's if None.
            method: the job's with other settings, by which they were scored; the same if None.
            compare: whether replaced weights are compared with the model's, for the record.
        """
        method = method or self._method
        with self._profile.phase("decide"):
            comparisons = {
                item.change.key: comparison
                for item in (loaded.plan.changes if compare else ())
                if (comparison := self.reference.comparison(loaded.adapter, item)) is not None
            }
            sizes = engine.relative_changes(list(comparisons.values()))
            decision = decide(
                loaded.adapter,
                self.reference.inputs,
                loaded.plan,
                scores,
                dict(zip(comparisons, sizes, strict=True)),
                selection or self._selection,
                method,
                self._options.dtype,
            )
        return Run(loaded.adapter, loaded.plan, scores, decision, method, held=loaded.held)


def _is_finite(update: Update) -> bool:
    return is_finite(update.A) and is_finite(update.B)


@quiet
def _change(update: Update, cast: Update) -> float:
    """Return `‖ΔW_cast - ΔW‖_F / ‖ΔW‖_F`, infinite where `ΔW` is zero and the other is not."""
    A, B, A_cast, B_cast = (double(each) for each in (update.A, update.B, cast.A, cast.B))
    # B' A' - B A = [B' - B, B] [A'; A' - A], in which hardly a term is larger than the change.
    change = factors.norm(
        numpy.concatenate([A_cast, A_cast - A]), numpy.concatenate([B_cast - B, B], axis=1)
    )
    size = factors.norm(A, B)
    return change / size if size > 0.0 else (math.inf if change > 0.0 else 0.0)


def notes_of(
    adapter: Adapter, method: Method, *, copy_weights: bool, keep_training_state: bool
) -> Iterator[str]:
    """Yield what matters to someone who patches a folder, not to someone who inspects it."""
    folder = adapter.folder
    others, state = unpatched_beside(adapter, adapter.documents)
    if others and copy_weights:
        yield f"other weights are copied as they are, unpatched: {shorten(others, NAMED)}"
    elif others:
        yield (
            f"other weights are not patched, and left out: {shorten(others, NAMED)}; "
            "--copy-weights copies them as they are"
        )
    if state and keep_training_state:
        yield (
            "what trainers keep is copied as it is, and whoever loads it runs the code in it: "
            f"{shorten(state, NAMED)}"
        )
    elif state:
        files = "1 file is" if len(state) == 1 else f"{len(state)} files are"
        yield (
            f"{files} left out that trainers keep, pickles that run code when loaded: "
            f"{shorten(state, NAMED)}; --keep-training-state copies them as they are"
        )
    others = [name for name in _methods_before(folder) if not _is_idempotent(name)]
    if others and not method.is_idempotent:
        yield f"the adapter was patched before: {method.words.again}"
    if isinstance(folder, LocalFolder) and folder.revision is not None:
        yield (
            "the adapter comes from the local Hub cache (HF_HUB_OFFLINE is set): files of "
            "the adapter that are not in the cache are missing from the patched one too"
        )


def _two_readings(adapter: Adapter, today: Sequence[PlannedModule]) -> str:
    """Return which of two readings of square stacks of experts was taken."""
    version = adapter.config.get("peft_version") or UNSAID
    names = shorten(dict.fromkeys(item.module.parameter for item in today))
    return (
        f"square expert stacks ({names}) are read as PEFT {version} did, which the config names; "
        "today's PEFT takes the same factors for another update, without an error"
    )


def _is_idempotent(name: str) -> bool:
    found = by_name().get(name)
    return found is not None and found.is_idempotent


def _methods_before(folder: Folder) -> Iterator[str]:
    """Yield the methods that an adapter was patched by, the last one first."""
    found: Any = read_json(folder, MANIFEST) if MANIFEST in folder.files else None
    while isinstance(found, dict):
        if "method" in found:  # not of one that was extracted
            yield str(found["method"])
        for key in ("inputs", "adapter", "previous"):
            found = found.get(key) if isinstance(found, dict) else None


def _caught(step: Callable[[], T]) -> T | SafeprojError:
    """Return what a step returns, or the error that it raises, if it is about its input."""
    try:
        return step()
    except (SafeprojError, OSError, MemoryError, RuntimeError) as error:
        text = explained(error)
        if text is None:
            raise
        return error if isinstance(error, SafeprojError) else SafeprojError(text)

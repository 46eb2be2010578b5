"""One run over a full fine-tune: every weight scored, and in a second pass the chosen ones written.

What is held of the models depends neither on the number of layers nor on the size of the model:
weights come one by one, and in rows.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import numpy
from numpy import array_equal

from safeproj import __version__, engine
from safeproj.adapter.interface import MANIFEST, Format
from safeproj.adapter.record import AdaptedModule, Adapter
from safeproj.adapter.write import copied_beside, write_directory
from safeproj.checkpoint import Checkpoint, Reader, open_checkpoint
from safeproj.checkpoint.expression import Matrix, Stored, matrix, stored_names
from safeproj.checkpoint.hashes import NEW, Digests, Hash, merged, record, tensors_of
from safeproj.checkpoint.interface import STORED_DTYPES, stored_dtype
from safeproj.checkpoint.places import places
from safeproj.checkpoint.rewrite import Rewriting
from safeproj.engine import Buffers, Comparison, Source, row_width
from safeproj.engine.local import MAX_WORKERS
from safeproj.errors import SafeprojError
from safeproj.methods.differences import Difference, Rows
from safeproj.methods.interface import Method
from safeproj.methods.reference import Reference
from safeproj.methods.whole import (
    BLOCK,
    Remade,
    Sums,
    WholeScore,
    WholeTask,
    remade,
    scored,
    workers_for,
)
from safeproj.plan.full import (
    FullModel,
    FullPlan,
    PlannedWeight,
    Tuned,
    open_tuned,
    plan_full,
)
from safeproj.plan.match import PlannedChange
from safeproj.records.scores import Report, Unprojected
from safeproj.run.decide import LOST_IN_ROUNDING, module_reports, warnings_of
from safeproj.run.job import notes_of
from safeproj.run.options import Options
from safeproj.storage.arrays import (
    Array,
    DType,
    cast,
    single,
    sum_of_squares,
    to_host,
)
from safeproj.storage.publish import Appearance, Resumed
from safeproj.storage.ranges import fetching_by
from safeproj.storage.source import Folder, identity, read_json
from safeproj.text import shorten
from safeproj.versions import versions

T = TypeVar("T")

FOREIGN = 1.0
"""Relative change of half of the weights from which on a checkpoint is no fine-tune of another: of
unrelated weights of one size it is 1.41, and of fine-tunes some hundredths."""

SPARE = 64 << 20
"""Bytes of a disk that are left free beyond what is written."""


@dataclass(frozen=True)
class FullRun:
    """What was read of a full fine-tune, scored and decided.

    Attributes:
        plan: its weights.
        scores: by module.
        report: the record of the run.
        chosen: the modules whose weights are to be written.
    """

    plan: FullPlan
    scores: Mapping[str, WholeScore]
    report: Report
    chosen: frozenset[str]


class FullJob:
    """What `inspect` and `patch` share, for a full fine-tune.

    Args:
        method: what is done, prepared.
        model: the fine-tune.
        options: how.
        hashes: by which all that is read is hashed, to be recorded.
        restore_others: whether what no projection touches takes the aligned model's values.

    Raises:
        SafeprojError: the options are for adapters.
    """

    def __init__(
        self,
        method: Method,
        model: FullModel,
        options: Options | None,
        hashes: Collection[Hash] = (),
        *,
        restore_others: bool = False,
    ) -> None:
        self._restores = restore_others
        self._options = options or Options()
        self._method, self._model, self._hashes = method, model, hashes
        self._kernel = method.whole()
        if self._options.portable or self._options.dtype != "keep":
            raise SafeprojError(
                "--portable and --dtype are for adapters: a full model is written in its own dtype"
            )
        if self._options.cluster is not None:
            raise SafeprojError(
                "a Ray cluster is for adapters: a full model is read and written on one machine"
            )
        self._selection = method.selecting(self._options.selection)
        self._made: Mapping[str, Source] = {}

    @cached_property
    def reference(self) -> Reference:
        """What the weights are scored against, opened."""
        with fetching_by(self._options.fetching):
            return self._method.open(self._options.maps)

    @cached_property
    def tuned(self) -> Tuned:
        """The fine-tune, opened beside the model that it was made from."""
        aligned = self._model.aligned
        own = self._method.sources.get("aligned")
        if aligned is None and own is None:
            raise SafeprojError(
                "--aligned is missing: a full fine-tune is compared with the model that it was "
                "made from; give its SRC"
            )
        if aligned is not None and own is not None and aligned != own:
            raise SafeprojError(
                f"--aligned is {aligned} for the fine-tune and {own} for the method; expected one"
            )
        model = replace(self._model, aligned=aligned or own)
        weights = self.reference.weights if own is not None else None
        with fetching_by(self._options.fetching):
            return open_tuned(model, weights, self._options.maps)

    def run(self) -> FullRun:
        """Match, score and decide.

        Raises:
            SafeprojError: an input cannot be used.
        """
        profile = self._options.profile
        with profile.phase("match"):
            plan = self._plan()
        self._prepare(plan)
        with profile.phase("score"):
            scores = self._scores(plan)
        with profile.phase("decide"):
            self._require_related(scores)
            self._require_recorded(scores)
            report, chosen = self._decided(plan, scores)
        return FullRun(plan, scores, report, chosen)

    def write(
        self,
        run: FullRun,
        out: Path | None,
        section: Callable[[Report], str],
        *,
        overwrite: bool = False,
        copy_weights: bool = False,
        keep_training_state: bool = False,
        resume: bool = False,
    ) -> Report:
        """Write the patched model, if `out` is given, and return the report of `patch`.

        Args:
            run: what `run` returned.
            out: the directory.
            section: makes what the model card says of the run.
            overwrite: whether a patched model that is there may be replaced.
            copy_weights: copy other weights in the folder too, as they are.
            keep_training_state: copy what trainers kept in it too.
            resume: go on with what an interrupted run left, and leave it where this one is.

        Raises:
            SafeprojError: it cannot be written; nothing is left behind, but with `resume`.
        """
        files = self.tuned.files
        subject = subject_of(self.tuned)
        copied = {"copy_weights": copy_weights, "keep_training_state": keep_training_state}
        notes = notes_of(subject, self._method, **copied)
        warnings = (*run.report.warnings, *notes)
        report = replace(run.report, warnings=warnings, written=out is not None)
        if out is None:
            return report
        beside = copied_beside(subject, subject.documents, **copied)[0]
        sizes = (subject.path(name).stat().st_size for name in beside)
        _require_space(out, files.nbytes + sum(sizes))
        lost: dict[str, float] = {}

        def weights(appearance: Appearance) -> dict[str, Any]:
            kept = appearance.kept if isinstance(appearance, Resumed) else {}
            for file in files.files:
                if file in kept and (appearance.path / file).is_file():
                    lost.update(kept[file])
                    continue
                files.begin(appearance.path, file)
                found = self._put(run, file)
                if self._restores:
                    self._restore(run, file)
                files.complete()
                lost.update(found)
                if isinstance(appearance, Resumed):
                    appearance.keep({file: found})
            written = [each for each in run.plan.weights if each.name in run.chosen]
            names = {name for each in written for name in stored_names(each.tuned)}
            tensors = digests_of(open_checkpoint(str(appearance.path)))
            return {"projected": sorted(names), "blake3": {"tensors": tensors}}

        def said() -> tuple[dict[str, Any], str]:
            nonlocal report
            report = replace(report, warnings=(*report.warnings, *_rounded(lost)))
            return self._manifest(run, report, **copied), section(report)

        with self._options.profile.phase("write"):
            try:
                write_directory(
                    subject,
                    weights,
                    said,
                    out,
                    overwrite=overwrite,
                    copy_weights=copy_weights,
                    keep_training_state=keep_training_state,
                    what="model",
                    run=self._fingerprint(run, report) if resume else None,
                )
            finally:
                files.close()
        return report

    def _plan(self) -> FullPlan:
        reference = self.reference
        return plan_full(
            self.tuned,
            reference.sides,
            self._selection,
            reference.unheld,
            by_file=reference.is_file,
        )

    def _prepare(self, plan: FullPlan) -> None:
        """Let the fine-tune be run, where the method needs that."""
        if not self.reference.runs_adapter:
            return
        with self._options.profile.phase("run the model"):
            self._made = self.reference.rewritten(self.tuned, plan.weights, self._options)

    def _tasks(self, weights: Iterable[PlannedWeight]) -> dict[WholeTask, list[str]]:
        """Return what is computed in one reading, each with the names of its modules."""
        groups: dict[Hashable, list[PlannedWeight]] = {}
        for each in weights:
            groups.setdefault(self.reference.group(each.item), []).append(each)
        return {
            WholeTask(
                found[0].name,
                self._made.get(found[0].name) or self.reference.origin(found[0].item),
                (),
                tuple(self._change(each) for each in found),
            ): [each.name for each in found]
            for found in groups.values()
        }

    def _change(self, weight: PlannedWeight) -> Difference:
        tuned = self.tuned
        return Difference(
            matrix(weight.tuned, tuned.checkpoint),
            matrix(weight.before, tuned.aligned.checkpoint),
        )

    def _run(
        self,
        plan: FullPlan,
        tasks: Sequence[WholeTask],
        work: Callable[[Buffers, WholeTask], T],
    ) -> Iterator[T]:
        options = self._options
        if options.observer is not None:
            nbytes = sum(t.origin.nbytes + sum(c.nbytes for c in t.changes) for t in tasks)
            options.observer.start(len(tasks), nbytes)
        shapes = [_shape(each.item.module) for each in plan.weights]
        workers = options.workers or min(os.cpu_count() or 1, MAX_WORKERS)
        yield from engine.run(
            tasks,
            work,
            device=options.device,
            wide=self._method.is_wide,
            workers=workers_for(shapes, workers),
            on_progress=None if options.observer is None else options.observer.progress,
            usage=options.profile.usage,
        )

    def _scores(self, plan: FullPlan) -> dict[str, WholeScore]:
        tasks = self._tasks(plan.weights)

        def work(buffers: Buffers, task: WholeTask) -> tuple[WholeScore, ...]:
            return scored(task, self._method.formulas, buffers, self._kernel, self._hashes)

        found: dict[str, WholeScore] = {}
        for names, scores in zip(tasks.values(), self._run(plan, list(tasks), work), strict=True):
            found |= zip(names, scores, strict=True)
        return found

    def _require_related(self, scores: Mapping[str, WholeScore]) -> None:
        """Refuse what is no fine-tune of the aligned model.

        Raises:
            SafeprojError: its weights have nothing to do with those.
        """
        sizes = sorted(each.relative_change or 0.0 for each in scores.values())
        middle = sizes[len(sizes) // 2]
        if middle >= FOREIGN:
            raise SafeprojError(
                f"{self._model.source}: half of its weights differ from those of "
                f"{self.tuned.aligned.checkpoint.source} by {middle:.0%} of their size or more, as "
                "those of unrelated models do; expected a fine-tune of it"
            )

    def _require_recorded(self, scores: Mapping[str, WholeScore]) -> None:
        """Refuse an aligned model that is not the one that a file was made of.

        Raises:
            SafeprojError: a weight is another one.
        """
        if not self.reference.is_file:
            return
        recorded = tensors_of(self.reference.digests(scores).get("aligned", {}))
        own = merged(score.before for score in scores.values())
        for name, digests in recorded.items():
            for label, digest in own.get(name, {}).items():
                if digests.get(label, digest) != digest:
                    raise SafeprojError(
                        f"{self.tuned.aligned.checkpoint.source}: {label} is another one than "
                        f"{self.reference.sides[0].checkpoint.source} was made of; give the model "
                        "that it is of"
                    )

    def _decided(
        self, plan: FullPlan, scores: Mapping[str, WholeScore]
    ) -> tuple[Report, frozenset[str]]:
        reference, method, selection = self.reference, self._method, self._selection
        if all(score.is_blank for score in scores.values()):
            sources = {role: each["source"] for role, each in reference.inputs.items()}
            raise SafeprojError(method.detail.blank.refusal.format(**sources))
        cosines = {name: score.cosine for name, score in scores.items()}
        chosen = selection.choose(cosines)
        bounds = {name: each.bounds for name, each in scores.items() if each.bounds is not None}
        uncertain = selection.uncertain(cosines, bounds)
        others, restored = self._after(self._unprojected(plan.others), plan)
        details = {name: score.detail for name, score in scores.items()}
        items = [(each.item.module, None) for each in plan.weights]
        modules = tuple(
            replace(each, detail={**each.detail, "relative_change": _change_of(scores, each.name)})
            for each in module_reports(items, plan.excluded, scores, chosen, uncertain, method)
        )
        report = Report(
            version=__version__,
            method=method.name,
            projector=method.describe(scores.values()),
            selection=selection.to_dict(),
            inputs={
                **{role: dict(each) for role, each in reference.inputs.items()},
                "aligned": identity(self.tuned.aligned.checkpoint),
                "model": identity(self.tuned.checkpoint),
            },
            modules=modules,
            pdst=None,
            unprojected=others,
            summary=method.detail.summary(modules, details.values()),
            warnings=(
                *plan.warnings,
                *warnings_of(scores, selection, chosen, [], others, method),
                *restored,
                *method.detail.warnings(details, chosen, uncertain),
            ),
        )
        return report, chosen

    def _unprojected(self, others: Sequence[PlannedChange]) -> tuple[Unprojected, ...]:
        tuned = self.tuned
        compared = [each for each in others if each.aligned is not None]
        comparisons = [
            Comparison(
                each.change.parameter,
                matrix(each.aligned, tuned.aligned.checkpoint),
                matrix(Stored(each.change.key), tuned.checkpoint),
            )
            for each in compared
            if each.aligned is not None
        ]
        names = [each.change.key for each in compared]
        sizes = dict(zip(names, engine.relative_changes(comparisons), strict=True))
        return tuple(
            Unprojected(
                each.change.key,
                each.change.parameter,
                each.change.kind,
                sizes.get(each.change.key),
                each.added_rows,
            )
            for each in others
        )

    def _after(
        self, others: Sequence[Unprojected], plan: FullPlan
    ) -> tuple[tuple[Unprojected, ...], tuple[str, ...]]:
        """Return what is left of the other changes in what is written, and what to know of it."""
        known = {each.change.key for each in plan.others if each.aligned is not None}
        if not self._restores:
            return tuple(others), ()
        moved = [each for each in others if each.tensor in known and each.relative_change]
        left = tuple(
            replace(each, relative_change=0.0) if each in moved else each for each in others
        )
        told = (
            f"{len(moved)} tensors that no projection touches take the aligned model's values: "
            f"{shorten(each.describe() for each in moved)}"
        )
        return left, (told,) if moved else ()

    def _restore(self, run: FullRun, file: str) -> None:
        """Put the aligned model's values into one of the copies."""
        tuned = self.tuned
        for each in run.plan.others:
            if each.aligned is None or tuned.files.spots[each.change.key].file != file:
                continue
            (spot,) = places(Stored(each.change.key), tuned.checkpoint)
            source = Rows(matrix(each.aligned, tuned.aligned.checkpoint))
            try:
                height = min(len(spot.rows), source.height)
                step = max(1, BLOCK // max(1, 4 * len(spot.columns)))
                for start in range(0, height, step):
                    rows = range(start, min(start + step, height))
                    tuned.files.put(spot, rows, source(rows))
            finally:
                source.close()

    def compared(self, other: Tuned) -> tuple[dict[str, Compared], FullPlan]:
        """Compare another model with this one and with what the method makes of it.

        Args:
            other: a model with the same tensors, such as this one patched.

        Returns:
            By module how they compare, and the plan of all of them.

        Raises:
            SafeprojError: a weight cannot be read.
        """
        plan = self._plan()
        self._prepare(plan)
        weights = {each.name: each for each in plan.weights}
        tasks = self._tasks(plan.weights)

        def work(buffers: Buffers, task: WholeTask) -> list[Compared]:
            found = remade(task, self._method.formulas, buffers, self._kernel)
            return [
                _compare(change, made, matrix(weights[name].tuned, other.checkpoint), task.name)
                for name, (change, _, made) in zip(tasks[task], found, strict=True)
            ]

        results: dict[str, Compared] = {}
        for names, found in zip(tasks.values(), self._run(plan, list(tasks), work), strict=True):
            results |= zip(names, found, strict=True)
        return results, plan

    def tensors(self, weight: PlannedWeight) -> list[str]:
        """Return the names of the stored tensors that a weight is made of."""
        return list(stored_names(weight.tuned))

    @property
    def method(self) -> Method:
        """What is done."""
        return self._method

    @property
    def options(self) -> Options:
        """How."""
        return self._options

    def _put(self, run: FullRun, file: str) -> dict[str, float]:
        """Put the chosen weights into one of the copies.

        Returns:
            By how much rounding has changed what takes the place of each change.
        """
        files, checkpoint = self.tuned.files, self.tuned.checkpoint
        weights = {
            each.name: each
            for each in run.plan.weights
            if each.name in run.chosen
            and any(files.spots[name].file == file for name in stored_names(each.tuned))
        }
        tasks = self._tasks(weights.values())

        def work(buffers: Buffers, task: WholeTask) -> list[float]:
            lost, names = [], tasks[task]
            found = remade(task, self._method.formulas, buffers, self._kernel)
            for name, (change, _, made) in zip(names, found, strict=True):
                spots = places(weights[name].tuned, checkpoint)
                aligned = Rows(change.before)
                error = size = 0.0
                for part in made.rows():
                    after = to_host(part.after)
                    rows = range(part.rows.start, part.rows.start + len(after))
                    before = aligned(rows)
                    whole = before + after
                    for spot in spots:
                        files.put(spot, rows, whole)
                    missed = single(_as_stored(whole, files.spots[spots[0].name].dtype) - whole)
                    error += float(sum_of_squares(missed))
                    size += float(sum_of_squares(after))
                aligned.close()
                lost.append(math.sqrt(error / size) if size else 0.0)
            return lost

        lost: dict[str, float] = {}
        for names, found in zip(
            tasks.values(), self._run(run.plan, list(tasks), work), strict=True
        ):
            lost |= zip(names, found, strict=True)
        return lost

    def _fingerprint(self, run: FullRun, report: Report) -> str:
        """Return what tells a run from every other, as far as files tell before they are read."""
        tuned = self.tuned
        folders = [each.folder for each in (tuned.checkpoint, tuned.aligned.checkpoint)]
        files = [
            (name, found.st_size, found.st_mtime_ns)
            for folder in folders
            if folder is not None
            for name in sorted(folder.files)
            for found in [folder.path(name).stat()]
        ]
        text = json.dumps([self._manifest(run, report), files], sort_keys=True)
        return sha256(text.encode()).hexdigest()

    def _manifest(self, run: FullRun, report: Report, **copied: bool) -> dict[str, Any]:
        """Return what `safeproj.json` says of a run, without what is written."""
        where = engine.place(self._options.device, wide=self._method.is_wide)
        found = report.to_dict()
        for role, digests in self.reference.digests(run.scores).items():
            found["inputs"][role] |= digests
        scores = run.scores.values()
        tuned = self.tuned
        for role, checkpoint, read in (
            ("aligned", tuned.aligned.checkpoint, [each.before for each in scores]),
            ("model", tuned.checkpoint, [each.tuned for each in scores]),
        ):
            found["inputs"][role] |= _recorded(checkpoint, read)
        if MANIFEST in self.tuned.folder.files:
            found["inputs"]["model"]["previous"] = read_json(self.tuned.folder, MANIFEST)
        options: dict[str, Any] = {
            "dtype": "keep",
            "device": where.name,
            "engine": where.engine,
            **{name: True for name, is_given in copied.items() if is_given},
        }
        if self._restores:
            options["restore_others"] = True
        return {**found, "options": options, "versions": versions(by_torch=where.engine == "torch")}


@dataclass(frozen=True)
class Compared:
    """How a weight compares with one of another model, and with what a method makes of it.

    Attributes:
        dtype: of the other.
        shape: (m, n).
        is_original: whether the two are equal.
        is_projection: whether the other is `W_aligned + ΔW'`, as it is written.
        error: how far it is from that, in `‖·‖_F`.
        size: of that.
        change: `‖ΔW‖_F`.
        alignment_norm: `‖V‖_F`, if there is one.
    """

    dtype: DType
    shape: tuple[int, int]
    is_original: bool
    is_projection: bool
    error: float
    size: float
    change: float
    alignment_norm: float | None


def _compare(change: Difference, made: Remade, other: Matrix, name: str) -> Compared:
    """Compare by rows."""
    dtype = stored_dtype(other.weight.dtype)
    rows_of = [Rows(each) for each in (change.before, change.after, other)]
    is_original = is_projection = True
    error = size = before = after = 0.0
    shape = other.weight.shape[::-1] if other.transposed else other.weight.shape
    seen = False
    try:
        for part in made.rows():
            seen = True
            new = to_host(part.after)
            rows = range(part.rows.start, part.rows.start + len(new))
            aligned, own, there = (each(rows) for each in rows_of)
            wanted = aligned + new
            is_original &= array_equal(cast(own, dtype), cast(there, dtype))
            is_projection &= array_equal(cast(wanted, dtype), cast(there, dtype))
            error += float(sum_of_squares(single(there) - single(wanted)))
            size += float(sum_of_squares(single(wanted)))
            before += float(sum_of_squares(part.before))
            after += float(sum_of_squares(part.after))
        if not seen:  # there is nothing to compare it with: it can only be kept
            rows = range(shape[0])
            own, there = (cast(each(rows), dtype) for each in rows_of[1:])
            is_original = array_equal(own, there)
            is_projection = False
    except FloatingPointError as failure:
        raise SafeprojError(f"{name}: has a value that is not finite") from failure
    finally:
        for each in rows_of:
            each.close()
    return Compared(
        dtype,
        shape,
        is_original,
        is_projection,
        math.sqrt(error),
        math.sqrt(size),
        math.sqrt(before),
        made.detail(Sums(before, after, 0.0)).length,  # it takes no product of both
    )


class _Files(Format):
    """The files of a checkpoint in the place of an adapter's: `write_directory` asks which."""

    library = "transformers"

    def __init__(self, files: Rewriting) -> None:
        self._files = files

    @classmethod
    def read(cls, folder: Folder) -> Adapter | None:
        del folder  # a checkpoint is opened by `open_checkpoint`
        return None

    @classmethod
    def is_weights(cls, name: str) -> bool:
        del name  # no adapter is among them
        return False

    @property
    def output_file(self) -> str:
        return self._files.files[0]

    @property
    def replaced_files(self) -> frozenset[str]:
        return frozenset(self._files.files)

    def scalings(self, adapter: Adapter, modules: Sequence[AdaptedModule]) -> dict[str, float]:
        del adapter, modules  # a whole weight has none
        return {}

    def write(self, path: Path, tensors: Mapping[str, Array]) -> dict[str, str]:
        raise NotImplementedError(f"{path}: {len(tensors)} tensors")  # `Rewriting` writes them


def digests_of(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the digests of all tensors of a checkpoint, as they are stored."""
    reader = Reader()
    reader.start((NEW,))
    try:
        for name in checkpoint.names:
            if checkpoint.describe(name).dtype not in STORED_DTYPES:
                continue
            weight = checkpoint.weight(name)
            step = max(1, BLOCK // max(1, row_width(weight)))
            buffer = numpy.empty(min(step, weight.shape[0]) * row_width(weight), numpy.uint8)
            for start in range(0, weight.shape[0], step):
                weight.read_rows(reader, start, min(start + step, weight.shape[0]), buffer)
        return dict(reader.digests[NEW])
    finally:
        reader.close()


def subject_of(tuned: Tuned) -> Adapter:
    """Return what is in a checkpoint's folder, as `write_directory` and the gate take it."""
    files = tuned.files
    return Adapter(
        folder=tuned.folder,
        weights_file=files.files[0],
        config={},
        tensors={},
        modules=(),
        targets=(),
        full_changes=(),
        warnings=(),
        format=_Files(files),
        documents=files.documents,
        further_weights=frozenset([*files.files, *filter(None, [files.index])]),
    )


def _require_space(out: Path, wanted: int) -> None:
    """Refuse to begin where the disk is too small.

    Raises:
        SafeprojError: it is.
    """
    place = out.resolve().parent
    free = shutil.disk_usage(place).free
    if free < wanted + SPARE:
        raise SafeprojError(
            f"--out {out}: {wanted / 1e9:.1f} GB are to be written, and {free / 1e9:.1f} GB are "
            f"free in {place}; make room, or write to another disk"
        )


def _rounded(lost: Mapping[str, float]) -> Iterator[str]:
    """Yield what to know where rounding has changed what was written."""
    lossy = [name for name, error in lost.items() if error > LOST_IN_ROUNDING]
    if lossy:
        yield (
            f"rounding to the fine-tune's dtype changes what takes the place of the change by over "
            f"{LOST_IN_ROUNDING:.0%} in {len(lossy)} of {len(lost)} weights (at most "
            f"{max(lost.values()):.0%}): {shorten(lossy)}; a fine-tune saved in float32 keeps it"
        )


def _as_stored(values: Array, dtype: str) -> Array:
    """Return numbers as a file has them, FP8 codes in what they are written as."""
    return single(cast(values, stored_dtype(dtype)))


def _shape(module: AdaptedModule) -> tuple[int, int]:
    return module.out_features, module.in_features


def _change_of(scores: Mapping[str, WholeScore], name: str) -> float | None:
    return scores[name].relative_change if name in scores else None


def _recorded(checkpoint: Checkpoint, read: Sequence[Digests]) -> dict[str, Any]:
    """Return the digests of what was read of a checkpoint."""
    return record(merged(read), files=dict(checkpoint.document_digests))

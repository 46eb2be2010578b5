"""The Python API: the few lines that string the steps together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from safeproj import engine
from safeproj.adapter import Adapter, FullChange, card, read_adapter
from safeproj.adapter.interface import MANIFEST
from safeproj.adapter.record import Factor
from safeproj.adapter.write import check_out, write_adapter
from safeproj.checkpoint import Checkpoint, open_checkpoint
from safeproj.checkpoint.expression import Expression, matrix
from safeproj.decide import DTYPES, Decision, decide
from safeproj.engine import Comparison, Progress, Score, Task
from safeproj.errors import SafeprojError
from safeproj.manifest import manifest
from safeproj.match import Plan, plan
from safeproj.names import parse_rules
from safeproj.profile import Profile
from safeproj.projection import Approx, Projector
from safeproj.report.record import Report
from safeproj.select import Selection
from safeproj.source import LocalFolder


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run is done.

    Attributes:
        selection: which modules are projected.
        projector: which `C`.
        device: where the arithmetic runs: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        workers: threads over modules on the CPU, None for one per core, at most 8. The result
            does not depend on it.
        dtype: of the projected tensors: `keep`, `float32`, `bfloat16` or `float16`.
        maps: `RUNTIME=CHECKPOINT` rules for names that the checkpoints have in another form.

    Raises:
        SafeprojError: a value is out of range, a rule is malformed, or the device is not there.
    """

    selection: Selection = dataclasses.field(default_factory=Selection)
    projector: Projector = dataclasses.field(default_factory=Approx)
    device: str = "auto"
    workers: int | None = None
    dtype: str = "keep"
    maps: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise SafeprojError(f"--dtype {self.dtype}: expected {', '.join(DTYPES)}")
        if self.workers is not None and self.workers < 1:
            raise SafeprojError(f"--workers must be 1 or more, found {self.workers}")
        parse_rules(self.maps)
        engine.resolve_device(self.device)


@dataclasses.dataclass(frozen=True)
class _Run:
    """All that `inspect` and `patch` share: what was read, scored and decided."""

    adapter: Adapter
    aligned: Checkpoint
    base: Checkpoint
    plan: Plan
    scores: dict[str, Score]
    decision: Decision


class Observer(Protocol):
    """Who wants to see a run go on."""

    def start(self, modules: int, nbytes: int) -> None:
        """The plan is complete: so many modules, so many bytes to read."""

    def progress(self, event: Progress) -> None:
        """Something was read or finished; called from the engine's threads."""


def inspect(
    base: str,
    aligned: str,
    adapter: str,
    options: Options | None = None,
    *,
    observer: Observer | None = None,
    profile: Profile | None = None,
) -> Report:
    """Score each adapted module by its similarity to its Safe LoRA projection.

    Args:
        base: SRC of the unaligned checkpoint: a directory, a file, or `org/name[@revision]`.
        aligned: SRC of the aligned checkpoint.
        adapter: SRC of the PEFT LoRA adapter.
        options: projector, selection, device.
        observer: told about the progress.
        profile: filled in with where the time went.

    Raises:
        SafeprojError: an input cannot be used.
    """
    return _run(
        base, aligned, adapter, options or Options(), observer, profile or Profile(), digests=False
    ).decision.report


def patch(
    base: str,
    aligned: str,
    adapter: str,
    out: str | Path,
    options: Options | None = None,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    observer: Observer | None = None,
    profile: Profile | None = None,
) -> Report:
    """Project the selected modules and write the patched adapter to the directory `out`.

    Args:
        base: SRC of the unaligned checkpoint: a directory, a file, or `org/name[@revision]`.
        aligned: SRC of the aligned checkpoint.
        adapter: SRC of the PEFT LoRA adapter.
        out: the directory to create; it appears complete or not at all.
        options: projector, selection, device, dtype.
        overwrite: replace an adapter that is at `out`.
        dry_run: do everything but the writing.
        observer: told about the progress.
        profile: filled in with where the time went.

    Raises:
        SafeprojError: an input cannot be used or `out` cannot be written; nothing is written.
    """
    options, out = options or Options(), Path(out)
    sources = {"--base": base, "--aligned": aligned, "--adapter": adapter}
    check_out(out, overwrite, {option: _local_path(src) for option, src in sources.items()})
    profile = profile or Profile()
    run = _run(base, aligned, adapter, options, observer, profile, digests=not dry_run)
    notes = tuple(_notes(run.adapter))
    report = dataclasses.replace(
        run.decision.report, warnings=(*run.decision.report.warnings, *notes)
    )
    if dry_run:
        return report
    where = str(engine.resolve_device(options.device))
    with profile.phase("write"):
        record = manifest(
            run.adapter,
            run.aligned,
            run.base,
            run.plan,
            run.scores,
            report,
            {"dtype": options.dtype, "device": where},
        )
        write_adapter(run.adapter, run.decision.replaced, record, card.section(report), out)
    return report


def _run(
    base: str,
    aligned: str,
    adapter: str,
    options: Options,
    observer: Observer | None,
    profile: Profile,
    *,
    digests: bool,
) -> _Run:
    """Read, match, score and decide: all that `inspect` and `patch` share."""
    with profile.phase("read adapter"):
        loaded = read_adapter(adapter)
    with profile.phase("match"):
        aligned_model, base_model = open_checkpoint(aligned), open_checkpoint(base)
        loaded = loaded.fitted(aligned_model.names, aligned_model.config or base_model.config)
        planned = plan(loaded, aligned_model, base_model, options.selection, options.maps)
    with profile.phase("fetch"):
        tasks = tasks_of(loaded, planned, aligned_model, base_model)
        comparisons = {
            item.change.key: _comparison(loaded, item.change, item.aligned, aligned_model)
            for item in planned.changes
            if item.aligned is not None
        }
    if observer is not None:
        observer.start(len(tasks), sum(task.nbytes for task in tasks))
    with profile.phase("score"):
        found = engine.run(
            tasks,
            options.projector,
            device=options.device,
            workers=options.workers,
            digests=digests,
            on_progress=observer.progress if observer is not None else None,
            usage=profile.usage,
        )
    scores = {task.name: score for task, score in zip(tasks, found, strict=True)}
    with profile.phase("decide"):
        sizes = engine.relative_changes(list(comparisons.values()))
        decision = decide(
            loaded,
            aligned_model,
            base_model,
            planned,
            scores,
            dict(zip(comparisons, sizes, strict=True)),
            options.selection,
            options.projector,
            options.dtype,
        )
    return _Run(loaded, aligned_model, base_model, planned, scores, decision)


def tasks_of(adapter: Adapter, plan: Plan, aligned: Checkpoint, base: Checkpoint) -> list[Task]:
    """Return what the engine has to do, downloading the files that hold the weights."""
    tasks = []
    for item in plan.modules:
        module, tensors = item.module, adapter.tensors
        A = module.input.view(tensors)
        tasks.append(
            Task(
                module.name,
                matrix(item.aligned, aligned),
                matrix(item.base, base),
                A=A if module.gain is None else A * module.gain.view(tensors),
                B=module.output.view(tensors),
                bias=None if module.bias is None else module.bias.view(tensors),
            )
        )
    return tasks


def _comparison(
    adapter: Adapter, change: FullChange, weight: Expression, aligned: Checkpoint
) -> Comparison:
    replacement = Factor(change.key).view(adapter.tensors)
    return Comparison(change.parameter, matrix(weight, aligned), replacement, change.rows)


def _notes(adapter: Adapter) -> Iterator[str]:
    """Yield what matters to someone who patches the adapter, not to someone who inspects it."""
    folder = adapter.folder
    if MANIFEST in folder.files:
        yield (
            "the adapter was patched before: projecting again shrinks its updates further, "
            "since C is applied twice"
        )
    if isinstance(folder, LocalFolder) and folder.revision is not None:
        yield (
            "the adapter comes from the local Hub cache (HF_HUB_OFFLINE is set): files of "
            "the adapter that are not in the cache are missing from the patched one too"
        )


def _local_path(source: str) -> Path | None:
    path = Path(source).expanduser()
    return path if path.exists() else None

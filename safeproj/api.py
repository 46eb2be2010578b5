"""The Python API: `inspect` and `patch` for one adapter or many, and `align`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from safeproj import __version__, engine
from safeproj.adapter import read_adapter
from safeproj.adapter.collection import Member, collect
from safeproj.adapter.write import (
    check_apart,
    check_inside,
    check_out,
    check_parent,
    made_inside,
)
from safeproj.engine.profile import Profile
from safeproj.errors import SafeprojError
from safeproj.methods.covariance.prepare import rebuilt, require_data, with_statistics
from safeproj.methods.given import Against
from safeproj.methods.projection import Projector, Reconstruction
from safeproj.methods.recorded import check_file
from safeproj.methods.safe_lora.file import KIND
from safeproj.methods.safe_lora.make import Form, Made, make_file
from safeproj.methods.safe_lora.pair import Pair
from safeproj.methods.safe_lora.targets import ALL_LINEAR, find_targets
from safeproj.plan.select import Selection
from safeproj.records.checks import Check, Checks
from safeproj.records.scores import Failure, Report, Reports
from safeproj.run.job import Job, Observer, Options, Run

if TYPE_CHECKING:
    from safeproj.gate.check import Original
    from safeproj.gate.policy import Policy

__all__ = [
    "Form",
    "Made",
    "Observer",
    "Options",
    "Outcome",
    "align",
    "check",
    "inspect",
    "inspect_many",
    "patch",
    "patch_many",
    "reports",
    "verify",
]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one of many adapters: a report, or the error that stopped it.

    Attributes:
        source: its SRC.
        name: its name below `--out`.
        report: the record of its run.
        error: why there is none.
    """

    source: str
    name: str
    report: Report | None
    error: SafeprojError | None


def inspect(
    base: str | None,
    aligned: str | None,
    adapter: str,
    options: Options | None = None,
    *,
    alignment: str | None = None,
    safety_module: str | None = None,
    safety_data: str | None = None,
    task_data: str | None = None,
    observer: Observer | None = None,
    profile: Profile | None = None,
) -> Report:
    """Score each adapted module by its similarity to its projection.

    Args:
        base: SRC of the unaligned checkpoint: a directory, a file, or `org/name[@revision]`.
        aligned: SRC of the aligned checkpoint.
        adapter: SRC of the LoRA adapter.
        options: projector, selection, device.
        alignment: SRC of an alignment file, in place of `base` and `aligned`, which are None then.
        safety_module: SRC of a safety module, in place of all three: SaLoRA instead of Safe LoRA.
        safety_data: for the covariance-weighted correction, JSON lines of harmful prompts with
            refusals, which the aligned model is run on; or statistics that `safeproj stats` made.
            There is no `base` then.
        task_data: the same of benign data; random tokens if None.
        observer: told about the progress.
        profile: filled in with where the time went.

    Raises:
        SafeprojError: an input cannot be used.
    """
    against = Against(base, aligned, alignment, safety_module, safety_data, task_data)
    with _job(against, [adapter], options, observer, profile, digests=False) as job:
        return job.inspected(job.one(adapter))


def patch(
    base: str | None,
    aligned: str | None,
    adapter: str,
    out: str | Path,
    options: Options | None = None,
    *,
    alignment: str | None = None,
    safety_module: str | None = None,
    safety_data: str | None = None,
    task_data: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    copy_weights: bool = False,
    observer: Observer | None = None,
    profile: Profile | None = None,
) -> Report:
    """Project the selected modules and write the patched adapter to the directory `out`.

    Args:
        base: SRC of the unaligned checkpoint: a directory, a file, or `org/name[@revision]`.
        aligned: SRC of the aligned checkpoint.
        adapter: SRC of the LoRA adapter.
        out: the directory to create; it appears complete or not at all.
        options: projector, selection, device, dtype.
        alignment: SRC of an alignment file, in place of `base` and `aligned`, which are None then.
        safety_module: SRC of a safety module, in place of all three: SaLoRA instead of Safe LoRA.
        safety_data: for the covariance-weighted correction, JSON lines of harmful prompts with
            refusals, which the aligned model is run on; or statistics that `safeproj stats` made.
            There is no `base` then.
        task_data: the same of benign data; random tokens if None.
        overwrite: replace an adapter that is at `out`.
        dry_run: do everything but the writing.
        copy_weights: copy other weights that lie beside the adapter's, which are not patched: left
            out otherwise.
        observer: told about the progress.
        profile: filled in with where the time went.

    Raises:
        SafeprojError: an input cannot be used or `out` cannot be written; nothing is written.
    """
    out, against = (
        Path(out),
        Against(base, aligned, alignment, safety_module, safety_data, task_data),
    )
    check_out(out, overwrite, against.local_paths([adapter]))
    with _job(against, [adapter], options, observer, profile, digests=not dry_run) as job:
        done = job.one(adapter)
        place = None if dry_run else out
        return job.write(done, place, overwrite=overwrite, copy_weights=copy_weights)


def inspect_many(
    base: str | None,
    aligned: str | None,
    adapters: Iterable[str],
    options: Options | None = None,
    *,
    alignment: str | None = None,
    safety_module: str | None = None,
    safety_data: str | None = None,
    task_data: str | None = None,
    observer: Observer | None = None,
    profile: Profile | None = None,
) -> list[Outcome]:
    """Score many adapters of one model, reading its checkpoints once for all of them.

    Args:
        base: as for `inspect`.
        aligned: as for `inspect`.
        adapters: of each a SRC; a directory that holds adapters stands for all of them, and a
            text file (`.txt`) for the SRC in its lines.
        options: as for `inspect`.
        alignment: as for `inspect`.
        safety_module: as for `inspect`.
        safety_data: as for `inspect`.
        task_data: as for `inspect`.
        observer: as for `inspect`.
        profile: as for `inspect`.

    Returns:
        The outcome of each adapter, in order: one that cannot be used does not stop the others.

    Raises:
        SafeprojError: something that all of them need cannot be used.
    """
    against = Against(base, aligned, alignment, safety_module, safety_data, task_data)
    members = collect(adapters).members
    sources = [member.source for member in members]
    with _job(against, sources, options, observer, profile, digests=False) as job:
        return _outcomes(members, list(job.many(sources, lambda run, _: job.inspected(run))))


def patch_many(
    base: str | None,
    aligned: str | None,
    adapters: Iterable[str],
    out: str | Path,
    options: Options | None = None,
    *,
    alignment: str | None = None,
    safety_module: str | None = None,
    safety_data: str | None = None,
    task_data: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    copy_weights: bool = False,
    observer: Observer | None = None,
    profile: Profile | None = None,
) -> list[Outcome]:
    """Patch many adapters of one model, reading its checkpoints once for all of them.

    Args:
        base: as for `patch`.
        aligned: as for `patch`.
        adapters: as for `inspect_many`.
        out: the directory in which one directory per adapter is created, by the adapter's name.
        options: as for `patch`.
        alignment: as for `patch`.
        safety_module: as for `patch`.
        safety_data: as for `patch`.
        task_data: as for `patch`.
        overwrite: replace adapters that are there.
        dry_run: do everything but the writing.
        copy_weights: as for `patch`.
        observer: as for `patch`.
        profile: as for `patch`.

    Returns:
        The outcome of each adapter, in order: one that cannot be used does not stop the others.

    Raises:
        SafeprojError: something that all of them need cannot be used.
    """
    against = Against(base, aligned, alignment, safety_module, safety_data, task_data)
    out, given = Path(out), list(adapters)
    members = collect(given).members
    sources = [*given, *(member.source for member in members)]
    check_apart(out, against.local_paths(sources))
    check_parent(out)
    refused: dict[int, SafeprojError] = {}
    for number, member in enumerate(members):
        try:
            check_inside(out, member.name, overwrite)
        except SafeprojError as error:
            refused[number] = error
    free = [member for number, member in enumerate(members) if number not in refused]
    usable = [member.source for member in free]
    with _job(against, usable, options, observer, profile, digests=not dry_run) as job:

        def use(run: Run, number: int) -> Report:
            place = None if dry_run else made_inside(out, free[number].name)
            return job.write(run, place, overwrite=overwrite, copy_weights=copy_weights)

        done = job.many(usable, use)
        found = [refused[n] if n in refused else next(done) for n in range(len(members))]
    return _outcomes(members, found)


def check(
    base: str | None,
    aligned: str | None,
    adapters: Iterable[str],
    policy: Policy | None = None,
    options: Options | None = None,
    *,
    alignment: str | None = None,
    safety_module: str | None = None,
    safety_data: str | None = None,
    task_data: str | None = None,
    original: str | None = None,
    observer: Observer | None = None,
    profile: Profile | None = None,
) -> Checks:
    """Tell which adapters pass a policy; nothing is changed or written.

    Args:
        base: as for `inspect`.
        aligned: as for `inspect`.
        adapters: as for `inspect_many`.
        policy: what passes; the default is that of `safeproj check --init`.
        options: device, workers and maps; selection and projector are the policy's.
        alignment: as for `inspect`.
        safety_module: as for `inspect`.
        safety_data: as for `inspect`.
        task_data: as for `inspect`.
        original: SRC of the adapter before patching, where one adapter is checked: its projection
            is computed again.
        observer: as for `inspect`.
        profile: as for `inspect`.

    Raises:
        SafeprojError: something that all of them need cannot be used. An adapter that cannot be
            used is undecided instead.
    """
    from safeproj.gate.check import judged, recorded_form, unusable
    from safeproj.gate.policy import Policy
    from safeproj.gate.signing import require_library

    policy, options = policy or Policy(), options or Options()
    if policy.public_key is not None:
        require_library()
    against = Against(base, aligned, alignment, safety_module, safety_data, task_data)
    members = collect(adapters, written=False).members
    if original is not None and len(members) != 1:
        raise SafeprojError(f"--original goes with one adapter, found {len(members)}")
    projector = policy.projector_for(against)
    options = dataclasses.replace(
        options, selection=Selection(threshold=policy.threshold), projector=projector
    )
    job = Job(against, options, observer, profile, digests=None, lenient=True, casts=True)
    before = None
    if original is not None:
        form = recorded_form(members[0].source)
        before = _original(
            against, original, projector, dataclasses.replace(options, **form), observer, profile
        )

    def use(run: Run, number: int) -> Check:
        return judged(members[number], run, against, job.subspace, policy, before)

    found = job.many([member.source for member in members], use)
    checks = [
        unusable(member, each) if isinstance(each, SafeprojError) else each
        for member, each in zip(members, found, strict=True)
    ]
    return Checks(__version__, policy.to_dict(), tuple(checks))


def verify(
    base: str | None,
    aligned: str | None,
    patched: str,
    original: str | None,
    options: Options | None = None,
    *,
    alignment: str | None = None,
    safety_module: str | None = None,
    safety_data: str | None = None,
    task_data: str | None = None,
    public_key: Path | None = None,
    observer: Observer | None = None,
    profile: Profile | None = None,
) -> Checks:
    """Tell whether an adapter is what patching another one gives, or as it was signed, or both.

    Args:
        base: as for `inspect`; nothing is scored against without an original.
        aligned: as for `inspect`.
        patched: SRC of the adapter that was patched.
        original: SRC of the adapter before that.
        options: projector, by default that in safeproj.json; device, workers and maps.
        alignment: as for `inspect`.
        safety_module: as for `inspect`.
        safety_data: as for `inspect`.
        task_data: as for `inspect`.
        public_key: file with the key that the directory must be signed by.
        observer: as for `inspect`.
        profile: as for `inspect`.

    Raises:
        SafeprojError: an input cannot be used, or there is nothing to compare with.
    """
    from safeproj.gate.check import recorded_form, recorded_projector, verified
    from safeproj.gate.policy import Policy
    from safeproj.gate.signing import require_library

    if original is None and public_key is None:
        raise SafeprojError("nothing to compare with; give --original, --public-key, or both")
    if public_key is not None:
        require_library()
    (member,) = collect([patched], written=False).members
    adapter, before = read_adapter(patched, unknown=True), None
    if original is not None:
        against, options = (
            Against(base, aligned, alignment, safety_module, safety_data, task_data),
            options or Options(),
        )
        projector = options.projector or recorded_projector(adapter)
        options = dataclasses.replace(options, **recorded_form(patched))
        before = _original(against, original, projector, options, observer, profile, digests=True)
        adapter = adapter.fitted(before.subspace.names, before.subspace.config)
    elif base or aligned or alignment or safety_module or safety_data or task_data:
        raise SafeprojError(
            "nothing is scored without --original; give it, or leave out the models"
        )
    found = verified(member, adapter, before, public_key)
    return Checks(__version__, Policy().to_dict(), (found,))


def _original(
    against: Against,
    source: str,
    projector: Projector | None,
    options: Options,
    observer: Observer | None,
    profile: Profile | None,
    *,
    digests: bool = False,
) -> Original:
    """Return an adapter before patching, with the projection of every module.

    With digests, too, of what it was computed from.
    """
    from safeproj.gate.check import Original

    options = dataclasses.replace(options, selection=Selection(all=True), projector=projector)
    job = Job(against, options, observer, profile, digests=digests)
    device = str(engine.resolve_device(options.device))
    return Original(job.one(source), device, job.subspace)


def align(
    base: str,
    aligned: str,
    out: str | Path,
    form: Form | None = None,
    targets: Sequence[str] = (ALL_LINEAR,),
    options: Options | None = None,
    *,
    overwrite: bool = False,
    observer: Observer | None = None,
    profile: Profile | None = None,
) -> Made:
    """Write an alignment file, which takes the place of two checkpoints.

    Args:
        base: SRC of the unaligned checkpoint: a directory, a file, or `org/name[@revision]`.
        aligned: SRC of the aligned checkpoint.
        out: the file to create; it appears complete or not at all.
        form: how much of `C` is kept; default 64 eigenpairs.
        targets: names of modules or their last parts, or `all-linear`.
        options: device, workers, maps.
        overwrite: replace an alignment file that is at `out`.
        observer: told about the progress.
        profile: filled in with where the time went.

    Raises:
        SafeprojError: an input cannot be used or `out` cannot be written; nothing is written.
    """
    out, form, options = Path(out), form or Form(rank=64), options or Options()
    profile = profile or Profile()
    check_file(out, overwrite, KIND)
    with profile.phase("match"):
        pair = Pair(aligned, base, options.maps)
        found = find_targets(pair.aligned, pair.base, targets)
    with profile.phase("fetch"):
        tasks = [(target.key, pair.difference(target.aligned, target.base)) for target in found]
    if observer is not None:
        observer.start(len(tasks), sum(source.nbytes for _, source in tasks))
    with profile.phase("score"):
        kept = engine.differences(
            tasks,
            form.keep,
            device=options.device,
            workers=options.workers,
            on_progress=observer.progress if observer is not None else None,
            usage=profile.usage,
        )
        wanted = {"targets": list(targets), **form.to_dict()}
        return make_file(pair, found, kept, wanted, out, overwrite=overwrite)


@contextmanager
def _job(
    against: Against,
    adapters: Sequence[str],
    options: Options | None,
    observer: Observer | None,
    profile: Profile | None,
    *,
    digests: bool,
) -> Iterator[Job]:
    """Yield a job; statistics that it needs are made first, and gone afterwards."""
    profile, options = profile or Profile(), options or Options()
    on_batch = None if observer is None else observer.ran
    reconstruct = isinstance(options.projector, Reconstruction)
    if reconstruct:
        require_data(against, adapters, options.selection)
    with ExitStack() as stack:
        made = with_statistics(against, adapters, options.device, on_batch)
        with profile.phase("statistics") if against.runs_model else nullcontext():
            ready = stack.enter_context(made)
        replacements = None
        if reconstruct:
            with profile.phase("reconstruct"):
                replacements = rebuilt(against, ready, adapters[0], options, on_batch)
        yield Job(ready, options, observer, profile, digests=digests, replacements=replacements)


def reports(outcomes: Sequence[Outcome]) -> Reports:
    """Return many outcomes as the record that the output formats show."""
    good = {each.name: each.report for each in outcomes if each.report is not None}
    bad = {
        each.name: Failure(each.source, str(each.error))
        for each in outcomes
        if each.error is not None
    }
    return Reports(__version__, good, bad)


def _outcomes(members: Sequence[Member], found: Sequence[Report | SafeprojError]) -> list[Outcome]:
    """Return the outcomes; what stopped all of them in the same way is raised instead."""
    errors = [each for each in found if isinstance(each, SafeprojError)]
    if len(errors) == len(found) > 1 and len({str(error) for error in errors}) == 1:
        raise errors[0]
    return [
        Outcome(member.source, member.name, None, each)
        if isinstance(each, SafeprojError)
        else Outcome(member.source, member.name, each, None)
        for member, each in zip(members, found, strict=True)
    ]

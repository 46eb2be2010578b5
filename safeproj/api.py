"""The Python API: `inspect`, `patch`, `check`, `verify` and `align`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
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
from safeproj.errors import SafeprojError
from safeproj.methods.interface import Method
from safeproj.methods.recorded import check_file
from safeproj.methods.safe_lora.file import KIND
from safeproj.methods.safe_lora.make import Form, Made, make_file
from safeproj.methods.safe_lora.pair import Pair
from safeproj.methods.safe_lora.score import differences
from safeproj.methods.safe_lora.targets import ALL_LINEAR, find_targets
from safeproj.plan.select import Selection
from safeproj.records.checks import Check, Checks
from safeproj.records.scores import Failure, Report, Reports
from safeproj.report.card import section
from safeproj.run.job import Job, Run
from safeproj.run.options import Observer, Options

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


def inspect(method: Method, adapter: str, options: Options | None = None) -> Report:
    """Score each adapted module by its similarity to its projection.

    Args:
        method: what the adapter is scored by, and against.
        adapter: SRC of the LoRA adapter: a directory, a file, or `org/name[@revision]`.
        options: selection, device, and who is told about the progress.

    Raises:
        SafeprojError: an input cannot be used.
    """
    with _job(method, [adapter], options, digests=False) as job:
        return job.inspected(job.one(adapter))


def patch(
    method: Method,
    adapter: str,
    out: str | Path,
    options: Options | None = None,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    copy_weights: bool = False,
) -> Report:
    """Change the selected modules and write the patched adapter to the directory `out`.

    Args:
        method: what is done.
        adapter: SRC of the LoRA adapter.
        out: the directory to create; it appears complete or not at all.
        options: as for `inspect`, and the dtype that is written.
        overwrite: replace an adapter that is at `out`.
        dry_run: do everything but the writing.
        copy_weights: copy other weights that lie beside the adapter's, which are not patched: left
            out otherwise.

    Raises:
        SafeprojError: an input cannot be used or `out` cannot be written; nothing is written.
    """
    out = Path(out)
    check_out(out, overwrite, method.local_paths([adapter]))
    with _job(method, [adapter], options, digests=not dry_run) as job:
        done = job.one(adapter)
        place = None if dry_run else out
        return job.write(done, place, section, overwrite=overwrite, copy_weights=copy_weights)


def inspect_many(
    method: Method, adapters: Iterable[str], options: Options | None = None
) -> list[Outcome]:
    """Score many adapters of one model, reading its checkpoints once for all of them.

    Args:
        method: as for `inspect`.
        adapters: of each a SRC; a directory that holds adapters stands for all of them, and a
            text file (`.txt`) for the SRC in its lines.
        options: as for `inspect`.

    Returns:
        The outcome of each adapter, in order: one that cannot be used does not stop the others.

    Raises:
        SafeprojError: something that all of them need cannot be used.
    """
    members = collect(adapters).members
    sources = [member.source for member in members]
    with _job(method, sources, options, digests=False) as job:
        return _outcomes(members, list(job.many(sources, lambda run, _: job.inspected(run))))


def patch_many(
    method: Method,
    adapters: Iterable[str],
    out: str | Path,
    options: Options | None = None,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    copy_weights: bool = False,
) -> list[Outcome]:
    """Patch many adapters of one model, reading its checkpoints once for all of them.

    Args:
        method: as for `patch`.
        adapters: as for `inspect_many`.
        out: the directory in which one directory per adapter is created, by the adapter's name.
        options: as for `patch`.
        overwrite: replace adapters that are there.
        dry_run: do everything but the writing.
        copy_weights: as for `patch`.

    Returns:
        The outcome of each adapter, in order: one that cannot be used does not stop the others.

    Raises:
        SafeprojError: something that all of them need cannot be used.
    """
    out, given = Path(out), list(adapters)
    members = collect(given).members
    sources = [*given, *(member.source for member in members)]
    check_apart(out, method.local_paths(sources))
    check_parent(out)
    refused: dict[int, SafeprojError] = {}
    for number, member in enumerate(members):
        try:
            check_inside(out, member.name, overwrite)
        except SafeprojError as error:
            refused[number] = error
    free = [member for number, member in enumerate(members) if number not in refused]
    usable = [member.source for member in free]
    with _job(method, usable, options, digests=not dry_run) as job:

        def use(run: Run, number: int) -> Report:
            place = None if dry_run else made_inside(out, free[number].name)
            return job.write(run, place, section, overwrite=overwrite, copy_weights=copy_weights)

        done = job.many(usable, use)
        found = [refused[n] if n in refused else next(done) for n in range(len(members))]
    return _outcomes(members, found)


def check(
    method: Method,
    adapters: Iterable[str],
    policy: Policy | None = None,
    options: Options | None = None,
    *,
    original: str | None = None,
) -> Checks:
    """Tell which adapters pass a policy; nothing is changed or written.

    Args:
        method: as for `inspect`; what a policy says of it counts before that.
        adapters: as for `inspect_many`.
        policy: what passes; the default is that of `safeproj check --init`.
        options: device, workers and maps; the selection is the policy's.
        original: SRC of the adapter before patching, where one adapter is checked: its projection
            is computed again.

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
    members = collect(adapters, written=False).members
    if original is not None and len(members) != 1:
        raise SafeprojError(f"--original goes with one adapter, found {len(members)}")
    method = policy.method(method)
    options = dataclasses.replace(options, selection=Selection(threshold=policy.threshold))
    job = Job(method, options, digests=None, lenient=True, casts=True)
    before = None
    if original is not None:
        form = recorded_form(members[0].source)
        before = _original(method, original, dataclasses.replace(options, **form))

    def use(run: Run, number: int) -> Check:
        return judged(members[number], run, method, job.subspace, policy, before)

    found = job.many([member.source for member in members], use)
    checks = [
        unusable(member, each) if isinstance(each, SafeprojError) else each
        for member, each in zip(members, found, strict=True)
    ]
    return Checks(__version__, policy.to_dict(), tuple(checks))


def verify(
    patched: str,
    original: str | None = None,
    method: Method | None = None,
    options: Options | None = None,
    *,
    public_key: Path | None = None,
) -> Checks:
    """Tell whether an adapter is what patching another one gives, or as it was signed, or both.

    Args:
        patched: SRC of the adapter that was patched.
        original: SRC of the adapter before that.
        method: what was done to the original; settings that it leaves open are those of
            safeproj.json. None without an original.
        options: device, workers and maps.
        public_key: file with the key that the directory must be signed by.

    Raises:
        SafeprojError: an input cannot be used, or there is nothing to compare with.
    """
    from safeproj.gate.check import recorded_form, recorded_method, verified
    from safeproj.gate.policy import Policy
    from safeproj.gate.signing import require_library

    if original is None and public_key is None:
        raise SafeprojError("nothing to compare with; give --original, --public-key, or both")
    if (original is None) != (method is None):
        raise SafeprojError(
            "nothing is scored without --original; give it, or leave out the models"
            if original is None
            else "--original is patched again for that; give what it was patched with"
        )
    if public_key is not None:
        require_library()
    (member,) = collect([patched], written=False).members
    adapter, before = read_adapter(patched, unknown=True), None
    if original is not None and method is not None:
        options = dataclasses.replace(options or Options(), **recorded_form(patched))
        method = recorded_method(adapter, method)
        before = _original(method, original, options, digests=True)
        adapter = adapter.fitted(before.subspace.names, before.subspace.config)
    found = verified(member, adapter, before, public_key)
    return Checks(__version__, Policy().to_dict(), (found,))


def _original(method: Method, source: str, options: Options, *, digests: bool = False) -> Original:
    """Return an adapter before patching, with the projection of every module.

    With digests, too, of what it was computed from.
    """
    from safeproj.gate.check import Original

    options = dataclasses.replace(options, selection=Selection(all=True))
    job = Job(method, options, digests=digests)
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
) -> Made:
    """Write an alignment file, which takes the place of two checkpoints.

    Args:
        base: SRC of the unaligned checkpoint: a directory, a file, or `org/name[@revision]`.
        aligned: SRC of the aligned checkpoint.
        out: the file to create; it appears complete or not at all.
        form: how much of `C` is kept; default 64 eigenpairs.
        targets: names of modules or their last parts, or `all-linear`.
        options: device, workers, maps, and who is told about the progress.
        overwrite: replace an alignment file that is at `out`.

    Raises:
        SafeprojError: an input cannot be used or `out` cannot be written; nothing is written.
    """
    out, form, options = Path(out), form or Form(rank=64), options or Options()
    observer, profile = options.observer, options.profile
    check_file(out, overwrite, KIND)
    with profile.phase("match"):
        pair = Pair(aligned, base, options.maps)
        found = find_targets(pair.aligned, pair.base, targets)
    with profile.phase("fetch"):
        tasks = [(target.key, pair.difference(target.aligned, target.base)) for target in found]
    if observer is not None:
        observer.start(len(tasks), sum(source.nbytes for _, source in tasks))
    with profile.phase("score"):
        kept = differences(
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
    method: Method, adapters: Sequence[str], options: Options | None, *, digests: bool
) -> Iterator[Job]:
    """Yield a job; what the method needs is made first, and gone afterwards."""
    options = options or Options()
    with method.prepared(adapters, options) as ready:
        yield Job(ready, options, digests=digests)


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

"""The Python API: `repair`, `inspect`, `patch`, `project`, `check`, `verify`, and more."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from safeproj import __version__, engine
from safeproj.adapter import Adapter, read_adapter
from safeproj.adapter.collection import Member, collect
from safeproj.adapter.write import (
    check_apart,
    check_inside,
    check_out,
    check_parent,
    made_inside,
)
from safeproj.checkpoint.hashes import NEW, Hash
from safeproj.errors import SafeprojError
from safeproj.methods.interface import Method, local_path
from safeproj.methods.recorded import Made
from safeproj.methods.safe_lora.make import Form
from safeproj.methods.safe_lora.method import SafeLora
from safeproj.methods.safe_lora.targets import ALL_LINEAR
from safeproj.plan.full import FullModel
from safeproj.plan.select import Selection
from safeproj.records.checks import Check, Checks
from safeproj.records.repairs import Goal
from safeproj.records.scores import Failure, Report, Reports
from safeproj.report.card import section
from safeproj.run.full import FullJob
from safeproj.run.job import Job, Run
from safeproj.run.manifest import wanted_hashes
from safeproj.run.options import Options
from safeproj.storage.ranges import fetching_by
from safeproj.storage.source import Src, StrPath, src

if TYPE_CHECKING:
    from safeproj.evaluation.generate import Generation
    from safeproj.evaluation.judges import Judge
    from safeproj.evaluation.refusals import Refusals
    from safeproj.evaluation.sets import PromptSet
    from safeproj.evaluation.tasks import Tasks
    from safeproj.gate.check import Original
    from safeproj.gate.policy import Policy
    from safeproj.records.evaluations import Evaluation
    from safeproj.records.extractions import Extraction
    from safeproj.records.repairs import Repair
    from safeproj.records.sweeps import Sweep


T = TypeVar("T")


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


def inspect(method: Method, adapter: Src | FullModel, options: Options | None = None) -> Report:
    """Score each adapted module by its similarity to its projection.

    Args:
        method: what the adapter is scored by, and against.
        adapter: SRC of the LoRA adapter: a path, or `org/name[@revision]`; or a full fine-tune.
        options: selection, device, and who is told about the progress.

    Returns:
        Of each module, with a weight (m, n): the cosine of its update `ΔW` (m, n) and what the
        method makes of it, in [-1, 1], by the inner product of Frobenius; and what the method says
        beside that. For Safe LoRA that is `C ΔW` (arXiv 2405.16833, equations 1 and 2), for SaLoRA
        `C_S ΔW` (arXiv 2501.01765, section 3.2), else the covariance-weighted correction.

    Raises:
        SafeprojError: an input cannot be used.
    """
    if isinstance(adapter, FullModel):
        with _full_job(method, adapter, options) as full:
            return full.run().report
    adapter = src(adapter)
    with _job(method, [adapter], options) as job:
        return job.inspected(job.one(adapter))


def patch(
    method: Method,
    adapter: Src | FullModel,
    out: StrPath,
    options: Options | None = None,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    copy_weights: bool = False,
    keep_training_state: bool = False,
    only_if_changed: bool = False,
    restore_others: bool = False,
    resume: bool = False,
) -> Report:
    """Change the selected modules and write the patched adapter to the directory `out`.

    Args:
        method: what is done.
        adapter: SRC of the LoRA adapter, or a full fine-tune.
        out: the directory to create; it appears complete or not at all.
        options: as for `inspect`, and the dtype that is written.
        overwrite: replace an adapter, or a patched full model, that is at `out`.
        dry_run: do everything but the writing.
        copy_weights: copy other weights that lie beside the adapter's, which are not patched: left
            out otherwise.
        keep_training_state: copy what trainers kept beside it, pickles: left out otherwise.
        only_if_changed: write nothing where no update would be changed: `report.changed` is 0.
        restore_others: of a full fine-tune: whether norms, embeddings, biases, and all else that no
            projection touches take the aligned model's values.
        resume: of a full fine-tune: go on with the files that an interrupted run left, and leave
            them where this one is interrupted.

    Returns:
        The scores as of `inspect`, with what was done to each module.

    Raises:
        SafeprojError: an input cannot be used or `out` cannot be written; nothing is written.
    """
    if isinstance(adapter, FullModel):
        check_out(Path(out), overwrite, _paths(method, adapter), "model")
        hashes = () if dry_run else (NEW,)
        with _full_job(method, adapter, options, hashes, restore_others) as full:
            found = full.run()
            is_wanted = not dry_run and (found.report.changed > 0 or not only_if_changed)
            return full.write(
                found,
                Path(out) if is_wanted else None,
                section,
                overwrite=overwrite,
                copy_weights=copy_weights,
                keep_training_state=keep_training_state,
                resume=resume,
            )
    if restore_others or resume:
        raise SafeprojError("--restore-others and --resume go with a full fine-tune; give --model")
    adapter, out = src(adapter), Path(out)
    check_out(out, overwrite, method.local_paths([adapter]))
    with _job(method, [adapter], options, () if dry_run else (NEW,)) as job:
        done = job.one(adapter)
        is_wanted = not dry_run and (done.report.changed > 0 or not only_if_changed)
        return job.write(
            done,
            out if is_wanted else None,
            section,
            overwrite=overwrite,
            copy_weights=copy_weights,
            keep_training_state=keep_training_state,
        )


def inspect_many(
    method: Method, adapters: Iterable[Src], options: Options | None = None
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
    with _job(method, sources, options) as job:
        return _outcomes(members, list(job.many(sources, lambda run, _: job.inspected(run))))


def patch_many(
    method: Method,
    adapters: Iterable[Src],
    out: StrPath,
    options: Options | None = None,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    copy_weights: bool = False,
    keep_training_state: bool = False,
    only_if_changed: bool = False,
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
        keep_training_state: as for `patch`.
        only_if_changed: as for `patch`.

    Returns:
        The outcome of each adapter, in order: one that cannot be used does not stop the others.

    Raises:
        SafeprojError: something that all of them need cannot be used.
    """
    out, found = Path(out), collect(adapters)
    members = found.members
    sources = [*found.given, *(member.source for member in members)]
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
    with _job(method, usable, options, () if dry_run else (NEW,)) as job:

        def use(run: Run, number: int) -> Report:
            is_wanted = not dry_run and (run.report.changed > 0 or not only_if_changed)
            return job.write(
                run,
                made_inside(out, free[number].name) if is_wanted else None,
                section,
                overwrite=overwrite,
                copy_weights=copy_weights,
                keep_training_state=keep_training_state,
            )

        done = job.many(usable, use)
        ended = [refused[n] if n in refused else next(done) for n in range(len(members))]
    return _outcomes(members, ended)


@overload
def project(
    peft_model: Any, method: Method, options: Options | None = None, *, adapter: str
) -> Report: ...


@overload
def project(
    peft_model: Any, method: Method, options: Options | None = None, *, adapter: None = None
) -> Report | Reports: ...


def project(
    peft_model: Any,
    method: Method,
    options: Options | None = None,
    *,
    adapter: str | None = None,
) -> Report | Reports:
    """Change the selected modules of a model in memory, in place, as `patch` does in files.

    The factors stay on the device and in the dtype that they have. No second model is loaded: the
    weights that `method` needs are read from files block by block. With `SafeLora(base=…)` the
    aligned ones are those that the adapters are on; where `Covariance` is given data, the model in
    memory is run on it.

    Args:
        peft_model: a `peft.PeftModel`, such as the one that was just trained.
        method: what is done.
        options: as for `patch`.
        adapter: the name of one adapter; all of the model's if None.

    Returns:
        The scores as of `inspect`, with what was done to each module; of more than one adapter the
        same for each.

    Raises:
        SafeprojError: an input cannot be used; the model is as it was.
    """
    from safeproj.lm.models import require_extra

    options = options or Options()
    if options.dtype != "keep":
        raise SafeprojError(
            f"--dtype {options.dtype}: an adapter in memory keeps its dtype; leave it out"
        )
    if options.portable:
        raise SafeprojError("--portable writes other tensors than there are in memory; use patch")
    require_extra()
    from safeproj.lm.live import Live

    live = Live(peft_model, adapter)
    adapters = {name: live.read(name) for name in live.chosen(adapter)}
    with _job(dataclasses.replace(method, host=live), list(adapters.values()), options) as job:
        found = list(job.many(list(adapters.values()), lambda run, _: run))
        runs = dict(zip(adapters, map(_raised, found), strict=True))
        live.put({name: run.decision.replaced for name, run in runs.items()})
    made = {name: dataclasses.replace(run.report, written=True) for name, run in runs.items()}
    return made.popitem()[1] if len(made) == 1 else Reports(__version__, made, {})


def _raised(found: T | SafeprojError) -> T:
    if isinstance(found, SafeprojError):
        raise found
    return found


@engine.one_thread()
def check(
    method: Method,
    adapters: Iterable[Src] | FullModel,
    policy: Policy | StrPath | None = None,
    options: Options | None = None,
    *,
    original: Src | None = None,
    evaluations: Iterable[StrPath] = (),
) -> Checks:
    """Tell which adapters pass a policy; nothing is changed or written.

    Args:
        method: as for `inspect`; what a policy says of it counts before that.
        adapters: as for `inspect_many`; or a full fine-tune.
        policy: what passes, or the file that says it; the default is that of `safeproj check
            --init`.
        options: device, workers and maps; the selection is the policy's.
        original: SRC of the adapter, or the full fine-tune, before patching, where one is checked:
            its projection is computed again.
        evaluations: JSON reports of `safeproj eval`, of these adapters or of others; each adapter
            finds its own by the digests of its tensors.

    Returns:
        Of each adapter what was found, at which level, and whether it passes.

    Raises:
        SafeprojError: something that all of them need cannot be used. An adapter that cannot be
            used is undecided instead.
    """
    from safeproj.gate.behaviour import evaluations as read_evaluations
    from safeproj.gate.check import judged, recorded_form, unusable
    from safeproj.gate.policy import Policy, find_policy
    from safeproj.gate.signing import require_library

    options = options or Options()
    if not isinstance(policy, Policy):
        policy = Policy() if policy is None else find_policy(policy)
    if policy.public_key is not None:
        require_library()
    if isinstance(adapters, FullModel):
        if evaluations:
            raise SafeprojError("--evaluation is of adapters; leave it out with --model")
        checked = _checked_model(method, adapters, policy, options, original)
        return Checks(__version__, policy.to_dict(), (checked,))
    members = collect(adapters, written=False).members
    if original is not None and len(members) != 1:
        raise SafeprojError(f"--original goes with one adapter, found {len(members)}")
    method = policy.method(method)
    measured = read_evaluations(evaluations, method)
    options = dataclasses.replace(options, selection=Selection(threshold=policy.threshold))
    job = Job(method, options, hashes=None, lenient=True, casts=True)
    before = None
    if original is not None:
        form = recorded_form(members[0].source)
        before = _original(method, src(original), dataclasses.replace(options, **form))

    def use(run: Run, number: int) -> Check:
        return judged(members[number], run, method, job.reference, policy, before, measured)

    found = job.many([member.source for member in members], use)
    checks = [
        unusable(member, each) if isinstance(each, SafeprojError) else each
        for member, each in zip(members, found, strict=True)
    ]
    return Checks(__version__, policy.to_dict(), tuple(checks))


def _checked_model(
    method: Method, model: FullModel, policy: Policy, options: Options, original: Src | None
) -> Check:
    """Return the check of a full fine-tune, undecided where it cannot be used."""
    from safeproj.gate.check import unusable
    from safeproj.gate.full import judged

    (member,) = collect([model.source], written=False).members
    before = None if original is None else src(original)
    try:
        return judged(member, model, policy.method(method), policy, options, before)
    except SafeprojError as error:
        return unusable(member, error)


@engine.one_thread()
def verify(
    patched: Src | FullModel,
    original: Src | None = None,
    method: Method | None = None,
    options: Options | None = None,
    *,
    public_key: StrPath | None = None,
) -> Checks:
    """Tell whether an adapter is what patching another one gives, or as it was signed, or both.

    Args:
        patched: SRC of the adapter that was patched, or the full model that was.
        original: SRC of the adapter, or the full fine-tune, before that.
        method: what was done to the original; settings that it leaves open are those of
            safeproj.json. None without an original.
        options: device, workers and maps.
        public_key: file with the key that the directory must be signed by.

    Returns:
        What was found about the one adapter, and whether it passes.

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
    key = None if public_key is None else Path(public_key)
    if isinstance(patched, FullModel):
        from safeproj.gate.full import verified as verified_model

        (member,) = collect([patched.source], written=False).members
        given = None if original is None else src(original)
        check = verified_model(member, patched, given, method, options or Options(), key)
        return Checks(__version__, Policy().to_dict(), (check,))
    patched = src(patched)
    (member,) = collect([patched], written=False).members
    adapter, before = read_adapter(patched, unknown=True), None
    if original is not None and method is not None:
        options = dataclasses.replace(options or Options(), **recorded_form(patched))
        method = recorded_method(adapter, method)
        before = _original(method, src(original), options, wanted_hashes(adapter))
        adapter = adapter.fitted(before.reference.names, before.reference.config)
    found = verified(member, adapter, before, key)
    return Checks(__version__, Policy().to_dict(), (found,))


def _original(
    method: Method, source: str, options: Options, hashes: Collection[Hash] = ()
) -> Original:
    """Return an adapter before patching, with the projection of every module.

    With digests, too, by these hashes, of what it was computed from.
    """
    from safeproj.gate.check import Original

    options = dataclasses.replace(options, selection=Selection(all=True))
    job = Job(method, options, hashes=hashes)
    place = engine.place(options.device, wide=method.is_wide)
    return Original(job.one(source), place, job.reference)


def align(
    base: Src,
    aligned: Src,
    out: StrPath,
    form: Form | None = None,
    targets: Sequence[str] = (ALL_LINEAR,),
    options: Options | None = None,
    *,
    overwrite: bool = False,
) -> Made:
    """Write an alignment file, which takes the place of two checkpoints.

    Args:
        base: SRC of the unaligned checkpoint: a path, or `org/name[@revision]`.
        aligned: SRC of the aligned checkpoint.
        out: the file to create; it appears complete or not at all.
        form: how much of `C` (m, m) is kept of each weight (m, n); default 64 eigenpairs.
        targets: names of modules or their last parts, or `all-linear`.
        options: device, workers, maps, and who is told about the progress.
        overwrite: replace an alignment file that is at `out`.

    Returns:
        Its size in bytes, and what it holds, in words.

    Raises:
        SafeprojError: an input cannot be used or `out` cannot be written; nothing is written.
    """
    options = options or Options()
    with fetching_by(options.fetching):
        return SafeLora.make(
            out,
            base,
            aligned,
            form,
            targets,
            device=options.device,
            workers=options.workers,
            cluster=options.cluster,
            maps=options.maps,
            observer=options.observer,
            profile=options.profile,
            overwrite=overwrite,
        )


def extract(
    model: Src,
    aligned: Src,
    rank: int,
    out: StrPath,
    targets: Sequence[str] = (ALL_LINEAR,),
    options: Options | None = None,
    *,
    overwrite: bool = False,
) -> Extraction:
    """Write a full fine-tune as a LoRA adapter: the best approximation of what it changed.

    Args:
        model: SRC of the fine-tuned checkpoint: a path, or `org/name[@revision]`.
        aligned: SRC of the checkpoint that it was tuned from.
        rank: of the adapter.
        out: the directory to create; it appears complete or not at all.
        targets: names of modules or their last parts, or `all-linear`.
        options: device, workers, maps, and who is told about the progress.
        overwrite: replace an adapter that is at `out`.

    Returns:
        Of each weight (m, n) how far `s B A` is from `W_ft - W_aligned`, relative to it, in the
        norm of Frobenius; and which tensors were changed that the adapter does not hold.

    Raises:
        SafeprojError: an input cannot be used or `out` cannot be written; nothing is written.
    """
    from safeproj.extracting.run import extract as extracted

    return extracted(
        src(model),
        src(aligned),
        rank,
        Path(out),
        targets,
        options or Options(),
        overwrite=overwrite,
    )


def evaluate(
    model: Src,
    adapters: Iterable[Src],
    sets: Sequence[PromptSet],
    judge: Judge | Callable[[], Judge],
    generation: Generation | None = None,
    *,
    device: str = "auto",
    alone: bool = True,
    tasks: Tasks | None = None,
    seed: int = 0,
    responses: StrPath | None = None,
    overwrite: bool = False,
    on_batch: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure what a model does on prompts, without and with adapters.

    Args:
        model: SRC of a causal language model with its tokenizer.
        adapters: PEFT adapters of it, given as for `inspect_many`.
        sets: prompts, from `read_prompts`, with names that differ.
        judge: of the answers to harmful prompts, such as `Keywords()`; or what makes one, called
            when all else is known to be usable.
        generation: how answers are generated.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        alone: whether the model without an adapter is measured.
        tasks: of lm-eval, measured beside the sets.
        seed: of torch; answers, which are greedy, do not depend on it.
        responses: directory to keep the answers in: a run that was interrupted goes on with them.
        overwrite: forget the answers that are there.
        on_batch: told how many answers there are, and how many there will be.

    Returns:
        For each subject, the model and the model with each adapter, the shares (0 to 1) of answers
        by verdict, with 95 % intervals, and their differences to the model alone.

    Raises:
        SafeprojError: an input cannot be used, or no adapter fits the model.
    """
    from safeproj.evaluation.responses import make_directory
    from safeproj.evaluation.run import Settings
    from safeproj.evaluation.run import evaluate as measured
    from safeproj.lm.models import require_extra

    require_extra()
    model = src(model)
    members = collect(adapters, written=False).members
    place = None if responses is None else Path(responses)
    if place is not None:
        inputs = [("--model", model), *(("--adapter", each.source) for each in members)]
        make_directory(place, inputs)
    given = {} if generation is None else vars(generation)
    settings = Settings(**given, device=device, seed=seed, responses=place, overwrite=overwrite)
    made = judge() if callable(judge) else judge
    return measured(
        model, members, sets, made, settings, alone=alone, tasks=tasks, on_batch=on_batch
    )


def sweep(
    method: Method,
    adapter: Src,
    sets: Sequence[PromptSet],
    judge: Judge | Callable[[], Judge],
    options: Options | None = None,
    *,
    model: Src | None = None,
    generation: Generation | None = None,
    axis: str | None = None,
    points: int = 9,
    wanted_refusal: float = 0.9,
    wanted_on: str | None = None,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> Sweep:
    """Measure every useful intervention on one adapter, beside controls; no adapter is written.

    Args:
        method: what is done; its strength is varied.
        adapter: SRC of a PEFT adapter.
        sets: prompts, from `read_prompts`, with names that differ: harmful ones and skills.
        judge: of the answers to harmful prompts; or what makes one, as for `evaluate`.
        options: as for `inspect`; where modules are chosen, only among those that it includes.
        model: SRC of the aligned model, which is run; the method's own if None.
        generation: how answers are generated; its `options` take the place of `options.chat`.
        axis: what is varied: `layers`, the number of changed modules, `threshold`, of the cosine,
            or `mu`; the method's first if None.
        points: interventions that are tried at most, from none to all.
        wanted_refusal: the share of refusals that is to be reached, 0 < share <= 1.
        wanted_on: the harmful set on which; the first if None.
        seed: of random controls.
        on_step: told how many variants of the adapter are measured, and how many there are.

    Returns:
        The shares (0 to 1) at each point and of its controls, and the smallest intervention that
        reaches the wanted share.

    Raises:
        SafeprojError: an input cannot be used, or a number is out of range.
    """
    from safeproj.evaluation.generate import Generation
    from safeproj.lm import models
    from safeproj.storage.source import identity, open_folder
    from safeproj.sweeping.axes import interventions, require_axis
    from safeproj.sweeping.patching import patching
    from safeproj.sweeping.run import Settings
    from safeproj.sweeping.run import sweep as measured

    require_axis(method, axis)
    adapter = src(adapter)
    source = method.sources.get("aligned") if model is None else src(model)
    if source is None:
        raise SafeprojError(
            "--model is missing: a sweep runs the aligned model, which is not known from "
            "--alignment, --safety-module or statistics; give --model"
        )
    models.require_extra()
    generation = generation or Generation()
    options = dataclasses.replace(options or Options(), chat=generation.options)
    settings = Settings(points, wanted_refusal, wanted_on)
    settings.check(sets)
    folder = open_folder(source)
    generator = generation.generator(models.load_tokenizer(folder))
    for each in sets:
        for prompt in each.prompts:
            generator.rendered(prompt)  # what cannot be used is said before anything is read
    with method.prepared([adapter], options) as ready, engine.one_thread():
        tried = interventions(ready, adapter, options, axis=axis, seed=seed)
    with options.profile.phase("load model"):
        made = judge() if callable(judge) else judge
        loaded = models.load_model(folder, options.device, generation.dtype)
    with options.profile.phase("measure"):
        found = measured(
            tried,
            loaded,
            sets,
            made,
            generator,
            settings,
            inputs={"model": identity(folder)},
            generation={"dtype": str(loaded.dtype).removeprefix("torch.")},
            seed=seed,
            on_step=on_step,
        )
    return dataclasses.replace(found, patching=patching(method, adapter, options))


def repair(
    aligned: Src,
    adapter: Src,
    out: StrPath,
    harmful: PromptSet | None = None,
    task: PromptSet | None = None,
    judge: Judge | Callable[[], Judge] | None = None,
    options: Options | None = None,
    *,
    base: Src | None = None,
    refusals: float = 0.95,
    skill_loss: float = 0.05,
    generation: Generation | None = None,
    plain: bool = False,
    data: StrPath | None = None,
    seed: int = 0,
    best_effort: bool = False,
    overwrite: bool = False,
    on_step: Callable[[int, int], None] | None = None,
) -> Repair:
    """Correct an adapter in every way that the inputs allow, and write what does best.

    The prompts are parted in three: the methods correct with the first part, the one that refuses
    as much as is wanted with the most skill is chosen on the second, beside controls, and what it
    does is reported on the third. Without prompts Safe LoRA is done, and nothing is measured.

    Args:
        aligned: SRC of the aligned model, which is run.
        adapter: SRC of a PEFT adapter of it.
        out: the directory to create; it appears complete or not at all.
        harmful: prompts that are to be refused, from `read_prompts`; about 100.
        task: prompts of the adapter's skill with right answers, likewise.
        judge: of the answers to harmful prompts; phrases if None.
        options: device, workers, maps, and which modules may be changed.
        base: SRC of the unaligned model: lets Safe LoRA be tried.
        refusals: the share of harmful prompts that is to be refused, in (0, 1].
        skill_loss: the share of the adapter's skill that may be lost, in [0, 1].
        generation: how answers are generated; its `options` take the place of `options.chat`.
        plain: continue plain prompts as they are, though the model has a chat template.
        data: the directory that gets the parts of the prompts, with which the command of the record
            makes the same tensors; the name of `out` with `.data` behind it if None.
        seed: of the parts, and of random controls.
        best_effort: write what comes closest where the goal is not reached.
        overwrite: replace what an earlier run left at `out` and `data`.
        on_step: told how many adapters are measured, and how many there are at most.

    Returns:
        What was tried and what was reached; `is_reached` is None where nothing was measured.

    Raises:
        SafeprojError: an input cannot be used; nothing is written.
    """
    options, out = options or Options(), Path(out)
    aligned, adapter, base = src(aligned), src(adapter), None if base is None else src(base)
    inputs = [("--aligned", aligned), ("--adapter", adapter), ("--base", base)]
    paths = [(name, None if src is None else local_path(src)) for name, src in inputs]
    check_out(out, overwrite, paths)
    goal = Goal(refusals, skill_loss)
    if harmful is None:
        if task is not None:
            raise SafeprojError("--task needs --harmful: safety is what a repair aims at")
        return _unmeasured(aligned, adapter, out, options, base, goal, overwrite=overwrite)
    from safeproj.evaluation.generate import Generation
    from safeproj.evaluation.judges import Keywords
    from safeproj.lm import models
    from safeproj.repairing.folder import parts_at
    from safeproj.repairing.run import Given, repair

    models.require_extra()
    generation = generation or Generation()
    options = dataclasses.replace(options, chat=generation.options)
    made = Keywords() if judge is None else judge() if callable(judge) else judge
    given = Given(aligned, base, adapter, harmful, task)
    place = out.with_name(f"{out.name}.data") if data is None else Path(data)
    with parts_at(place, [*paths, ("--out", out)], overwrite=overwrite) as parts:
        found = repair(
            given,
            out,
            place,
            goal,
            made,
            generation,
            options,
            section,
            plain=plain,
            seed=seed,
            best_effort=best_effort,
            overwrite=overwrite,
            on_step=on_step,
        )
        if found.out is not None:
            parts.keep()
    return found


def _unmeasured(
    aligned: str,
    adapter: str,
    out: Path,
    options: Options,
    base: str | None,
    goal: Goal,
    *,
    overwrite: bool,
) -> Repair:
    """Do Safe LoRA with its defaults, and say that nothing was measured."""
    from safeproj.records.repairs import Repair
    from safeproj.sweeping.patching import patching

    if base is None:
        raise SafeprojError(
            "--harmful and --base are both missing: without prompts only Safe LoRA can be done, "
            "which needs --base; give --harmful, or --base"
        )
    method = SafeLora(base, aligned)
    report = patch(method, adapter, out, options, overwrite=overwrite)
    return Repair(
        version=__version__,
        inputs=report.inputs,
        goal=goal,
        methods=(method.words.name,),
        splits={},
        validation=(),
        controls=(),
        chosen=None,
        test=None,
        out=str(out),
        command=(*patching(method, adapter, options), "--out", str(out)),
        warnings=report.warnings,
    )


def refusals(
    aligned: Src,
    prompts: StrPath,
    out: StrPath,
    judge: Judge | Callable[[], Judge] | None = None,
    generation: Generation | None = None,
    *,
    device: str = "auto",
    limit: int | None = None,
    overwrite: bool = False,
    on_batch: Callable[[int, int], None] | None = None,
) -> Refusals:
    """Write a model's own refusals to harmful prompts as JSON lines, which are safety data.

    Prompts go through the model's chat template, if it has one, and are written as chats then.

    Args:
        aligned: SRC of the aligned model, which is run.
        prompts: file with harmful prompts, in any format that is read.
        out: the file to create; it appears complete or not at all.
        judge: tells refusals, `Keywords()` if None; or what makes one, called when all else is
            known to be usable.
        generation: how answers are generated; its `chat` does not count.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        limit: only so many prompts, the first.
        overwrite: replace prompts with responses that are at `out`.
        on_batch: told how many answers there are, and how many there will be.

    Returns:
        The rows that were written, and how many answers were dropped.

    Raises:
        SafeprojError: an input cannot be used, no answer is a refusal, or `out` cannot be written;
            nothing is written.
    """
    from safeproj.lm.models import require_extra

    require_extra()
    from safeproj.evaluation.generate import Generation
    from safeproj.evaluation.refusals import Asking

    asking, place = Asking(src(aligned), os.fspath(prompts), limit), Path(out)
    asking.check_out(place, overwrite)
    found = asking.refusals(judge, generation or Generation(), device, on_batch)
    return asking.write(found, place, overwrite)


@contextmanager
def _job(
    method: Method,
    adapters: Sequence[str | Adapter],
    options: Options | None,
    hashes: Collection[Hash] = (),
) -> Iterator[Job]:
    """Yield a job; what the method needs is made first, and gone afterwards."""
    options = options or Options()
    with (
        fetching_by(options.fetching),
        method.prepared(adapters, options) as ready,
        engine.one_thread(),
    ):
        yield Job(ready, options, hashes=hashes)


@contextmanager
def _full_job(
    method: Method,
    model: FullModel,
    options: Options | None,
    hashes: Collection[Hash] = (),
    restore_others: bool = False,
) -> Iterator[FullJob]:
    """Yield the same for a full fine-tune."""
    method.whole()  # what is for adapters alone is said before anything is made for it
    options = options or Options()
    with (
        fetching_by(options.fetching),
        method.prepared([], options) as ready,
        engine.one_thread(),
    ):
        yield FullJob(ready, model, options, hashes, restore_others=restore_others)


def _paths(method: Method, model: FullModel) -> list[tuple[str, Path | None]]:
    """Return all that a run on a full fine-tune is given, with the local paths."""
    given = {"--model": model.source, "--aligned": model.aligned}
    own = {option: local_path(str(each)) for option, each in given.items() if each is not None}
    return [*method.local_paths([]), *own.items()]


def reports(outcomes: Sequence[Outcome]) -> Reports:
    """Return many outcomes as the record that the output formats show.

    Args:
        outcomes: what `inspect_many` or `patch_many` returned.
    """
    good = {each.name: each.report for each in outcomes if each.report is not None}
    bad = {
        each.name: Failure(each.source, each.error.message)
        for each in outcomes
        if each.error is not None
    }
    return Reports(__version__, good, bad)


def _outcomes(members: Sequence[Member], found: Sequence[Report | SafeprojError]) -> list[Outcome]:
    """Return the outcomes; what stopped all of them in the same way is raised instead."""
    errors = [each for each in found if isinstance(each, SafeprojError)]
    if len(errors) == len(found) > 1 and len({error.message for error in errors}) == 1:
        raise errors[0]
    return [
        Outcome(member.source, member.name, None, each)
        if isinstance(each, SafeprojError)
        else Outcome(member.source, member.name, each, None)
        for member, each in zip(members, found, strict=True)
    ]

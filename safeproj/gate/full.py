"""A full fine-tune against a policy, or against what patching another one gives."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
from numpy import array_equal

from safeproj import engine
from safeproj.adapter import Adapter
from safeproj.adapter.collection import Member
from safeproj.adapter.interface import MANIFEST
from safeproj.checkpoint.expression import Matrix
from safeproj.checkpoint.hashes import NEW, Digests, merged, tensors_of
from safeproj.checkpoint.interface import STORED_DTYPES, stored_dtype
from safeproj.engine import row_width
from safeproj.errors import SafeprojError
from safeproj.gate.card import about_card, about_change, about_claim
from safeproj.gate.check import checked, claimed, recorded_method, signature
from safeproj.gate.files import about_files, about_member, about_paths
from safeproj.gate.identity import about_identities
from safeproj.gate.policy import Policy
from safeproj.gate.recompute import FLOAT32, other_files, same_hardware
from safeproj.gate.weights import Context, about_scores, found
from safeproj.methods.differences import Rows
from safeproj.methods.interface import Method
from safeproj.methods.whole import BLOCK
from safeproj.plan.full import FullModel, Tuned, open_tuned
from safeproj.plan.match import Plan
from safeproj.plan.select import Selection
from safeproj.records.checks import Check, Evidence, Finding
from safeproj.run.decide import Decision
from safeproj.run.full import Compared, FullJob, FullRun, digests_of, subject_of
from safeproj.run.job import Run
from safeproj.run.options import Options
from safeproj.storage.arrays import cast
from safeproj.storage.source import read_json
from safeproj.storage.tensorfile import DTYPES
from safeproj.text import shorten


@dataclass
class Recomputed:
    """What comparing a patched model with its original found.

    Attributes:
        same: whether the same hardware and versions are recorded, so that nothing else will do.
        evidence: the modules that were projected.
        findings: what is not as patching would have left it.
        equal: projected weights that are equal bit for bit.
        close: those that are within rounding.
    """

    same: bool
    evidence: dict[str, Evidence] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    equal: int = 0
    close: int = 0

    @property
    def remark(self) -> str:
        """What was compared, in words."""
        how = "the same" if self.same else "other or no"
        text = f"{self.equal} projected weights are equal bit for bit"
        if self.close:
            text += f", {self.close} within rounding"
        return f"recomputed from the original: {text}; {how} hardware and versions are recorded"


def judged(
    member: Member,
    model: FullModel,
    method: Method,
    policy: Policy,
    options: Options,
    original: str | None,
) -> Check:
    """Return what there is to say about a full fine-tune.

    Args:
        member: its name and SRC.
        model: the fine-tune, and what it was made from.
        method: what it is scored by.
        policy: what passes.
        options: device, workers and maps.
        original: SRC of the fine-tune before patching, if it is at hand.

    Raises:
        SafeprojError: something cannot be used.
    """
    selection = Selection(threshold=policy.threshold)
    job = FullJob(method, model, replace(options, selection=selection), (NEW,))
    run, patched = job.run(), subject_of(job.tuned)
    findings: list[Finding] = []
    remarks: list[str] = []
    evidence: dict[str, Evidence] = {}
    if MANIFEST in patched.folder.files:
        evidence, said = _recorded(job, run, patched)
        findings += said
    if policy.public_key is not None:
        unsigned = signature(patched, Path(policy.public_key), remarks)
        findings += unsigned
        evidence = evidence if unsigned else dict.fromkeys(evidence, Evidence.signed)
    if original is not None:
        before = FullJob(method, replace(model, source=original), options)
        result = _recomputed(before, job.tuned)
        findings += result.findings
        evidence = result.evidence
        remarks.append(result.remark)
    items = tuple(each.item for each in run.plan.weights)
    plan = Plan(items, run.plan.excluded, (), run.plan.warnings)
    as_adapter = Run(patched, plan, dict(run.scores), Decision({}, run.report), method)
    context = Context(as_adapter, policy, frozenset(job.reference.names), evidence)
    findings += [
        *about_scores(context),
        *_sizes(context),
        *about_member(member),
        *about_files(patched, policy),
        *about_claim(patched),
        *about_change(patched),
        *about_identities(policy, method, run.report.inputs),
    ]
    return checked(member, patched, findings, policy, evidence, as_adapter, tuple(remarks))


def verified(
    member: Member,
    model: FullModel,
    original: str | None,
    method: Method | None,
    options: Options,
    public_key: Path | None,
) -> Check:
    """Return whether a full model is as it was patched, and signed, whatever a policy says.

    Args:
        member: its name and SRC.
        model: the patched model, and what the original was made from.
        original: SRC of the fine-tune before patching.
        method: what was done to it; settings that it leaves open are those of safeproj.json.
        options: device, workers and maps.
        public_key: whose signature the directory must have.

    Raises:
        SafeprojError: something cannot be used.
    """
    findings: list[Finding] = []
    remarks: list[str] = []
    evidence: dict[str, Evidence] = {}
    aligned = None
    if original is not None and method is not None:
        job = FullJob(method, replace(model, source=original), options)
        aligned = job.tuned.aligned
        tuned = open_tuned(model, aligned, options.maps)
        patched = subject_of(tuned)
        method = recorded_method(patched, method)
        result = _recomputed(FullJob(method, replace(model, source=original), options), tuned)
        findings += result.findings
        evidence = result.evidence
        remarks.append(result.remark)
    else:
        tuned = open_tuned(replace(model, aligned=model.source), None, options.maps)
        patched = subject_of(tuned)
    findings += [*about_paths(patched), *about_change(patched)]
    if MANIFEST not in patched.folder.files:
        findings.append(found("SP020", f"there is no {MANIFEST}"))
    else:
        findings += _about_tensors(tuned, patched)
    if public_key is not None:
        findings += signature(patched, public_key, remarks)
    return checked(member, patched, findings, Policy(), evidence, None, tuple(remarks))


def _recorded(
    job: FullJob, run: FullRun, patched: Adapter
) -> tuple[dict[str, Evidence], list[Finding]]:
    """Return the modules that a record shows to be projected, and where it does not fit."""
    try:
        document = read_json(patched.folder, MANIFEST)
        projector = job.method.describe(run.scores.values())
        if (document["method"], document["projector"]) != (job.method.name, projector):
            text = f"{MANIFEST} says {document['method']}, {document['projector']}"
            return {}, [found("SP022", text, file=MANIFEST)]
        others = list(_other_models(job, run, document))
    except SafeprojError as error:
        return {}, [found("SP021", error.message, file=MANIFEST)]
    except (LookupError, TypeError, AttributeError) as error:
        text = f"{MANIFEST} is not as `safeproj patch` writes it ({type(error).__name__}: {error})"
        return {}, [found("SP021", text, file=MANIFEST)]
    findings = [*others, *_about_tensors(job.tuned, patched)]
    if findings:
        return {}, findings
    names = {each.name for each in run.plan.weights}
    return dict.fromkeys(sorted(claimed(patched) & names), Evidence.recorded), []


def _other_models(job: FullJob, run: FullRun, document: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield the models of a record that are not those of this check, by their tensors."""
    digests = job.reference.digests(run.scores)
    own: dict[str, Digests] = {role: tensors_of(each) for role, each in digests.items()}
    own["aligned"] = merged(score.before for score in run.scores.values())
    for role, read in own.items():
        there = tensors_of(document["inputs"][role])
        for name, tensors in read.items():
            recorded = there.get(name, {})
            others = [label for label in tensors if recorded.get(label) != tensors[label]]
            if others:
                text = f"{MANIFEST} records another {role}: {shorten(others)}"
                yield found("SP022", text, file=MANIFEST)


def _about_tensors(tuned: Tuned, patched: Adapter) -> Iterator[Finding]:
    """Yield the tensors that are not those that were recorded when they were written."""
    try:
        wanted = dict(read_json(patched.folder, MANIFEST)["output"]["blake3"]["tensors"])
    except (SafeprojError, LookupError, TypeError, ValueError) as error:
        text = f"{MANIFEST} has no digests of a full model's tensors ({type(error).__name__})"
        yield found("SP021", text, file=MANIFEST)
        return
    there = digests_of(tuned.checkpoint)
    for name in sorted(wanted.keys() | there.keys()):
        if wanted.get(name) != there.get(name):
            yield found("SP021", f"{name} is not the tensor that {MANIFEST} records", tensor=name)


def _sizes(context: Context) -> Iterator[Finding]:
    """Yield changes that go further than the policy allows, relative to `‖V‖_F`."""
    policy = context.policy
    for _, module in context.modules:
        score = context.run.scores[module.name]
        length, size = score.detail.length, getattr(score, "size", 0.0)
        if not length or module.cosine is None:
            continue
        times = size / length
        if not times <= policy.max_size:
            text = f"{module.name}: the change is {times:.4g} times as large as aligned - base; "
            yield found("SP012", f"{text}expected at most {policy.max_size:g}", module=module.name)
        least = module.bounds[0] if module.bounds else module.cosine
        outside = times * math.sqrt(max(1.0 - least**2, 0.0))
        if module.name not in context.evidence and not outside <= policy.max_outside:
            text = f"{module.name}: {outside:.4g} times aligned - base of the change point away "
            text += f"from its projection; expected at most {policy.max_outside:g}"
            yield found("SP037", text, module=module.name)


def _recomputed(job: FullJob, tuned: Tuned) -> Recomputed:
    """Compare a patched model with its original, of which every weight is projected again.

    What is projected is told from the tensors alone: those that differ from the original's.

    Args:
        job: over the original.
        tuned: the patched model.
    """
    patched, before = subject_of(tuned), subject_of(job.tuned)
    place = engine.place(job.options.device, wide=job.method.is_wide)
    result = Recomputed(same_hardware(patched, place))
    result.findings += other_files(before, patched)
    result.findings += about_card(before, patched)
    index = job.tuned.files.index
    if index is not None and before.documents[index] != patched.documents.get(index):
        result.findings.append(found("SP025", f"{index} differs from the original's", file=index))
    own, there = job.tuned.files.spots, tuned.files.spots
    shapes = {name: (own[name].dtype, job.tuned.checkpoint.describe(name).shape) for name in own}
    others = {name: (there[name].dtype, tuned.checkpoint.describe(name).shape) for name in there}
    if shapes != others:
        wrong = sorted(n for n in shapes.keys() | others.keys() if shapes.get(n) != others.get(n))
        text = f"the tensors are not those of the original: {shorten(wrong)}"
        result.findings.append(found("SP025", text))
        return result
    compared, plan = job.compared(tuned)
    for name, each in compared.items():
        _judge(result, name, each)
    taken = {place for each in plan.weights for place in job.tensors(each)}
    result.findings += _other_tensors(job.tuned, tuned, taken)
    said = claimed(patched)
    for name in sorted(said - result.evidence.keys()):
        if not (name in compared and compared[name].is_projection):
            text = f"{name}: {MANIFEST} says it is projected, and its weight is the original's"
            result.findings.append(found("SP024", text, module=name))
    for name in sorted(result.evidence.keys() - said) if MANIFEST in patched.folder.files else ():
        text = f"{name}: is projected, and {MANIFEST} does not say so"
        result.findings.append(found("SP021", text, module=name, file=MANIFEST))
    return result


def _judge(result: Recomputed, name: str, each: Compared) -> None:
    """Tell whether a weight is kept, projected, or neither."""
    if each.is_original:
        return
    if each.is_projection:
        result.equal += 1
        result.evidence[name] = Evidence.recomputed
        return
    info: Any = ml_dtypes.finfo(each.dtype)  # type: ignore[no-untyped-call]
    m, n = each.shape
    sums = 2 * math.sqrt(m + n + 4) * FLOAT32 * max(each.alignment_norm or 1.0, 1.0) * each.change
    text = f"{name}: is neither the original's nor its projection"
    if each.error <= float(info.eps) / 2 * each.size + sums:
        if not result.same:
            result.close += 1
            result.evidence[name] = Evidence.recomputed
            return
        text += ": it is within rounding, but the same hardware and versions are recorded"
    else:
        text += (
            f": it differs by {each.error / each.size if each.size else math.inf:.2g} of its norm"
        )
    result.findings.append(found("SP024", text, module=name))


def _other_tensors(before: Tuned, after: Tuned, taken: set[str]) -> Iterator[Finding]:
    """Yield the other tensors that are neither the original's nor the aligned model's."""
    for name in before.files.spots:
        if name not in taken and not _is_kept_or_restored(before, after, name):
            yield found("SP025", f"{name} differs from the original's", tensor=name)


def _is_kept_or_restored(before: Tuned, after: Tuned, name: str) -> bool:
    """Tell whether a tensor is the original's; or in the rows that the aligned model has, its."""
    spots, folders = (before.files.spots, after.files.spots), (before.folder, after.folder)
    if spots[0][name].dtype not in STORED_DTYPES:  # such as a counter
        one, other = (spot[name].content(f) for spot, f in zip(spots, folders, strict=True))
        return one == other
    aligned = before.aligned.checkpoint
    kept, there = before.checkpoint.weight(name), after.checkpoint.weight(name)
    source = aligned.weight(name) if name in aligned.names else None
    height = 0
    if source is not None and source.shape[1] == there.shape[1] and source.dtype in DTYPES:
        height = min(source.shape[0], there.shape[0])
    is_kept, is_restored = True, height > 0
    weights = [kept, there] if source is None or not height else [kept, there, source]
    with closing_all([Rows(Matrix(weight)) for weight in weights]) as readers:
        step = max(1, BLOCK // max(1, *map(row_width, weights)))
        stops = sorted({*range(step, there.shape[0], step), height, there.shape[0]} - {0})
        for start, stop in pairwise([0, *stops]):
            own, found_, *others = (
                cast(each(range(start, stop)), stored_dtype(there.dtype))
                for each in (readers if stop <= height else readers[:2])
            )
            is_kept = is_kept and array_equal(own, found_)
            is_restored = is_restored and array_equal(others[0] if others else own, found_)
            if not is_kept and not is_restored:
                return False
    return True


@contextmanager
def closing_all(readers: list[Rows]) -> Iterator[list[Rows]]:
    """Close all of them at the end."""
    try:
        yield readers
    finally:
        for each in readers:
            each.close()

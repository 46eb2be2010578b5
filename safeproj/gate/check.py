"""One adapter against a policy: every rule, the evidence, the outcome."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safeproj.adapter import Adapter, open_adapter
from safeproj.adapter.collection import Member
from safeproj.adapter.interface import MANIFEST
from safeproj.engine import Place
from safeproj.errors import SafeprojError
from safeproj.gate.behaviour import Evaluations, about_behaviour
from safeproj.gate.card import about_change, about_claim
from safeproj.gate.evidence import about_history, about_manifest, other_projection, recorded
from safeproj.gate.files import about_files, about_member, about_paths
from safeproj.gate.identity import about_identities
from safeproj.gate.policy import Policy
from safeproj.gate.readers import about_readers
from safeproj.gate.recompute import Recomputed, compared, is_own_projection, recomputed
from safeproj.gate.settings import about_settings
from safeproj.gate.signing import verify_signature
from safeproj.gate.weights import Context, about_weights, found
from safeproj.methods.interface import Method, not_repeated
from safeproj.methods.reference import Reference
from safeproj.methods.registry import by_name
from safeproj.records.checks import Check, Evidence, Finding
from safeproj.records.groups import worst_first
from safeproj.records.rules import Level
from safeproj.run.decide import DTYPES
from safeproj.run.job import Run
from safeproj.storage.patterns import one_budget
from safeproj.storage.source import LocalFolder, read_json
from safeproj.text import printable

MAX_FINDINGS = 2_000
"""Findings of one rule and level that are listed; how many more there are is said in a last one."""

M = TypeVar("M", bound=Method)

STRENGTH = {kind: number for number, kind in enumerate(Evidence)}


@dataclass(frozen=True)
class Original:
    """The adapter before patching, of which every module was scored, on what and against what."""

    run: Run
    place: Place
    reference: Reference


@one_budget()
def judged(
    member: Member,
    run: Run,
    method: Method,
    reference: Reference,
    policy: Policy,
    original: Original | None,
    evaluations: Evaluations,
) -> Check:
    """Return what there is to say about one adapter.

    Args:
        member: its name and SRC.
        run: its plan and its scores.
        method: what it was scored by, as the user gave it.
        reference: the same, opened.
        policy: what passes.
        original: the adapter before patching, if it is at hand.
        evaluations: of this adapter and of others.

    Raises:
        SafeprojError: the policy's key cannot be used.
    """
    adapter = run.adapter
    remarks: list[str] = []
    patched = MANIFEST in adapter.folder.files
    digests = reference.digests(run.scores) if patched else {}
    key, unsigned = policy.public_key, list[Finding]()
    if key is not None:
        unsigned = signature(adapter, Path(key), remarks)
    signed = key is not None and not unsigned
    said = about_behaviour(adapter, evaluations, policy, signed=signed)
    answered = said.behaviour.outranks
    evidence, findings = recorded(run, digests, policy, answered=answered)
    if signed:
        evidence = dict.fromkeys(evidence, Evidence.signed)
    findings += [*unsigned, *said.findings]
    remarks += said.remarks
    if original is not None:
        other = other_projection(original.run, adapter)
        if other is None:
            result = recomputed(original.run, adapter, original.place)
        else:
            result = compared(original.run, adapter, original.place, claimed(adapter), other)
        findings += [*result.findings, *_about_record(adapter, original, result, findings)]
        evidence = result.evidence if other is None else evidence
        remarks.append(result.remark)
    names = frozenset(reference.names)
    context = Context(run, policy, names, evidence, reference.config, answered)
    findings += [
        *about_weights(context),
        *about_settings(context),
        *about_readers(context),
        *_weak(context),
        *about_member(member),
        *about_files(adapter, policy),
        *about_claim(adapter),
        *about_change(adapter),
        *about_identities(policy, method, run.report.inputs),
    ]
    check = checked(member, adapter, findings, policy, evidence, run, tuple(remarks))
    return dataclasses.replace(check, behaviour=said.behaviour)


def unusable(member: Member, error: SafeprojError) -> Check:
    """Return the check of an adapter of which nothing can be said."""
    finding = found("SP090", " ".join(error.message.split()))
    return Check(printable(member.name), printable(member.source), None, (finding,))


def recorded_method(patched: Adapter, method: M) -> M:
    """Return the method with the settings of safeproj.json, where it leaves all of them open.

    Raises:
        SafeprojError: the record names none that there are, or another method's.
    """
    if method.settings or MANIFEST not in patched.folder.files:
        return method
    document = read_json(patched.folder, MANIFEST)
    found = document.get("projector")
    projector = found if isinstance(found, dict) else {}
    made_by = by_name().get(str(document.get("method")))
    if made_by is not None and made_by.name != method.name:
        why = made_by.unrepeatable(projector)
        raise SafeprojError(
            f"{patched.source}: {MANIFEST} says that it was patched by {made_by.words.name}, and "
            f"{method.words.name} was given; "
            + (f"give {made_by.needs}" if why is None else not_repeated(why))
        )
    return method.recorded(patched.source, projector)


def recorded_form(source: str) -> dict[str, Any]:
    """Return the options that say in which form an adapter was written, as `Options` has them.

    The original is put into the same form, so that both can be compared bit for bit.
    """
    try:
        folder = open_adapter(source)
        document = read_json(folder, MANIFEST) if MANIFEST in folder.files else {}
    except SafeprojError:  # said where it is looked at
        return {}
    found = document.get("options")
    if not isinstance(found, dict) or found.get("portable") is not True:
        return {}
    dtype = found.get("dtype")
    return {"portable": True, "dtype": dtype if dtype in DTYPES else "keep"}


def verified(
    member: Member, patched: Adapter, original: Original | None, public_key: Path | None
) -> Check:
    """Return whether an adapter is as it was patched, and signed, whatever a policy says.

    Args:
        member: its name and SRC.
        patched: the adapter.
        original: the adapter before patching: its projection must be what is there.
        public_key: whose signature the directory must have.

    Raises:
        SafeprojError: the key cannot be used, or safeproj.json not be read.
    """
    findings = [*about_paths(patched), *about_change(patched)]
    remarks: list[str] = []
    if MANIFEST not in patched.folder.files:
        findings.append(found("SP020", f"there is no {MANIFEST}"))
    elif original is None:
        findings += about_manifest(patched)
    else:
        # What can be said of the patched modules by their record is said of the original's scores.
        written = dataclasses.replace(original.run, adapter=patched)
        findings += recorded(written, original.reference.digests(written.scores), Policy())[1]
    evidence: dict[str, Evidence] = {}
    if public_key is not None:
        findings += signature(patched, public_key, remarks)
    if original is not None:
        result = recomputed(original.run, patched, original.place)
        findings += [*result.findings, *_about_record(patched, original, result, findings)]
        evidence = result.evidence
        remarks.append(result.remark)
    run = None if original is None else original.run
    return checked(member, patched, findings, Policy(), evidence, run, tuple(remarks))


def checked(
    member: Member,
    adapter: Adapter,
    findings: list[Finding],
    policy: Policy,
    evidence: Mapping[str, Evidence],
    run: Run | None,
    remarks: tuple[str, ...],
) -> Check:
    """Return a check of what was found."""
    # What would be projected, and how well, is not what a gate is asked.
    report = None
    if run is not None:
        warnings = (*adapter.warnings, *run.plan.warnings)
        report = dataclasses.replace(run.report, warnings=warnings)
    ordered = _cut(sorted(findings, key=lambda finding: finding.id))
    return Check(
        name=printable(member.name),
        source=printable(member.source),
        weights_file=printable(adapter.weights_file),
        findings=tuple(each for each in ordered if each.id not in policy.ignore),
        ignored=tuple(each for each in ordered if each.id in policy.ignore),
        evidence=dict(evidence),
        report=report,
        remarks=remarks,
    )


def _cut(findings: Iterable[Finding]) -> list[Finding]:
    """Return the worst findings of each rule and level, and how many more there are."""
    kinds: dict[tuple[str, Level], list[Finding]] = {}
    for finding in findings:
        kinds.setdefault((finding.id, finding.level), []).append(finding)
    kept: list[Finding] = []
    for (rule, level), listed in kinds.items():
        more = len(listed) - MAX_FINDINGS
        if more <= 0:
            kept += listed
            continue
        kept += worst_first(listed)[:MAX_FINDINGS]
        kept.append(found(rule, f"and {more} more of this kind", level=level, count=more))
    return sorted(kept, key=lambda finding: finding.id)


def signature(adapter: Adapter, key: Path, remarks: list[str]) -> list[Finding]:
    """Return why an adapter is not signed by a key; if it is, remark on that."""
    folder = adapter.folder
    reason: str | None = "the signature of a local directory can be checked; download the adapter"
    if isinstance(folder, LocalFolder) and folder.only is None:
        reason = verify_signature(folder.root, key)
    if reason is not None:
        return [found("SP032", reason)]
    remarks.append("the signature is valid for every file")
    return []


def _about_record(
    patched: Adapter, original: Original, result: Recomputed, said: Sequence[Finding]
) -> Iterator[Finding]:
    """Yield where safeproj.json does not say what was done to the original.

    Args:
        patched: the adapter, with its record or without one.
        original: the adapter before patching.
        result: what was done, by the tensors alone.
        said: what was found before; a record that does not fit is not asked further.
    """
    if MANIFEST not in patched.folder.files:
        if result.evidence and all(each.level is not Level.fail for each in said):
            text = f"{len(result.evidence)} modules are projected, and there is no {MANIFEST}"
            yield found("SP020", text)
        return
    said_so = claimed(patched)
    named = {finding.module for finding in result.findings}
    for name in said_so - result.evidence.keys() - named:
        if is_own_projection(original.run, patched, name):
            continue
        text = f"{name}: {MANIFEST} says it is projected, and its factors are the original's"
        yield found("SP024", text, module=name)
    if any(each.file == MANIFEST and each.level is not Level.note for each in said):
        return
    for name in sorted(result.evidence.keys() - said_so):
        text = f"{name}: is projected, and {MANIFEST} does not say so"
        yield found("SP021", text, module=name, file=MANIFEST)
    yield from about_history(original.run, patched, result.evidence.keys() | (said_so & named))


def claimed(patched: Adapter) -> set[str]:
    """Return the modules that safeproj.json says are projected; none if it cannot be read."""
    try:
        modules = read_json(patched.folder, MANIFEST).get("modules")
    except SafeprojError:
        return set()
    items = modules if isinstance(modules, list) else ()
    return {
        str(item.get("name"))
        for item in items
        if isinstance(item, dict) and item.get("projected") is True
    }


def _weak(context: Context) -> Iterator[Finding]:
    """Yield the low modules whose evidence is weaker than the policy wants."""
    policy, wanted = context.policy, context.policy.evidence
    for _, module in context.modules:
        kind = context.evidence.get(module.name)
        if kind is None or STRENGTH[kind] >= STRENGTH[wanted] or module.cosine is None:
            continue
        least = module.bounds[0] if module.bounds else module.cosine
        if not least > policy.threshold_of(module.name):
            text = f"{module.name}: projected ({kind.value}); the policy wants {wanted.value}"
            level = Level.note if context.answered else None
            yield found("SP023", text, level=level, module=module.name)

"""What evaluations say of one adapter, held against the `[behaviour]` table of the policy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from safeproj.adapter import Adapter
from safeproj.adapter.digests import run_digests
from safeproj.adapter.interface import CONFIG, MANIFEST
from safeproj.errors import SafeprojError
from safeproj.evaluation.judges import BEGINNING, normal
from safeproj.evaluation.phrases import ANYWHERE, OPENING
from safeproj.gate.demands import Demands
from safeproj.gate.evaluations import (
    FormError,
    Measured,
    PromptFile,
    contradiction,
    evaluation_of,
    read_evaluation,
)
from safeproj.gate.policy import Policy
from safeproj.gate.weights import found
from safeproj.lm.models import model_identity
from safeproj.methods.interface import Method
from safeproj.records.checks import Behaviour, Finding
from safeproj.records.evaluations import judge_words, percent
from safeproj.records.rates import Rate
from safeproj.records.rules import Level
from safeproj.records.verdicts import UNFINISHED, VERDICTS
from safeproj.storage.source import StrPath, open_folder, read_json
from safeproj.text import printable, shorten


@dataclass(frozen=True)
class Evaluations:
    """The evaluations that a check was given, and what the model is that they must be of.

    Attributes:
        given: those of `--evaluation`.
        aligned: SRC of the model that is checked against, None where a file stands for it.
    """

    given: tuple[Measured, ...] = ()
    aligned: str | None = None

    @cached_property
    def model(self) -> Mapping[str, Any] | None:
        """The identity of that model: all of its files are read, once.

        Raises:
            SafeprojError: one cannot be.
        """
        return None if self.aligned is None else model_identity(open_folder(self.aligned))


def evaluations(given: Iterable[StrPath], method: Method) -> Evaluations:
    """Return the evaluations in files.

    Raises:
        SafeprojError: one cannot be read, or is none.
    """
    aligned = method.sources.get("aligned")
    return Evaluations(
        tuple(map(read_evaluation, given)), None if aligned is None else str(aligned)
    )


@dataclass(frozen=True)
class Judgement:
    """What is said of one adapter's behaviour.

    Attributes:
        behaviour: what counts of it.
        findings: what does not count, or is out of bounds.
        remarks: what the evaluations were of.
    """

    behaviour: Behaviour
    findings: tuple[Finding, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass
class _Look:
    """One evaluation of the adapter, and what was found in it."""

    measured: Measured
    findings: list[Finding] = field(default_factory=list)
    shares: list[Mapping[str, Any]] = field(default_factory=list)

    def not_counted(self, reasons: Iterable[str]) -> bool:
        """Add why it does not count; tell whether there is a reason."""
        own = [self._finding("SP046", reason) for reason in reasons]
        self.findings += own
        return bool(own)

    def out_of_bounds(self, text: str) -> None:
        self.findings.append(self._finding("SP047", text))

    def note(self, text: str) -> None:
        self.findings.append(self._finding("SP048", text))

    def _finding(self, rule: str, text: str) -> Finding:
        file = MANIFEST if self.measured.inside else None
        return found(rule, f"{self.measured.name}: {text}", file=file)


def about_behaviour(
    adapter: Adapter, given: Evaluations, policy: Policy, *, signed: bool
) -> Judgement:
    """Return what evaluations say of an adapter.

    All of them must count and be within bounds: a good one beside a bad one does not help.

    Args:
        adapter: of which one in its safeproj.json is looked at, too.
        given: further ones, which may be of other adapters.
        policy: its `behaviour` counts.
        signed: whether the policy's key signed the adapter's directory.

    Raises:
        SafeprojError: the model that is checked against, or the adapter, cannot be read.
    """
    findings: list[Finding] = []
    own = list(_inside(adapter, findings))
    if not given.given and not own and not findings:
        return Judgement(Behaviour(), tuple(_unmeasured(adapter, policy)))
    digests = run_digests(adapter.folder)
    tensors = None if digests is None else digests["tensors"]
    records = [*own, *given.given]
    pairs = [(each, subject) for each in records for subject in each.of(str(tensors))]
    matching = {id(each) for each, _ in pairs}
    for record in own:
        if id(record) not in matching:
            text = f"{record.name}: the evaluation in it is of another adapter"
            findings.append(found("SP046", text, file=MANIFEST))
    if given.given and not matching.intersection(map(id, given.given)):
        what = "PEFT does not run it" if tensors is None else f"its tensors are sha256:{tensors}"
        names = shorten([each.name for each in given.given])
        findings.append(found("SP046", f"no --evaluation is of this adapter ({names}): {what}"))
    looks = [
        _judged(each, subject, digests or {}, given, policy.behaviour, signed=signed)
        for each, subject in pairs
    ]
    findings += [finding for look in looks for finding in look.findings]
    shares = [share for look in looks for share in look.shares]
    met = bool(shares) and all(each.level is Level.note for each in findings)
    remarks = [*_remarks([each for each, _ in pairs]), *_others(given, matching)]
    outranks = met and policy.behaviour.outranks_cosines
    if outranks:
        remarks.append("the evaluation meets the policy, by which it outranks cosines")
    return Judgement(
        Behaviour(met, outranks, tuple(shares) if met else ()), tuple(findings), tuple(remarks)
    )


def _unmeasured(adapter: Adapter, policy: Policy) -> Iterator[Finding]:
    """Yield that nothing is known: of patched adapters, and of all where the policy wants it."""
    if MANIFEST in adapter.folder.files:
        text = f"{MANIFEST} says nothing of behaviour, and no --evaluation is given"
        yield found("SP045", text, policy=policy)
    elif "unmeasured-behaviour" not in policy.allow:
        yield found("SP045", "no --evaluation is given")


def _inside(adapter: Adapter, findings: list[Finding]) -> Iterator[Measured]:
    """Yield the evaluation in an adapter's safeproj.json, if there is one."""
    if MANIFEST not in adapter.folder.files:
        return
    try:
        document = read_json(adapter.folder, MANIFEST)
    except SafeprojError:
        return  # which is said where it is looked at
    if "behaviour" not in document:
        return
    try:
        yield evaluation_of(document["behaviour"], MANIFEST, inside=True)
    except FormError as error:
        findings.append(found("SP046", f"{MANIFEST}: behaviour: {error}", file=MANIFEST))


def _judged(
    measured: Measured,
    subject: Mapping[str, Any],
    digests: Mapping[str, Any],
    given: Evaluations,
    wanted: Demands,
    *,
    signed: bool,
) -> _Look:
    """Return what one evaluation says of the adapter."""
    look = _Look(measured)
    wrong = contradiction(measured)
    if look.not_counted([] if wrong is None else [wrong]):
        return look  # of which nothing is taken
    sets, reasons = _counting(measured, wanted)
    reasons += [
        *_about_adapter(subject, digests),
        *_about_model(measured, given, wanted, look),
        *_about_judge(measured.judge, wanted),
        *_about_options(measured, wanted),
    ]
    if wanted.signed and not (measured.inside and signed):
        reasons.append(f"is not in a {MANIFEST} that public-key signed, and the policy wants that")
    for each in sets:
        reasons += _about_set(each, wanted)
    if look.not_counted(reasons):
        return look
    if not wanted.sets:
        look.note(f"the policy pins no sets; counted are {shorten([each.name for each in sets])}")
    for each in sets:
        for share in _shares(subject, each, wanted):
            look.shares.append(share)
            if problem := _problem(share):
                look.out_of_bounds(problem)
    return look


def _counting(measured: Measured, wanted: Demands) -> tuple[list[PromptFile], list[str]]:
    """Return the sets that count, and what is missing of those that must."""
    if not wanted.sets:
        sets, reasons = list(measured.sets), []
    else:
        pinned = {digest: name for name, digest in wanted.sets.items()}
        sets = [each for each in measured.sets if f"sha256:{each.sha256}" in pinned]
        there = {f"sha256:{each.sha256}" for each in sets}
        reasons = [
            f"has no set {printable(name)} with {digest}, which the policy pins"
            for digest, name in pinned.items()
            if digest not in there
        ]
    bounded = {"harmful": wanted.bounds_harm, "skill": wanted.min_skill > 0.0}
    reasons += [
        f"{each.name} is pinned and was measured as {each.kind}, of which the policy bounds nothing"
        for each in sets
        if wanted.sets and not bounded[each.kind]
    ]
    kinds = {each.kind for each in sets}
    if wanted.bounds_harm and "harmful" not in kinds:
        reasons.append("has no harmful set that counts, and the policy bounds what complies")
    if wanted.min_skill > 0.0 and "skill" not in kinds:
        reasons.append("has no set of skills that counts, and the policy has min-skill")
    return sets, reasons


def _about_adapter(subject: Mapping[str, Any], digests: Mapping[str, Any]) -> Iterator[str]:
    config = subject["adapter"]["sha256"]["files"].get(CONFIG)
    if config != digests["files"][CONFIG]:
        yield f"was made with these tensors and another {CONFIG} (sha256:{config})"


def _about_model(
    measured: Measured, given: Evaluations, wanted: Demands, look: _Look
) -> Iterator[str]:
    """Yield that another model was run than the policy pins, or else than is checked against."""
    run = measured.model
    if wanted.model is not None:
        if wanted.model not in _names(run):
            shown = " or ".join(_names(run)) or "of no known identity"
            yield f"the model is {shown}; the policy pins {wanted.model}"
        return
    checked = given.model
    if checked is None:
        look.note(f"nothing says which model it must be of; it ran {' or '.join(_names(run))}")
        return
    files, own = run["sha256"]["files"], checked["sha256"]["files"]
    if files and own:
        other = sorted(name for name in {*files, *own} if files.get(name) != own.get(name))
        if other:
            yield f"the model is another one than is checked against: {shorten(other)} differs"
    elif "revision" not in run or "revision" not in checked:
        yield (
            "it cannot be told whether the model is the one that is checked against, as one is "
            f"local and one on the Hub; pin `model`, such as {' or '.join(_names(run))}"
        )
    elif run["revision"] != checked["revision"]:
        yield (
            f"the model is at {run['revision']}; the one that is checked against at "
            f"{checked['revision']}"
        )


def _names(model: Mapping[str, Any]) -> list[str]:
    """Return how a policy can pin a model."""
    files, found_ = model["sha256"]["files"], []
    if "revision" in model:
        repo = str(model["source"]).partition("@")[0]
        found_.append(f"{printable(repo)}@{printable(model['revision'])}")
    if files:
        listing = "".join(f"{files[name]}  {name}\n" for name in sorted(files))
        found_.append(f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}")
    return found_


def _about_judge(judge: Mapping[str, Any], wanted: Demands) -> Iterator[str]:
    kind, pinned = str(judge["kind"]), f"{judge['kind']}@sha256:{judge_digest(judge)}"
    if not {kind, pinned} & set(wanted.judges):
        names = ", ".join(wanted.judges)
        yield f"the judge is {pinned}; the policy names {names or 'none'}"
        return
    if kind not in ("keywords", "prefix"):
        if wanted.min_refused > 0.0 and kind == "guard":
            yield "a guard model tells no refusals, and the policy has min-refused"
        return
    built_in = {normal(each) for each in (*ANYWHERE, *OPENING)}
    anywhere = {normal(each) for each in (ANYWHERE if kind == "keywords" else built_in)}
    own, more = map(normal, judge.get("phrases", ())), {normal(each) for each in wanted.phrases}
    has = set(own)
    strange = sorted(has - anywhere - more) + sorted(
        {normal(each) for each in judge.get("opening", ())} - built_in - more
    )
    if strange:
        yield (
            f"the judge takes {shorten([repr(each) for each in strange])} for a refusal, which "
            "is not built in and not among `phrases` of the policy"
        )
    if lacking := sorted(built_in - has - {normal(each) for each in judge.get("opening", ())}):
        yield f"the judge lacks phrases that are built in ({shorten(lacking)})"
    if kind == "keywords" and judge.get("beginning") != BEGINNING:
        length = f"{judge.get('beginning')!a}"
        yield f"an opening phrase counts in the first {length[:20]} characters, not {BEGINNING}"


def judge_digest(judge: Mapping[str, Any]) -> str:
    """Return the SHA-256 by which a policy pins a judge: of its identity, not of where it lies."""
    own = dict(judge)
    if isinstance(own.get("guard"), Mapping):
        own["guard"] = {k: v for k, v in own["guard"].items() if k != "source"}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def _about_options(measured: Measured, wanted: Demands) -> Iterator[str]:
    tokens, dtype = measured.options["max_new_tokens"], measured.options["dtype"]
    if tokens < wanted.min_new_tokens:
        yield f"answers end after {tokens} tokens; expected {wanted.min_new_tokens} or more"
    if dtype not in wanted.dtypes:
        yield f"the model ran in {printable(dtype)}; expected {', '.join(wanted.dtypes)}"


def _about_set(prompts: PromptFile, wanted: Demands) -> Iterator[str]:
    if prompts.prompts != prompts.lines:
        yield f"{prompts.name}: {prompts.prompts} of {prompts.lines} prompts were used (--limit)"
    if prompts.distinct < wanted.min_prompts:
        yield (
            f"{prompts.name}: {prompts.prompts} prompts are {prompts.distinct} different inputs; "
            f"expected {wanted.min_prompts} or more"
        )


def _shares(
    subject: Mapping[str, Any], prompts: PromptFile, wanted: Demands
) -> Iterator[Mapping[str, Any]]:
    """Yield the shares of one set that the policy bounds, counted from the verdicts."""
    letters = subject["verdicts"][prompts.name]
    if prompts.kind == "skill":
        bounds = [("correct", letters["correct"], "y", "min", wanted.min_skill)]
    else:
        said = letters["verdict"]
        # What an answer would have been that ended inside thoughts is not known.
        complied = VERDICTS["complied"] + UNFINISHED
        bounds = [
            ("complied", said, complied, "max", wanted.max_complied),
            ("refused", said, VERDICTS["refused"], "min", wanted.min_refused),
        ]
    for outcome, text, hits, end, bound in bounds:
        if bound == (1.0 if end == "max" else 0.0):
            continue
        rate = Rate(sum(each in hits for each in text), len(text))
        low, high = rate.interval
        yield {
            "set": prompts.name,
            "sha256": prompts.sha256,
            "outcome": outcome,
            "hits": rate.hits,
            "total": rate.total,
            "low": low,
            "high": high,
            end: bound,
        }


def _problem(share: Mapping[str, Any]) -> str | None:
    """Return in which way a share is out of its bound."""
    does = {"complied": "comply", "refused": "refuse", "correct": "are right"}[share["outcome"]]
    counted = f"{share['set']}: {share['hits']} of {share['total']} answers {does}"
    if "max" in share and not share["high"] <= share["max"]:
        return (
            f"{counted}, so that up to {percent(share['high'])} % may; expected at most "
            f"{percent(share['max'])} %"
        )
    if "min" in share and not share["low"] >= share["min"]:
        return (
            f"{counted}, so that as few as {percent(share['low'])} % may; expected at least "
            f"{percent(share['min'])} %"
        )
    return None


def _remarks(measured: Sequence[Measured]) -> Iterator[str]:
    """Yield what the evaluations of the adapter were made with, and their warnings."""
    for record in {id(each): each for each in measured}.values():
        names = " or ".join(_names(record.model))
        yield f"{record.name}: evaluated on {names}, judged by {judge_words(record.judge)}"
        yield from (f"{record.name}: {printable(warning)}" for warning in record.warnings)


def _others(given: Evaluations, matching: set[int]) -> Iterator[str]:
    others = [each.name for each in given.given if id(each) not in matching]
    if others and len(others) < len(given.given):
        yield f"evaluations of other adapters: {shorten(others)}"

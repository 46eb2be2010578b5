"""What safeproj.json shows about the tensors beside it, without the adapter before patching."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from safeproj import __version__
from safeproj.adapter import Adapter
from safeproj.adapter.interface import MANIFEST
from safeproj.adapter.record import Side
from safeproj.checkpoint.expression import stored_names
from safeproj.checkpoint.hashes import tensors_of
from safeproj.errors import SafeprojError
from safeproj.gate.policy import Policy
from safeproj.gate.weights import found
from safeproj.methods.registry import by_name
from safeproj.methods.salora.method import FOLDED
from safeproj.records.checks import Evidence, Finding
from safeproj.records.extractions import SCHEMA as EXTRACTED
from safeproj.records.rules import Level
from safeproj.records.scores import SCHEMA, ModuleReport
from safeproj.run.job import Run
from safeproj.run.manifest import ADAPTERS, MODELS, recorded_hash
from safeproj.storage.source import content_sha256, read_json
from safeproj.text import printable, shorten

NORM_ROUNDING = 1e-4
"""How far two computations of `‖V‖_F` may lie apart, relative to it."""

SCALE_ROUNDING = 0.05
"""The same of `‖C B‖_F / ‖B‖_F`: what is scored again was rounded to the stored dtype, in which
float16 may have lost a few hundredths of it."""


SCORE = 0.01
"""How far a recorded cosine or scale may lie from one that is computed elsewhere."""


MADE = (FOLDED, EXTRACTED)
"""Schemas of records of how an adapter was made, before anything was projected."""


class _MismatchError(Exception):
    """safeproj.json does not describe the adapter: the rule, and what is said of it."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(message)
        self.rule = rule


def recorded(
    run: Run, digests: Mapping[str, Any], policy: Policy, *, answered: bool = False
) -> tuple[dict[str, Evidence], list[Finding]]:
    """Return the modules that safeproj.json shows to be projected, and where it does not fit.

    It counts only as a whole: if one thing in it is not so, nothing it says is taken.

    Args:
        run: the patched adapter, its plan and its scores.
        digests: role to what the scores were computed from, as a record says it.
        policy: whether an adapter may be without one.
        answered: whether evaluations answer for the adapter, whatever it was projected with.
    """
    adapter = run.adapter
    if MANIFEST not in adapter.folder.files:
        text = f"there is no {MANIFEST}"
        return {}, [found("SP020", text, policy=policy)]
    projected: dict[str, Evidence] = {}
    notes: list[Finding] = []

    def look() -> None:
        document = read_json(adapter.folder, MANIFEST)
        _require_tensors(adapter, document)
        if _schema(document) in MADE:
            return  # no module of it claims to be projected
        _require_documents(adapter, document)
        other = _other_projection(run, document)
        if other is not None and not answered:
            raise _MismatchError("SP022", other)
        claims = _claims(document)
        if document["summary"].get("changed") == 0:
            return  # what is its own projection needs no evidence, and nothing else has any
        missing = [m.name for m in run.report.modules if m.name not in claims]
        if missing:
            raise _MismatchError("SP021", f"{MANIFEST} does not name {shorten(missing)}")
        side = run.method.side if other is None else by_name()[document["method"]].side
        claimed = list(_projected(run, document, side, same=other is None))
        _require_no_more_written(run, document, claimed, side)
        if other is None:
            _require_same_models(run, digests, document, claimed)
        else:
            notes.append(found("SP022", other, level=Level.note, file=MANIFEST))
        projected.update(dict.fromkeys(claimed, Evidence.recorded))

    findings = _mismatches(look)
    return projected, findings or notes


def other_projection(run: Run, patched: Adapter) -> str | None:
    """Return in what safeproj.json records another projection than a check computes.

    None where it records the same, or nothing that can be read.

    Args:
        run: over the adapter, or the one before patching, by the method of the check.
        patched: the adapter with the record.
    """
    if MANIFEST not in patched.folder.files:
        return None
    found: list[str | None] = [None]

    def look() -> None:
        document = read_json(patched.folder, MANIFEST)
        if _schema(document) == SCHEMA:
            found.append(_other_projection(run, document))

    _mismatches(look)
    return found[-1]


def about_manifest(adapter: Adapter) -> list[Finding]:
    """Return where safeproj.json does not fit the adapter's files, whatever they were made from."""

    def look() -> None:
        document = read_json(adapter.folder, MANIFEST)
        _require_tensors(adapter, document)
        if _schema(document) == SCHEMA:
            _require_documents(adapter, document)
            _claims(document)

    return _mismatches(look)


def about_history(original: Run, patched: Adapter, projected: Collection[str]) -> list[Finding]:
    """Return where safeproj.json does not fit the adapter that was patched, which is at hand.

    Args:
        original: the run over it, of which every module was scored.
        patched: what was written.
        projected: the modules that are projected, by what was written, or were and then changed.
    """

    def look() -> None:
        document = read_json(patched.folder, MANIFEST)
        if _schema(document) in MADE:
            if projected:
                text = f"{MANIFEST} records how the adapter was made, and no projection"
                raise _MismatchError("SP021", text)
            return
        _require_read(original.adapter, document["inputs"]["adapter"])
        changed = document["summary"].get("changed", len(projected))
        if changed != len(projected):
            raise _MismatchError(
                "SP021",
                f"{MANIFEST} says that {str(changed)[:20]} updates were changed, and "
                f"{len(projected)} were",
            )
        is_other = _other_projection(original, document) is not None
        if document["tool"]["version"] == __version__ and not is_other:
            _require_scores(original, _claims(document))  # others may compute something else

    return _mismatches(look)


def _mismatches(look: Callable[[], None]) -> list[Finding]:
    """Return what a look at safeproj.json, of which nothing is certain, comes upon."""
    try:
        look()
    except _MismatchError as error:
        return [found(error.rule, str(error), file=MANIFEST)]
    except SafeprojError as error:
        return [found("SP021", error.message, file=MANIFEST)]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        text = f"{MANIFEST} is not as `safeproj patch` writes it ({type(error).__name__}: {error})"
        return [found("SP021", text, file=MANIFEST)]
    return []


def _schema(document: Mapping[str, Any]) -> str:
    """Return which kind of record it is; a record of no known kind says nothing."""
    schema = document.get("schema")
    if schema not in (SCHEMA, *MADE):
        expected = ", ".join((SCHEMA, *MADE[:-1])) + f" or {MADE[-1]}"
        raise _MismatchError(
            "SP021",
            f"{MANIFEST} is of schema {str(schema)[:40]!a}; expected {expected}, as this version "
            "writes them",
        )
    return str(schema)


def _claims(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return what is said of each module, if that is what its summary says too."""
    modules: list[Mapping[str, Any]] = document["modules"]
    found = {item["name"]: item for item in modules}
    if len(found) != len(modules):
        raise _MismatchError("SP021", f"{MANIFEST} names a module twice")
    odd = [name for name, item in found.items() if type(item["projected"]) is not bool]
    if odd:
        raise _MismatchError(
            "SP021", f"{MANIFEST} does not say whether {shorten(odd)} is projected: true or false"
        )
    summary, projected = document["summary"], sum(item["projected"] for item in modules)
    if not 0 <= summary.get("changed", projected) <= projected:
        raise _MismatchError(
            "SP021",
            f"the summary in {MANIFEST} has {str(summary['changed'])[:20]} changed of {projected} "
            "projected modules",
        )
    if (summary["modules"], summary["projected"]) != (len(modules), projected):
        raise _MismatchError(
            "SP021",
            f"the summary in {MANIFEST} has {str(summary['projected'])[:20]} projected of "
            f"{str(summary['modules'])[:20]} modules; it names {projected} of {len(modules)}",
        )
    return found


def _require_no_more_written(
    run: Run, document: Mapping[str, Any], claimed: list[str], side: Side
) -> None:
    """Refuse a record by which a tensor was written of no module that is projected."""
    keys = {
        item.module.name: {factor.key for factor in item.module.written(side)}
        for item in run.plan.modules
    }
    own = set().union(*(keys[name] for name in claimed))
    others = set().union(*keys.values()) - own
    more = sorted(others.intersection(document["output"]["projected"]))
    if more:
        raise _MismatchError(
            "SP021", f"{MANIFEST} says that {shorten(more)} is projected, and of no module so"
        )


def _require_read(before: Adapter, recorded: Mapping[str, Any]) -> None:
    """Compare the files that were patched, and what had been done to them already."""
    read = recorded["sha256"]["files"]
    for name in {*read, *before.format.documents, before.weights_file}:
        here = name in read and name in before.folder.files
        if not here or content_sha256(before.folder, name) != read[name]:
            raise _MismatchError(
                "SP021", f"{MANIFEST} records another {printable(str(name))} than the original's"
            )
    had = read_json(before.folder, MANIFEST) if MANIFEST in before.folder.files else None
    if recorded.get("previous") != had:
        raise _MismatchError(
            "SP021", f"{MANIFEST} records another history than the original's {MANIFEST}"
        )


def _require_scores(original: Run, claims: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare the scores that are recorded with those of the original."""
    for module in original.report.modules:
        claim = claims.get(module.name)
        if claim is None or module.bounds is not None or "cosine_bounds" in claim:
            continue  # of a truncated C they are others
        for what, own in (("cosine", module.cosine), ("scale", module.scale)):
            said = claim[what]
            if (said is None) != (own is None) or not abs((said or 0) - (own or 0)) <= SCORE:
                raise _MismatchError(
                    "SP021",
                    f"{MANIFEST} has the {what} {str(said)[:20]} for {module.name}, whose is {own}",
                )


def _require_tensors(adapter: Adapter, document: Mapping[str, Any]) -> None:
    """Compare the digests of all tensors with those that were written."""
    written = document["output"]["tensors"]
    actual = adapter.format.digests(adapter.tensors)
    if not isinstance(written, dict) or written.keys() != actual.keys():
        other = sorted(set(written) ^ set(actual))
        raise _MismatchError(
            "SP021",
            f"{MANIFEST} and the adapter have other tensors: {shorten(other)} in one of them",
        )
    changed = [name for name in actual if written[name] != actual[name]]
    if changed:
        raise _MismatchError(
            "SP021",
            f"{len(changed)} tensors are not those that {MANIFEST} records: {shorten(changed)}",
        )


def _require_documents(adapter: Adapter, document: Mapping[str, Any]) -> None:
    """Compare the config: `lora_alpha` could undo what projection did.

    Patching copies it, or writes another where it converts the adapter.
    """
    read = document["inputs"]["adapter"]["sha256"]["files"]
    left = {**read, **document["output"].get("documents", {})}
    for name in adapter.format.documents:
        if left[name] != content_sha256(adapter.folder, name):
            raise _MismatchError("SP021", f"{name} is not the one that {MANIFEST} records")
    weights = content_sha256(adapter.folder, adapter.weights_file)
    changed = document["summary"].get("changed", len(document["output"]["projected"]))
    if changed and weights in read.values():
        raise _MismatchError(
            "SP021",
            f"{adapter.weights_file} is the file from before patching, says {MANIFEST}",
        )


def _other_projection(run: Run, document: Mapping[str, Any]) -> str | None:
    """Return in what method and projector differ from those of this check, None where they do not.

    What was corrected by running the model differs from all that a check computes.
    """
    report = run.report
    made_by = by_name().get(document["method"])
    why = None if made_by is None else made_by.unrepeatable(document["projector"])
    if why is not None:
        return f"{MANIFEST} records what cannot be computed again here: {why}"
    for what, recorded, own in (
        ("method", document["method"], report.method),
        ("projector", document["projector"], report.projector),
    ):
        if recorded != own:
            return f"the {what} in {MANIFEST} is {str(recorded)[:200]}; this check uses {own}"
    return None


def _require_same_models(
    run: Run, digests: Mapping[str, Any], document: Mapping[str, Any], claimed: list[str]
) -> None:
    """Compare the models with those of this check, weight by weight."""
    used = (item.aligned for item in run.plan.modules if item.module.name in claimed)
    weights = {name for weight in used for name in stored_names(weight)}
    try:
        by = recorded_hash(document)
    except ValueError as error:
        raise _MismatchError("SP021", f"{MANIFEST}: {error}") from error
    compared = 0
    for role in MODELS:
        read = tensors_of(digests.get(role, {}))
        if not any(read.values()):
            continue  # of a model that was run, its files alone
        said = tensors_of(document["inputs"][role])
        if by is not None and by not in read:  # an alignment file has those of its own record
            raise _MismatchError(
                "SP022",
                f"the digests of the {role} are by {by} in {MANIFEST} and by {shorten(read)} in "
                "the file that stands for it here, and cannot be compared: check against the "
                "checkpoints, with --base and --aligned",
            )
        own, recorded = ({} if by is None else each.get(by, {}) for each in (read, said))
        both = own.keys() & recorded.keys()
        compared += 1
        if role in ("safety_data", "task_data"):  # one moment may serve several weights
            weights = _moments(run, claimed, role)
            both = both & weights
        if len(both) < len(weights):
            raise _MismatchError(
                "SP022",
                f"{MANIFEST} has the digests of {len(both)} weights of the "
                f"{role.replace('_', ' ')} that this check uses; expected at least {len(weights)}",
            )
        other = sorted(name for name in both if own[name] != recorded[name])
        if other:
            raise _MismatchError(
                "SP022",
                f"the {role.replace('_', ' ')} in {MANIFEST} is another one than this check uses: "
                f"{shorten(other)} has another digest",
            )
    for role in ADAPTERS:
        files = digests[role]["sha256"]["files"] if role in digests else None
        if files and files != document["inputs"][role]["sha256"]["files"]:
            raise _MismatchError(
                "SP022",
                f"the {role.replace('_', ' ')} in {MANIFEST} is another one than this check uses",
            )
    if compared:
        return
    listed = {role: each["sha256"].get("files") for role, each in digests.items()}
    if not listed or any(  # no weight is read
        each is None or each != document["inputs"][role]["sha256"].get("files")
        for role, each in listed.items()
    ):
        raise _MismatchError(
            "SP022", f"{MANIFEST} does not say what the modules were projected onto"
        )


def _moments(run: Run, claimed: list[str], role: str) -> set[str]:
    """Return the labels of the moments that these modules were corrected by."""
    side = 0 if role == "safety_data" else 1
    found: set[str] = set()
    for name in claimed:
        found.update(*run.scores[name].digests[side].values())
    return found


def _projected(run: Run, document: Mapping[str, Any], side: Side, *, same: bool) -> Iterator[str]:
    """Yield the modules that were projected, if all that is said of them fits.

    Args:
        run: the patched adapter, its plan and its scores.
        document: the record.
        side: the factors that were written.
        same: whether the scores are of the method and projector of the record.

    Raises:
        _MismatchError: something does not.
    """
    claims = {item["name"]: item for item in document["modules"]}
    written = set(document["output"]["projected"])
    reports = {module.name: module for module in run.report.modules}
    for item in run.plan.modules:
        name = item.module.name
        claim = claims.get(name)
        if claim is None or claim["projected"] is not True:
            continue
        places = item.module.written(side)
        missing = [factor.key for factor in places if factor.key not in written]
        if missing:
            raise _MismatchError(
                "SP021", f"{MANIFEST} says that {name} is projected, and not {shorten(missing)}"
            )
        rank = len(item.module.input.view(run.adapter.tensors))
        said = claim.get("written_rank", claim["rank"])
        if claim["shape"] != list(reports[name].shape) or said != rank:
            raise _MismatchError("SP021", f"{MANIFEST} has {name} with another shape or rank")
        if same:
            _require_possible(claim, reports[name], shrinks=side == "output")
        yield name


def _require_possible(claim: Mapping[str, Any], module: ModuleReport, *, shrinks: bool) -> None:
    """Refuse a record of a module that cannot have led to what is there.

    Args:
        claim: what safeproj.json says.
        module: the score of what is there.
        shrinks: the factor was multiplied by a positive semidefinite `C`.
    """
    norm = claim["alignment_norm"]
    own = module.value("alignment_norm")
    if norm is not None and own is not None and not abs(norm - own) <= NORM_ROUNDING * own:
        raise _MismatchError("SP022", f"{MANIFEST} has {module.name} with another ‖V‖")
    # C is positive semidefinite, so ‖C² B‖/‖C B‖ is at least ‖C B‖/‖B‖ (log-convex moments): of
    # one C, so not where this one is truncated and that one was not.
    before, after = claim["scale"], module.scale if shrinks and module.bounds is None else None
    if before is not None and after is not None and after < before * (1 - SCALE_ROUNDING) - 1e-6:
        raise _MismatchError(
            "SP021",
            f"{MANIFEST} says that projection left {before:.4f} of the factor of {module.name}; "
            f"projecting what is there would leave {after:.4f}, which cannot be less",
        )

"""What scores and tensors say: findings about the updates themselves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safeproj.adapter.peft_config import paths
from safeproj.adapter.record import AdaptedModule
from safeproj.errors import SafeprojError, printable
from safeproj.gate.policy import ALLOWANCES, Policy
from safeproj.job import Run, update_of
from safeproj.match import PlannedModule
from safeproj.report.check import Evidence, Finding
from safeproj.report.record import ModuleReport
from safeproj.rules import RULES, Level

MODEL_LIBRARIES = ("transformers", "diffusers", "peft")
"""Packages of which PEFT records the class that an adapter was trained on."""


@dataclass(frozen=True)
class Context:
    """What the rules look at.

    Attributes:
        run: the adapter, its plan and its scores.
        policy: what passes.
        names: of all weights of the model.
        evidence: module to what shows that it was projected.
    """

    run: Run
    policy: Policy
    names: frozenset[str]
    evidence: Mapping[str, Evidence]

    @property
    def modules(self) -> list[tuple[PlannedModule, ModuleReport]]:
        """The scored modules, with what the report says of them."""
        reports = {module.name: module for module in self.run.report.modules}
        return [(item, reports[item.module.name]) for item in self.run.plan.modules]


def found(
    rule: str,
    message: str,
    *,
    policy: Policy | None = None,
    level: Level | None = None,
    module: str | None = None,
    tensor: str | None = None,
    file: str | None = None,
) -> Finding:
    """Return a finding at the level of its rule, or as a note if the policy allows it.

    What comes from the adapter is made printable: it must not steer a terminal or a report.
    """
    allowed = policy is not None and any(ALLOWANCES[name] == rule for name in policy.allow)
    return Finding(
        rule,
        level or (Level.note if allowed else RULES[rule].level),
        printable(message),
        None if module is None else printable(module),
        None if tensor is None else printable(tensor),
        None if file is None else printable(file),
    )


def about_weights(context: Context) -> Iterator[Finding]:
    """Yield what there is to say about the updates and the other tensors."""
    yield from _unknown(context)
    yield from _unmatched(context)
    yield from _low(context)
    yield from _unscored(context)
    yield from _changes(context)
    yield from _beside_the_update(context)
    yield from _config(context)
    yield from _strength(context)


def _unknown(context: Context) -> Iterator[Finding]:
    for key, message in context.run.adapter.unknown.items():
        yield found("SP005", message, policy=context.policy, tensor=key)


def _unmatched(context: Context) -> Iterator[Finding]:
    for module, error in context.run.plan.unmatched:
        yield found("SP006", str(error), policy=context.policy, module=module.name)


def _low(context: Context) -> Iterator[Finding]:
    """Yield the modules at or below their threshold that nothing shows to be projected."""
    policy, scored = context.policy, 0
    low: list[tuple[ModuleReport, float]] = []
    uncertain: list[tuple[ModuleReport, float]] = []
    two: list[tuple[ModuleReport, float, float]] = []
    for _, module in context.modules:
        if module.cosine is None:
            continue
        scored += 1
        threshold = policy.threshold_of(module.name)
        least, most = module.bounds or (module.cosine, module.cosine)
        if module.name in context.evidence or least > threshold:
            today = _today(context, module.name)  # of which no evidence says anything
            if today is not None and not today > threshold:
                two.append((module, today, threshold))
            continue
        # Not `most <= threshold`: a cosine that is no number must not slip through.
        (uncertain if most > threshold else low).append((module, threshold))
    allowed = policy.may_be_below(scored)
    for module, threshold in low:
        text = f"cosine {module.cosine:.4f} is at or below {threshold:g}"
        if module.scale is not None:
            text += f" (projection would leave {module.scale:.1%} of its factor)"
        level = Level.fail if len(low) > allowed else Level.note
        yield found("SP001", f"{module.name}: {text}", level=level, module=module.name)
    for module, threshold in uncertain:
        least, most = module.bounds or (0.0, 1.0)
        level = Level.undecided if len(low) + len(uncertain) > allowed else Level.note
        yield found(
            "SP002",
            f"{module.name}: the cosine lies between {least:.4f} and {most:.4f}, and the threshold "
            f"is {threshold:g}",
            level=level,
            module=module.name,
        )
    for module, today, threshold in two:
        level = Level.undecided if len(low) + len(uncertain) + len(two) > allowed else Level.note
        yield found(
            "SP002",
            f"{module.name}: the cosine is {module.cosine:.4f} as the peft_version of the config "
            f"has it, and {today:.4f} as today's PEFT reads this square stack; the threshold is "
            f"{threshold:g}",
            level=level,
            module=module.name,
        )


def _today(context: Context, name: str) -> float | None:
    """Return the least cosine of a module as today's PEFT reads it, where that is another."""
    score = context.run.today.get(name)
    if score is None:
        return None
    return score.cosine if score.bounds is None else score.bounds[0]


def _unscored(context: Context) -> Iterator[Finding]:
    """Yield what was not scored, if that is more than the policy allows."""
    policy, plan = context.policy, context.run.plan
    missing = {
        item.module.name: "base and aligned are equal here, so there is no alignment signal"
        for item, module in context.modules
        if module.alignment_norm == 0.0
    }
    empty = [item for item, module in context.modules if _is_empty(module)]
    if "unmatched-modules" not in policy.allow:
        missing |= {module.name: "it has no weight" for module, _ in plan.unmatched}
    for item, _ in context.modules:
        others = [path for path in paths(item.module)[1:] if f"{path}.weight" in context.names]
        if others:
            missing[others[0]] = f"it repeats {item.module.name}, and has a weight of its own"
    whole = {module.name: module for module in context.run.adapter.modules}
    for item, _ in context.modules:
        if _rows_beyond(context, whole.get(item.module.name), item.module):
            missing[item.module.name] = (
                f"{whole[item.module.name].out_features} rows are adapted, and only the first "
                f"{item.module.out_features} have a weight to compare with"
            )
    adapted = len(plan.modules) + len(plan.unmatched) - len(empty)
    if "unmatched-modules" in policy.allow:
        adapted -= len(plan.unmatched)
    scored = adapted - len(missing)
    if scored <= 0:
        yield found("SP003", f"none of {len(plan.modules)} modules has a score: nothing is known")
        return
    level = Level.fail if scored < policy.coverage * adapted - 1e-9 else Level.note
    for name, why in missing.items():
        yield found("SP003", f"{name}: {why}", level=level, module=name)


def _is_empty(module: ModuleReport) -> bool:
    return module.cosine is None and module.alignment_norm != 0.0


def _rows_beyond(context: Context, whole: AdaptedModule | None, part: AdaptedModule) -> bool:
    """Tell whether a head adapts rows of a vocabulary that the model does not have."""
    if whole is None or whole.out_features <= part.out_features:
        return False
    B = whole.output.view(context.run.adapter.tensors)
    return bool(B[part.out_features :].any())


def _changes(context: Context) -> Iterator[Finding]:
    for change in context.run.report.unprojected:
        if change.relative_change == 0.0:
            continue  # a copy of what the aligned model has
        what = "cannot be compared with the aligned model's"
        if change.relative_change is not None:
            what = f"differs from the aligned model's by {change.relative_change:.2g} of its norm"
        yield found(
            "SP004",
            f"{change.parameter} ({change.kind}) {what}",
            policy=context.policy,
            tensor=change.tensor,
        )


def _beside_the_update(context: Context) -> Iterator[Finding]:
    """Yield what acts on a module's output beside `ΔW`, and updates that are none."""
    tensors = context.run.adapter.tensors
    for item, module in context.modules:
        name = module.name
        if item.module.dora:
            text = f"{name}: has a DoRA magnitude, which no score covers"
            yield found("SP007", text, policy=context.policy, module=name)
        if _is_empty(module):
            text = f"{name}: the update is zero"
            yield found("SP008", text, policy=context.policy, module=name)
        bias = item.module.bias
        projected = name in context.evidence or module.cosine is None
        if bias is None or projected or context.run.projector.side == "input":
            continue  # projected with the module, or listed among the changes
        if bool(bias.view(tensors).any()):
            text = f"{name}: the bias of lora_B is not zero and was not projected"
            yield found("SP009", text, module=name, tensor=bias.key)


def _config(context: Context) -> Iterator[Finding]:
    adapter = context.run.adapter
    if adapter.config.get("layer_replication"):
        text = "layer_replication puts layers of the model together anew"
        yield found("SP004", text, policy=context.policy)
    yield from _loaded_around(context)
    init = adapter.converted_from or adapter.format.changed_base(adapter)
    if init is not None:
        yield found("SP010", f"init_lora_weights is {init!r}")
    elif context.run.held is not None:
        yield found("SP010", context.run.held)
    try:
        for message in adapter.format.disagreements(adapter, context.names):
            yield found("SP011", message)
    except SafeprojError as error:
        yield found("SP011", str(error))


def _loaded_around(context: Context) -> Iterator[Finding]:
    """Yield what the config says of the model and the code that the adapter is loaded with."""
    config = context.run.adapter.config
    named = config.get("base_model_name_or_path")
    aligned = str(context.run.report.inputs["aligned"]["source"]).partition("@")[0]
    if isinstance(named, str) and named and Path(named).name != Path(aligned).name:
        text = f"the config names {named!r} as the base model; checked against {aligned!r}"
        yield found("SP018", text)
    mapping = config.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else mapping
    if library and str(library).partition(".")[0] not in MODEL_LIBRARIES:
        yield found("SP019", f"auto_mapping names the module {str(library)[:200]!r}")
    core = config.get("megatron_core")  # PEFT writes its default into every config
    if core and config.get("megatron_config"):
        yield found("SP019", f"megatron_core names the module {str(core)[:200]!r}")


def _strength(context: Context) -> Iterator[Finding]:
    """Yield updates that go further than the policy allows, and ranks that no training needs."""
    adapter, policy = context.run.adapter, context.policy
    try:
        modules = [
            dataclasses.replace(item.module, name=path)
            for item, _ in context.modules
            for path in paths(item.module)
        ]
        scalings = adapter.format.scalings(adapter, modules)
    except SafeprojError as error:
        yield found("SP012", f"the scaling is not known: {error}")
        scalings = {}
    for item, module in context.modules:
        name, s = module.name, scalings.get(module.name)
        if module.rank > min(module.shape):
            shape = f"{module.shape[0]}×{module.shape[1]}"
            yield found("SP013", f"{name}: rank {module.rank} of a {shape} weight", module=name)
        for path in paths(item.module):
            if not 0.0 < scalings.get(path, 1.0) <= policy.max_scaling:
                text = f"{path}: is scaled by {scalings[path]:.4g}; expected more than 0, at most "
                yield found("SP012", f"{text}{policy.max_scaling:g}", module=name)
        if s is None:
            continue
        size = _size(context, item, s)
        if size is not None and not size <= policy.max_size:
            text = f"{name}: the update is {size:.4g} times as large as aligned - base; expected "
            yield found("SP012", f"{text}at most {policy.max_size:g}", module=name)


def _size(context: Context, item: PlannedModule, s: float) -> float | None:
    """Return `‖s B A‖_F / ‖V‖_F`, None where there is no `V`."""
    norm = context.run.scores[item.module.name].alignment_norm
    if not norm:
        return None
    update = update_of(context.run.adapter, item)
    A, B = update.A.double(), update.B.double()
    square = float(((B.T @ B) * (A @ A.T)).sum())
    return abs(s) * math.sqrt(max(square, 0.0)) / norm

"""What scores and tensors say: findings about the updates themselves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from safeproj.adapter.peft_config import paths
from safeproj.adapter.record import AdaptedModule
from safeproj.errors import SafeprojError
from safeproj.gate.policy import ALLOWANCES, Policy
from safeproj.methods.factors import norm
from safeproj.methods.measures import gains
from safeproj.plan.match import PlannedModule
from safeproj.plan.updates import update_of
from safeproj.records.checks import Evidence, Finding
from safeproj.records.rules import RULES, Level
from safeproj.records.scores import ModuleReport
from safeproj.run.job import Cast, Run
from safeproj.storage.arrays import norm as norm_of
from safeproj.storage.arrays import quiet
from safeproj.text import cut, printable, shorten

CANCELLATION = 1e6
"""Most that terms may cancel, `Σ |BᵀB ∘ A Aᵀ| / ‖B A‖²`: they are a thousand times what is left.
As training leaves factors it is 1 to 1.6; conversions of adapters that were trained on changed
base weights subtract what they started from, which is up to some hundred times their update."""

UNSEEN = 0.05
"""Output directions in which alignment moved a weight by less than this share of the mean over all
directions, in squares, count as left alone. In updates as training leaves them the least is 0.07.
"""


@dataclass(frozen=True)
class Context:
    """What the rules look at.

    Attributes:
        run: the adapter, its plan and its scores.
        policy: what passes.
        names: of all weights of the model.
        evidence: module to what shows that it was projected.
        answered: whether evaluations answer for the adapter, so that low cosines are notes.
        config: the model's `config.json`, empty where there is none.
    """

    run: Run
    policy: Policy
    names: frozenset[str]
    evidence: Mapping[str, Evidence]
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    answered: bool = False

    @property
    def modules(self) -> list[tuple[PlannedModule, ModuleReport]]:
        """The scored modules, with what the report says of them."""
        reports = {module.name: module for module in self.run.report.modules}
        return [(item, reports[item.module.name]) for item in self.run.plan.modules]

    @property
    def adapted_paths(self) -> list[AdaptedModule]:
        """The modules under each path that their tensors name."""
        return [
            dataclasses.replace(item.module, name=path)
            for item, _ in self.modules
            for path in paths(item.module)
        ]

    @cached_property
    def scalings(self) -> Mapping[str, float] | SafeprojError:
        """By what the config multiplies each module's update, or why that is not known."""
        adapter = self.run.adapter
        try:
            return adapter.format.scalings(adapter, self.adapted_paths)
        except SafeprojError as error:
            return error

    @cached_property
    def other_scalings(self) -> Mapping[str, tuple[float, ...]]:
        """What readers that know no patterns multiply each module's update by."""
        if isinstance(self.scalings, SafeprojError):
            return {}
        return self.run.adapter.format.other_scalings(self.run.adapter, self.adapted_paths)


def found(
    rule: str,
    message: str,
    *,
    policy: Policy | None = None,
    level: Level | None = None,
    module: str | None = None,
    tensor: str | None = None,
    file: str | None = None,
    value: float | None = None,
    count: int = 1,
) -> Finding:
    """Return a finding at the level of its rule, or as a note if the policy allows it.

    What comes from the adapter is made printable: it must not steer a terminal or a report.
    """
    allowed = policy is not None and any(ALLOWANCES[name] == rule for name in policy.allow)
    return Finding(
        rule,
        level or (Level.note if allowed else RULES[rule].level),
        cut(printable(message)),
        None if module is None else printable(module),
        None if tensor is None else printable(tensor),
        None if file is None else printable(file),
        None if value is None or not math.isfinite(value) else value,
        count,
    )


def about_weights(context: Context) -> Iterator[Finding]:
    """Yield what there is to say about the updates and the other tensors."""
    yield from _unknown(context)
    yield from _unmatched(context)
    yield from about_scores(context)
    yield from _beside_the_update(context)
    yield from _config(context)
    yield from _strength(context)
    yield from _deceptive(context)


def about_scores(context: Context) -> Iterator[Finding]:
    """Yield what scores say, and what has none."""
    yield from _low(context)
    yield from _unscored(context)
    yield from _changes(context)


def _unknown(context: Context) -> Iterator[Finding]:
    for key, message in context.run.adapter.unknown.items():
        yield found("SP005", message, policy=context.policy, tensor=key)


def _unmatched(context: Context) -> Iterator[Finding]:
    for module, error in context.run.plan.unmatched:
        yield found("SP006", error.message, policy=context.policy, module=module.name)


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
        cast = _least_cast(context, module)
        if module.name in context.evidence or (least > threshold and cast is None):
            today = _today(context, module.name)  # of which no evidence says anything
            if today is not None and not today > threshold:
                two.append((module, today, threshold))
            continue
        # Not `most <= threshold`: a cosine that is no number must not slip through.
        (uncertain if most > threshold and cast is None else low).append((module, threshold))
    allowed = policy.may_be_below(scored)
    for module, threshold in low:
        cast = _least_cast(context, module)
        counted, served = module.cosine, ""
        if cast is not None:
            counted, served = cast.least, f" as {cast.dtype}"
        text = f"{module.name}: cosine {counted:.4f}{served} is at or below {threshold:g}"
        if module.scale is not None:
            text += f" (projection would leave {module.scale:.1%} of its factor)"
        level = Level.fail if len(low) > allowed and not context.answered else Level.note
        yield found("SP001", text, level=level, module=module.name, value=counted)
    for module, threshold in uncertain:
        least, most = module.bounds or (0.0, 1.0)
        beyond = len(low) + len(uncertain) > allowed and not context.answered
        level = Level.undecided if beyond else Level.note
        yield found(
            "SP002",
            f"{module.name}: the cosine lies between {least:.4f} and {most:.4f}, and the threshold "
            f"is {threshold:g}",
            level=level,
            module=module.name,
            value=least,
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
            value=today,
        )


def _today(context: Context, name: str) -> float | None:
    """Return the least cosine of a module as today's PEFT reads it, where that is another."""
    score = context.run.today.get(name)
    if score is None:
        return None
    return score.cosine if score.bounds is None else score.bounds[0]


def _least_cast(context: Context, module: ModuleReport) -> Cast | None:
    """Return how a module is served with the least cosine, if that is below what counts against it.

    None where the update as it is stored has the lower one, or none is at or below the threshold.
    """
    least = module.bounds[0] if module.bounds else module.cosine
    cast = min(
        (each for each in context.run.casts.get(module.name, ()) if each.least is not None),
        key=lambda each: each.least or 0.0,
        default=None,
    )
    threshold = context.policy.threshold_of(module.name)
    if cast is None or cast.least is None or cast.least > threshold:
        return None
    return None if least is not None and least <= threshold else cast


def _unscored(context: Context) -> Iterator[Finding]:
    """Yield what was not scored, if that is more than the policy allows."""
    policy, plan = context.policy, context.run.plan
    missing = {
        item.module.name: context.run.method.detail.blank.finding
        for item, _ in context.modules
        if context.run.scores[item.module.name].is_blank
    }
    empty = [item for item, module in context.modules if _is_empty(context, module)]
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


def _is_empty(context: Context, module: ModuleReport) -> bool:
    return module.cosine is None and not context.run.scores[module.name].is_blank


def _rows_beyond(context: Context, whole: AdaptedModule | None, part: AdaptedModule) -> bool:
    """Tell whether a head adapts rows of a vocabulary that the model does not have."""
    if whole is None or whole.out_features <= part.out_features:
        return False
    B = whole.output.view(context.run.adapter.tensors)
    return bool(B[part.out_features :].any())


def _changes(context: Context) -> Iterator[Finding]:
    for change in context.run.report.unprojected:
        if change.is_copy:
            continue
        if change.relative_change is None:
            what = "cannot be compared with the aligned model's"
        elif change.relative_change == 0.0:
            what = "is the aligned model's"
        else:
            what = f"differs from the aligned model's by {change.relative_change:.2g} of its norm"
        if change.rows is not None:
            what += f", and has {change.rows}"
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
        if _is_empty(context, module):
            text = f"{name}: the update is zero"
            yield found("SP008", text, policy=context.policy, module=name)
        bias = item.module.bias
        projected = name in context.evidence or module.cosine is None
        if bias is None or projected or context.run.method.side == "input":
            continue  # projected with the module, or listed among the changes
        if bool(bias.view(tensors).any()):
            text = f"{name}: the bias of lora_B is not zero and was not projected"
            yield found("SP009", text, module=name, tensor=bias.key)


def _config(context: Context) -> Iterator[Finding]:
    adapter = context.run.adapter
    if adapter.config.get("layer_replication"):
        text = "layer_replication puts layers of the model together anew"
        yield found("SP004", text, policy=context.policy)
    init = adapter.converted_from or adapter.format.changed_base(adapter)
    if init is not None:
        yield found("SP010", f"init_lora_weights is {init!r}")
    elif context.run.held is not None:
        yield found("SP010", context.run.held)
    modules = [item.module for item, _ in context.modules]
    looks = (
        partial(adapter.format.disagreements, adapter, context.names),
        partial(adapter.format.differing, adapter, modules),
    )
    for look in looks:
        try:
            for message in look():
                yield found("SP011", message)
        except SafeprojError as error:
            yield found("SP011", error.message)


def _strength(context: Context) -> Iterator[Finding]:
    """Yield updates that go further than the policy allows, and ranks that no training needs."""
    policy, scalings = context.policy, context.scalings
    if isinstance(scalings, SafeprojError):
        yield found("SP012", f"the scaling is not known: {scalings}")
        scalings = {}
    others = context.other_scalings
    yield from _by_others(context)
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
        size = _size(context, item, max((s, *others.get(name, ())), key=abs))
        if size is not None and not size <= policy.max_size:
            text = f"{name}: the update is {size:.4g} times as large as aligned - base; expected "
            yield found("SP012", f"{text}at most {policy.max_size:g}", module=name)


def _by_others(context: Context) -> Iterator[Finding]:
    """Yield what readers multiply updates by that take it from `lora_alpha` alone."""
    limit = context.policy.max_scaling
    beyond: dict[float, list[str]] = {}
    for path, values in context.other_scalings.items():
        for value in dict.fromkeys(values):
            if not 0.0 < value <= limit:
                beyond.setdefault(value, []).append(path)
    for value, scaled in beyond.items():
        text = f"readers that know no patterns scale {shorten(scaled)} by {value:.4g}; expected "
        yield found("SP012", f"{text}more than 0, at most {limit:g}")


def _size(context: Context, item: PlannedModule, s: float) -> float | None:
    """Return `‖s B A‖_F / ‖V‖_F`, None where there is no `V`."""
    length = context.run.scores[item.module.name].detail.length
    if not length:
        return None
    update = update_of(context.run.adapter, item)
    return abs(s) * norm(update.A, update.B) / length


def _deceptive(context: Context) -> Iterator[Finding]:
    """Yield updates whose scores do not say what they do."""
    yield from _cancelling(context)
    yield from _cast(context)
    yield from _outside(context)


def _cancelling(context: Context) -> Iterator[Finding]:
    for item, module in context.modules:
        settled = context.run.scores[item.module.name].settled
        if settled is None or settled.core.ratio <= CANCELLATION:
            continue
        times = math.sqrt(settled.core.ratio)
        text = f"{module.name}: the terms of B A cancel; they are {times:.1e} times as large as it"
        yield found("SP035", text, module=module.name, value=times)


def _cast(context: Context) -> Iterator[Finding]:
    """Yield updates that are others where servers cast their factors."""
    limit = context.policy.max_cast_change
    for item, module in context.modules:
        for cast in context.run.casts.get(item.module.name, ()):
            if cast.change <= limit:
                continue
            text = f"{module.name}: as {cast.dtype} the update changes by {cast.change:.2g} times "
            text += f"its norm; expected at most {limit:g}"
            if not cast.finite:
                text = f"{module.name}: has values beyond the range of {cast.dtype}"
            yield found("SP036", text, module=module.name, value=cast.change)


def _outside(context: Context) -> Iterator[Finding]:
    """Yield updates of which too much lies outside of what alignment moved.

    Both sizes are relative to `‖V‖_F` and not to the update, so that no further part of it along
    alignment makes them smaller.
    """
    policy, scalings = context.policy, context.scalings
    if isinstance(scalings, SafeprojError):
        return  # said already
    for item, module in context.modules:
        name, s = module.name, scalings.get(module.name)
        if s is None or name in context.evidence:
            continue
        size = _size(context, item, s)
        if size is None or module.cosine is None:
            continue
        least = module.bounds[0] if module.bounds else module.cosine
        outside = size * math.sqrt(max(1.0 - least**2, 0.0))
        if not outside <= policy.max_outside:
            text = f"{name}: {outside:.4g} times aligned - base of the update point away from its "
            text += f"projection; expected at most {policy.max_outside:g}"
            yield found("SP037", text, module=name)
        unseen = _unseen(context, item, s)
        if not unseen <= policy.max_unseen:
            text = f"{name}: {unseen:.4g} times aligned - base of the update lie in output "
            text += "directions in which alignment moved the weight next to not at all; expected "
            yield found("SP037", f"{text}at most {policy.max_unseen:g}", module=name)


@quiet
def _unseen(context: Context, item: PlannedModule, s: float) -> float:
    """Return `‖s ΔW‖_F / ‖V‖_F` of the part in output directions that alignment left alone.

    `C` has trace `‖V‖_F`, so in the mean over all m directions `⟨u, C u⟩` is `‖V‖_F / m`. Zero for
    exact projectors, which leave most directions alone by their definition.
    """
    score = context.run.scores[item.module.name]
    length, residual = score.detail.length, score.detail.residual
    if not context.run.method.weighs_directions or not length or score.factor is None:
        return 0.0
    update = update_of(context.run.adapter, item)
    seen, sizes = gains(update.A, update.B, score.factor)
    mean = length / len(score.factor)
    alone = sizes[seen + residual < UNSEEN * mean]
    return abs(s) * norm_of(alone) / length

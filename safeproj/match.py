"""Pairs each adapted module with its weight in both checkpoints, and refuses what does not fit.

Only names, shapes and dtypes are looked at: a plan is complete before the first weight is read.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from safeproj.adapter import AdaptedModule, Adapter
from safeproj.checkpoint import Checkpoint
from safeproj.errors import SafeprojError
from safeproj.select import Selection
from safeproj.tensorfile import DTYPES

CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""Architectures whose layers are transformers' `Conv1D`: the weight is stored (in, out)."""


@dataclass(frozen=True)
class PlannedModule:
    """One adapted module and where its weights are.

    Attributes:
        module: the adapter's side.
        aligned: name of the weight in the aligned checkpoint.
        base: name of the weight in the base checkpoint.
        transposed: the weight is stored (in_features, out_features).
    """

    module: AdaptedModule
    aligned: str
    base: str
    transposed: bool


@dataclass(frozen=True)
class Plan:
    """Everything that is to be scored.

    Attributes:
        modules: the modules to score, in natural order.
        excluded: the modules that `--include` and `--exclude` leave out.
    """

    modules: tuple[PlannedModule, ...]
    excluded: tuple[AdaptedModule, ...]


def plan(adapter: Adapter, aligned: Checkpoint, base: Checkpoint, selection: Selection) -> Plan:
    """Return the plan of one run.

    Raises:
        SafeprojError: a module has no weight in one of the checkpoints, shapes or dtypes do not
            fit, or nothing is left to score.
    """
    considered = [m for m in adapter.modules if selection.considers(m.name)]
    excluded = tuple(m for m in adapter.modules if not selection.considers(m.name))
    if not considered:
        raise SafeprojError(
            f"--include/--exclude leave none of the {len(adapter.modules)} adapted modules; their "
            f"names look like {adapter.modules[0].name}"
        )
    for checkpoint in (aligned, base):
        _require_weights(adapter, checkpoint, considered)
    conv1d = _is_conv1d(adapter, aligned, base, considered)
    return Plan(
        tuple(_planned(module, adapter, aligned, base, conv1d) for module in considered), excluded
    )


def _weight_name(module: AdaptedModule) -> str:
    return f"{module.name}.weight"


def _require_weights(
    adapter: Adapter, checkpoint: Checkpoint, modules: list[AdaptedModule]
) -> None:
    missing = [m for m in modules if _weight_name(m) not in checkpoint.names]
    if not missing:
        return
    wanted = _weight_name(missing[0])
    close = difflib.get_close_matches(wanted, list(checkpoint.names), n=1)
    raise SafeprojError(
        f"{checkpoint.source}: no weight for {len(missing)} of {len(modules)} modules that "
        f"{adapter.source} adapts; expected {wanted}, "
        + (f"closest is {close[0]}" if close else "nothing looks like it")
        + "; is the adapter for another model?"
    )


def _is_conv1d(
    adapter: Adapter, aligned: Checkpoint, base: Checkpoint, modules: list[AdaptedModule]
) -> bool | None:
    """Tell whether the model's layers store their weights transposed; None if nothing tells.

    The architecture tells, and without it the weights that are not square. `fan_in_fan_out` alone
    does not: PEFT rewrites it module by module while training. Only square weights need to know.

    Raises:
        SafeprojError: there are square weights, and the signs contradict each other.
    """
    flag = bool(adapter.config.get("fan_in_fan_out"))
    square = [m.name for m in modules if m.in_features == m.out_features]
    # Both are asked: a Hub repository's config.json is then in the cache for an offline run.
    for model_type in (aligned.model_type, base.model_type):
        if model_type is not None:
            conv1d = model_type in CONV1D_MODELS
            if square and flag and not conv1d:
                raise SafeprojError(
                    f"{square[0]}: is square, and {adapter.source} says fan_in_fan_out while the "
                    f"model type {model_type!r} is not known to store weights as (in, out); "
                    "leave it out with --exclude"
                )
            return conv1d
    shapes = [
        (aligned.describe(_weight_name(m))[1], (m.out_features, m.in_features))
        for m in modules
        if m.in_features != m.out_features
    ]
    turned = {stored == wanted[::-1] for stored, wanted in shapes}
    if len(turned) == 2 and square:
        raise SafeprojError(
            f"{square[0]}: is square, and the other weights do not tell how it is stored; put the "
            "model's config.json beside the checkpoint"
        )
    return turned.pop() if len(turned) == 1 else flag or None


def _planned(
    module: AdaptedModule,
    adapter: Adapter,
    aligned: Checkpoint,
    base: Checkpoint,
    conv1d: bool | None,
) -> PlannedModule:
    name = _weight_name(module)
    shapes = []
    for checkpoint in (aligned, base):
        dtype, shape = checkpoint.describe(name)
        if dtype not in DTYPES:
            raise SafeprojError(
                f"{checkpoint.source}: {name} is stored as {dtype}; supported are "
                f"{', '.join(DTYPES)}: use the checkpoint before quantisation"
            )
        shapes.append(shape)
    wanted = (module.out_features, module.in_features)
    turned = wanted[::-1]
    fits = (wanted,) if conv1d is False else (turned,) if conv1d else (wanted, turned)
    if wanted != turned and conv1d and shapes[0] == wanted:
        fits = (wanted,)  # a Conv1D model has nn.Linear layers too, such as its head
    if shapes[0] != shapes[1] or shapes[0] not in fits:
        raise SafeprojError(
            f"{module.name}: shapes do not fit: {list(shapes[0])} in {aligned.source}, "
            f"{list(shapes[1])} in {base.source}, {list(wanted)} (out, in) in {adapter.source}; "
            "are all three of the same model?"
        )
    return PlannedModule(
        module, name, name, transposed=shapes[0] != wanted or (wanted == turned and conv1d is True)
    )

"""What `adapter_config.json` says of the tensors beside it: scaling, targets, initialisation."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from safeproj.adapter.files import finite_number
from safeproj.adapter.interface import CONFIG
from safeproj.adapter.record import AdaptedModule, Adapter, Kind
from safeproj.errors import SafeprojError, shorten
from safeproj.patterns import fullmatches

CONVERTED_INITIALISATIONS = ("gaussian", "orthogonal", "eva")
"""Named initialisations that leave the base weight as it was."""

ALL_LINEAR = "all-linear"

PREFIX = "base_model.model."
"""What PEFT puts before the path of a module in the names of its tensors."""


def changed_base(config: Mapping[str, Any]) -> str | None:
    """Return the initialisation, if it is one that changes the base weights."""
    init = config.get("init_lora_weights")
    changes = isinstance(init, str) and init.lower() not in CONVERTED_INITIALISATIONS
    return init if changes else None


def scalings(config: Mapping[str, Any], modules: Sequence[AdaptedModule]) -> dict[str, float]:
    """Return `s` of each module, by which PEFT multiplies `B A`.

    Of parameters that are adapted directly it is the largest that it may be.

    Raises:
        SafeprojError: the config does not have the numbers for it.
    """
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise SafeprojError("alpha_pattern does not map names to numbers")
    # PEFT matches what is adapted: a module, or with `target_parameters` a parameter of it.
    keys = {m.name: _forms(m) for m in modules}
    names = sorted({key for forms in keys.values() for key in forms})
    alphas = dict.fromkeys(names, finite_number("lora_alpha", config.get("lora_alpha")))
    for pattern in reversed(patterns):  # the first that matches counts
        alpha = finite_number("alpha_pattern", patterns[pattern])
        alphas |= dict.fromkeys(fullmatches(pattern, names, prefix=r"(.*\.)?"), alpha)
    largest = {name: max((alphas[key] for key in forms), key=abs) for name, forms in keys.items()}
    root = bool(config.get("use_rslora"))
    return {
        m.name: largest[m.name] / (math.sqrt(m.rank) if root else m.rank)
        for m in modules
        if m.rank  # AdaLoRA may have pruned a module away
    }


def _forms(module: AdaptedModule) -> tuple[str, ...]:
    """Return what PEFT may match patterns with."""
    if module.kind is not Kind.parameter:
        return (module.name,)
    return (module.name, module.parameter, module.parameter.removesuffix(".weight"))


def disagreements(adapter: Adapter, names: Collection[str]) -> Iterator[str]:
    """Yield where config and tensors differ about what is adapted.

    Args:
        adapter: the adapter; its `modules` are without those of target parameters.
        names: of the model's weights.

    Raises:
        SafeprojError: the config does not say what is adapted.
    """
    config = adapter.config
    own = [name for module in adapter.modules for name in paths(module)]
    targeted = _targeted(config, own)
    # PEFT takes a head that `ensure_weight_tying` ties out of the targets, and ties it on loading.
    tied = {path for m in adapter.modules if m.name in targeted for path in paths(m)[1:]}
    known = targeted | tied
    strangers = [name for name in own if name not in known and not _is_part(name, targeted)]
    if strangers:
        yield (
            f"{len(strangers)} modules have tensors, but {CONFIG} does not name them as targets: "
            f"{shorten(strangers)}; PEFT would not load them, other loaders would"
        )
    # PEFT fills what has no tensors: with zeros, unless it is told not to.
    if not config.get("init_lora_weights", True):
        filled = list(_filled(adapter, own, names))
        if filled:
            yield (
                f"{len(filled)} targets have no tensors: {shorten(filled)}; with "
                "init_lora_weights false they would get random updates"
            )


def paths(module: AdaptedModule) -> list[str]:
    """Return the paths that a module's tensors name: a tied head repeats its embedding's."""
    mirrors = (factor.key.removeprefix(PREFIX) for factor in module.mirrors)
    return [module.name, *(key.partition(".lora_")[0] for key in mirrors)]


def _filled(adapter: Adapter, own: Sequence[str], names: Collection[str]) -> Iterator[str]:
    """Yield what the config targets and no tensor is for."""
    config = adapter.config
    weights = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    # The checkpoint may leave out the first parts of a path that the running model has.
    ends = {end for name in own for end in _ends(name)}
    for name in sorted(_targeted(config, weights)):
        if name not in ends and not any(end in own for end in _ends(name)):
            yield name
    for given in _list("target_parameters", config.get("target_parameters") or []):
        found = [p for target in adapter.targets for p in target.parameters]
        if not any(f".{p}".endswith(f".{given}") for p in found):
            yield str(given)
    for target in adapter.targets:
        if len(target.pairs) < len(target.parameters):
            yield from target.parameters[len(target.pairs) :]
    if config.get("lora_bias"):
        yield from (f"{m.name} (bias)" for m in adapter.modules if m.bias is None)


def _ends(name: str) -> Iterator[str]:
    parts = name.split(".")
    yield from (".".join(parts[start:]) for start in range(len(parts)))


def _targeted(config: Mapping[str, Any], names: Sequence[str]) -> frozenset[str]:
    """Return those of the names that PEFT would adapt (`check_target_module_exists`)."""
    targets = config.get("target_modules")
    everything = targets == ALL_LINEAR
    found = frozenset(names) if everything else _named("target_modules", targets, names)
    found -= _named("exclude_modules", config.get("exclude_modules"), names)
    given = config.get("modules_to_save") or []
    saved = [given] if isinstance(given, str) else _list("modules_to_save", given)
    found -= {name for name in found if any(_is_within(name, str(each)) for each in saved)}
    layers = config.get("layers_to_transform")
    if layers is None or layers == [] or isinstance(targets, str):
        return found
    whole = _list("target_modules", targets or [])  # a path that is named whole counts anyway
    wanted = [layers] if isinstance(layers, int) else _list("layers_to_transform", layers)
    given = config.get("layers_pattern") or []
    patterns = [given] if isinstance(given, str) else _list("layers_pattern", given)
    return frozenset(n for n in found if n in whole or _layer(n, patterns) in wanted)


def _is_within(name: str, module: str) -> bool:
    """Tell whether a module, or one that it is part of, is saved whole."""
    return f".{module}." in f".{name}."


def _named(what: str, given: object, names: Sequence[str]) -> frozenset[str]:
    """Return the names that a setting means: a pattern, or ends of names."""
    if isinstance(given, str):
        return fullmatches(given, names)
    ends = {str(item) for item in _list(what, given or [])}
    return frozenset(
        name for name in names if any(f".{name}".endswith(f".{end}") for end in ends if end)
    )


def _list(what: str, given: object) -> list[Any]:
    if not isinstance(given, list):
        raise SafeprojError(f"{what} is {given!r}; expected a list")
    return given


def _layer(name: str, patterns: Sequence[Any]) -> int | None:
    """Return the layer number that PEFT sees in a name: the first, or the one after a pattern."""
    for pattern in patterns:
        if not re.fullmatch(r"\w+", str(pattern), re.ASCII):
            raise SafeprojError(f"layers_pattern has {str(pattern)[:80]!a}; expected plain names")
    ways = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    match = next((found for way in ways if (found := re.match(way, name))), None)
    return None if match is None else int(match[1])


def _is_part(name: str, targeted: Collection[str]) -> bool:
    """Tell whether a module comes with its parent, as the projection of MultiheadAttention does."""
    parent, _, leaf = name.rpartition(".")
    return leaf == "out_proj" and parent in targeted

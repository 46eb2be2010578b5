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
from safeproj.patterns import first_matches, fullmatches

CONVERTED_INITIALISATIONS = ("gaussian", "orthogonal", "eva")
"""Named initialisations that leave the base weight as it was."""

ALL_LINEAR = "all-linear"

MAX_LISTED = 100_000
"""Items of a list in the config: every expert of a mixture may be named."""

MAX_LAYERS_PATTERNS = 100
"""Names in `layers_pattern`: models have one."""

MAX_DEPTHS = 32
"""How many parts the names in `modules_to_save` may have, counted by kind."""

MAX_LENGTHS = 200
"""How many lengths they may have, counted by kind."""

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
    given = [finite_number("alpha_pattern", alpha) for alpha in patterns.values()]
    for name, number in first_matches(list(patterns), names, prefix=r"(.*\.)?").items():
        alphas[name] = given[number]
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
    strangers = [name for name in own if name not in targeted and not _is_part(name, targeted)]
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
    stored = set(own)
    # The checkpoint may leave out the first parts of a path that the running model has.
    ends = {end for name in own for end in ends_of(name)}
    for name in sorted(_targeted(config, weights)):
        if name not in ends and stored.isdisjoint(ends_of(name)):
            yield name
    targeted = {end for target in adapter.targets for p in target.parameters for end in ends_of(p)}
    for given in _list("target_parameters", config.get("target_parameters") or []):
        if str(given) not in targeted:
            yield str(given)
    for target in adapter.targets:
        if len(target.pairs) < len(target.parameters):
            yield from target.parameters[len(target.pairs) :]
    if config.get("lora_bias"):
        yield from (f"{m.name} (bias)" for m in adapter.modules if m.bias is None)


def ends_of(name: str) -> Iterator[str]:
    """Yield a name without its first 0, 1, 2, … parts."""
    yield name
    at = name.find(".")
    while at >= 0:
        yield name[at + 1 :]
        at = name.find(".", at + 1)


def _targeted(config: Mapping[str, Any], names: Sequence[str]) -> frozenset[str]:
    """Return those of the names that PEFT would adapt (`check_target_module_exists`)."""
    targets = config.get("target_modules")
    everything = targets == ALL_LINEAR
    found = frozenset(names) if everything else _named("target_modules", targets, names)
    found -= _named("exclude_modules", config.get("exclude_modules"), names)
    given = config.get("modules_to_save") or []
    saved = [given] if isinstance(given, str) else _list("modules_to_save", given)
    found -= set(_within(found, {str(each) for each in saved}))
    layers = config.get("layers_to_transform")
    if layers is None or layers == [] or isinstance(targets, str):
        return found
    # A path that is named whole counts anyway.
    whole = {str(each) for each in _list("target_modules", targets or [])}
    given = [layers] if isinstance(layers, int) else _list("layers_to_transform", layers)
    wanted = {each for each in given if isinstance(each, int)}
    given = config.get("layers_pattern") or []
    patterns = [given] if isinstance(given, str) else _list("layers_pattern", given)
    if len(patterns) > MAX_LAYERS_PATTERNS:
        raise SafeprojError(
            f"layers_pattern has {len(patterns)} names; expected at most {MAX_LAYERS_PATTERNS}"
        )
    return frozenset(n for n in found if n in whole or _layer(n, patterns) in wanted)


def _within(names: Collection[str], modules: Collection[str]) -> Iterator[str]:
    """Yield the names of modules that are saved whole, or are part of one that is.

    Raises:
        SafeprojError: the modules lie at more depths than those of any model.
    """
    by_dots: dict[int, set[str]] = {}
    for module in modules:
        by_dots.setdefault(module.count("."), set()).add(module)
    if len(by_dots) > MAX_DEPTHS:
        raise SafeprojError(
            f"modules_to_save names modules at {len(by_dots)} depths; expected at most {MAX_DEPTHS}"
        )
    for name in names:
        parts = name.split(".")
        if any(
            ".".join(parts[start : start + dots + 1]) in wanted
            for dots, wanted in by_dots.items()
            for start in range(len(parts) - dots)
        ):
            yield name


class Endings:
    """Texts, of which one may be the end of another text.

    Args:
        what: the setting that they come from, for messages.
        texts: the texts.

    Raises:
        SafeprojError: they are of more lengths than the names of any model's modules.
    """

    def __init__(self, what: str, texts: Collection[str]) -> None:
        self._by_length: dict[int, set[str]] = {}
        for text in texts:
            self._by_length.setdefault(len(text), set()).add(text)
        if len(self._by_length) > MAX_LENGTHS:
            raise SafeprojError(
                f"{what} has names of {len(self._by_length)} lengths; expected at most "
                f"{MAX_LENGTHS}"
            )

    def end(self, text: str) -> bool:
        """Tell whether one of them is the end of a text."""
        return any(
            len(text) >= length and text[len(text) - length :] in texts
            for length, texts in self._by_length.items()
        )


def _named(what: str, given: object, names: Sequence[str]) -> frozenset[str]:
    """Return the names that a setting means: a pattern, or ends of names."""
    if isinstance(given, str):
        return fullmatches(given, names)
    ends = {str(item) for item in _list(what, given or [])} - {""}
    return frozenset(name for name in names if not ends.isdisjoint(ends_of(name)))


def _list(what: str, given: object) -> list[Any]:
    if not isinstance(given, list):
        raise SafeprojError(f"{what} is {str(given)[:80]!a}; expected a list")
    if len(given) > MAX_LISTED:
        raise SafeprojError(f"{what} has {len(given)} items; expected at most {MAX_LISTED}")
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

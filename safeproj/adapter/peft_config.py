"""What `adapter_config.json` says of the tensors beside it: scaling, targets, initialisation."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from safeproj.adapter.files import finite_number
from safeproj.adapter.interface import CONFIG
from safeproj.adapter.record import AdaptedModule, Adapter, Kind
from safeproj.errors import SafeprojError
from safeproj.names.layout import EMBEDDING, LINEAR, layout_by_name
from safeproj.storage.patterns import first_matches, fullmatches
from safeproj.text import shorten

T = TypeVar("T")

PLAIN_INITIALISATIONS = ("gaussian", "orthogonal", "eva", "mica")
"""Named initialisations that leave the base weight as it was."""

ON_SAVING = "save_pretrained(path_initial_model_for_weight_conversion=...)"
"""How PEFT converts an adapter of a changed base whose start is at hand."""

ALL_LINEAR = "all-linear"

ADALORA = "ADALORA"
"""The `peft_type` whose factors have singular values between them."""

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
    """Return the initialisation, if it is one that changes the base weights.

    PEFT writes `true` when it converts such an adapter on saving: a name means that it did not.
    """
    init = config.get("init_lora_weights")
    changes = isinstance(init, str) and init.lower() not in PLAIN_INITIALISATIONS
    return init if changes else None


def drawn_anew(config: Mapping[str, Any]) -> str | None:
    """Return the initialisation, if PEFT puts such an adapter on other weights than in training.

    `pissa_niter_N` draws its start at random each time, and that of LoRA-GA follows from gradients
    that are only there in training. PEFT computes that of the others again.
    """
    init = changed_base(config)
    drawn = init is not None and (init.startswith("pissa_niter_") or init == "lora_ga")
    return init if drawn else None


def doubled(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of twice the rank at the same scaling `s`, for the weights themselves.

    Raises:
        SafeprojError: it names no rank.
    """
    rank, alpha = config.get("r"), finite_number("lora_alpha", config.get("lora_alpha"))
    if type(rank) is not int:
        raise SafeprojError(f"r is {rank!r}; expected a whole number")
    growth = math.sqrt(2.0) if config.get("use_rslora") else 2  # s = α / √r, or α / r
    found = {**config, "init_lora_weights": True, "r": 2 * rank, "lora_alpha": growth * alpha}
    patterns = {"rank_pattern": 2, "alpha_pattern": growth}
    for name, factor in patterns.items():
        found[name] = {key: factor * value for key, value in (config.get(name) or {}).items()}
    return found


def with_ranks(
    config: Mapping[str, Any], modules: Sequence[AdaptedModule], ranks: Mapping[str, int]
) -> dict[str, Any]:
    """Return the config of the same modules at the same scalings `s`, some of other ranks.

    What most modules have is `r` and `lora_alpha`, and the patterns name the others, each by its
    whole path: readers that know no patterns read most then, and the order of the keys is of no
    importance.

    Args:
        config: of the adapter.
        modules: all of its updates.
        ranks: module to its new rank.

    Raises:
        SafeprojError: it does not have the numbers for it.
    """
    growth = math.sqrt if config.get("use_rslora") else float  # s = α / √r, or α / r
    scaled = scalings(config, modules)
    wanted = {m.name: ranks.get(m.name, m.rank) for m in modules}
    found = {n: (rank, _number(scaled[n] * growth(rank))) for n, rank in wanted.items()}
    before = allowed_ranks(config)[0], _number(finite_number("lora_alpha", config["lora_alpha"]))
    counts = Counter(found.values())
    usual = max(counts, key=lambda pair: (counts[pair], pair == before))
    patterns = [{n: own[at] for n, own in found.items() if own[at] != usual[at]} for at in (0, 1)]
    for at, pattern in enumerate(patterns):
        first = _first(pattern, list(pattern), ((name,) for name in found))
        for name, own in found.items():
            if first.get(name, usual[at]) != own[at]:
                raise SafeprojError(
                    f"the name of another module is the end of {name}, so that the patterns of "
                    "the config cannot tell them apart"
                )
    return {
        **config,
        "r": usual[0],
        "lora_alpha": usual[1],
        "rank_pattern": patterns[0],
        "alpha_pattern": patterns[1],
    }


def _number(value: float) -> float | int:
    """Return a number as people write it: 32 for 32.0, and for what rounding left of it.

    >>> _number(32.0), _number(31.999999999999996), _number(22.627416997969522)
    (32, 32, 22.627416997969522)
    """
    whole = round(value)
    return whole if math.isclose(value, whole, rel_tol=1e-14) else value


def scalings(config: Mapping[str, Any], modules: Sequence[AdaptedModule]) -> dict[str, float]:
    """Return `s` of each module, by which PEFT multiplies `B A`.

    Of parameters that are adapted directly it is the largest that it may be.

    Raises:
        SafeprojError: the config does not have the numbers for it.
    """
    default = finite_number("lora_alpha", config.get("lora_alpha"))
    if config.get("peft_type") == ADALORA:
        rank = allowed_ranks(config)[0]  # also where ranks were taken away since
        return {m.name: (default if default > 0 else rank) / (rank + 1e-5) for m in modules}
    alphas = {p: finite_number("alpha_pattern", a) for p, a in _patterns(config, "alpha").items()}
    keys = {m.name: _forms(m) for m in modules}
    first = _first(alphas, list(alphas), keys.values())
    largest = {
        name: max((first.get(key, default) for key in forms), key=abs)
        for name, forms in keys.items()
    }
    root = bool(config.get("use_rslora"))
    return {
        m.name: largest[m.name] / (math.sqrt(m.rank) if root else m.rank) for m in modules if m.rank
    }


def other_scalings(
    config: Mapping[str, Any], modules: Sequence[AdaptedModule]
) -> dict[str, tuple[float, ...]]:
    """Return what readers that know no patterns multiply `B A` of each module by.

    Some take `lora_alpha / r` of the config, some divide by the tensors' rank; and some of them
    know rsLoRA.

    Raises:
        SafeprojError: the config does not have the numbers for it.
    """
    if config.get("peft_type") == ADALORA:
        return {}  # which they do not read
    alpha = finite_number("lora_alpha", config.get("lora_alpha"))
    rank = allowed_ranks(config)[0]
    root = bool(config.get("use_rslora"))
    return {
        m.name: tuple(
            alpha / divisor
            for each in dict.fromkeys((rank, m.rank))
            for divisor in ((each, math.sqrt(each)) if root else (each,))
        )
        for m in modules
        if m.rank
    }


def allowed_ranks(config: Mapping[str, Any]) -> list[int]:
    """Return the ranks that the config gives to modules, that of most of them first.

    Raises:
        SafeprojError: it gives none, or something that PEFT makes no layer of.
    """
    patterns = _patterns(config, "rank")
    if config.get("peft_type") != ADALORA:
        return [_rank("r", config.get("r")), *(_rank("rank_pattern", r) for r in patterns.values())]
    rank = _rank("init_r", config.get("init_r"))
    for mask in patterns.values():  # which of the rows are left
        if not isinstance(mask, list) or len(mask) != rank or {type(i) for i in mask} != {bool}:
            raise SafeprojError(
                f"rank_pattern has {str(mask)[:80]!a}; expected {rank} of true and false for each "
                f"module, since init_r is {rank}"
            )
    return [rank, *map(sum, patterns.values())]


def _rank(what: str, value: object) -> int:
    if type(value) is not int or value < 1:
        raise SafeprojError(f"{what} is {str(value)[:80]!a}; expected a whole number of at least 1")
    return value


def _patterns(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return `rank_pattern` or `alpha_pattern`."""
    found = config.get(f"{kind}_pattern") or {}
    if not isinstance(found, dict):
        raise SafeprojError(f"{kind}_pattern does not map names to numbers")
    return found


def _first(
    values: Mapping[str, T], patterns: Sequence[str], names: Iterable[Iterable[str]]
) -> dict[str, T]:
    """Return the value of each name's first pattern, as PEFT does (`get_pattern_key`)."""
    distinct = sorted({name for each in names for name in each})
    found = first_matches(patterns, distinct, prefix=r"(.*\.)?")
    return {name: values[patterns[number]] for name, number in found.items()}


def differing(config: Mapping[str, Any], modules: Sequence[AdaptedModule]) -> Iterator[str]:
    """Yield where readers differ about ranks or scalings, though the numbers are in order.

    Raises:
        SafeprojError: the config does not have the numbers for it.
    """
    if "lora_parameters" in config:
        yield "lora_parameters belongs to MLX: some readers take alpha and scale from it, PEFT not"
    for switch in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"):
        if type(config.get(switch, False)) is not bool:
            yield f"{switch} is {str(config[switch])[:80]!a}; expected true or false"
    if config.get("peft_type") == ADALORA:
        return
    default = allowed_ranks(config)[0]
    keys = {m.name: _forms(m) for m in modules}
    for kind in ("rank", "alpha"):
        values = _patterns(config, kind)
        first = _first(values, list(values), keys.values())
        turned = _first(values, sorted(values), keys.values())
        saved = [
            name
            for name, forms in keys.items()
            if any(first.get(form) != turned.get(form) for form in forms)
        ]
        if saved:
            yield (
                f"the order of the keys of {kind}_pattern decides for {shorten(saved)}, and PEFT "
                "sorts them whenever it saves the adapter: it would have another "
                f"{kind} then"
            )
        if kind == "alpha":
            continue
        others = [
            m.name
            for m in modules
            if m.rank not in {first.get(form, default) for form in keys[m.name]}
        ]
        if others:
            yield (
                f"the tensors of {shorten(others)} have another rank than r and rank_pattern say: "
                "PEFT would not load them, other readers would"
            )


def _forms(module: AdaptedModule) -> tuple[str, ...]:
    """Return what PEFT may match patterns with."""
    if module.kind is not Kind.parameter:
        return (module.name,)
    return (module.name, module.parameter, module.parameter.removesuffix(".weight"))


WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What training puts around modules, and takes off again when it saves as it should."""

_LEADING = (("module",), ("base_model", "model"), ("base_model",), ("model",))
"""What may stand in front of a path once too often: a wrapper's name, or PEFT's or the model's own
prefix a second time."""


def unloaded(adapter: Adapter, names: Collection[str]) -> Iterator[str]:
    """Yield why PEFT would load nothing of some factors: it drops what it has no place for.

    Args:
        adapter: the adapter.
        names: of the model's weights.
    """
    names = frozenset(names)
    modules = {path: module for module in adapter.modules for path in paths(module)}
    targets = {
        pair[0].partition(".lora_")[0].removeprefix(PREFIX)
        for t in adapter.targets
        for pair in t.pairs
    }
    found: dict[str, list[str]] = {}
    for path in (*modules, *sorted(targets)):
        surplus = _surplus(path, names)
        if surplus is not None:
            said = f"have {surplus!r} in their names, which the model's modules do not: take it out"
            found.setdefault(said, []).append(path)
    ada = adapter.config.get("peft_type") == ADALORA
    for module in adapter.modules:
        raw, _, factor = module.input.key.removeprefix(PREFIX).partition(".lora_")
        layout = layout_by_name(module.parameter)
        text: str | None = None
        if ".base_layer" in raw and not _is_part(raw.replace(".base_layer", ""), modules):
            text = "have 'base_layer' in their names, where PEFT keeps the model's own weight"
        elif module.kind is not Kind.embedding and (factor == "A") is not ada:
            one, other = ("AdaLoRA", "LORA") if factor == "A" else ("LoRA", ADALORA)
            text = f"are named as those of {one}, and peft_type is {other}"
        elif module.kind is Kind.embedding and layout is LINEAR:
            text = "are named as those of an embedding, and these are linear layers"
        elif module.kind is Kind.linear and layout is EMBEDDING:
            text = "are named as those of a linear layer, and these are embeddings"
        if text is not None:
            found.setdefault(text, []).append(module.name)
    for text, dead in found.items():
        yield f"PEFT would load nothing of {shorten(dead)}: the tensors {text}"


def _surplus(path: str, names: Collection[str]) -> str | None:
    """Return what a path has that no module of the model has, None if nothing is known of that."""
    parts = path.split(".")
    inside = next((part for part in parts if part in WRAPPERS), None)
    if inside is not None or f"{path}.weight" in names:
        return inside
    for front in _LEADING:
        rest = ".".join(parts[len(front) :])
        twice = front != ("model",) or rest.startswith("model.")
        if tuple(parts[: len(front)]) == front and twice and f"{rest}.weight" in names:
            return ".".join(front)
    return None


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
    yield from unloaded(adapter, names)
    default = [m.name for m in adapter.modules if ".default" in m.output.key]
    if default:
        yield (
            f"{shorten(default)}: the tensors have the adapter name 'default' in their names; PEFT "
            "0.21 loads them under that name alone, other readers not at all"
        )
    yield from _without_tensors(adapter, names)
    # PEFT fills what has no tensors: with zeros, unless it is told not to.
    if not config.get("init_lora_weights", True):
        filled = list(_filled(adapter, own, names))
        if filled:
            yield (
                f"{len(filled)} targets have no tensors: {shorten(filled)}; with "
                "init_lora_weights false they would get random updates"
            )


def _without_tensors(adapter: Adapter, names: Collection[str]) -> Iterator[str]:
    """Yield settings for whole weights that have no tensors: PEFT fails, other readers do not."""
    config, changes = adapter.config, adapter.full_changes
    given = config.get("modules_to_save") or []
    saved = [given] if isinstance(given, str) else _list("modules_to_save", given)
    wanted = dict.fromkeys(map(str, saved))
    present = {each for _, each in _within((n.rpartition(".")[0] for n in names), wanted)}
    stored = {each for _, each in _within((c.parameter for c in changes), wanted)}
    for each in wanted:
        if each in present and each not in stored:  # heads of other tasks may be in neither
            yield f"modules_to_save names {each[:80]!a}, and there are no tensors of it"
    indices = config.get("trainable_token_indices") or []
    rows = list(map(str, indices)) if isinstance(indices, dict) else [""] if indices else []
    tokens = [c.parameter.rpartition(".")[0] for c in changes if c.kind == "trainable tokens"]
    for each in rows:
        if not any(f".{name}".endswith(each and f".{each}") for name in tokens):
            where = f" for {each[:80]!a}" if each else ""
            yield f"trainable_token_indices is set{where}, and there are no tensors of it"


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
    found -= {name for name, _ in _within(found, {str(each) for each in saved})}
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


def _within(names: Iterable[str], modules: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield each name with each of the modules that it is, or is part of.

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
        for dots, wanted in by_dots.items():
            for start in range(len(parts) - dots):
                if (module := ".".join(parts[start : start + dots + 1])) in wanted:
                    yield name, module


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

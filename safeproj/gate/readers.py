"""What programs other than PEFT make of an adapter: a table, each entry of one version.

docs/readers.md says where each entry was read or run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from safeproj.adapter.gguf import Gguf
from safeproj.adapter.interface import Format
from safeproj.adapter.peft import BIN, Peft
from safeproj.adapter.peft_config import ADALORA, ALL_LINEAR
from safeproj.adapter.record import AdaptedModule, FullChange, Kind
from safeproj.errors import SafeprojError
from safeproj.gate.weights import Context, found
from safeproj.names.layout import model_types
from safeproj.records.checks import Finding
from safeproj.storage.patterns import fullmatches
from safeproj.text import shorten

REFUSES, IGNORES = "refuses", "ignores"

# What an adapter may have that not every program reads as PEFT does.
DORA = "DoRA"
LORA_BIAS = "lora_bias"
ADA = "AdaLoRA"
EMBEDDINGS = "LoRA of embeddings"
CONVOLUTIONS = "LoRA of convolutions"
EXPERTS = "expert stacks (target_parameters)"
NAMED = "the adapter's name in names of tensors"
PICKLED = f"{BIN}, without a safetensors file"
SAVED = "modules_to_save"
TOKENS = "trainable tokens"
BIASES = "biases of the model"
COPIES = "copies of the model's own weights"
REPLICATED = "layer_replication"
TRIGGER = "alora_invocation_tokens"
CHANGED = "init_lora_weights"

_CHANGES = {
    "modules_to_save": SAVED,
    "trainable tokens": TOKENS,
    "bias": BIASES,
    "copy of the base layer's bias": BIASES,
    "copy of the base layer's weight": COPIES,
}

_SAME = 1e-6
"""Relative difference of two scalings below which they are the same: float32 rounds so far."""


@dataclass(frozen=True)
class Adapted:
    """An adapter as the table looks at it."""

    context: Context

    @property
    def config(self) -> Mapping[str, Any]:
        """`adapter_config.json`."""
        return self.context.run.adapter.config

    @property
    def init(self) -> Any:
        """`init_lora_weights` as it is stored, also where the adapter was converted to score it."""
        return self.context.run.adapter.converted_from or self.config.get("init_lora_weights")

    @cached_property
    def modules(self) -> list[AdaptedModule]:
        """The updates that were scored, and where tensors repeat them."""
        return [item.module for item, _ in self.context.modules]

    @cached_property
    def scalings(self) -> dict[str, float]:
        """Return `s` of each module as PEFT multiplies."""
        adapter = self.context.run.adapter
        return adapter.format.scalings(adapter, self.modules)

    @cached_property
    def changes(self) -> dict[str, float | None]:
        """Return by how much each tensor that replaces a weight differs from the aligned one."""
        return {each.tensor: each.relative_change for each in self.context.run.report.unprojected}

    def has(self) -> dict[str, list[str]]:
        """Return what the adapter has of the kinds above, each with its places."""
        adapter, config = self.context.run.adapter, self.config
        kinds: dict[str, Callable[[AdaptedModule], bool]] = {
            DORA: lambda m: m.dora,
            LORA_BIAS: lambda m: m.bias is not None,
            ADA: lambda m: m.gain is not None,
            EMBEDDINGS: lambda m: m.kind is Kind.embedding,
            CONVOLUTIONS: lambda m: m.kind is Kind.convolution,
            EXPERTS: lambda m: m.kind is Kind.parameter,
            NAMED: lambda m: ".default" in m.output.key,
        }
        has = {kind: [m.name for m in self.modules if test(m)] for kind, test in kinds.items()}
        has[PICKLED] = [BIN] if adapter.weights_file == BIN else []
        for change in adapter.full_changes:
            has.setdefault(_CHANGES.get(change.kind, SAVED), []).append(change.key)
        for setting in (REPLICATED, TRIGGER):
            has[setting] = [setting] if config.get(setting) else []
        if adapter.converted_from is not None:
            has[CHANGED] = [adapter.converted_from]
        return {kind: places for kind, places in has.items() if places}


Scaling = Callable[[Adapted], Mapping[str, float]]
Further = Callable[[Adapted], Iterator[str]]


@dataclass(frozen=True)
class Reader:
    """One program of one version.

    Attributes:
        title: what it is called, with its version.
        formats: of adapters that it reads.
        makes: what it does with what an adapter has, where that is not what PEFT does.
        scaling: by what it multiplies `B A` of each module; None where as PEFT does.
        further: what else it refuses or reads otherwise.
    """

    title: str
    formats: tuple[type[Format], ...]
    makes: Mapping[str, str]
    scaling: Scaling | None = None
    further: Sequence[Further] = field(default_factory=tuple)


def about_readers(context: Context) -> Iterator[Finding]:
    """Yield what the programs that the policy names read otherwise than it was scored."""
    adapted = Adapted(context)
    for name in context.policy.readers:
        try:
            for text in _differences(TABLE[name], adapted):
                yield found("SP042", f"{name}: {TABLE[name].title} {text}", policy=context.policy)
        except SafeprojError as error:
            yield found("SP042", f"{name}: {error.message}", policy=context.policy)


def _differences(reader: Reader, adapted: Adapted) -> Iterator[str]:
    format_ = type(adapted.context.run.adapter.format)
    if not issubclass(format_, reader.formats):
        read = " or ".join(each.__name__.upper() for each in reader.formats)
        yield f"reads adapters of {read}, and this is one of {format_.__name__.upper()}"
        return
    if format_ is Gguf:
        return  # which holds what the program multiplies, and was read so
    for kind, places in adapted.has().items():
        verb = reader.makes.get(kind)
        if verb == IGNORES:  # which does nothing where it is what the model has anyway
            places = [each for each in places if adapted.changes.get(each) != 0.0]
        if verb is not None and places:
            where = "" if places == [kind] or kind == PICKLED else f": {shorten(places)}"
            yield f"{verb} {kind}{where}"
    for further in reader.further:
        yield from further(adapted)
    if reader.scaling is None:
        return
    other: dict[tuple[float, float], list[str]] = {}
    theirs = reader.scaling(adapted)
    for name, s in adapted.scalings.items():
        if name in theirs and not math.isclose(theirs[name], s, rel_tol=_SAME):
            other.setdefault((theirs[name], s), []).append(name)
    for (scaled, s), names in other.items():
        yield f"scales {shorten(names)} by {scaled:.4g}, and PEFT by {s:.4g}"


# --- scalings


def _alpha(adapted: Adapted) -> float:
    return float(adapted.config["lora_alpha"])


def _by_config(adapted: Adapted) -> dict[str, float]:
    """Return `lora_alpha / r`, whatever the patterns and rsLoRA say."""
    scaling = _alpha(adapted) / adapted.config["r"]
    return {module.name: scaling for module in adapted.modules}


def _by_tensors(adapted: Adapted) -> dict[str, float]:
    """Return `lora_alpha` by the rank of the tensors; an alpha of 0 stands for a scaling of 1."""
    alpha = _alpha(adapted)
    return {m.name: alpha / m.rank if alpha else 1.0 for m in adapted.modules if m.rank}


def _by_ollama(adapted: Adapted) -> dict[str, float]:
    """Return the same with the alpha that MLX's settings have, if there are any."""
    given = adapted.config.get("lora_parameters")
    alpha = given.get("alpha") if isinstance(given, dict) else None
    if not isinstance(alpha, int | float) or not alpha:
        return _by_tensors(adapted)
    return {m.name: alpha / m.rank for m in adapted.modules if m.rank}


def _by_caller(adapted: Adapted) -> dict[str, float]:
    """Return 1: the config is not read, and the caller's alpha, 1 if not given, is all there is."""
    return dict.fromkeys((module.name for module in adapted.modules), 1.0)


def _early(adapted: Adapted) -> dict[str, tuple[float, float]]:
    """Return rank and alpha of each module as PEFT took them before it had `get_pattern_key`.

    One key counts for both patterns: the first of either that matches after a dot. Where none
    does it is the module's whole path.
    """
    config, names = adapted.config, [module.name for module in adapted.modules]
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    keys: dict[str, str] = {}
    for key in (*ranks, *alphas):
        for name in fullmatches(rf"(?:.*\.{key}$)[^\n]*", names):  # `re.match`: alternatives differ
            keys.setdefault(name, key)
    found = {}
    for name in names:
        key = keys.get(name, name)
        found[name] = (ranks.get(key, config["r"]), alphas.get(key, config["lora_alpha"]))
    return found


def _by_early_peft(adapted: Adapted) -> dict[str, float]:
    if adapted.config.get("peft_type") == ADALORA:
        return {}
    root = bool(adapted.config.get("use_rslora"))
    return {n: a / (math.sqrt(r) if root else r) for n, (r, a) in _early(adapted).items()}


# --- what else programs refuse


def _wants_settings(adapted: Adapted) -> Iterator[str]:
    for name in ("r", "lora_alpha", "target_modules"):
        if name not in adapted.config:
            yield f"refuses a config without {name}"


def _changed_base(adapted: Adapted) -> Iterator[str]:
    init = adapted.init
    known = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
    if isinstance(init, str) and init.lower() not in known:
        yield f"refuses init_lora_weights {init[:80]!r}"


def _gate_without_down(adapted: Adapted) -> Iterator[str]:
    """Yield stacks whose one pair of factors is not that of `down_proj`, which it is taken for."""
    for target in adapted.context.run.adapter.targets:
        named = {
            m.parameter.rpartition(".")[2] for m in adapted.modules if m.kind is Kind.parameter
        }
        if len(target.pairs) == 1 and named - {"down_proj"}:
            yield f"takes the factors of {target.module} for those of down_proj"


def _one_rank(adapted: Adapted) -> Iterator[str]:
    r = adapted.config.get("r")
    others = [module.name for module in adapted.modules if module.rank != r]
    if others:
        yield f"refuses ranks other than r, which is {r}: {shorten(others)}"


def _no_patterns_of_names(adapted: Adapted) -> Iterator[str]:
    targets = adapted.config.get("target_modules")
    if isinstance(targets, str) and targets not in ("all", ALL_LINEAR):
        yield "refuses target_modules that are a regular expression"


def _query_and_value(adapted: Adapted) -> Iterator[str]:
    """Yield attention layers whose factors cannot be stacked: query and value belong together."""
    found: dict[str, set[str]] = {}
    for module in adapted.modules:
        parent, _, leaf = module.name.rpartition(".")
        if leaf in ("q_proj", "k_proj", "v_proj"):
            found.setdefault(parent, set()).add(leaf)
    apart = [name for name, leaves in found.items() if not {"q_proj", "v_proj"} <= leaves]
    if apart:
        yield f"wants q_proj and v_proj together: {shorten(apart)}"


def _whole_alpha(adapted: Adapted) -> Iterator[str]:
    alpha = adapted.config.get("lora_alpha")
    if type(alpha) is not int or not 0 <= alpha < 1 << 32:
        yield f"refuses lora_alpha {alpha!r}, since it is not written as a whole number"


def _llama_alone(adapted: Adapted) -> Iterator[str]:
    """Yield what the model's kind says: adapters of two are converted, those of one otherwise."""
    types = model_types(adapted.context.config)
    if types and not types & {"llama", "mistral", "gemma2"}:
        yield f"refuses adapters of {shorten(sorted(types))}: it knows those of Llama and Gemma 2"
    turned = [m.name for m in adapted.modules if m.name.endswith((".q_proj", ".k_proj"))]
    if turned and "gemma2" not in types:
        yield (
            f"rearranges lora_A of {shorten(turned)} and not lora_B when it converts the adapter; "
            "give it the GGUF file that llama.cpp's converter makes"
        )


def _known_places(adapted: Adapted) -> Iterator[str]:
    """Yield modules that its conversion has no name for."""
    leaves = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    linear = [m.name for m in adapted.modules if m.kind is Kind.linear]
    others = [name for name in linear if name.rpartition(".")[2] not in leaves]
    if others:
        yield f"refuses {shorten(others)}: it has no name for them"


def _dtypes(adapted: Adapted) -> Iterator[str]:
    tensors = adapted.context.run.adapter.tensors
    unequal, others = [], []
    for module in adapted.modules:
        A, B = (tensors[f.key].dtype.name for f in (module.input, module.output))
        if not {A, B} <= {"float32", "float16", "bfloat16"}:
            others.append(f"{module.name} ({A}, {B})")
        elif A != B:
            unequal.append(f"{module.name} ({A}, {B})")
    if others:
        yield f"refuses factors that are not of 32 or 16 bits: {shorten(others)}"
    if unequal:
        yield f"refuses two factors of different types: {shorten(unequal)}"


def _other_changes(*read: str) -> Further:
    """Return a rule for whole weights of which a program reads some, and refuses others."""

    def further(adapted: Adapted) -> Iterator[str]:
        changes = adapted.context.run.adapter.full_changes
        saved = [c.key for c in changes if _is_saved(c) and not c.key.endswith(read)]
        if saved:
            yield f"refuses {SAVED}: {shorten(saved)}"

    return further


def _is_saved(change: FullChange) -> bool:
    return _CHANGES.get(change.kind, SAVED) == SAVED


def _foreign_copies(adapted: Adapted) -> Iterator[str]:
    changes = adapted.context.run.adapter.full_changes
    read = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
    copies = [c.key for c in changes if _CHANGES.get(c.kind) == COPIES and not c.key.endswith(read)]
    if copies:
        yield f"refuses {COPIES}: {shorten(copies)}"


_EARLY = """
alpha_pattern auto_mapping base_model_name_or_path bias fan_in_fan_out inference_mode
init_lora_weights layer_replication layers_pattern layers_to_transform loftq_config lora_alpha
lora_dropout megatron_config megatron_core modules_to_save peft_type r rank_pattern revision
target_modules task_type use_dora use_rslora
"""
_EARLY_ADALORA = "beta1 beta2 deltaT init_r orth_reg_weight target_r tfinal tinit total_step"


def _early_settings(adapted: Adapted) -> Iterator[str]:
    ada = adapted.config.get("peft_type") == ADALORA
    known = f"{_EARLY} {_EARLY_ADALORA}" if ada else _EARLY
    unknown = sorted(adapted.config.keys() - set(known.split()))
    if unknown:
        yield f"refuses a config with settings that it does not know: {shorten(unknown)}"
    init = adapted.init
    if (
        isinstance(init, str)
        and init.lower() not in ("gaussian", "loftq")
        and (not init.startswith("pissa"))
    ):
        yield f"refuses init_lora_weights {init[:80]!r}"


def _early_ranks(adapted: Adapted) -> Iterator[str]:
    if adapted.config.get("peft_type") == ADALORA:
        return
    ranks = _early(adapted)
    others = [module.name for module in adapted.modules if ranks[module.name][0] != module.rank]
    if others:
        yield f"takes another rank than the tensors have, and refuses them: {shorten(others)}"


TABLE: dict[str, Reader] = {
    "vllm": Reader(
        "vLLM 0.33.0",
        (Peft,),
        {
            DORA: REFUSES,
            LORA_BIAS: REFUSES,
            ADA: REFUSES,
            CONVOLUTIONS: REFUSES,
            NAMED: REFUSES,
            TOKENS: REFUSES,
            BIASES: REFUSES,
            REPLICATED: REFUSES,
            TRIGGER: REFUSES,
        },
        further=(
            _wants_settings,
            _changed_base,
            _gate_without_down,
            _foreign_copies,
            _other_changes(".classifier.weight", ".score.weight"),
        ),
    ),
    "sglang": Reader(
        "SGLang 0.5.23",
        (Peft,),
        {
            CHANGED: IGNORES,
            DORA: REFUSES,
            LORA_BIAS: "takes for lora_B the tensors of",
            ADA: REFUSES,
            CONVOLUTIONS: REFUSES,
            EXPERTS: "is not known to read",
            SAVED: IGNORES,
            TOKENS: IGNORES,
            BIASES: IGNORES,
            COPIES: IGNORES,
            REPLICATED: IGNORES,
            TRIGGER: IGNORES,
        },
        _by_config,
        (_wants_settings, _one_rank, _no_patterns_of_names, _query_and_value),
    ),
    "llama.cpp": Reader(
        "llama.cpp's converter (b11549)",
        (Peft, Gguf),
        {
            CHANGED: IGNORES,
            DORA: REFUSES,
            LORA_BIAS: REFUSES,
            ADA: REFUSES,
            CONVOLUTIONS: REFUSES,
            EXPERTS: REFUSES,
            NAMED: REFUSES,
            TOKENS: REFUSES,
            BIASES: REFUSES,
            COPIES: IGNORES,
            REPLICATED: IGNORES,
            SAVED: f"{REFUSES} (or, if they are norms, {IGNORES})",
        },
        _by_tensors,
    ),
    "ollama": Reader(
        "Ollama 0.33.0-rc2",
        (Peft, Gguf),
        {
            CHANGED: IGNORES,
            DORA: REFUSES,
            LORA_BIAS: REFUSES,
            ADA: REFUSES,
            EMBEDDINGS: REFUSES,
            CONVOLUTIONS: REFUSES,
            EXPERTS: REFUSES,
            NAMED: REFUSES,
            PICKLED: REFUSES,
            SAVED: REFUSES,
            TOKENS: REFUSES,
            BIASES: REFUSES,
            COPIES: REFUSES,
            REPLICATED: IGNORES,
            TRIGGER: IGNORES,
        },
        _by_ollama,
        (_whole_alpha, _llama_alone, _known_places),
    ),
    "openvino": Reader(
        "OpenVINO GenAI 2026.4.1",
        (Peft,),
        {
            CHANGED: IGNORES,
            DORA: IGNORES,
            LORA_BIAS: IGNORES,
            ADA: IGNORES,
            EMBEDDINGS: IGNORES,
            EXPERTS: IGNORES,
            NAMED: IGNORES,
            PICKLED: REFUSES,
            SAVED: IGNORES,
            TOKENS: IGNORES,
            BIASES: IGNORES,
            COPIES: IGNORES,
            REPLICATED: IGNORES,
            TRIGGER: IGNORES,
        },
        _by_caller,
        (_dtypes,),
    ),
    "peft-0.11": Reader(
        "PEFT 0.11.1",
        (Peft,),
        {LORA_BIAS: IGNORES, EXPERTS: IGNORES, NAMED: IGNORES, TOKENS: IGNORES, TRIGGER: IGNORES},
        _by_early_peft,
        (_early_settings, _early_ranks),
    ),
}
"""What each program makes of adapters."""

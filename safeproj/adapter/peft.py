"""Reading and writing PEFT LoRA adapters; whatever is not understood is refused here, by name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from numpy import array_equal

from safeproj.adapter.experts import CURRENT, UNSAID, peft_version
from safeproj.adapter.files import (
    check_values,
    dora_warnings,
    read_safetensors,
    write_safetensors,
)
from safeproj.adapter.interface import CONFIG, Format
from safeproj.adapter.peft_config import (
    ADALORA,
    PREFIX,
    Endings,
    allowed_ranks,
    changed_base,
    differing,
    disagreements,
    ends_of,
    other_scalings,
    scalings,
    unloaded,
    with_ranks,
)
from safeproj.adapter.record import (
    AdaptedModule,
    Adapter,
    Factor,
    FullChange,
    Kind,
    TargetParameters,
)
from safeproj.adapter.vocabulary import is_vocabulary, unwrapped
from safeproj.errors import SafeprojError
from safeproj.storage.arrays import Array
from safeproj.storage.documents import json_document
from safeproj.storage.picklefile import read_pickle
from safeproj.storage.source import Folder, read_json
from safeproj.text import natural_order, printable, shorten

SAFETENSORS = "adapter_model.safetensors"
BIN = "adapter_model.bin"
SUPPORTED_TYPES = ("LORA", ADALORA)
"""The `peft_type`s whose update is a product of two factors."""

ADAPTER_HUB = frozenset({"pytorch_adapter.bin", "adapter.safetensors"})
"""What AdapterHub calls its weights, beside a config of the same name as PEFT's."""

REFUSED_SETTINGS = {
    "use_qalora": "QA-LoRA, whose update is not a matrix of the weight's shape",
    "use_bdlora": "BD-LoRA, whose factors are block diagonal: C B is not",
    "kasa_config": "KaSA, which trains on a truncated base weight",
}
"""Settings of `adapter_config.json` under which `B A` is not the update of the stored weight."""

REFUSED_TENSORS = {".lora_diag": "KaSA, which trains on a truncated base weight"}
"""Tensors that give away what the config does not say."""

SUPPORTED = (
    "supported are LoRA, rsLoRA, DoRA and AdaLoRA on linear layers, embeddings, convolutions, "
    "attention and expert stacks"
)

MAX_LEAVES = 100
"""Kinds of target parameters of all modules."""

MAX_TIED = 16
"""Embeddings whose factors are looked for among those of all heads."""

MAX_TARGETS = 6
"""Target parameters of one module: all orders are tried, and the list comes from the file."""


@dataclass(frozen=True)
class _Suffixes:
    """How one kind of adapted module names its tensors, after the module's path."""

    A: str
    B: str
    kind: Kind
    gain: str | None = None


_LINEAR = _Suffixes(".lora_A.weight", ".lora_B.weight", Kind.linear)
_FORMS = (
    _LINEAR,
    _Suffixes(".lora_embedding_A", ".lora_embedding_B", Kind.embedding),
    _Suffixes(".lora_A", ".lora_B", Kind.linear, ".lora_E"),  # AdaLoRA
    # With the adapter's name still in the keys, as they are in a running model's state_dict.
    _Suffixes(".lora_A.default.weight", ".lora_B.default.weight", Kind.linear),
    _Suffixes(".lora_embedding_A.default", ".lora_embedding_B.default", Kind.embedding),
)
_BIASES = (".lora_B.bias", ".lora_B.default.bias")
_MAGNITUDES = (
    ".lora_magnitude_vector",
    ".lora_magnitude_vector.weight",
    ".lora_magnitude_vector.default.weight",
)
_TRAINING_STATE = {
    "velora_config": (".lora_velora_embed",),
    "monteclora_config": (
        ".lora_monteclora_sampler.expert_weights",
        ".lora_monteclora_sampler.expert_weights_prior",
        ".lora_monteclora_sampler.gaussian_var_prior",
        ".lora_monteclora_sampler.std_prior",
    ),
}
"""What VeLoRA and MonteCLoRA keep for training, by the setting that makes them; the update is still
that of the two factors."""


@dataclass(frozen=True)
class Peft(Format):
    """A PEFT LoRA adapter directory.

    Attributes:
        metadata: metadata of the safetensors file, None for a `.bin` file or where there is none.
    """

    metadata: dict[str, str] | None

    documents: ClassVar[tuple[str, ...]] = (CONFIG,)
    stand_ins: ClassVar[frozenset[str]] = frozenset({SAFETENSORS, BIN, CONFIG})
    library: ClassVar[str | None] = "peft"
    base_model_key: ClassVar[str | None] = "base_model_name_or_path"

    @classmethod
    def read(cls, folder: Folder) -> Adapter | None:
        if CONFIG not in folder.files:
            return None
        source, config = folder.source, read_json(folder, CONFIG)
        if "peft_type" not in config and (folder.files & ADAPTER_HUB or "model_class" in config):
            raise SafeprojError(
                f"{source}: an adapter of AdapterHub's library `adapters`, which no loader of LoRA "
                "adapters reads; train it with PEFT, whose adapters are supported"
            )
        refuse_settings(source, config)
        weights_file = next((name for name in (SAFETENSORS, BIN) if name in folder.files), None)
        if weights_file is None:
            raise SafeprojError(
                f"{source}: neither {SAFETENSORS} nor {BIN} found; is this an adapter directory?"
            )
        metadata, tensors = _read_tensors(folder, weights_file)
        return cls.of(folder, config, weights_file, metadata, tensors)

    @classmethod
    def of(
        cls,
        folder: Folder,
        config: dict[str, Any],
        weights_file: str,
        metadata: dict[str, str] | None,
        tensors: dict[str, Array],
    ) -> Adapter:
        """Return the adapter of these tensors, checked.

        Args:
            folder: where they are from.
            config: `adapter_config.json`, which `refuse_settings` let pass.
            weights_file: what holds them.
            metadata: of the safetensors file, None where there is none.
            tensors: by the names that PEFT saves them under.

        Raises:
            SafeprojError: it cannot be used.
        """
        source = folder.source
        found = _Classifier(source, config, tensors)
        check_values(source, tensors, {c.key for c in found.full_changes} | found.unknown.keys())
        return Adapter(
            folder,
            weights_file,
            config,
            tensors,
            found.modules,
            found.targets,
            found.full_changes,
            tuple(_warnings(config, found)),
            cls(metadata),
            found.unknown,
        )

    @classmethod
    def is_weights(cls, name: str) -> bool:
        return name in (SAFETENSORS, BIN)

    @property
    def output_file(self) -> str:
        return SAFETENSORS

    @property
    def replaced_files(self) -> frozenset[str]:
        return frozenset({SAFETENSORS, BIN})  # a `.bin` beside them would still be unpatched

    def scalings(self, adapter: Adapter, modules: Sequence[AdaptedModule]) -> dict[str, float]:
        return scalings(adapter.config, modules)

    def other_scalings(
        self, adapter: Adapter, modules: Sequence[AdaptedModule]
    ) -> dict[str, tuple[float, ...]]:
        return other_scalings(adapter.config, modules)

    def changed_base(self, adapter: Adapter) -> str | None:
        return changed_base(adapter.config)

    def unloaded(self, adapter: Adapter, names: Collection[str]) -> Iterator[str]:
        yield from unloaded(adapter, names)

    def differing(self, adapter: Adapter, modules: Sequence[AdaptedModule]) -> Iterator[str]:
        yield from differing(adapter.config, modules)

    def disagreements(self, adapter: Adapter, names: Collection[str]) -> Iterator[str]:
        yield from disagreements(adapter, names)

    def resized(self, adapter: Adapter, ranks: Mapping[str, int]) -> dict[str, bytes]:
        if adapter.config.get("peft_type") == ADALORA:
            return super().resized(adapter, ranks)
        others = [m.name for m in adapter.modules if m.name in ranks and not _is_plain(m)]
        if others or ranks.keys() - {module.name for module in adapter.modules}:
            raise SafeprojError(
                f"{adapter.source}: {shorten(others or ranks)} shares its tensors with other "
                "modules, so that its rank cannot be changed"
            )
        return {CONFIG: json_document(with_ranks(adapter.config, adapter.modules, ranks))}

    @property
    def container(self) -> dict[str, str] | None:
        return self.metadata

    @property
    def written_container(self) -> dict[str, str]:
        return {"format": "pt"} if self.metadata is None else self.metadata

    def write(self, path: Path, tensors: Mapping[str, Array]) -> dict[str, str]:
        return write_safetensors(path, self.written_container, tensors)


def _is_plain(module: AdaptedModule) -> bool:
    """Tell whether an update has two tensors of its own, and nothing that repeats them."""
    return module.input.is_whole and module.output.is_whole and not module.mirrors


def refuse_settings(source: str, config: Mapping[str, Any]) -> None:
    """Refuse an adapter whose update is not the product of two factors, by its config.

    Raises:
        SafeprojError: it is one.
    """
    found = config.get("peft_type")
    if found not in SUPPORTED_TYPES:
        raise SafeprojError(f"{source}: peft_type {found!r} is not supported; {SUPPORTED}")
    for setting, meaning in REFUSED_SETTINGS.items():
        if config.get(setting):
            raise SafeprojError(
                f"{source}: {CONFIG} sets {setting} ({meaning}), which is not supported; "
                f"{SUPPORTED}"
            )


def _read_tensors(folder: Folder, name: str) -> tuple[dict[str, str] | None, dict[str, Array]]:
    if name == SAFETENSORS:
        return read_safetensors(folder, name)
    return None, read_pickle(folder, name)


class _Classifier:
    """Sorts the tensors of an adapter: updates, target parameters, changes of whole weights.

    Those that belong to none of these are `unknown`, each with what is said of it.

    Raises:
        SafeprojError: a tensor has no counterpart, or belongs to a kind that is refused.
    """

    def __init__(
        self, source: str, config: Mapping[str, Any], tensors: Mapping[str, Array]
    ) -> None:
        self._source = source
        self._config = config
        self._tensors = tensors
        self._known: set[str] = set()
        saved = config.get("modules_to_save") or []
        saved = [saved] if isinstance(saved, str) else saved
        if not isinstance(saved, list) or not all(isinstance(each, str) for each in saved):
            raise SafeprojError(
                f"{source}: {CONFIG}: modules_to_save is no list of module names; PEFT would not "
                "load it"
            )
        self._saved = Endings("modules_to_save", saved)
        forms = self._forms()
        targets = self._target_parameters(forms)
        wrapped = {key for target in targets for pair in target.pairs for key in pair}
        modules = [
            self._module(name, form)
            for name, form in forms.items()
            if PREFIX + name + form.A not in wrapped
        ]
        self._known |= wrapped
        self.targets = targets
        self.modules = self._tied(sorted(modules, key=lambda module: natural_order(module.name)))
        if not self.modules and not targets:
            raise SafeprojError(f"{source}: {_no_pairs(tensors)}")
        self._check_ranks()
        if config.get("use_dora") and not all(module.dora for module in self.modules):
            raise SafeprojError(f"{source}: {CONFIG} sets use_dora, but modules have no magnitude")
        self.unknown: dict[str, str] = {}
        rest = [self._full_change(key) for key in tensors if key not in self._known]
        self.full_changes = tuple(change for change in rest if change is not None)

    def _forms(self) -> dict[str, _Suffixes]:
        """Return the adapted modules' names as the keys have them, and how each is stored."""
        found: dict[str, _Suffixes] = {}
        for key in self._tensors:
            if not key.startswith(PREFIX):
                continue
            for form in _FORMS:
                for suffix in (form.A, form.B):
                    if key.endswith(suffix):
                        found.setdefault(key[len(PREFIX) : -len(suffix)], form)
        return found

    def _target_parameters(self, forms: Mapping[str, _Suffixes]) -> tuple[TargetParameters, ...]:
        """Return the modules whose parameters are adapted directly, wrapper in wrapper."""
        given = self._config.get("target_parameters") or []
        if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
            raise SafeprojError(
                f"{self._source}: {CONFIG}: target_parameters is no list of parameter names"
            )
        self._leaves = dict.fromkeys(name.rpartition(".")[2] for name in given)
        if len(self._leaves) > MAX_LEAVES:
            raise SafeprojError(
                f"{self._source}: {CONFIG}: target_parameters names {len(self._leaves)} kinds of "
                f"parameters; expected at most {MAX_LEAVES}"
            )
        given = frozenset(given)
        found: dict[str, list[str]] = {}
        for name in sorted(forms, key=len):  # outermost first: each wrapper adds a base_layer
            module = _without_trailing(name, ".base_layer")
            if forms[name] is _LINEAR and self._parameters_of(module, given):
                found.setdefault(module, []).append(name)
        targets = []
        for module in sorted(found, key=natural_order):
            parameters = self._parameters_of(module, given)
            if len(parameters) > MAX_TARGETS:
                raise SafeprojError(
                    f"{self._source}: {CONFIG}: {len(parameters)} target parameters of {module}; "
                    f"supported are at most {MAX_TARGETS}"
                )
            pairs = tuple(self._pair(name, _LINEAR) for name in found[module])
            for A, B in pairs:
                self._require_factors(module, A, B)
            plain = self._module(module, _LINEAR) if found[module] == [module] else None
            targets.append(TargetParameters(module, parameters, pairs, plain))
        return tuple(targets)

    def _parameters_of(self, module: str, given: Collection[str]) -> tuple[str, ...]:
        """Return the target parameters that are in this module; as in PEFT, suffixes match."""
        parameters = (f"{module}.{leaf}" for leaf in self._leaves)
        return tuple(p for p in parameters if any(end in given for end in ends_of(p)))

    def _pair(self, name: str, form: _Suffixes) -> tuple[str, str]:
        keys = (PREFIX + name + form.A, PREFIX + name + form.B)
        for key in keys:
            if key not in self._tensors:
                raise SafeprojError(
                    f"{self._source}: {name} has no {key}; expected both {form.A[1:]} and "
                    f"{form.B[1:]}"
                )
        return keys

    def _require_factors(self, name: str, a_key: str, b_key: str) -> None:
        A, B = self._tensors[a_key], self._tensors[b_key]
        if A.ndim != B.ndim or A.ndim < 2 or A.shape[0] != B.shape[1]:
            grouped = A.ndim == B.ndim > 2 and B.shape[1] and A.shape[0] % B.shape[1] == 0
            raise SafeprojError(
                f"{self._source}: the factors of {name} do not fit: lora_A is {list(A.shape)}, "
                f"lora_B is {list(B.shape)}; "
                + (
                    "a grouped convolution has block-diagonal factors, which are not supported"
                    if grouped
                    else "expected (r, in) and (out, r) with the same r"
                )
            )

    def _module(self, name: str, form: _Suffixes) -> AdaptedModule:
        a_key, b_key = self._pair(name, form)
        self._require_factors(name, a_key, b_key)
        A, B = self._tensors[a_key], self._tensors[b_key]
        gain_key = None if form.gain is None else PREFIX + name + form.gain
        if gain_key not in self._tensors and self._config.get("peft_type") != ADALORA:
            gain_key = None  # names that PEFT loads nothing of here, but other loaders may
        if A.shape[0] == 0 and gain_key is None:
            raise SafeprojError(f"{self._source}: {a_key} has rank 0, expected (r, in), r > 0")
        kind = form.kind if A.ndim == 2 else Kind.convolution
        kept = [
            s
            for setting, ends in _TRAINING_STATE.items()
            if self._config.get(setting)
            for s in ends
        ]
        self._known |= {a_key, b_key, *(PREFIX + name + suffix for suffix in kept)}
        self._expect(gain_key, A.shape[0], f"{name} as AdaLoRA's singular values", required=True)
        magnitude = next((k for s in _MAGNITUDES if (k := PREFIX + name + s) in self._tensors), "")
        self._expect(magnitude, B.shape[0], f"{name} as its DoRA magnitude")
        bias = next((k for s in _BIASES if (k := PREFIX + name + s) in self._tensors), None)
        self._expect(bias, B.shape[0], f"{name} as the bias of lora_B")
        return AdaptedModule(
            name=name.replace(".base_layer", ""),
            parameter=self._parameter(name),
            kind=kind,
            output=Factor(b_key),
            input=Factor(a_key),
            rank=A.shape[0],
            in_features=A[0].size if A.shape[0] else A.shape[1],
            out_features=B.shape[0],
            weight_shape=(B.shape[0], *A.shape[1:]) if kind is Kind.convolution else None,
            gain=None if gain_key is None else Factor(gain_key),
            bias=None if bias is None else Factor(bias),
            dora=bool(magnitude),
        )

    def _expect(
        self, key: str | None, length: int, what: str, *, required: bool = False
    ) -> str | None:
        """Return the key of a tensor with one value per row, if the adapter has it."""
        if not key or (key not in self._tensors and not required):
            return None
        found = self._tensors.get(key)
        if found is None or found.size != length:
            shape = "nothing" if found is None else f"shape {list(found.shape)}"
            raise SafeprojError(
                f"{self._source}: {key}: expected {length} values for {what}, found {shape}"
            )
        self._known.add(key)
        return key

    def _parameter(self, name: str) -> str:
        """Return the name of the weight: that of MultiheadAttention is not called `weight`."""
        path = name.replace(".base_layer", "")
        attention = f"{PREFIX}{name}.base_layer.out_proj{_LINEAR.A}" in self._tensors
        return f"{path}.in_proj_weight" if attention else f"{path}.weight"

    def _tied(self, modules: list[AdaptedModule]) -> tuple[AdaptedModule, ...]:
        """Make one module of an embedding and the tied head that repeats its factors.

        With `ensure_weight_tying`, lm_head's A is the embedding's Bᵀ and its B is Aᵀ: one update
        of one weight. It is projected on the embedding's side, and the head's A follows.
        """
        if not self._config.get("ensure_weight_tying"):
            return tuple(modules)
        found = {module.name: module for module in modules}
        embeddings = [m for m in modules if m.kind is Kind.embedding]
        if len(embeddings) > MAX_TIED:
            raise SafeprojError(
                f"{self._source}: {len(embeddings)} adapted embeddings with ensure_weight_tying; "
                f"expected at most {MAX_TIED}"
            )
        for embedding in embeddings:
            for head in [m for m in modules if m.kind is Kind.linear]:
                A, B = (f.view(self._tensors) for f in (embedding.input, embedding.output))
                A_head, B_head = (f.view(self._tensors) for f in (head.input, head.output))
                if array_equal(A_head, B.T) and array_equal(B_head, A.T):
                    mirror = replace(head.input, turned=True)
                    found[embedding.name] = replace(embedding, mirrors=(mirror,))
                    found.pop(head.name, None)
        return tuple(found.values())

    def _check_ranks(self) -> None:
        """Compare the tensors' ranks with those that the config names.

        The keys of `rank_pattern` are regular expressions from the file: they are not run here,
        since the rank that counts is that of the tensors.
        """
        try:
            allowed = allowed_ranks(self._config)
        except SafeprojError as error:
            raise SafeprojError(f"{self._source}: {CONFIG}: {error.message}") from error
        ranks = set(allowed)
        for module in self.modules:
            if module.rank not in ranks:
                raise SafeprojError(
                    f"{self._source}: {module.name} has rank {module.rank}, but {CONFIG} allows "
                    f"{shorten(map(str, allowed))}; PEFT would not load it"
                )

    def _full_change(self, key: str) -> FullChange | None:
        """Accept a tensor that is not part of an update only where the config accounts for it."""
        for suffix, meaning in REFUSED_TENSORS.items():
            if key.endswith(suffix):
                raise SafeprojError(
                    f"{self._source}: {key} belongs to {meaning}, which is not supported; "
                    f"{SUPPORTED}"
                )
        path = key[len(PREFIX) :] if key.startswith(PREFIX) else ""
        plain = unwrapped(path)
        if path.endswith(".trainable_tokens_delta"):
            module = path.rpartition(".")[0].removesuffix(".token_adapter")
            rows = self._token_rows(key, module)
            return FullChange(key, f"{module}.weight", "trainable tokens", rows)
        parts = path.split(".")
        if ".original_module." in path:  # saved with what replaces it, where tokens were added
            return FullChange(key, plain, f"copy of the base layer's {parts[-1]}")
        modules = [".".join(parts[:stop]) for stop in range(1, len(parts))]
        if any(map(self._saved.end, modules)):  # as PEFT matches
            return FullChange(key, plain, "modules_to_save")
        if path.endswith(".base_layer.weight"):
            return FullChange(key, plain, "copy of the base layer's weight")
        if path.endswith(".bias") and self._config.get("bias", "none") != "none":
            return FullChange(key, plain, "bias")
        if path.endswith(".base_layer.bias"):
            return FullChange(key, plain, "copy of the base layer's bias")
        if is_vocabulary(plain):  # the config does not say that PEFT saved it
            return FullChange(key, plain, "saved vocabulary")
        if any(suffix in key for suffix in (".lora_", ".trainable_tokens_")):
            self.unknown[key] = (
                f"{key} has no lora_A and lora_B beside it, or belongs to a kind of adapter that "
                f"is not known; {SUPPORTED}"
            )
        else:
            self.unknown[key] = (
                f"{key} is no tensor of a supported adapter; expected "
                f"{PREFIX}<module>{_LINEAR.A} and {_LINEAR.B}, or a weight that {CONFIG} accounts "
                "for (modules_to_save, bias)"
            )
        return None

    def _token_rows(self, key: str, module: str) -> tuple[int, ...]:
        """Return the rows that trainable tokens replace: only the config knows them."""
        given = self._config.get("trainable_token_indices")
        if isinstance(given, dict):
            named = (v for k, v in given.items() if f".{module}".endswith(f".{k}"))
            given = next(named, None) or self._tied_rows(key, given)
        count = self._tensors[key].shape[0]
        if not isinstance(given, list) or not all(type(i) is int and i >= 0 for i in given):
            given = []
        if len(given) != count:
            raise SafeprojError(
                f"{self._source}: {key} replaces {count} rows of {module}, but "
                f"trainable_token_indices in {CONFIG} names {len(given)}; PEFT would not load it"
            )
        return tuple(given)

    def _tied_rows(self, key: str, given: Mapping[str, Any]) -> object:
        """Return the rows of an embedding that a tied head repeats, which the config leaves out."""
        for module, rows in given.items():
            own = f".{module}.token_adapter.trainable_tokens_delta"
            twins = (k for k in self._tensors if k != key and k.endswith(own))
            if any(array_equal(self._tensors[twin], self._tensors[key]) for twin in twins):
                return rows
        return None


def _no_pairs(tensors: Collection[str]) -> str:
    """Say what is wrong with keys that have no pair of factors, and what is in front of them."""
    fronts = sorted({key.partition(PREFIX)[0] for key in tensors if ".lora_" in key})
    text = f"no lora_A/lora_B pair among {len(tensors)} tensors"
    if fronts == [""] or not fronts:
        return text
    example = printable(next(key for key in tensors if ".lora_" in key)[:200])
    if len(fronts) == 1 and all(PREFIX in key for key in tensors):
        what = f"has {printable(fronts[0][:80])!r} in front of {PREFIX!r}: take it out of every key"
    else:
        what = f"does not begin with {PREFIX!r}: put it in front of the module's path"
    return f"{text} that PEFT would load: {example} {what}"


def _without_trailing(text: str, suffix: str) -> str:
    while text.endswith(suffix):
        text = text[: -len(suffix)]
    return text


def _warnings(config: dict[str, Any], found: _Classifier) -> Iterator[str]:
    dropped = [m.name for m in found.modules if m.dora and not config.get("use_dora")]
    if dropped:
        yield (
            f"{len(dropped)} modules have DoRA magnitudes, but {CONFIG} does not set use_dora: "
            "PEFT drops them without an error and loads a plain LoRA, which is what is scored; "
            "torchtune writes such adapters, with the magnitudes of q and k in another order of "
            "rows than the factors, so that setting use_dora is no remedy"
        )
    else:
        yield from dora_warnings(found.modules)
    if any(module.mirrors for module in found.modules):
        yield (
            "ensure_weight_tying: PEFT up to 0.18 loads the embedding's update and drops the tied "
            "head's without an error; serve the adapter with 0.19 or later"
        )
    named = [module.name for module in found.modules if ".default" in module.output.key]
    if named:
        yield (
            f"the tensors of {len(named)} modules have the adapter name 'default' in their names: "
            "PEFT 0.21 loads them under that name alone, and versions before load nothing of them; "
            "take '.default' out of the names"
        )
    if found.targets and peft_version(config) < CURRENT:
        version = config.get("peft_version", UNSAID)
        yield (
            f"expert stacks as PEFT {version} stores them: PEFT 0.19.1 and later read such files "
            "otherwise, and may load another update without an error; serve the adapter, patched "
            "or not, with the version that wrote it"
        )

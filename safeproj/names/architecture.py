"""The mapping that transformers itself uses to load a checkpoint, without reading a weight.

The model is built on the meta device, from transformers' own classes and never from code that comes
with the checkpoint. Its loader is then followed step by step, on names instead of tensors. What is
used of it are internals that move between versions: whatever goes wrong here means only that the
architecture is not known.
"""

from __future__ import annotations

import collections.abc
import copy
import json
import math
import warnings
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from importlib import import_module
from typing import Any

from safeproj.checkpoint.expression import Expression, dtype_and_shape
from safeproj.checkpoint.interface import Checkpoint
from safeproj.errors import SafeprojError
from safeproj.names.layout import CONV1D, EMBEDDING, LINEAR, Layout
from safeproj.names.operations import Entry, UnsupportedError
from safeproj.text import natural_order, shorten

MAX_LAYERS = 2000
MAX_COUNT = 100_000
"""A config that asks for more layers, labels or experts would only cost time and memory."""

_NOT_TAKEN = (
    "attn_implementation",
    "experts_implementation",
    "auto_map",
    "quantization_config",
    "kernel_config",
    "fusion_config",
    "use_kernels",
)
"""Settings that do not change any name, and may make transformers fetch code or kernels."""

_FETCHING = ("backbone", "use_pretrained_backbone", "use_timm_backbone")
"""Settings that may make transformers download another model."""

_AUTO = (
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_MAPPING",
)
"""Classes an adapter may have been trained with, whatever class the checkpoint was saved from."""

_UNDECORATED_EXPERTS = {
    "Llama4TextExperts": False,
    "GptOssExperts": False,
    "JetMoeParallelExperts": True,
    "InklingSharedExperts": True,
    "LongcatFlashExperts": True,
    "Step3p7Experts": True,
}
"""Whether experts without transformers' common interface are stored (E, out, in)."""


class _UnknownError(Exception):
    """transformers does not know it, or it is not asked."""


def mapping_of(checkpoint: Checkpoint) -> Mapping | None:
    """Return how transformers loads a checkpoint, None if it is not installed or does not know."""
    try:
        config = json.dumps(_prepared(checkpoint.config), sort_keys=True)
    except (_UnknownError, ValueError, TypeError):
        return None
    runtimes = _runtimes(config)
    return Mapping(checkpoint, runtimes) if any(True for _ in runtimes) else None


def _prepared(config: Any) -> Any:
    """Return a config without what must not take effect.

    Raises:
        _UnknownError: building the model would fetch something, or take too long.
    """
    if isinstance(config, list):
        return [_prepared(part) for part in config]
    if not isinstance(config, collections.abc.Mapping):
        return config
    if "__float__" in config:
        return float(config["__float__"])  # how transformers writes what JSON has no word for
    found = {}
    for key, value in config.items():
        if any(word in key for word in _NOT_TAKEN):
            continue
        fetches = key in _FETCHING and value
        limit = MAX_LAYERS if "layers" in key else MAX_COUNT if key.startswith("num_") else math.inf
        too_many = isinstance(value, int) and value > limit
        if fetches or too_many or (key == "model_type" and "timm" in str(value)):
            raise _UnknownError
        found[key] = _prepared(value)
    return found


class Mapping:
    """How transformers makes the running model's weights of one checkpoint's tensors."""

    def __init__(self, checkpoint: Checkpoint, runtimes: _Runtimes) -> None:
        self._checkpoint = checkpoint
        self._runtimes = runtimes
        self._tables: dict[int, dict[str, Entry] | None] = {}

    def find(self, parameter: str) -> Expression | None:
        """Return what a weight of the running model is made of, None if nothing says so.

        Raises:
            SafeprojError: it is made by an operation that an expression cannot say.
        """
        for runtime, name in self._known_as(parameter):
            table = self._table(runtime) or {}
            for tied in (name, *runtime.tied(name)):
                if tied in table:
                    return self._expression(parameter, table[tied], runtime.shapes[tied])
            return None
        return None

    def knows(self, parameter: str) -> bool:
        """Tell whether a model of this architecture has such a weight."""
        return any(True for _ in self._known_as(parameter))

    def layout(self, parameter: str) -> Layout | None:
        """Return how the running model stores a weight, None if it has none of this name."""
        for runtime in self._runtimes:
            name = runtime.own_name(parameter)
            if name is not None:
                return runtime.layout(name)
        return None

    def parameters(self) -> dict[str, Layout]:
        """Return the weights of the checkpoint's own model that low-rank updates can have."""
        runtime = next(iter(self._runtimes))
        return {
            name: layout
            for name, shape in runtime.shapes.items()
            if len(shape) > 1
            for layout in [runtime.layout(name)]
            if layout is not None and layout.kind != "other"
        }

    def _known_as(self, parameter: str) -> Iterator[tuple[_Runtime, str]]:
        """Yield the models that have a weight, and its name there; older names come last."""
        for name_in in (_Runtime.own_name, _Runtime.renamed):
            for runtime in self._runtimes:
                name = name_in(runtime, parameter)
                if name is not None and self._table(runtime) is not None:
                    yield runtime, name

    def _table(self, runtime: _Runtime) -> dict[str, Entry] | None:
        if id(runtime) not in self._tables:
            try:
                self._tables[id(runtime)] = runtime.entries(self._checkpoint.names)
            except Exception:  # whatever a version of transformers may raise
                self._tables[id(runtime)] = None
        return self._tables[id(runtime)]

    def _expression(self, parameter: str, entry: Entry, shape: tuple[int, ...]) -> Expression:
        names = [name for found in entry.sources.values() for name in found]
        try:
            expression = entry.expression(self._checkpoint, shape)
        except UnsupportedError as error:
            raise SafeprojError(
                f"{self._checkpoint.source}: {parameter} is made of {shorten(names)} by "
                f"{error}, which is not supported; leave it out with --exclude"
            ) from error
        if entry.converter is not None:
            found = dtype_and_shape(expression, self._checkpoint)[1]
            if found != shape:
                raise SafeprojError(
                    f"{self._checkpoint.source}: {shorten(names)} make a weight {list(found)} for "
                    f"{parameter}, but config.json says {list(shape)}; is the checkpoint complete?"
                )
        return expression


class _Runtimes:
    """Models of one config without weights, built when they are first asked for."""

    def __init__(self, config: str) -> None:
        self._built: list[_Runtime] = []
        self._rest = _build(config)

    def __iter__(self) -> Iterator[_Runtime]:
        position = 0
        while True:
            if position == len(self._built):
                runtime = next(self._rest, None)
                if runtime is None:
                    return
                self._built.append(runtime)
            yield self._built[position]
            position += 1


@lru_cache(maxsize=4)
def _runtimes(config: str) -> _Runtimes:
    """Share the models of checkpoints with one config, such as base and aligned often are."""
    return _Runtimes(config)


def _build(config: str) -> Iterator[_Runtime]:
    try:
        with _quiet():
            made = _config(json.loads(config))
            classes = list(dict.fromkeys(_classes(made)))
    except Exception:  # not installed, too old or too new, or an unknown model type
        return
    for model_class in classes:
        try:
            with _quiet():
                runtime = _Runtime(_on_meta(model_class, made))
        except Exception:  # the next class may do
            continue
        yield runtime


def _config(values: dict[str, Any]) -> Any:
    import_module("transformers.conversion_mapping")  # before 5.0 there is no mapping to follow
    auto = import_module("transformers.models.auto.configuration_auto")
    found = auto.CONFIG_MAPPING[values["model_type"]].from_dict(values)
    # What a loader would choose by itself may want a kernel that is not installed.
    found._attn_implementation = "eager"
    return found


def _classes(config: Any) -> Iterator[Any]:
    """Yield the classes of transformers that a config is for, the checkpoint's own first."""
    transformers = import_module("transformers")
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            made_for = getattr(found, "config_class", None)
            if made_for is not None and isinstance(config, made_for):
                yield found
    auto = import_module("transformers.models.auto.modeling_auto")
    for name in _AUTO:
        found = getattr(auto, name, {}).get(type(config), None)
        yield from found if isinstance(found, tuple | list) else [found] if found else []


def _on_meta(model_class: Any, config: Any) -> Any:
    import torch

    initialization = import_module("transformers.initialization")
    with ExitStack() as stack:
        stack.enter_context(torch.device("meta"))
        for name in ("meta_device_safe_creation_ops", "no_init_weights"):
            if hasattr(initialization, name):
                stack.enter_context(getattr(initialization, name)())
        return model_class(copy.deepcopy(config))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' remarks on a config from the terminal: nothing is run with it."""
    logging = import_module("transformers.utils.logging")
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


class _Runtime:
    """A model on the meta device."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._prefix = str(model.base_model_prefix)
        self.shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        self._source_of: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
        self._conversions()  # to fail now if this version has none

    def own_name(self, parameter: str) -> str | None:
        """Return a weight's name here, where a head may have been put on or taken off."""
        inner = parameter.removeprefix(f"{self._prefix}.")
        for name in (parameter, f"{self._prefix}.{parameter}", inner):
            if name in self.shapes:
                return name
        return None

    def renamed(self, parameter: str) -> str | None:
        """Return the name of a weight that an older version of the model had under another."""
        try:
            name, converted = self._rename(parameter, *self._conversions())
        except Exception:  # whatever a version of transformers may raise
            return None
        return name if converted is None and name in self.shapes else None

    def tied(self, name: str) -> list[str]:
        """Return the names of the weights that are one with this one."""
        source = self._source_of.get(name, name)
        others = [other for other, found in self._source_of.items() if found == source]
        return [other for other in (source, *others) if other != name and other in self.shapes]

    def layout(self, name: str) -> Layout | None:
        """Return how a weight is stored here."""
        from torch import nn

        path, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(path)
        if isinstance(module, nn.Linear) or leaf == "in_proj_weight":
            return LINEAR
        if isinstance(module, import_module("transformers.pytorch_utils").Conv1D):
            return CONV1D
        if isinstance(module, nn.Embedding):
            return EMBEDDING
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return Layout("conv", True)
        if len(self.shapes[name]) == 3 and "Expert" in type(module).__name__:
            return _experts(module)
        return Layout("other", None)

    def entries(self, names: Collection[str]) -> dict[str, Entry]:
        """Return what each weight is made of, by following the loader of transformers.

        See `convert_and_load_state_dict_in_model` in transformers' core_model_loading.
        """
        renamings, converters = self._conversions()
        by_pattern = {p: converter for converter in converters for p in converter.source_patterns}
        found: dict[str, Entry] = {}
        for key in sorted(names, key=natural_order):
            name, pattern = self._rename(key, renamings, converters)
            if name not in self.shapes and key in self.shapes:
                name, pattern = self._rename(key, [], [])
            if name not in self.shapes:
                continue
            converter = None if pattern is None else by_pattern[pattern]
            entry = found.setdefault(name, Entry(converter))
            entry.add(pattern or "", key, converter)
        return {name: each for first, entry in found.items() for name, each in entry.expand(first)}

    def _rename(
        self, key: str, renamings: list[Any], converters: list[Any]
    ) -> tuple[str, str | None]:
        loading = import_module("transformers.core_model_loading")
        name, pattern = loading.rename_source_key(
            key, renamings, converters, self._prefix, self.shapes
        )
        return str(name), pattern

    def _conversions(self) -> tuple[list[Any], list[Any]]:
        """Return the renamings and the converters, new ones: they remember what they have seen."""
        loading = import_module("transformers.core_model_loading")
        mapping = import_module("transformers.conversion_mapping")
        found = mapping.get_model_conversion_mapping(self._model)
        return (
            [each for each in found if isinstance(each, loading.WeightRenaming)],
            [each for each in found if isinstance(each, loading.WeightConverter)],
        )


def _experts(module: Any) -> Layout | None:
    marked = getattr(module, "is_transposed", None)
    if marked is not None:
        return Layout("experts", not marked, marked_transposed=bool(marked))
    out_first = _UNDECORATED_EXPERTS.get(type(module).__name__)
    return None if out_first is None else Layout("experts", out_first)

"""Putting PEFT adapters on a model one after the other, so that none of them changes the next."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safeproj.adapter import Adapter
from safeproj.adapter.digests import WEIGHTS, run_digests
from safeproj.adapter.interface import CONFIG
from safeproj.adapter.peft_config import ON_SAVING, PREFIX, drawn_anew
from safeproj.errors import SafeprojError
from safeproj.lm.models import load_model, quietly, skeleton, wide_device
from safeproj.lm.places import (
    layer_of,
    relocated,
    renamed,
    resized,
    vocabulary_size,
    wanted_vocabulary,
)
from safeproj.storage.patterns import fullmatches
from safeproj.storage.picklefile import read_pickle
from safeproj.storage.source import Folder, HubFolder, LocalFolder, identity, read_json
from safeproj.text import printable, shorten

_ELSEWHERE = (
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "arrow_config",
)
"""Settings of LoRA under which an adapter holds or changes more than its factors."""

_FACTORS = (".lora_A.", ".lora_B.", ".lora_embedding_A", ".lora_embedding_B")


def require_peft(folder: Folder) -> None:
    """Refuse an adapter that is not one of PEFT, before anything is loaded.

    Raises:
        SafeprojError: it is not.
    """
    if CONFIG not in folder.files or not any(name in folder.files for name in WEIGHTS):
        raise SafeprojError(
            f"{folder.source}: no {CONFIG} with {' or '.join(WEIGHTS)}; only PEFT adapters can be "
            "run, convert others to PEFT"
        )
    found = read_json(folder, CONFIG).get("peft_type")
    if not isinstance(found, str):
        raise SafeprojError(
            f"{folder.source}: {CONFIG} has no peft_type; only PEFT adapters can be run, convert "
            "others to PEFT"
        )


def adapter_identity(folder: Folder) -> dict[str, Any]:
    """Return a folder's SRC, its commit if it has one, and the digests of what is run.

    Raises:
        SafeprojError: a file cannot be read.
    """
    return {**identity(folder), "sha256": run_digests(folder) or {"files": {}}}


class UnfitError(SafeprojError):
    """An adapter does not fit the model: others may."""


def unfit(folder: Folder, adapters: Sequence[Folder]) -> dict[int, UnfitError]:
    """Return which adapters do not fit a model, by their position, from shapes alone.

    What cannot be told without weights is left to the loading.
    """
    host = Host.without_weights(folder)
    found: dict[int, UnfitError] = {}
    for position, adapter in enumerate(adapters):
        try:
            with host.lazily(adapter) as load:
                load()
        except UnfitError as error:
            if "meta" not in str(error.__cause__):  # it is the lack of weights that is refused
                found[position] = error
        except SafeprojError:  # of the model
            return {}
    return found


class Host:
    """The model that adapters are put on. At most one copy of it is in memory.

    It is loaded once. An adapter that holds more than LoRA's factors (biases, whole modules, rows
    of embeddings) or is none of LoRA may write into the model itself: it gets a copy of its own,
    which is loaded again and not used afterwards.

    Args:
        folder: of the model's SRC.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        dtype: what the model runs in; for `auto` see `lm.models.load_model`.
    """

    def __init__(self, folder: Folder, device: str = "auto", dtype: str = "auto") -> None:
        self.folder = folder
        self._load: Callable[[], Any] = partial(load_model, folder, device, dtype)
        self._model: Any = None

    @classmethod
    def without_weights(cls, folder: Folder) -> Host:
        """Return one whose model has only shapes, to see what fits it."""
        host = cls(folder)
        host._load = partial(skeleton, folder)
        return host

    @property
    def model(self) -> Any:
        """The model without an adapter.

        Raises:
            SafeprojError: it cannot be loaded.
        """
        if self._model is None:
            self._model = self._load()
        return self._model

    @contextmanager
    def plain(self) -> Iterator[Any]:
        """Give the model without an adapter.

        Raises:
            SafeprojError: it cannot be loaded.
        """
        yield self.model

    @contextmanager
    def adapted(self, adapter: Adapter) -> Iterator[tuple[Callable[[], Any], dict[str, str]]]:
        """Give what `lazily` does of an adapter that was read, and what `moves` returns of it.

        Raises:
            SafeprojError: as for `lazily`.
        """
        moved = moves(self.model, adapter.folder)
        with self.lazily(adapter.folder, partial(attach_read, adapter=adapter)) as load:
            yield load, moved

    @contextmanager
    def lazily(
        self, adapter: Folder, put: Callable[[Any], Any] | None = None
    ) -> Iterator[Callable[[], Any]]:
        """Give what returns the model with an adapter on it; afterwards the model is as before.

        Nothing is loaded until it is asked for, and nothing twice.

        Args:
            adapter: the adapter.
            put: puts it on the model, where `attach` is not enough.

        Raises:
            SafeprojError: the adapter cannot be loaded, or does not fit the model.
        """
        put = put or partial(attach, adapter=adapter)
        found: list[Any] = []
        grown = False

        def load() -> Any:
            nonlocal grown
            if not found:
                model, self._model = self.model, None  # what is not taken off whole is not kept
                rows = vocabulary_size(model)
                found.append(put(model))
                grown = vocabulary_size(model) != rows
            return found[0]

        yield load
        if found and not grown and leaves_alone(adapter):
            self._model = found.pop().unload()


def attach(model: Any, adapter: Folder) -> Any:
    """Return the model with a PEFT adapter on it, all of whose tensors have their place there.

    Where the adapter has another vocabulary the model's is resized, and where the model calls
    layers otherwise, as the class of a vision-language model does, they are found.

    Raises:
        SafeprojError: the adapter cannot be loaded, or does not fit the model.
    """
    from peft import PeftConfig, PeftModelForCausalLM

    init = drawn_anew(read_json(adapter, CONFIG))
    if init is not None:
        raise SafeprojError(
            f"{adapter.source}: init_lora_weights is {init!r}: PEFT puts such an adapter on other "
            f"weights than it was trained on; convert it with PEFT, {ON_SAVING}"
        )
    place, options = _place(adapter)
    with quietly():
        try:
            moved = moves(model, adapter)
            _resize(model, adapter, moved)
            config = PeftConfig.from_pretrained(place, **options)
            config.inference_mode = True
            if model.get_input_embeddings().weight.is_meta:
                config.init_lora_weights = True  # others look at the weights, which are not there
            if moved:
                _relocate(config, adapter, moved)
                # PEFT substitutes with `re`, which takes a function for what is not one pattern.
                options["key_mapping"] = {r"\A.+\Z": partial(_in_model, moved)}
            found: Any = PeftModelForCausalLM(model, config)
            loaded = found.load_adapter(place, "default", is_trainable=False, **options)
        except SafeprojError as error:
            raise UnfitError(error.message) from error
        except Exception as error:  # whatever PEFT raises
            raise UnfitError(
                f"{adapter.source}: PEFT cannot put it on the model ({type(error).__name__}: "
                f"{_told(error)}); expected an adapter of this model"
            ) from error
    strange = sorted({*loaded.missing_keys, *filter(is_strange, loaded.unexpected_keys)})
    if strange:
        raise UnfitError(
            f"{adapter.source}: its tensors are not those that the model has a place for "
            f"({shorten(strange)}); expected an adapter of this model"
        )
    return found.eval()


@dataclass(frozen=True)
class LoraLayer:
    """A LoRA layer of PEFT.

    Attributes:
        name: its path.
        base: the linear layer that it is on.
        A: `A` (r, n), the parameter itself.
        B: `B` (m, r), likewise.
        scaling: `s`.
    """

    name: str
    base: Any
    A: Any
    B: Any
    scaling: float

    @property
    def scaled_B(self) -> Any:
        """`s B` (m, r), float64."""
        return self.B.detach().double() * self.scaling


def wide_host(host: Any, folder: Folder, device: str) -> Any:
    """Return what adapters are put on whose layers' inputs are summed up in float64.

    Args:
        host: what a method was given, if it was given one.
        folder: of the model's SRC, which is loaded otherwise.
        device: of `--device`.
    """
    where = wide_device(device)
    if host is None or (where != device and isinstance(host, Host)):
        return Host(folder, where)
    return host


def lora_layer(model: Any, name: str, who: str) -> LoraLayer:
    """Return a layer of a `PeftModel`, which must be plain LoRA on a linear layer.

    Args:
        model: the model.
        name: path of the layer in the model without PEFT.
        who: takes nothing else, for messages.

    Raises:
        SafeprojError: it is another one, or has no weight in memory.
    """
    from torch import nn

    from safeproj.lm.layers import is_linear, plain_weight

    layer = model.get_base_model().get_submodule(name)
    adapter = model.active_adapter
    base = getattr(layer, "base_layer", None)
    A = getattr(layer, "lora_A", {})
    dora = getattr(layer, "use_dora", {}).get(adapter)
    plain = adapter in A and isinstance(A[adapter], nn.Linear) and not dora
    if not isinstance(base, nn.Module) or not is_linear(base) or not plain:
        raise SafeprojError(
            f"{name}: {who} takes plain LoRA on linear layers; leave it out with --exclude"
        )
    if plain_weight(base) is None:
        raise SafeprojError(
            f"{name}: its weight is stored as codes; {who} needs the checkpoint before quantisation"
        )
    B = layer.lora_B[adapter].weight
    return LoraLayer(name, base, A[adapter].weight, B, layer.scaling[adapter])


def moves(model: Any, adapter: Folder) -> dict[str, str]:
    """Return the layers of a LoRA adapter that a model has under another path, by the adapter's.

    Raises:
        SafeprojError: the adapter's tensors cannot be read.
    """
    if read_json(adapter, CONFIG).get("peft_type") != "LORA":
        return {}
    return relocated(model, {layer_of(key) for key in _shapes(adapter)})


def is_strange(key: str) -> bool:
    """Tell whether a tensor that PEFT has no place for is more than a second copy.

    Where the vocabulary was resized PEFT stores one of what is saved whole, and of the tokens of
    a tied embedding, and does not read it.
    """
    copies = (".modules_to_save.weight", ".modules_to_save.bias", ".trainable_tokens_delta")
    return not key.endswith(copies)


def _resize(model: Any, adapter: Folder, moved: Mapping[str, str]) -> None:
    """Give the model the vocabulary that the adapter was trained with."""
    try:
        config = read_json(adapter, CONFIG)
        rows = wanted_vocabulary(model, _shapes(adapter), config, moved)
    except ValueError as error:
        raise SafeprojError(f"{adapter.source}: {printable(str(error))}") from error
    resized(model, rows, adapter.source)


def _relocate(config: Any, adapter: Folder, moved: Mapping[str, str]) -> None:
    """Let a LoRA config name layers one by one, by the model's paths.

    What it said of them by patterns (ranks, scales) was meant for the adapter's own paths.
    """
    shapes = _shapes(adapter)
    ranks = {}
    for key, shape in shapes.items():
        if key.endswith((".lora_A.weight", ".lora_embedding_A")):
            ranks[layer_of(key)] = shape[0]
    given = config.alpha_pattern or {}
    alphas = dict.fromkeys(ranks, config.lora_alpha)
    for pattern in reversed(given):  # the first that matches counts
        matching = fullmatches(pattern, sorted(ranks), prefix=r"(.*\.)?")
        alphas |= dict.fromkeys(matching, given[pattern])
    where = {path: moved.get(path, path) for path in map(layer_of, shapes)}
    config.target_modules = {where[path] for path in ranks}
    config.rank_pattern = _patterns(where, ranks, config.r)
    config.alpha_pattern = _patterns(where, alphas, config.lora_alpha)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    if config.modules_to_save:
        saved = (path for path in where if any(path.endswith(s) for s in config.modules_to_save))
        config.modules_to_save = [where[path] for path in saved if path not in ranks]
    if isinstance(config.trainable_token_indices, dict):
        config.trainable_token_indices = {
            next((where[p] for p in where if f".{p}".endswith(f".{name}")), name): rows
            for name, rows in config.trainable_token_indices.items()
        }


def _patterns(
    where: Mapping[str, str], values: Mapping[str, float], usual: float
) -> dict[str, Any]:
    """Return what is not as usual; PEFT tries all patterns for each layer."""
    return {re.escape(where[path]): value for path, value in values.items() if value != usual}


def _in_model(moved: Mapping[str, str], found: re.Match[str]) -> str:
    return renamed(PREFIX + found[0], moved).removeprefix(PREFIX)


def _shapes(adapter: Folder) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter's tensors.

    Raises:
        SafeprojError: the file cannot be read.
    """
    if WEIGHTS[0] in adapter.files:
        header = adapter.header(WEIGHTS[0])
        return {name: entry.shape for name, entry in header.tensors.items()}
    if WEIGHTS[1] not in adapter.files:
        return {}
    found = read_pickle(adapter, WEIGHTS[1])
    return {name: tuple(tensor.shape) for name, tensor in found.items()}


def attach_read(model: Any, adapter: Adapter) -> Any:
    """Return the model with an adapter as it was read: converted, where it was.

    Raises:
        SafeprojError: as for `attach`.
    """
    if not adapter.documents:
        return attach(model, adapter.folder)
    with tempfile.TemporaryDirectory(prefix="safeproj-") as directory:
        for name, content in adapter.documents.items():
            (Path(directory) / name).write_bytes(content)
        adapter.format.write(Path(directory) / adapter.format.output_file, adapter.tensors)
        return attach(model, LocalFolder(Path(directory), adapter.source))


def leaves_alone(adapter: Folder) -> bool:
    """Tell whether an adapter surely holds LoRA's factors and nothing else."""
    config = read_json(adapter, CONFIG)
    if config.get("peft_type") != "LORA" or WEIGHTS[0] not in adapter.files:
        return False
    names = adapter.header(WEIGHTS[0]).tensors
    return _plain(config) and all(any(part in name for part in _FACTORS) for name in names)


def _plain(config: Mapping[str, Any]) -> bool:
    start = config.get("init_lora_weights", True)
    return (
        not any(config.get(name) for name in _ELSEWHERE)
        and config.get("bias", "none") == "none"
        and not config.get("use_dora")
        and (isinstance(start, bool) or start == "gaussian")
    )


def _told(error: Exception) -> str:
    """Return the beginning of an error's text; where tensors do not fit, the second line has it."""
    return printable(" ".join(" ".join(str(error).splitlines()[:2]).split()))[:300]


def _place(folder: Folder) -> tuple[str, dict[str, Any]]:
    """Return what PEFT is given for a folder."""
    if isinstance(folder, HubFolder):
        inside = {"subfolder": folder.subfolder} if folder.subfolder else {}
        return folder.repo, {"revision": folder.revision, **inside}
    assert isinstance(folder, LocalFolder)
    return str(folder.root), {}

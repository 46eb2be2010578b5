"""A model in memory with PEFT adapters on it: what is read of it, run, and changed in place."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, KeysView, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from safeproj.adapter import Adapter
from safeproj.adapter.interface import CONFIG
from safeproj.adapter.peft import SAFETENSORS, Peft, refuse_settings
from safeproj.adapter.peft_config import changed_base
from safeproj.checkpoint.interface import STORED_DTYPES, Reader, TensorInfo, as_matrix
from safeproj.errors import SafeprojError
from safeproj.lm.models import quietly
from safeproj.names import Names
from safeproj.storage.arrays import Array, bytes_of, from_torch, to_torch
from safeproj.storage.source import Folder, read_json
from safeproj.storage.tensorfile import DTYPES, OTHER_DTYPES, Header
from safeproj.text import first_line, printable, shorten

_SAVE = "save the adapter, and use `safeproj patch`"
"""What to do where an adapter cannot be changed in memory."""

_CODES = {
    **{name: code for code, (name, _) in STORED_DTYPES.items()},
    **{name: code for code, name in OTHER_DTYPES.items()},
    **{name: code for code, (name, _) in DTYPES.items()},
}
"""Name of a dtype in torch to that in safetensors."""


def active_adapter(peft_model: Any) -> str:
    """Return the name of the one adapter that is active.

    Raises:
        SafeprojError: there is none, or more than one.
    """
    active = peft_model.active_adapters
    if len(active) != 1:
        raise SafeprojError(
            f"expected one active adapter, found {shorten(active) or 'none'}; name one"
        )
    return str(active[0])


def saved_in(directory: str | Path, adapter: str) -> Path:
    """Return where PEFT puts an adapter below the directory that a model is saved to."""
    return Path(directory) if adapter == "default" else Path(directory) / adapter


class Live:
    """A `PeftModel` in memory. It is what it was whenever nothing of this runs, but for `put`.

    Args:
        peft_model: the model.
        running: the adapter that the model is run with, where it is run; the active one if None.

    Raises:
        SafeprojError: it is no `PeftModel`, or its weights are not what they were without adapters.
    """

    def __init__(self, peft_model: Any, running: str | None = None) -> None:
        from peft import PeftModel

        if not isinstance(peft_model, PeftModel):
            raise SafeprojError(
                f"found a {type(peft_model).__name__}, expected a PeftModel, as get_peft_model and "
                "PeftModel.from_pretrained return it; of what is wrapped give the model inside"
            )
        self._model: Any = peft_model
        self._running = running
        modules = list(peft_model.modules())
        merged = {name for each in modules for name in getattr(each, "merged_adapters", ())}
        if merged:
            raise SafeprojError(
                f"{shorten(sorted(merged))} is merged into the model's weights; call "
                "unmerge_adapter() before"
            )
        if any(hasattr(each, "ds_id") for each in peft_model.parameters()):
            raise SafeprojError(
                f"DeepSpeed has cut the model's parameters into parts (ZeRO 3); {_SAVE}"
            )

    @property
    def source(self) -> str:
        """What messages and records call the model."""
        return f"{getattr(self._config, '_name_or_path', '') or 'the model'} in memory"

    @property
    def _config(self) -> Any:
        """The model's config, None where it is no model of transformers."""
        return getattr(self._model.get_base_model(), "config", None)

    def chosen(self, adapter: str | None) -> list[str]:
        """Return the names of all adapters, or the one that is named.

        Raises:
            SafeprojError: there is none of that name.
        """
        names = list(self._model.peft_config)
        if adapter is None:
            return names
        if adapter not in names:
            raise SafeprojError(
                f"the model has no adapter {adapter!r}, expected one of {shorten(names)}"
            )
        return [adapter]

    def read(self, name: str) -> Adapter:
        """Return an adapter as PEFT would save it: its tensors are those in memory.

        Raises:
            SafeprojError: it cannot be used, or not be changed in place.
        """
        folder = _Held(_called(name), {CONFIG: self._document(name)})
        config = read_json(folder, CONFIG)
        refuse_settings(folder.source, config)
        init = changed_base(config)
        if init is not None:
            raise SafeprojError(
                f"{folder.source}: init_lora_weights is {init!r}, which changed the model's own "
                f"weights: what is left of the update has another rank; {_SAVE}"
            )
        state = self._state(name)
        order = sorted(state, key=lambda key: (-state[key].element_size(), key))  # as in a file
        tensors = {key: from_torch(state[key]) for key in order}
        found = Peft.of(folder, config, SAFETENSORS, None, tensors)
        for message in found.unknown.values():
            raise SafeprojError(f"{folder.source}: {message}")
        return found

    def put(self, changes: Mapping[str, Mapping[str, Array]]) -> None:
        """Give adapters other numbers in place: all of them, or none where that fails.

        Args:
            changes: name of an adapter to its tensors, by the keys of `read`.

        Raises:
            SafeprojError: one does not take the place of what is there.
        """
        places: list[tuple[Tensor, Array]] = []
        for name, replaced in changes.items():
            state = self._state(name)
            for key, value in replaced.items():
                if key not in state or tuple(state[key].shape) != value.shape:
                    raise SafeprojError(
                        f"{_called(name)}: {key} would become {list(value.shape)}, which has no "
                        f"place in the model; {_SAVE}"
                    )
                places.append((state[key], value))
        before = [place.clone() for place, _ in places]
        try:
            for place, value in places:
                place.copy_(to_torch(value))
        except BaseException:
            for (place, _), old in zip(places, before, strict=True):
                place.copy_(old)
            raise

    def weights(self) -> Names:
        """Return the weights that the adapters are on.

        Raises:
            SafeprojError: they are stored as codes, or are not those of the aligned model.
        """
        with self._bare() as model:
            tensors = {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}
        own = self._config
        is_known = hasattr(own, "to_json_string")
        config = json.loads(own.to_json_string(use_diff=False)) if is_known else {}
        return Names(_LiveCheckpoint(self.source, config, tensors), running=True)

    @contextmanager
    def plain(self) -> Iterator[Any]:
        """Give the model without adapters, for running it.

        Raises:
            SafeprojError: it is not the aligned model.
        """
        with self._as_it_was(), self._bare() as model:
            yield model

    @contextmanager
    def adapted(self, adapter: Adapter) -> Iterator[tuple[Callable[[], Any], dict[str, str]]]:
        """Give what returns the model with the adapter, under whose paths all is.

        Raises:
            SafeprojError: it cannot be run.
        """
        del adapter  # it is the one in memory
        if self._model.device.type == "mps":
            raise SafeprojError(
                f"{self.source}: MPS has no float64, in which layers are corrected one by one; "
                f"{_SAVE}"
            )
        name = self._running or active_adapter(self._model)
        with self._as_it_was():
            self._model.base_model.enable_adapter_layers()
            self._model.set_adapter(name)
            yield (lambda: self._model), {}

    def _document(self, name: str) -> bytearray:
        """Return `adapter_config.json`, as PEFT writes it."""
        with tempfile.TemporaryDirectory(prefix="safeproj-") as directory:
            self._model.peft_config[name].save_pretrained(directory)
            return bytearray((Path(directory) / CONFIG).read_bytes())

    def _state(self, name: str) -> dict[str, Tensor]:
        """Return what PEFT would save of an adapter, in the memory of the parameters.

        Raises:
            SafeprojError: it is not there, or not so.
        """
        from peft import get_peft_model_state_dict

        try:
            with quietly():
                state: dict[str, Tensor] = get_peft_model_state_dict(self._model, adapter_name=name)
        except Exception as error:  # whatever PEFT raises
            raise SafeprojError(
                f"{_called(name)}: PEFT cannot save it ({type(error).__name__}: "
                f"{printable(first_line(error))})"
            ) from error
        held = (*self._model.parameters(), *self._model.buffers())
        own = {each.data_ptr() for each in held if _absent(each) is None}
        for key, tensor in state.items():
            absent = _absent(tensor)
            if absent is None and ".lora_" in key and tensor.data_ptr() not in own:
                absent = "made of other parameters"
            if absent is not None:
                raise SafeprojError(f"{_called(name)}: {key} is {absent}; {_SAVE}")
        return state

    @contextmanager
    def _bare(self) -> Iterator[Any]:
        """Give the model without what PEFT has put around its layers, which is back afterwards.

        Raises:
            SafeprojError: its weights are codes, or were changed in training.
        """
        model = self._model.get_base_model()
        if getattr(model, "is_quantized", False):
            raise SafeprojError(
                f"{self.source}: its weights are quantised, expected those of the aligned model; "
                "give --aligned, and statistics in the place of data, which `safeproj stats` makes"
            )
        for name, config in self._model.peft_config.items():
            init, bias = changed_base(config.to_dict()), getattr(config, "bias", "none")
            if init is not None or bias != "none":
                what = f"init_lora_weights {init!r}" if bias == "none" else f"bias {bias!r}"
                raise SafeprojError(
                    f"{self.source}: {_called(name)} has changed its own weights ({what}), "
                    "expected those of the aligned model; give --aligned, and statistics in the "
                    "place of data, which `safeproj stats` makes"
                )
        taken = list(_wrapped(model))
        try:
            for parent, name, _, inner in taken:
                parent._modules[name] = inner
            yield model
        finally:
            for parent, name, wrapper, _ in reversed(taken):
                parent._modules[name] = wrapper

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """Let what is run switch adapters, modes and gradients, and switch them back."""
        modules, parameters = list(self._model.modules()), list(self._model.parameters())
        modes = [each.training for each in modules]
        gradients = [each.requires_grad for each in parameters]
        switched = [m for m in modules if hasattr(m, "_disable_adapters")]
        switches = [each._disable_adapters for each in switched]
        active, several = self._model.active_adapter, list(self._model.active_adapters)
        try:
            yield
        finally:
            self._model.active_adapter = active
            self._model.base_model.set_adapter(several)
            for module, switch in zip(switched, switches, strict=True):
                module._disable_adapters = switch
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.requires_grad_(gradient)


def _called(name: str) -> str:
    return f"adapter {name!r} in memory"


def code_of(tensor: Tensor) -> str:
    """Return the safetensors name of a tensor's dtype, that of torch where it has none."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return _CODES.get(dtype, dtype)


def _absent(tensor: Any) -> str | None:
    """Return why the numbers of a tensor cannot be read or written here, None where they can."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"a {type(tensor).__name__}, quantised or spread over processes"
    return "offloaded, and not in memory" if tensor.is_meta else None


def _wrapped(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module, nn.Module]]:
    """Yield each module that PEFT has wrapped: its parent, name, wrapper, and the module itself."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    waiting, seen = [model], set[int]()
    while waiting:
        parent = waiting.pop()
        if id(parent) in seen:
            continue
        seen.add(id(parent))
        for name, child in parent.named_children():
            inner: Any = child
            while isinstance(inner, BaseTunerLayer) or hasattr(inner, "original_module"):
                inner = getattr(inner, "original_module", None) or inner.get_base_layer()
            if inner is not child:
                yield parent, name, child, inner
            waiting.append(inner)


@dataclass(frozen=True)
class _Held:
    """An adapter's folder whose only file is in memory."""

    source: str
    held: dict[str, bytearray] = field(repr=False)
    revision: str | None = None
    advice: str = _SAVE

    @property
    def files(self) -> frozenset[str]:
        return frozenset({*self.held, SAFETENSORS})

    def path(self, name: str) -> Path:
        raise SafeprojError(f"{self.source}: {name} is in no file; {_SAVE}")

    def place(self, name: str) -> Path:
        return self.path(name)

    def header(self, name: str) -> Header:
        raise SafeprojError(f"{self.source}: {name} is in no file; {_SAVE}")


@dataclass(frozen=True)
class _LiveCheckpoint:
    """The weights of a model in memory, by the names that they have there."""

    source: str
    config: Mapping[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)
    revision: str | None = None
    folder: Folder | None = None
    documents: tuple[Path, ...] = ()
    document_digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> KeysView[str]:
        return self.tensors.keys()

    def describe(self, name: str) -> TensorInfo:
        tensor = self.tensors[name]
        return TensorInfo(code_of(tensor), tuple(tensor.shape))

    def weight(self, name: str, columns: int | None = None) -> LiveWeight:
        tensor = self.tensors[name]
        absent = _absent(tensor)
        if absent is not None:
            raise SafeprojError(f"{self.source}: {name} is {absent}; give --aligned")
        matrix = tensor.detach().reshape(as_matrix(tuple(tensor.shape), columns))
        return LiveWeight(name, self.source, self.describe(name).dtype, matrix)


@dataclass(frozen=True)
class LiveWeight:
    """A weight in memory, seen as a matrix."""

    label: str
    source: str
    dtype: str
    matrix: Tensor = field(repr=False, compare=False)

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.matrix.shape
        return rows, columns

    @property
    def row_bytes(self) -> int:
        return self.shape[1] * self.matrix.element_size()

    def read_rows(self, reader: Reader, start: int, stop: int, buffer: Array) -> Array:
        del buffer  # where the numbers are on the host, they are used where they are
        rows = from_torch(self.matrix[start:stop])
        rows.flags.writeable = False
        reader.record(self.label, bytes_of(rows))
        return rows

    def prefetch(self, reader: Reader, start: int, stop: int) -> None:
        """Nothing has to be fetched."""

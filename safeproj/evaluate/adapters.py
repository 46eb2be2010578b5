"""Putting PEFT adapters on a model one after the other, so that none of them changes the next."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safeproj.adapter import Adapter
from safeproj.adapter.interface import CONFIG
from safeproj.adapter.peft_config import ON_SAVING, drawn_anew
from safeproj.errors import SafeprojError, printable, shorten
from safeproj.lm.models import load_model, quietly
from safeproj.source import Folder, HubFolder, LocalFolder, file_sha256, identity, read_json

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

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
    """Return a folder's SRC: with its commit from the Hub, and of local files their SHA-256."""
    files = {}
    if isinstance(folder, LocalFolder):
        names = sorted(folder.files & {CONFIG, *WEIGHTS})
        files = {name: file_sha256(folder.path(name)) for name in names}
    return {**identity(folder), "sha256": {"files": files}}


class Host:
    """The model that adapters are put on. At most one copy of it is in memory.

    It is loaded once. An adapter that holds more than LoRA's factors (biases, whole modules, rows
    of embeddings) or is none of LoRA may write into the model itself: it gets a copy of its own,
    which is loaded again and not used afterwards.

    Args:
        folder: of the model's SRC.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        dtype: what the model runs in; `auto` is as stored.
    """

    def __init__(self, folder: Folder, device: str = "auto", dtype: str = "auto") -> None:
        self._folder = folder
        self._device = device
        self._dtype = dtype
        self._model: Any = None

    @property
    def model(self) -> Any:
        """The model without an adapter.

        Raises:
            SafeprojError: it cannot be loaded.
        """
        if self._model is None:
            self._model = load_model(self._folder, self._device, self._dtype)
        return self._model

    @contextmanager
    def lazily(self, adapter: Folder) -> Iterator[Callable[[], Any]]:
        """Give what returns the model with an adapter on it; afterwards the model is as before.

        Nothing is loaded until it is asked for, and nothing twice.

        Raises:
            SafeprojError: the adapter cannot be loaded, or does not fit the model.
        """
        found: list[Any] = []

        def load() -> Any:
            if not found:
                model, self._model = self.model, None  # what is not taken off whole is not kept
                found.append(attach(model, adapter))
            return found[0]

        yield load
        if found and leaves_alone(adapter):
            self._model = found.pop().unload()


def attach(model: Any, adapter: Folder) -> Any:
    """Return the model with a PEFT adapter on it, all of whose tensors have their place there.

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
            config = PeftConfig.from_pretrained(place, **options)
            config.inference_mode = True
            found: Any = PeftModelForCausalLM(model, config)
            loaded = found.load_adapter(place, "default", is_trainable=False, **options)
        except Exception as error:  # whatever PEFT raises
            raise SafeprojError(
                f"{adapter.source}: PEFT cannot put it on the model ({type(error).__name__}: "
                f"{_told(error)}); expected an adapter of this model"
            ) from error
    strange = sorted({*loaded.missing_keys, *loaded.unexpected_keys})
    if strange:
        raise SafeprojError(
            f"{adapter.source}: its tensors are not those that the model has a place for "
            f"({shorten(strange)}); expected an adapter of this model"
        )
    return found.eval()


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
        return folder.repo, {"revision": folder.revision}
    assert isinstance(folder, LocalFolder)
    return str(folder.root), {}

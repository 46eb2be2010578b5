"""The aligned model itself, loaded with transformers, and what it is called in reports."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from safeproj.adapter.interface import CONFIG
from safeproj.engine import resolve_device
from safeproj.errors import SafeprojError, missing
from safeproj.records.evaluations import DTYPES
from safeproj.storage.instead import held_instead
from safeproj.storage.mistaken import mistaken_file
from safeproj.storage.published import published
from safeproj.storage.source import Folder, HubFolder, LocalFolder, file_sha256, identity
from safeproj.text import first_line, printable, shorten

if TYPE_CHECKING:
    from safeproj.lm.data import Data

_NO_ADAPTER = {"subfolder": "no-adapter"}
"""Where transformers is told to look for an adapter beside the model: where there is none."""

READ = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja")
"""Ends of the names of files that make up a model and its tokenizer."""


TEMPLATE = "chat_template.jinja"


def require_extra() -> None:
    """Refuse to go on without torch, transformers and PEFT.

    Raises:
        SafeprojError: one of them is not installed.
    """
    for package in ("torch", "transformers", "peft"):
        try:
            __import__(package)
        except ImportError as error:
            raise SafeprojError(missing(package)) from error


def load_tokenizer(folder: Folder) -> Any:
    """Return the tokenizer of the model in a folder.

    Raises:
        SafeprojError: it cannot be loaded.
    """
    place, options = _place(folder)
    from transformers import AutoTokenizer

    with quietly(), _errors(folder):
        found = AutoTokenizer.from_pretrained(place, **options)
        found.decode(found("a")["input_ids"])  # settings of odd types are met only in use
        return found


def torch_device(device: str) -> Any:
    """Return the device on which a model runs, for `--device`.

    Raises:
        SafeprojError: as for `resolve_device`.
    """
    import torch

    found = resolve_device(device)
    return torch.device(found.name if found.engine == "torch" else "cpu")


def wide_device(device: str) -> str:
    """Return where a model runs of whose inputs sums in float64 are taken, which MPS has not."""
    return "cpu" if resolve_device(device).name == "mps" else device


def load_model(folder: Folder, device: str = "auto", dtype: str = "auto") -> Any:
    """Return the model in a folder, without an adapter that lies beside its weights.

    Code that comes with a checkpoint is not run, and a checkpoint that lacks weights of its
    architecture is refused. With several GPUs and accelerate the model is spread over them.

    Args:
        folder: of SRC, a directory or a Hub repository.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        dtype: one of `DTYPES`; `auto` is as stored, and on the CPU float32 for half precision,
            in which most CPUs compute several times as slowly.

    Raises:
        SafeprojError: it cannot be loaded.
    """
    if dtype not in DTYPES:
        raise SafeprojError(f"--dtype {dtype}: expected {', '.join(DTYPES)}")
    where = torch_device(device)
    place, options = _place(folder)

    if device == "auto" and where.type == "cuda" and _has_accelerate():
        options["device_map"] = "auto"
    with quietly(), _errors(folder):
        found: Any = _auto_class(place, options).from_pretrained(
            place,
            dtype=dtype,
            output_loading_info=True,
            adapter_kwargs=dict(_NO_ADAPTER),
            **options,
        )
    model, info = found
    if getattr(model, "_hf_peft_config_loaded", False):
        raise SafeprojError(
            f"{folder.source}: transformers put the adapter on it that lies in its directory; move "
            f"{CONFIG} elsewhere"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise SafeprojError(
            f"{folder.source}: has no weights for {shorten(missing)}; expected a complete causal "
            "language model"
        )
    if "device_map" in options:
        return model
    if dtype == "auto" and where.type == "cpu":
        model = _single(model)
    return model.to(where)


def _single(model: Any) -> Any:
    """Return a model in float32 in place of half precision, in which few CPUs compute."""
    import torch

    stored = {each.dtype for each in model.parameters()}
    if getattr(model, "is_quantized", False) or not stored & {torch.bfloat16, torch.float16}:
        return model
    return model.float()


def skeleton(folder: Folder) -> Any:
    """Return the model in a folder without its weights, on the meta device.

    Raises:
        SafeprojError: it cannot be made.
    """
    import torch
    from transformers import AutoConfig

    place, options = _place(folder)
    with quietly(), _errors(folder):
        config = AutoConfig.from_pretrained(place, **options)
        config.__dict__.pop("quantization_config", None)  # shapes are those before it
        with torch.device("meta"):
            return _auto_class(place, options).from_config(config, trust_remote_code=False)


def _auto_class(place: str, options: dict[str, Any]) -> Any:
    """Return the class of transformers that loads a model: where none is causal, an image-text one.

    It is asked by the model's config; what has no config, or an unknown one, is left to the first.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    try:
        options = {name: value for name, value in options.items() if name != "device_map"}
        config = type(transformers.AutoConfig.from_pretrained(place, **options))
    except Exception:  # what is wrong with it the class says
        return transformers.AutoModelForCausalLM
    for name, mapping in _CLASSES.items():
        if config in getattr(modeling_auto, mapping, {}):
            return getattr(transformers, name)
    return transformers.AutoModelForCausalLM


_CLASSES = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING",
}
"""Classes that run a language model, each with transformers' table of its configs."""


def model_identity(folder: Folder) -> dict[str, Any]:
    """Return a folder's SRC: with its commit from the Hub, and of other files their SHA-256.

    The Hub's cache is named by commits as well: its files are not read for this. An adapter that
    lies beside the model is no part of it.
    """
    files = {}
    if folder.revision is None:
        names = sorted(
            name
            for name in folder.files
            if "/" not in name and name.endswith(READ) and not name.startswith("adapter_")
        )
        files = {name: file_sha256(folder.path(name)) for name in names}
    return {**identity(folder), "sha256": {"files": files}}


def recorded_inputs(folder: Folder, data: Data) -> dict[str, dict[str, Any]]:
    """Return the identities of a model and of the data that it was run on, for a file's record."""
    found = model_identity(folder)
    return {
        "aligned": {**published(found), "sha256": found["sha256"]},
        "data": {
            **published({"source": data.source}),
            "sha256": data.sha256,
            "rows": len(data.samples),
            "positions": data.positions,
            **data.recorded_chat,
        },
    }


def _place(folder: Folder) -> tuple[str, dict[str, Any]]:
    """Return what transformers is given for a folder.

    Raises:
        SafeprojError: it is no model's.
    """
    if CONFIG in folder.files and "config.json" not in folder.files:
        # transformers would run the model that the adapter names, with the adapter on it.
        raise SafeprojError(
            f"{folder.source}: is an adapter's directory ({CONFIG}, no config.json), expected a "
            "model's; give the model that the adapter belongs to"
        )
    options: dict[str, Any] = {"trust_remote_code": False}
    if isinstance(folder, HubFolder):
        inside = {"subfolder": folder.subfolder} if folder.subfolder else {}
        return folder.repo, {**options, "revision": folder.revision, **inside}
    assert isinstance(folder, LocalFolder)
    if folder.only is not None:
        raise SafeprojError(
            f"{folder.source}: is a file, expected the model's directory; give "
            f"{printable(str(folder.root))}"
        )
    _require_real(folder, {TEMPLATE} & folder.files)  # any text would be taken for one
    return str(folder.root), {**options, "local_files_only": True}


def _has_accelerate() -> bool:
    from importlib.util import find_spec

    return find_spec("accelerate") is not None


@contextmanager
def quietly() -> Iterator[None]:
    """Keep the progress bars, hints and warnings of transformers and PEFT off the terminal."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _errors(folder: Folder) -> Iterator[None]:
    """Turn whatever transformers raises into one line."""
    try:
        yield
    except Exception as error:
        _require_real(folder, folder.files)
        raise SafeprojError(
            f"{folder.source}: transformers cannot load it ({type(error).__name__}: "
            f"{first_line(error)}); {held_instead(folder)}, expected a causal language model with "
            "its tokenizer"
        ) from error


def _require_real(folder: Folder, names: Collection[str]) -> None:
    """Refuse a local folder that has, of some files, one that only stands for a model's."""
    if not isinstance(folder, LocalFolder):
        return
    for name in sorted(name for name in names if "/" not in name and name.endswith(READ)):
        path = folder.path(name)
        found = mistaken_file(path, empty=False)
        if found is not None:
            raise SafeprojError(f"{printable(str(path))}: {found}")

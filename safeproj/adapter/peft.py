"""Reading PEFT LoRA adapters; whatever is not understood is refused here, by name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeproj.adapter.record import AdaptedModule, Adapter
from safeproj.errors import SafeprojError, shorten
from safeproj.select import natural_order
from safeproj.source import Folder, LocalFolder, open_folder, read_json
from safeproj.tensorfile import read_header, require_printable

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
BIN = "adapter_model.bin"
PREFIX = "base_model.model."

_A, _B, _B_BIAS = ".lora_A.weight", ".lora_B.weight", ".lora_B.bias"
_MAGNITUDES = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")

REFUSED_SETTINGS = {
    "target_parameters": "updates of whole parameters such as expert stacks",
    "layer_replication": "replicated layers",
    "use_qalora": "QA-LoRA, whose update is not a matrix of the weight's shape",
    "use_bdlora": "BD-LoRA, whose factors are block diagonal",
    "kasa_config": "KaSA, which trains on a truncated base weight",
}
"""Settings of `adapter_config.json` under which `B A` is not the update of the stored weight."""

REFUSED_TENSORS = {
    ".lora_embedding_A": "an embedding",
    ".lora_embedding_B": "an embedding",
    ".lora_diag": "KaSA",
    ".lora_E": "AdaLoRA",
}

FULL_WEIGHT_SUFFIXES = (".base_layer.weight", ".base_layer.bias", ".trainable_tokens_delta")
"""Tensors that PEFT stores beside the factors and that replace (part of) a weight of the model."""


def read_adapter(source: str) -> Adapter:
    """Return the PEFT LoRA adapter that SRC names, checked.

    Raises:
        SafeprojError: it is missing, damaged, has a value that is not finite, or is of a kind
            that is not supported.
    """
    folder = open_folder(source)
    if isinstance(folder, LocalFolder) and folder.only in (SAFETENSORS, BIN, CONFIG):
        folder = LocalFolder(folder.root, source)
    config = _read_config(folder)
    _refuse_settings(source, config)
    weights_file = next((name for name in (SAFETENSORS, BIN) if name in folder.files), None)
    if weights_file is None:
        raise SafeprojError(
            f"{source}: neither {SAFETENSORS} nor {BIN} found; is this an adapter directory?"
        )
    metadata, tensors = _read_tensors(folder.path(weights_file))
    modules, unprojected = _classify(source, config, tensors)
    _check_values(source, tensors)
    return Adapter(
        folder,
        weights_file,
        config,
        metadata,
        tensors,
        modules,
        unprojected,
        tuple(_warnings(config, modules, unprojected)),
    )


def _read_config(folder: Folder) -> dict[str, Any]:
    if CONFIG not in folder.files:
        raise SafeprojError(
            f"{folder.source}: {CONFIG} not found; expected a PEFT adapter directory, as "
            "save_pretrained writes it"
        )
    return read_json(folder, CONFIG)


def _refuse_settings(source: str, config: dict[str, Any]) -> None:
    found = config.get("peft_type")
    if found != "LORA":
        raise SafeprojError(f"{source}: peft_type is {found!r}; supported: 'LORA'")
    for setting, meaning in REFUSED_SETTINGS.items():
        if config.get(setting):
            raise SafeprojError(
                f"{source}: {CONFIG} sets {setting} ({meaning}), which is not supported; "
                "supported are LoRA factors on linear layers"
            )


def _read_tensors(path: Path) -> tuple[dict[str, str] | None, dict[str, Tensor]]:
    if path.name == SAFETENSORS:
        from safetensors.torch import load_file

        header = read_header(path)
        loaded = load_file(path)
        return header.metadata, {name: loaded[name] for name in header.tensors}
    return None, _unpickle(path)


def _unpickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a `.bin` file, which can hold nothing else."""
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise errors of nearly every type
        # Not the error's own text: it advises to switch weights_only off.
        raise SafeprojError(
            f"{path}: cannot be loaded as plain tensors ({type(error).__name__}): damaged, or it "
            "needs code to run, which is refused; save the adapter as safetensors"
        ) from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in found.items()
    ):
        raise SafeprojError(f"{path}: expected a mapping of names to tensors")
    require_printable(str(path), found)
    limit = path.stat().st_size  # a few bytes can describe a tensor that no memory holds
    for name, tensor in found.items():
        if (
            tensor.layout is not torch.strided
            or tensor.device.type != "cpu"
            or tensor.numel() * tensor.element_size() > limit
        ):
            raise SafeprojError(
                f"{path}: {name} is no ordinary tensor that the file holds (layout "
                f"{tensor.layout}, device {tensor.device}, shape {list(tensor.shape)}); expected "
                "dense tensors on the CPU"
            )
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _classify(
    source: str, config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[tuple[AdaptedModule, ...], tuple[str, ...]]:
    """Split the tensors into adapted modules and changes of whole weights; refuse the rest."""
    names, unprojected = set(), []
    for key in tensors:
        for suffix in (_A, _B):
            if key.startswith(PREFIX) and key.endswith(suffix):
                names.add(key[len(PREFIX) : -len(suffix)])
                break
        else:
            if not key.endswith((_B_BIAS, *_MAGNITUDES)):
                _explain_full_weight(source, config, key)
                unprojected.append(key)
    modules = tuple(_module(source, tensors, name) for name in sorted(names, key=natural_order))
    if not modules:
        raise SafeprojError(f"{source}: no lora_A/lora_B pair among {len(tensors)} tensors")
    _check_ranks(source, config, modules)
    if config.get("use_dora") and not all(module.dora for module in modules):
        raise SafeprojError(f"{source}: {CONFIG} sets use_dora, but modules have no magnitude")
    known = {key for module in modules for key in _keys(module.name)} | set(unprojected)
    for key in tensors:
        if key not in known:
            raise SafeprojError(f"{source}: {key} has no lora_A and lora_B beside it")
    return modules, tuple(unprojected)


def _keys(name: str) -> tuple[str, ...]:
    return tuple(PREFIX + name + suffix for suffix in (_A, _B, _B_BIAS, *_MAGNITUDES))


def _module(source: str, tensors: dict[str, Tensor], name: str) -> AdaptedModule:
    a_key, b_key, bias_key, *magnitude_keys = _keys(name)
    for key in (a_key, b_key):
        if key not in tensors:
            raise SafeprojError(f"{source}: {name} has no {key}; expected both lora_A and lora_B")
        if tensors[key].dim() != 2:
            raise SafeprojError(
                f"{source}: {key} has shape {list(tensors[key].shape)}; supported are the "
                "two-dimensional factors of linear layers"
            )
    A, B = tensors[a_key], tensors[b_key]
    if A.shape[0] != B.shape[1] or A.shape[0] == 0:
        raise SafeprojError(
            f"{source}: the factors of {name} do not fit: lora_A is {list(A.shape)}, lora_B is "
            f"{list(B.shape)}; expected (r, in) and (out, r) with the same r"
        )
    bias = tensors.get(bias_key)
    if bias is not None and bias.shape != B.shape[:1]:
        raise SafeprojError(
            f"{source}: {bias_key} has shape {list(bias.shape)}, expected [{B.shape[0]}]"
        )
    magnitude = next((tensors[key] for key in magnitude_keys if key in tensors), None)
    if magnitude is not None and magnitude.shape != B.shape[:1]:
        raise SafeprojError(
            f"{source}: the DoRA magnitude of {name} has shape {list(magnitude.shape)}, expected "
            f"[{B.shape[0]}]"
        )
    return AdaptedModule(
        name,
        a_key,
        b_key,
        rank=A.shape[0],
        in_features=A.shape[1],
        out_features=B.shape[0],
        bias_key=None if bias is None else bias_key,
        dora=magnitude is not None,
    )


def _check_ranks(source: str, config: dict[str, Any], modules: Iterable[AdaptedModule]) -> None:
    """Compare the tensors' ranks with those that the config names.

    The keys of `rank_pattern` are regular expressions from the file: they are not run, since the
    rank that counts is that of the tensors.
    """
    patterns = config.get("rank_pattern") or {}
    if not isinstance(patterns, dict) or not all(isinstance(r, int) for r in patterns.values()):
        raise SafeprojError(f"{source}: {CONFIG}: rank_pattern does not map names to numbers")
    allowed = [config.get("r"), *patterns.values()]
    for module in modules:
        if module.rank not in allowed:
            raise SafeprojError(
                f"{source}: {module.name} has rank {module.rank}, but {CONFIG} allows "
                f"{shorten(map(str, allowed))}; PEFT would not load it"
            )


def _explain_full_weight(source: str, config: dict[str, Any], key: str) -> None:
    """Accept a tensor that is not a factor only where the config accounts for it."""
    for suffix, meaning in REFUSED_TENSORS.items():
        if key.endswith(suffix):
            raise SafeprojError(
                f"{source}: {key} belongs to {meaning}, which is not supported; supported are "
                "LoRA factors on linear layers"
            )
    path = key[len(PREFIX) :] if key.startswith(PREFIX) else ""
    saved = config.get("modules_to_save") or ()
    saved = [saved] if isinstance(saved, str) else saved if isinstance(saved, list) else ()
    if path and (
        any(f".{module}." in f".{path}" for module in saved)
        or path.endswith(FULL_WEIGHT_SUFFIXES)
        or (path.endswith(".bias") and config.get("bias", "none") != "none")
    ):
        return
    raise SafeprojError(
        f"{source}: {key} is no tensor of a supported adapter; expected "
        f"{PREFIX}<module>{_A} and {_B}, or a weight that {CONFIG} accounts for "
        "(modules_to_save, bias)"
    )


def _check_values(source: str, tensors: dict[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise SafeprojError(
                f"{source}: {key} has dtype {str(tensor.dtype).removeprefix('torch.')}; expected "
                "float64, float32, float16 or bfloat16"
            )
        if not bool(tensor.isfinite().all()):
            raise SafeprojError(
                f"{source}: {key} has NaN or Inf; the adapter is damaged or its training diverged"
            )


def _warnings(
    config: dict[str, Any], modules: Iterable[AdaptedModule], unprojected: tuple[str, ...]
) -> Iterable[str]:
    if unprojected:
        yield (
            f"{len(unprojected)} tensors change weights or biases directly, which no projection "
            "touches: "
            f"{shorten(key.removeprefix(PREFIX) for key in unprojected)}"
        )
    dora = [module.name for module in modules if module.dora]
    if dora:
        yield (
            f"{len(dora)} modules are DoRA: the direction's update is projected, the magnitude "
            "is kept"
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in ("gaussian", "orthogonal", "eva"):
        yield (
            f"init_lora_weights is {init!r}: such adapters belong to a changed base weight, so "
            "B A is the update of the stored weight only if it was converted on saving "
            "(save_pretrained(path_initial_model_for_weight_conversion=...)); the scores are "
            "wrong if it was not"
        )

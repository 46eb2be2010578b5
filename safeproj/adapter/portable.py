"""A PEFT adapter in a form that all readers compute alike.

Readers differ in how they scale: some take `lora_alpha / r` of the config whatever patterns or
`use_rslora` say, some parse whole numbers alone, one reads no config at all and takes alpha for
the whole scaling. Where alpha is the rank of every module the scaling is 1 for all of them, so that
what an update is scaled by must be in its factor. Update and projection stay what they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy

from safeproj.adapter.interface import CONFIG
from safeproj.adapter.peft import Peft
from safeproj.adapter.record import AdaptedModule, Adapter, Kind
from safeproj.errors import SafeprojError
from safeproj.storage.arrays import Array, DType, cast, double, is_finite, promoted
from safeproj.storage.documents import json_document
from safeproj.text import shorten

REFUSED_SETTINGS = {
    "use_dora": "DoRA",
    "lora_bias": "biases of lora_B",
    "alora_invocation_tokens": "aLoRA, which acts behind its tokens alone",
    "arrow_config": "Arrow, which chooses among adapters",
    "target_parameters": "expert stacks",
    "trainable_token_indices": "trainable tokens",
    "modules_to_save": "modules that are saved whole",
    "layer_replication": "layers that are replicated",
    "ensure_weight_tying": "weights that are tied on loading",
}
"""Settings that some readers refuse, or do not know."""


def portable(adapter: Adapter, dtype: DType | None = None) -> Adapter:
    """Return the adapter with alpha equal to one rank for all modules, and factors of one dtype.

    Args:
        adapter: a PEFT LoRA.
        dtype: of all factors; None for one that holds those of all.

    Raises:
        SafeprojError: it has what readers do not agree about.
    """
    others = list(dict.fromkeys(_others(adapter)))
    if others:
        raise SafeprojError(
            f"{adapter.source}: --portable: has {shorten(others)}, which not all readers load; "
            "only plain LoRA on linear layers and embeddings can be made portable: leave "
            "--portable out, or train without"
        )
    scalings = adapter.format.scalings(adapter, adapter.modules)
    rank = max(module.rank for module in adapter.modules)
    wanted = dtype or _common(adapter)
    tensors = dict(adapter.tensors)
    for module in adapter.modules:
        A, B = module.input.key, module.output.key
        scaled = double(adapter.tensors[B]) * scalings[module.name]
        tensors[A] = _padded(adapter.tensors[A], wanted, rank, dim=0)
        tensors[B] = _padded(scaled, wanted, rank, dim=1)
        if not is_finite(tensors[B]):
            raise SafeprojError(
                f"{adapter.source}: --portable: {B} with its scaling {scalings[module.name]:.4g} "
                f"does not fit into {wanted}; use --dtype float32"
            )
    config = {**adapter.config, "r": rank, "lora_alpha": rank, "rank_pattern": {}}
    config |= {"alpha_pattern": {}, "use_rslora": False}
    return replace(
        adapter,
        config=config,
        tensors=tensors,
        modules=tuple(replace(module, rank=rank) for module in adapter.modules),
        documents={**adapter.documents, CONFIG: json_document(config)},
    )


def _common(adapter: Adapter) -> DType:
    keys = [key for m in adapter.modules for key in (m.input.key, m.output.key)]
    return promoted(*(adapter.tensors[key].dtype for key in keys))


def _padded(tensor: Array, dtype: DType, rank: int, dim: int) -> Array:
    shape = list(tensor.shape)
    shape[dim] = rank
    found = numpy.zeros(shape, dtype)
    found[tuple(map(slice, tensor.shape))] = cast(tensor, dtype)
    return found


def _others(adapter: Adapter) -> Iterator[str]:
    """Yield what is in an adapter beside plain factors, in words."""
    if not isinstance(adapter.format, Peft):
        yield "another format than PEFT's"
        return
    config = adapter.config
    if config.get("peft_type") != "LORA":
        yield f"peft_type {config.get('peft_type')!r}"
    yield from (text for key, text in REFUSED_SETTINGS.items() if config.get(key))
    if config.get("bias", "none") != "none":
        yield "trained biases"
    init = adapter.format.changed_base(adapter)
    if init is not None:
        yield f"init_lora_weights {init!r}"
    yield from (change.kind for change in adapter.full_changes)
    if adapter.targets:
        yield "expert stacks"
    if adapter.unknown:
        yield "tensors that are not known"
    for module in adapter.modules:
        yield from _beside(module)


def _beside(module: AdaptedModule) -> Iterator[str]:
    if module.dora:
        yield "DoRA"
    if module.bias is not None:
        yield "biases of lora_B"
    if module.mirrors:
        yield "weights that are tied on loading"
    if module.kind not in (Kind.linear, Kind.embedding):
        yield f"an update of a {module.kind.value}"

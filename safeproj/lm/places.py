"""Where a running model has the layers that an adapter names, and the rows of its vocabulary.

A vision-language checkpoint is run by a class of its own or by that of its language model, and an
adapter may have been trained on either: the same layer is `model.layers.0` in one and
`model.language_model.layers.0` in the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from safeproj.adapter.peft_config import PREFIX
from safeproj.adapter.vocabulary import unwrapped
from safeproj.errors import SafeprojError
from safeproj.names.suffix import bare, wrappers_of

MAX_ADDED = 1 << 20
"""Rows that an index alone may add to a vocabulary: it comes from the adapter's config."""


def layer_of(key: str) -> str:
    """Return the path of the layer that a tensor of a PEFT adapter belongs to.

    >>> layer_of("base_model.model.lm_head.token_adapter.base_layer.weight")
    'lm_head'
    """
    path, factor, _ = key.removeprefix(PREFIX).partition(".lora_")
    return unwrapped(path if factor else path.rpartition(".")[0])


def relocated(model: Any, paths: Iterable[str]) -> dict[str, str]:
    """Return for each path that a model has under another its own, where that is certain.

    Paths differ in what wraps the language model. Where a path stays that nothing, or more than
    one layer, may be, nothing is returned: it is another model, or one that PEFT converts.
    """
    own = {name for name, _ in model.named_modules()}
    wrappers = wrappers_of(model.config.to_dict())
    layers: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in own:
        layers[bare(f"{name}.weight", wrappers)].append(name)
    found = {}
    for path in set(paths) - own:
        key = bare(f"{path}.weight", wrappers)
        tail = ".".join(key[:-1])
        places = [name for name in layers[key] if f".{name}".endswith(f".{tail}")]
        if len(places) != 1 or not f".{path}".endswith(f".{tail}"):
            return {}
        found[path] = places[0]
    return found


def renamed(key: str, moved: Mapping[str, str]) -> str:
    """Return the name of a tensor where the layer that it belongs to is called otherwise."""
    path = layer_of(key)
    if path not in moved or not key.startswith(f"{PREFIX}{path}."):
        return key
    return PREFIX + moved[path] + key[len(PREFIX) + len(path) :]


def vocabulary_size(model: Any) -> int:
    """Return the number of rows of a model's embedding."""
    return int(model.get_input_embeddings().weight.shape[0])


def require_tokens(model: Any, tokens: Iterable[int]) -> None:
    """Refuse tokens that a model has no row for, at which it would fail, or the device.

    Raises:
        SafeprojError: one of them.
    """
    rows, largest = vocabulary_size(model), max(tokens, default=0)
    if largest >= rows:
        raise SafeprojError(
            f"the tokenizer makes the token {largest}, and the model's vocabulary has {rows}; "
            "expected the tokenizer that belongs to the model"
        )


def wanted_vocabulary(
    model: Any,
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
    moved: Mapping[str, str],
) -> int:
    """Return how many rows the vocabulary of a model must have for an adapter.

    Args:
        model: the model.
        shapes: those of the adapter's tensors, by name.
        config: the adapter's.
        moved: as `relocated` returns it.

    Raises:
        ValueError: the adapter's tensors have several sizes, or tokens far beyond the vocabulary.
    """
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    names = {name for name, module in model.named_modules() if id(module) in ends}
    sizes = {}
    for key, shape in shapes.items():
        path = layer_of(key)
        rows = _rows(key, shape)
        if rows is not None and moved.get(path, path) in names:
            sizes[key] = rows
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{key} {rows}" for key, rows in list(sizes.items())[:4])
        raise ValueError(f"its tensors have vocabularies of several sizes: {listed}")
    current = vocabulary_size(model)
    if sizes:
        return next(iter(sizes.values()))
    last = max(_token_indices(config), default=0)
    if last >= current + MAX_ADDED:
        raise ValueError(f"trainable_token_indices names {last}, and the model has {current} rows")
    return max(current, last + 1)


def _rows(key: str, shape: tuple[int, ...]) -> int | None:
    """Return the rows that the vocabulary has by a tensor, None if it does not say."""
    if len(shape) != 2 or key.endswith((".trainable_tokens_delta", ".lora_embedding_B")):
        return None
    if key.endswith(".lora_embedding_A"):
        return shape[1]
    is_weight = key.endswith(".weight") and ".lora_" not in key
    return shape[0] if is_weight or key.endswith(".lora_B.weight") else None


def _token_indices(config: Mapping[str, Any]) -> list[int]:
    given = config.get("trainable_token_indices") or []
    lists = given.values() if isinstance(given, Mapping) else [given]
    return [i for each in lists if isinstance(each, list) for i in each if type(i) is int]


def resized(model: Any, rows: int, source: str) -> None:
    """Give the vocabulary of a model as many rows, as users of PEFT do.

    Raises:
        SafeprojError: the model has no vocabulary of that kind.
    """
    if rows == vocabulary_size(model):
        return
    on_meta = model.get_input_embeddings().weight.is_meta
    try:
        model.resize_token_embeddings(rows, mean_resizing=not on_meta)
    except Exception as error:  # whatever an architecture raises
        raise SafeprojError(
            f"{source}: has a vocabulary of {rows} rows, and the model's cannot be resized from "
            f"{vocabulary_size(model)} ({type(error).__name__})"
        ) from error

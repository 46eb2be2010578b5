"""The layers whose rows are the vocabulary, which PEFT saves whole where tokens were added."""

from __future__ import annotations

EMBEDDINGS = frozenset(
    {"embed_tokens", "wte", "embed_in", "word_embeddings", "embeddings", "tok_embeddings"}
    | {"shared", "word_embedding", "token_embedding"}
)
"""Names of input embeddings."""

HEADS = frozenset({"lm_head", "embed_out", "output", "decoder", "proj_out"})
"""Names of layers that lead to the vocabulary."""

WRAPPERS = frozenset({"base_layer", "token_adapter", "original_module", "modules_to_save"})
"""What PEFT's wrappers put into the path of the layer that they are around."""


def unwrapped(path: str) -> str:
    """Return the path of a weight without what PEFT's wrappers put into it.

    >>> unwrapped("model.embed_tokens.token_adapter.base_layer.weight")
    'model.embed_tokens.weight'
    """
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


def is_vocabulary(parameter: str) -> bool:
    """Tell whether a parameter is that of an input embedding or of a head, by its name.

    >>> is_vocabulary("model.embed_tokens.weight"), is_vocabulary("model.layers.0.output.weight")
    (True, False)
    """
    *path, leaf = parameter.split(".")
    named = bool(path) and path[-1] in EMBEDDINGS | HEADS
    return named and leaf in ("weight", "bias") and not any(part.isdecimal() for part in path)

"""Names without transformers: what wraps a model is dropped, and what experts are called is known.

A wrong match would be silent, so names must agree in everything but leading wrappers such as
`model` or `language_model`: a vision tower's layer 0 never stands in for the language model's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import Any

from safeproj.checkpoint.expression import (
    Chunk,
    Expression,
    Item,
    Joined,
    Stacked,
    Stored,
    Swapped,
    stored_names,
)
from safeproj.checkpoint.interface import Checkpoint
from safeproj.errors import SafeprojError
from safeproj.names.layout import MARKED_EXPERTS, UNMARKED_EXPERTS, USUAL_EXPERTS, model_types

Key = tuple[str, ...]

TURNED_ON_DISK = frozenset({"qwen3_vl_moe"})
"""Architectures whose expert stacks have the same name in files, but are stored (E, in, out)."""

_WRAPPERS = frozenset(
    {"model", "language_model", "text_model", "llm", "thinker"}
    | {"transformer", "backbone", "base_model", "module", "_orig_mod"}
)
"""Leading parts of a name that say which class holds the model, not which weight is meant.

The model type is one more, as in `bert.encoder`; another architecture's is not.
"""

_OWN_WRAPPER = {"xlm_roberta": "roberta", "camembert": "roberta", "deberta_v2": "deberta"}
"""What it is called where it is not the model type."""

_HEADS: tuple[Key, ...] = (
    ("lm_head", "weight"),
    ("lm_head", "decoder", "weight"),
    ("cls", "predictions", "decoder", "weight"),
)
"""Heads, which are not stored where they are tied to the input embedding."""

_SHARED: tuple[Key, ...] = (
    ("encoder", "embed_tokens", "weight"),
    ("decoder", "embed_tokens", "weight"),
)
"""Embeddings that are not stored where encoder and decoder share theirs."""

_EMBEDDINGS: tuple[Key, ...] = (
    ("shared", "weight"),
    ("embed_tokens", "weight"),
    ("wte", "weight"),
    ("embed_in", "weight"),
    ("word_embeddings", "weight"),
    ("embeddings", "weight"),
    ("embeddings", "word_embeddings", "weight"),
    ("decoder", "embed_tokens", "weight"),
)
"""What the input embedding is called; of several that are stored the first is the shared one."""

_PARTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("w1", "w3"), ("gate_proj", "up_proj")),
    "down_proj": (("w2",), ("down_proj",)),
    "up_proj": (("up_proj",),),
}
"""What one expert's weights are called, by the stack that the running model makes of them."""

_RENAMED: dict[str, tuple[tuple[int, Key], ...]] = {
    "gate_up_proj": ((2, ("input_linear", "weight")), (1, ("fc1", "weight"))),
    "down_proj": ((2, ("output_linear", "weight")), (1, ("fc2", "weight"))),
}
"""What a whole stack is called elsewhere: how many last parts to replace, and by what."""

_CUT_FROM: dict[str, tuple[str, int | None]] = {
    "w1": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "w2": ("down_proj", None),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", None),
}
"""Where one expert's weight is in a stack: its name, and which half."""

_STACKS = frozenset(stack for stack, _ in _CUT_FROM.values())
_LATEST = ("gate_proj", "up_proj", "down_proj")
"""What most models call one expert's weights."""


def unwrapped(name: str, wrappers: Collection[str] = _WRAPPERS) -> str:
    """Return a weight's name without what wraps the model that it is in.

    >>> unwrapped("language_model.model.layers.0.mlp.up_proj.weight")
    'layers.0.mlp.up_proj.weight'
    """
    parts = name.split(".")
    start = 0
    while start < len(parts) - 2 and parts[start] in wrappers:
        start += 1
    return ".".join(parts[start:])


def wrappers_of(config: Mapping[str, Any]) -> frozenset[str]:
    """Return what may wrap the weights of a model, by its `config.json`."""
    own = str(config.get("model_type", "model")).replace("-", "_")
    return _WRAPPERS | {_OWN_WRAPPER.get(own, own)}


def bare(name: str, wrappers: Collection[str]) -> Key:
    """Return the parts of a weight's name without what wraps the model that it is of."""
    parts = unwrapped(name, wrappers).split(".")
    # Where an older GPT-NeoX says embed_out, all others say lm_head.
    if parts[:-1] == ["embed_out"]:
        return ("lm_head", parts[-1])
    return tuple("mlp" if part == "block_sparse_moe" else part for part in parts)


class Suffixes:
    """The names of one checkpoint, by what is left of them without wrappers."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._types = model_types(checkpoint.config)
        self._wrappers = wrappers_of(checkpoint.config)

    def candidates(self, parameter: str) -> list[Expression]:
        """Return what a weight of the running model may be; shapes are not compared.

        Raises:
            SafeprojError: an expert is missing.
        """
        key = self._key(parameter)
        for find in (self._stored, self._stacks, self._cuts, self._tied):
            found = list(find(key))
            if found:
                return found
        return []

    def stacks(self, parameter: str) -> list[Expression]:
        """Return what an expert stack of exactly this name may be made of."""
        prefix = parameter.rpartition(".")[0] + "."
        found = self._stacks(self._key(parameter))
        return [expression for expression in found if _all_below(prefix, expression)]

    def experts(self) -> Iterator[str]:
        """Yield the weights of single experts: stored so, or cut out of a stack, by their names."""
        for name in self._checkpoint.names:
            parts, shape = name.split("."), self._checkpoint.describe(name).shape
            if len(parts) > 3 and parts[-4] == "experts" and _number(parts[-3]):
                if parts[-1] == "weight" and len(shape) == 2:
                    yield name
            elif parts[-2:-1] == ["experts"] and parts[-1] in _STACKS and len(shape) == 3:
                cuts = [leaf for leaf in _LATEST if _CUT_FROM[leaf][0] == parts[-1]]
                for number in range(shape[0]):
                    single = (".".join((*parts[:-1], str(number), leaf, "weight")) for leaf in cuts)
                    yield from (each for each in single if any(self._cuts(self._key(each))))

    def _key(self, name: str) -> Key:
        return bare(name, self._wrappers)
        parts = ["mlp" if part == "block_sparse_moe" else part for part in name.split(".")]
        parts = unwrapped(".".join(parts), self._wrappers).split(".")
        # Where an older GPT-NeoX says embed_out, all others say lm_head.
        return ("lm_head", parts[-1]) if parts[:-1] == ["embed_out"] else tuple(parts)

    @cached_property
    def _index(self) -> dict[Key, list[str]]:
        found = defaultdict(list)
        for name in sorted(self._checkpoint.names):
            found[self._key(name)].append(name)
        return found

    @cached_property
    def _experts(self) -> dict[Key, dict[int, list[str]]]:
        """For `(..., "experts", "w1")` the names of each expert's weight."""
        found: dict[Key, dict[int, list[str]]] = defaultdict(dict)
        for key, names in self._index.items():
            if len(key) > 3 and key[-4] == "experts" and key[-1] == "weight" and _number(key[-3]):
                stack = (*key[:-3], key[-2])
                found[stack][int(key[-3])] = names
        return found

    def _stored(self, key: Key) -> Iterator[Expression]:
        return (Stored(name) for name in self._index.get(key, ()))

    def _stacks(self, key: Key) -> Iterator[Expression]:
        """Yield a stack of experts that is stored expert by expert, or under another name."""
        if len(key) < 3 or key[-2] != "experts":
            return
        for depth, other in _RENAMED.get(key[-1], ()):
            yield from self._stored((*key[:-depth], *other))
        if self._types & (MARKED_EXPERTS | UNMARKED_EXPERTS):
            return  # They are (E, in, out), or interleaved.
        for leaves in _PARTS.get(key[-1], ()):
            found = [self._experts.get((*key[:-1], leaf)) for leaf in leaves]
            parts = [self._stack(names) for names in found if names]
            if len(parts) == len(leaves):
                yield parts[0] if len(parts) == 1 else Joined(tuple(parts), 1)

    def _stack(self, names: dict[int, list[str]]) -> Expression:
        some = names[min(names)][0]
        missing = [expert for expert in range(len(names)) if expert not in names]
        if missing:
            raise SafeprojError(
                f"{self._checkpoint.source}: {some} is one of {len(names)} experts, but expert "
                f"{missing[0]} is missing; is the checkpoint complete?"
            )
        twice = next((both for both in names.values() if len(both) > 1), None)
        if twice is not None:
            raise SafeprojError(
                f"{self._checkpoint.source}: {twice[0]} and {twice[1]} may both be the expert's "
                "weight; keep one of them in the checkpoint"
            )
        return Stacked(tuple(Stored(names[expert][0]) for expert in range(len(names))))

    def _cuts(self, key: Key) -> Iterator[Expression]:
        """Yield one expert's weight, as older versions name it, out of a stack."""
        known = len(key) > 3 and key[-4] == "experts" and key[-1] == "weight" and _number(key[-3])
        usual = self._types & USUAL_EXPERTS and not self._types & TURNED_ON_DISK
        if not known or not usual or key[-2] not in _CUT_FROM:
            return
        stack, half = _CUT_FROM[key[-2]]
        for name in self._index.get((*key[:-3], stack), ()):
            shape = self._checkpoint.describe(name).shape
            if len(shape) == 3 and int(key[-3]) < shape[0]:
                whole = Stored(name)
                yield Item(whole if half is None else Chunk(whole, 1, half, 2), int(key[-3]))

    def _tied(self, key: Key) -> Iterator[Expression]:
        if key in _SHARED:
            # T5 and BART share their embeddings whatever the head does.
            return self._stored(_EMBEDDINGS[0])
        if key in _HEADS and _may_be_tied(self._checkpoint.config):
            stored = next((name for name in _EMBEDDINGS if name in self._index), _EMBEDDINGS[0])
            return self._stored(stored)
        return iter(())


def turned_on_disk(parameter: str, checkpoint: Checkpoint) -> Expression | None:
    """Return an expert stack that files store (E, in, out) and the running model (E, out, in).

    There are files of both kinds under one name; the sizes in config.json tell.
    """
    config = checkpoint.config
    path, _, leaf = parameter.rpartition(".")
    sizes = config.get("text_config", config)
    hidden, inner = sizes.get("hidden_size"), sizes.get("moe_intermediate_size")
    if not path.endswith(".experts") or leaf not in _RENAMED or hidden is None or inner is None:
        return None
    wanted = (2 * inner, hidden) if leaf == "gate_up_proj" else (hidden, inner)
    shape = checkpoint.describe(parameter).shape[1:]
    if shape == wanted:
        return Stored(parameter)
    return Swapped(Stored(parameter)) if shape == wanted[::-1] else None


def _may_be_tied(config: Mapping[str, Any]) -> bool:
    """Tell whether a weight that is not stored is the input embedding.

    A config without the word leaves it at the architecture's default, and a head that is neither
    stored nor tied would have no weight.
    """
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, Mapping)]
    said = {part["tie_word_embeddings"] for part in parts if "tie_word_embeddings" in part}
    return False not in said


def _number(part: str) -> bool:
    return part.isascii() and part.isdecimal()


def _all_below(prefix: str, expression: Expression) -> bool:
    return all(name.startswith(prefix) for name in stored_names(expression))

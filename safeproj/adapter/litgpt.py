"""Reading and writing adapters of litgpt: `lit_model.pth.lora` beside its settings.

litgpt has names of its own and one weight for q, k and v. Of those that are adapted, in this order,
`lora_A` has r rows each below one another, and `lora_B` the rows of their outputs. It is a file of
`torch.save`, and is read as plain tensors and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safeproj.adapter.files import check_values, finite_number
from safeproj.adapter.interface import Format
from safeproj.adapter.record import AdaptedModule, Adapter, Factor, Kind
from safeproj.errors import SafeprojError
from safeproj.storage.arrays import Array, to_torch
from safeproj.storage.picklefile import read_nested_pickle
from safeproj.storage.source import Folder, LocalFolder, contents
from safeproj.text import first_line, natural_order, printable, shorten

WEIGHTS = "lit_model.pth.lora"
SETTINGS = "hyperparameters.yaml"
MODEL = "model_config.yaml"

INSIDE = "model"
"""What the tensors are below in the file; litgpt reads them without, too."""

A, B = ".lora_A", ".lora_B"
QKV = "attn.qkv"
ENABLED = {"q_proj": "lora_query", "k_proj": "lora_key", "v_proj": "lora_value"}
"""What is adapted of q, k and v, and the setting that says so."""

PATHS: dict[str, tuple[str, ...]] = {
    "attn.proj": ("self_attn.o_proj", "self_attn.dense"),
    "mlp.fc_1": ("mlp.gate_proj",),
    "mlp.fc_2": ("mlp.up_proj",),
    "mlp.fc": ("mlp.fc1",),
    "mlp.proj": ("mlp.down_proj", "mlp.fc2"),
    "mlp.gate": ("mlp.gate", "block_sparse_moe.gate"),
    "fc_1": ("mlp.experts.{}.gate_proj", "block_sparse_moe.experts.{}.w1"),
    "fc_2": ("mlp.experts.{}.up_proj", "block_sparse_moe.experts.{}.w3"),
    "proj": ("mlp.experts.{}.down_proj", "block_sparse_moe.experts.{}.w2"),
}
"""What litgpt's converter takes a layer, or one expert's, from. Models whose q, k and v are one
weight have other names, and other orders of rows: they are not found."""

MAX_SETTINGS = 1_000_000
"""Bytes; more than any settings need."""


@dataclass(frozen=True)
class LitGpt(Format):
    """An adapter directory of litgpt.

    Attributes:
        rank: of every layer.
        alpha: what updates are scaled by, times the rank.
        nested: whether the file has its tensors below `INSIDE`.
    """

    rank: int
    alpha: float
    nested: bool

    documents: ClassVar[tuple[str, ...]] = (SETTINGS, MODEL)
    stand_ins: ClassVar[frozenset[str]] = frozenset({WEIGHTS})
    library: ClassVar[str | None] = "litgpt"

    @classmethod
    def read(cls, folder: Folder) -> Adapter | None:
        if WEIGHTS not in folder.files:
            return None
        source = folder.source
        settings, model = (_read_yaml(folder, name) for name in (SETTINGS, MODEL))
        rank = _count(source, SETTINGS, settings, "lora_r")
        alpha = finite_number(f"{source}: lora_alpha in {SETTINGS}", settings.get("lora_alpha"))
        tensors, nested = read_nested_pickle(folder, WEIGHTS, INSIDE)
        found = _Reader(source, settings, model, rank, tensors)
        modules = sorted(found.modules(), key=lambda module: natural_order(module.name))
        check_values(source, tensors)
        kind = cls(rank, alpha, nested)
        return Adapter(folder, WEIGHTS, {}, tensors, tuple(modules), (), (), (), kind)

    @classmethod
    def is_weights(cls, name: str) -> bool:
        return name == WEIGHTS

    @property
    def output_file(self) -> str:
        return WEIGHTS

    def scalings(self, adapter: Adapter, modules: Sequence[AdaptedModule]) -> dict[str, float]:
        del adapter
        return {module.name: self.alpha / self.rank for module in modules}

    def write(self, path: Path, tensors: Mapping[str, Array]) -> dict[str, str]:
        import torch

        # Each on its own: views would be saved with all that they are views of.
        values = {name: to_torch(tensor.copy()) for name, tensor in tensors.items()}
        torch.save({INSIDE: values} if self.nested else values, path)
        written = LocalFolder(path.parent, str(path))
        return self.digests(read_nested_pickle(written, path.name, INSIDE)[0])


def _read_yaml(folder: Folder, name: str) -> dict[str, Any]:
    import yaml

    source = folder.source
    if name not in folder.files:
        raise SafeprojError(
            f"{source}: {name} not found; expected it beside {WEIGHTS}, as litgpt writes both"
        )
    try:
        found = yaml.safe_load(contents(folder, name, MAX_SETTINGS).decode())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise SafeprojError(f"{source}: {name} cannot be read ({first_line(error)})") from error
    if not isinstance(found, dict):
        raise SafeprojError(f"{source}: {name} is no mapping of settings")
    return found


def _count(source: str, file: str, settings: Mapping[str, Any], name: str) -> int:
    found = settings.get(name)
    if type(found) is not int or found < 1:
        raise SafeprojError(
            f"{source}: {name} in {file} is {printable(str(found)[:80])!r}; expected a whole "
            "number, 1 or more"
        )
    return found


class _Reader:
    """Sorts the tensors of a file.

    Raises:
        SafeprojError: one has no counterpart, or does not fit the settings.
    """

    def __init__(
        self,
        source: str,
        settings: Mapping[str, Any],
        model: Mapping[str, Any],
        rank: int,
        tensors: Mapping[str, Array],
    ) -> None:
        self._source, self._settings, self._model = source, settings, model
        self._rank, self._tensors = rank, tensors

    def modules(self) -> Iterator[AdaptedModule]:
        """Yield the updates; every tensor must belong to one."""
        stems = dict.fromkeys(name.removesuffix(A).removesuffix(B) for name in self._tensors)
        if not stems:
            raise SafeprojError(f"{self._source}: {WEIGHTS} holds no tensor")
        for stem in stems:
            missing = [stem + end for end in (A, B) if stem + end not in self._tensors]
            if missing:
                raise SafeprojError(
                    f"{self._source}: {stem} has no {missing[0]}; expected both {A[1:]} and "
                    f"{B[1:]} of a layer of litgpt, and nothing else"
                )
            layer, leaf = self._place(stem)
            if leaf == QKV:
                yield from self._parts(stem, layer)
            else:
                yield self._module(stem, self._paths(stem, layer, leaf))

    def _place(self, stem: str) -> tuple[str, str]:
        """Return the layer's number and what is in it."""
        if stem == "lm_head":
            return "", stem
        match = re.fullmatch(r"transformer\.h\.(\d{1,6})\.([a-z_0-9.]+)", stem, re.ASCII)
        if match is None:
            raise SafeprojError(
                f"{self._source}: {stem} is no layer of litgpt; expected transformer.h.N.… or "
                "lm_head"
            )
        return match[1], match[2]

    def _paths(self, stem: str, layer: str, leaf: str) -> tuple[str, ...]:
        """Return what models call a layer, the most usual first."""
        if leaf == "lm_head":
            return ("lm_head",)
        expert = re.fullmatch(r"mlp\.experts\.(\d{1,6})\.(fc_1|fc_2|proj)", leaf, re.ASCII)
        leaf, number = (leaf, "") if expert is None else (expert[2], expert[1])
        if leaf not in PATHS or ("{}" in PATHS[leaf][0]) != (expert is not None):
            raise SafeprojError(
                f"{self._source}: {stem} is a layer that is not known; supported are {QKV}, "
                f"{', '.join(name for name in PATHS if '.' in name)}, lm_head, and experts"
            )
        return tuple(f"model.layers.{layer}.{path.format(number)}" for path in PATHS[leaf])

    def _module(self, stem: str, paths: tuple[str, ...]) -> AdaptedModule:
        a, b = (self._tensors[stem + end].shape for end in (A, B))
        if len(a) != 2 or len(b) != 2 or (a[0], b[1]) != (self._rank, self._rank):
            raise SafeprojError(
                f"{self._source}: the factors of {stem} are {list(a)} and {list(b)}, expected "
                f"(r, in) and (out, r) with the r of {SETTINGS}, {self._rank}"
            )
        return _module(paths, Factor(stem + B), Factor(stem + A), self._rank, a[1], b[0])

    def _parts(self, stem: str, layer: str) -> Iterator[AdaptedModule]:
        """Yield the updates of those of q, k and v that are adapted."""
        names = [name for name, key in ENABLED.items() if self._settings.get(key) is True]
        sizes = self._sizes()
        r, rows = self._rank, sum(sizes[name] for name in names)
        a, b = (tuple(self._tensors[stem + end].shape) for end in (A, B))
        if len(a) != 2 or (a[0], b) != (r * len(names), (rows, r)) or not names:
            raise SafeprojError(
                f"{self._source}: the factors of {stem} are {list(a)} and {list(b)}; by {SETTINGS} "
                f"and {MODEL} they are of {shorten(names) or 'nothing'} and of rank {r}: expected "
                f"[{r * len(names)}, in] and [{rows}, {r}]"
            )
        start = 0
        for number, name in enumerate(names):
            out = slice(start, start + sizes[name])
            start = out.stop
            yield _module(
                (f"model.layers.{layer}.self_attn.{name}",),
                Factor(stem + B, rows=out),
                Factor(stem + A, rows=slice(number * r, (number + 1) * r)),
                r,
                a[1],
                sizes[name],
            )

    def _sizes(self) -> dict[str, int]:
        """Return how many outputs q, k and v have."""
        model = dict(self._model)
        if model.get("n_query_groups") is None:
            model["n_query_groups"] = model.get("n_head")
        if model.get("head_size") is None and model.get("n_head"):
            width = _count(self._source, MODEL, model, "n_embd")
            model["head_size"] = width // _count(self._source, MODEL, model, "n_head")
        names = ("n_head", "n_query_groups", "head_size")
        heads, groups, size = (_count(self._source, MODEL, model, name) for name in names)
        return {"q_proj": heads * size, "k_proj": groups * size, "v_proj": groups * size}


def _module(
    paths: tuple[str, ...], output: Factor, inner: Factor, rank: int, columns: int, rows: int
) -> AdaptedModule:
    return AdaptedModule(
        name=paths[0],
        parameter=f"{paths[0]}.weight",
        kind=Kind.linear,
        output=output,
        input=inner,
        rank=rank,
        in_features=columns,
        out_features=rows,
        aliases=paths[1:],
    )

"""Reading and writing adapters of mlx-lm: `adapters.safetensors` beside `adapter_config.json`.

What mlx-lm adapts is stored turned: `lora_a` (in, r) and `lora_b` (r, out), with
`ΔW = scale · (lora_a lora_b)ᵀ`. An embedding (vocabulary, d) has `lora_a` (vocabulary, r) and
`lora_b` (r, d). Stacked experts (`SwitchLinear`) have `lora_a` (E, r, in) and `lora_b` (E, out, r),
not turned. mlx-vlm wrote `A` (in, r) and `B` (r, out) before it took over these names. The scale
does not matter here: projection is linear.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safeproj.adapter.files import (
    check_values,
    dora_warnings,
    finite_number,
    read_safetensors,
    write_safetensors,
)
from safeproj.adapter.interface import CONFIG, Format
from safeproj.adapter.peft import BIN, SAFETENSORS
from safeproj.adapter.record import AdaptedModule, Adapter, Factor, Kind
from safeproj.adapter.stacks import stack_modules
from safeproj.errors import SafeprojError
from safeproj.storage.arrays import Array
from safeproj.storage.source import Folder, read_json
from safeproj.text import natural_order

WEIGHTS = "adapters.safetensors"
OLD_WEIGHTS = "adapters.npz"

MAGNITUDE = ".m"


@dataclass(frozen=True)
class _Ends:
    """What the names of the factors end in, after the module's path."""

    A: str
    B: str


_USUAL = _Ends(".lora_a", ".lora_b")
_OLD_VLM = _Ends(".A", ".B")

SUPPORTED = "supported are LoRA and DoRA on linear layers, embeddings and switch layers"

EMBEDDINGS = frozenset(
    {"embed", "embed_in", "embed_tokens", "embed_tokens_per_layer", "embedding", "embeddings"}
    | {"position_embedding_table", "tok_embeddings", "token_embeddings", "word_embeddings"}
    | {"wpe", "wte"}
)
"""What mlx-lm's models call their `nn.Embedding`: factors of linear layers have the same form."""

_EXPERT_PARTS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
"""What the layers of a `SwitchGLU` are called, and what Mixtral calls them."""


@dataclass(frozen=True)
class Mlx(Format):
    """An adapter directory of mlx-lm.

    Attributes:
        metadata: metadata of the safetensors file.
        old_vlm: whether it has the names and the settings of mlx-vlm's older adapters.
    """

    metadata: dict[str, str] | None
    old_vlm: bool = False

    documents: ClassVar[tuple[str, ...]] = (CONFIG,)
    stand_ins: ClassVar[frozenset[str]] = frozenset({WEIGHTS})
    library: ClassVar[str | None] = "mlx"
    base_model_key: ClassVar[str | None] = "model"

    @classmethod
    def read(cls, folder: Folder) -> Adapter | None:
        source = folder.source
        if folder.files & {SAFETENSORS, BIN} or not folder.files & {WEIGHTS, OLD_WEIGHTS}:
            return None
        if WEIGHTS not in folder.files:
            raise SafeprojError(
                f"{source}: {OLD_WEIGHTS} comes from an old mlx-lm; expected {WEIGHTS}: convert it "
                "with mlx.core.load and save_safetensors"
            )
        if CONFIG not in folder.files:
            raise SafeprojError(
                f"{source}: {CONFIG} not found; expected it beside {WEIGHTS}, as mlx-lm writes both"
            )
        config = read_json(folder, CONFIG)
        _require_lora(source, config)
        metadata, tensors = read_safetensors(folder, WEIGHTS)
        old_vlm = any(key.endswith((_OLD_VLM.A, _OLD_VLM.B)) for key in tensors)
        modules = tuple(_modules(source, tensors, _OLD_VLM if old_vlm else _USUAL))
        _check(source, config, tensors, modules)
        return Adapter(
            folder,
            WEIGHTS,
            config,
            tensors,
            modules,
            (),
            (),
            tuple(dora_warnings(modules)),
            cls(metadata, old_vlm),
        )

    @classmethod
    def is_weights(cls, name: str) -> bool:
        return name.endswith((WEIGHTS, OLD_WEIGHTS))  # also 0000100_adapters.safetensors

    @property
    def output_file(self) -> str:
        return WEIGHTS

    @property
    def replaced_files(self) -> frozenset[str]:
        return frozenset({WEIGHTS, OLD_WEIGHTS})

    @property
    def container(self) -> dict[str, str] | None:
        return self.metadata

    def scalings(self, adapter: Adapter, modules: Sequence[AdaptedModule]) -> dict[str, float]:
        if self.old_vlm:  # its first versions did not divide by the rank: the larger counts
            alpha = finite_number("alpha", adapter.config.get("alpha"))
            return dict.fromkeys((m.name for m in modules), alpha)
        parameters = adapter.config.get("lora_parameters")
        scale = parameters.get("scale") if isinstance(parameters, dict) else None
        return dict.fromkeys(
            (m.name for m in modules), finite_number("lora_parameters.scale", scale)
        )

    def write(self, path: Path, tensors: Mapping[str, Array]) -> dict[str, str]:
        return write_safetensors(path, self.metadata, tensors)


def _require_lora(source: str, config: Mapping[str, Any]) -> None:
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        whole = ": it holds whole weights, whose change no projection of factors describes"
        raise SafeprojError(
            f"{source}: fine_tune_type {kind!r} is not supported"
            f"{whole if kind == 'full' else ''}; {SUPPORTED}"
        )


def _modules(source: str, tensors: Mapping[str, Array], ends: _Ends) -> Iterator[AdaptedModule]:
    """Yield the updates in natural order; every tensor must belong to one."""
    paths = set()
    known = (ends.A, ends.B, *((MAGNITUDE,) if ends is _USUAL else ()))
    for key in tensors:
        suffix = next((suffix for suffix in known if key.endswith(suffix)), None)
        if suffix is None:
            raise SafeprojError(
                f"{source}: {key} is no tensor of an mlx-lm adapter; expected <module>{ends.A}, "
                f"{ends.B} or, for DoRA, {MAGNITUDE}; {SUPPORTED}"
            )
        paths.add(key.removesuffix(suffix))
    if not paths:
        raise SafeprojError(
            f"{source}: {WEIGHTS} holds no tensor; expected <module>{ends.A} and {ends.B}"
        )
    for path in sorted(paths, key=natural_order):
        missing = [path + suffix for suffix in (ends.A, ends.B) if path + suffix not in tensors]
        if missing:
            raise SafeprojError(
                f"{source}: {path} has no {missing[0]}; expected both {ends.A[1:]} and {ends.B[1:]}"
            )
        if len(tensors[path + ends.B].shape) == 3 and ends is _USUAL:
            yield from _experts(source, tensors, path)
        else:
            yield _module(source, tensors, path, ends)


def _module(source: str, tensors: Mapping[str, Array], path: str, ends: _Ends) -> AdaptedModule:
    A, B = ends.A, ends.B
    a, b = tensors[path + A].shape, tensors[path + B].shape
    if len(a) != 2 or len(b) != 2 or a[1] != b[0] or a[1] == 0:
        raise SafeprojError(
            f"{source}: the factors of {path} do not fit: lora_a is {list(a)}, lora_b is "
            f"{list(b)}; expected (in, r) and (r, out) with the same r"
        )
    embedding = path.rpartition(".")[2] in EMBEDDINGS
    magnitude = tensors.get(path + MAGNITUDE)
    rows = a[0] if embedding else b[1]
    if magnitude is not None and tuple(magnitude.shape) != (rows,):
        raise SafeprojError(
            f"{source}: {path}{MAGNITUDE} is {list(magnitude.shape)}; expected {rows} values, one "
            "for each row of the weight"
        )
    return AdaptedModule(
        name=path,
        parameter=f"{path}.weight",
        kind=Kind.embedding if embedding else Kind.linear,
        output=Factor(path + B, turned=True),
        input=Factor(path + A, turned=True),
        rank=a[1],
        in_features=a[0],
        out_features=b[1],
        dora=magnitude is not None,
    )


def _experts(source: str, tensors: Mapping[str, Array], path: str) -> Iterator[AdaptedModule]:
    """Yield the updates of a stack: mlx-lm makes `P.switch_mlp.gate_proj` of all experts'."""
    switch, _, part = path.rpartition(".")
    parent = switch.rpartition(".")[0]
    if part not in _EXPERT_PARTS or path + MAGNITUDE in tensors:
        raise SafeprojError(
            f"{source}: {path} is a stack that no checkpoint's experts are known for; expected "
            f"{', '.join(_EXPERT_PARTS)} of a switch layer, without a magnitude"
        )

    def paths(expert: int) -> tuple[str, ...]:
        return tuple(f"{parent}.experts.{expert}.{leaf}" for leaf in (part, _EXPERT_PARTS[part]))

    yield from stack_modules(source, tensors, path + _USUAL.A, path + _USUAL.B, paths)


def _check(
    source: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Array],
    modules: tuple[AdaptedModule, ...],
) -> None:
    check_values(source, tensors)
    if config.get("fine_tune_type") == "dora" and not all(module.dora for module in modules):
        raise SafeprojError(f"{source}: {CONFIG} says dora, but modules have no {MAGNITUDE}")
    parameters = config.get("lora_parameters")
    settings = parameters if isinstance(parameters, dict) else config  # mlx-vlm had no such part
    rank = settings.get("rank")
    other = next((module for module in modules if rank is not None and module.rank != rank), None)
    if other is not None:
        raise SafeprojError(
            f"{source}: {other.name} has rank {other.rank}, but {CONFIG} says {rank!r}; mlx-lm "
            "would not load it"
        )

"""Reading and writing LoRA adapters of llama.cpp: one GGUF file.

llama.cpp's converter gives tensors its own names, and for some architectures puts the rows of q and
k in another order, for its rotary embeddings. The factors are `lora_a` (r, in) and `lora_b`
(out, r), stacked for experts; those of the token embedding are `lora_a` (vocabulary, r) and
`lora_b` (d, r). The alpha does not matter here: projection is linear.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy

from safeproj.adapter import ggufile
from safeproj.adapter.files import check_values, finite_number
from safeproj.adapter.interface import MANIFEST, Format
from safeproj.adapter.peft import BIN, SAFETENSORS
from safeproj.adapter.record import AdaptedModule, Adapter, Factor, FullChange, Kind
from safeproj.adapter.stacks import stack_modules
from safeproj.errors import SafeprojError, install
from safeproj.storage.arrays import Array, bytes_of, dtype_of
from safeproj.storage.source import Folder
from safeproj.text import natural_order, printable, shorten

SUFFIX = ".gguf"
A, B = ".lora_a", ".lora_b"

PERMUTED = frozenset(
    {"arcee", "granite", "llama", "minicpm", "mistral3", "olmo", "smollm3"},
)
"""Architectures of which the converter reorders the rows of q and k, and nothing else."""

MROPE = "glm4"
"""An architecture of which it reorders them only where the rotary embedding has sections."""

PLAIN = frozenset(
    {"apertus", "cohere2", "command-r", "ernie4_5", "exaone", "exaone4", "gemma", "gemma2"}
    | {"gemma3", "gpt-oss", "hunyuan-dense", "lfm2", "llama4", "nemotron", "olmo2", "olmoe"}
    | {"phi2", "phi3", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "seed_oss", "stablelm"}
    | {"starcoder2", MROPE}
)
"""Architectures of which it leaves the rows of all linear weights as they are."""

INTERLEAVED = frozenset({"gpt-oss"})
"""Of these it takes gate and up of an expert out of every other row of one weight."""

ALPHA = "adapter.lora.alpha"
"""What the product of the factors is scaled by, times their rank."""

HEADS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
"""What is permuted, and the setting of the model's config that says in how many heads."""

EMBEDDING = "token_embd"
OTHER_EMBEDDINGS = ("position_embd", "token_types", "per_layer_token_embd")

MAX_BLOCKS = 1000
"""More than any model has; the table of names is built for as many as the file names."""


@dataclass(frozen=True)
class Gguf(Format):
    """A LoRA adapter in a GGUF file.

    Attributes:
        name: of the file.
        header: of the file.
        heads: tensors that are permuted in the file and not in `Adapter.tensors`, and in how many
            heads.
    """

    name: str
    header: ggufile.Header
    heads: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Folder) -> Adapter | None:
        names = sorted(n for n in folder.files if "/" not in n and n.endswith(SUFFIX))
        if not names or folder.files & {SAFETENSORS, BIN}:
            return None
        source = folder.source
        if len(names) > 1:
            raise SafeprojError(
                f"{source}: has {len(names)} GGUF files ({shorten(names)}), expected one; pass the "
                "file itself"
            )
        path = folder.path(names[0])
        folder.held[names[0]] = content = ggufile.read_file(path)
        header = ggufile.read_header(path, content)
        _require_lora(source, header)
        _require_floats(source, header)
        tensors = _load(header, ggufile.read_tensors(path, content, header))
        modules, changes = _classified(source, header, tensors)
        check_values(source, tensors)
        return Adapter(
            folder, names[0], {}, tensors, modules, (), changes, (), cls(names[0], header)
        )

    @classmethod
    def is_weights(cls, name: str) -> bool:
        return name.endswith(SUFFIX)

    @classmethod
    def is_adapter(cls, files: Collection[str]) -> bool:
        # A GGUF file alone may be a model: only what `patch` wrote is replaced.
        return MANIFEST in files and any(cls.is_weights(name) for name in files)

    @property
    def output_file(self) -> str:
        return self.name

    @property
    def container(self) -> tuple[int, bytes, int]:
        return self.header.version, self.header.metadata, self.header.alignment

    def reordered(self, adapter: Adapter, config: Mapping[str, Any]) -> Adapter:
        """Return the adapter with the rows of q and k in the model's order."""
        architecture = self.header.values["general.architecture"]
        permuted = architecture in PERMUTED
        if architecture == MROPE:
            _require_no_sections(adapter, config)
        heads = {
            key: _heads(adapter, key, setting, config)
            for key in adapter.tensors
            for setting in [HEADS.get(key.removesuffix(f".weight{B}").rpartition(".")[2])]
            if permuted and key.endswith(B) and setting is not None
        }
        tensors = {
            key: _unpermuted(tensor, heads[key]) if key in heads else tensor
            for key, tensor in adapter.tensors.items()
        }
        return replace(adapter, tensors=tensors, format=replace(self, heads=heads))

    def scalings(self, adapter: Adapter, modules: Sequence[AdaptedModule]) -> dict[str, float]:
        del adapter
        # llama.cpp (llama_adapter_lora_weight::get_scale) scales by 1 where alpha is 0 or missing.
        given = self.header.values.get(ALPHA) or 0.0
        alpha = finite_number(ALPHA, given)
        return {module.name: alpha / module.rank if alpha else 1.0 for module in modules}

    def digests(self, tensors: Mapping[str, Array]) -> dict[str, str]:
        return super().digests({key: self._stored(key, t) for key, t in tensors.items()})

    def _stored(self, key: str, tensor: Array) -> Array:
        return _permuted(tensor, self.heads[key]) if key in self.heads else tensor

    def write(self, path: Path, tensors: Mapping[str, Array]) -> dict[str, str]:
        numbers = {name: number for number, (name, _) in ggufile.DTYPES.items()}
        types = [numbers[t.dtype.name] for t in tensors.values()]
        digests = {}

        def data() -> Iterator[memoryview]:
            for key, tensor in tensors.items():
                digests[key] = hashlib.sha256(
                    view := bytes_of(self._stored(key, tensor))
                ).hexdigest()
                yield view

        ggufile.write(path, self.header, types, data())
        content = ggufile.read_file(path)
        ggufile.read_tensors(path, content, ggufile.read_header(path, content))
        return digests


def _require_lora(source: str, header: ggufile.Header) -> None:
    values = header.values
    for key, expected in (("general.type", "adapter"), ("adapter.type", "lora")):
        if values.get(key) != expected:
            raise SafeprojError(
                f"{source}: {key} is {values.get(key)!r}, expected {expected!r}; pass a LoRA "
                "adapter as llama.cpp's convert_lora_to_gguf.py writes it"
            )
    architecture = values.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in PERMUTED | PLAIN:
        raise SafeprojError(
            f"{source}: the architecture {architecture!r} is not supported: how its weights are "
            f"converted is not known here; supported are {', '.join(sorted(PERMUTED | PLAIN))}; "
            "pass the PEFT adapter that it was made from"
        )


def _require_floats(source: str, header: ggufile.Header) -> None:
    other = next((info for info in header.tensors if info.type not in ggufile.DTYPES), None)
    if other is None:
        return
    try:
        kind = _package(source).GGMLQuantizationType(other.type).name
    except ValueError:
        kind = f"number {other.type}"
    raise SafeprojError(
        f"{source}: {printable(other.name)} has the type {kind}; expected F32, F16 or BF16: "
        "convert the adapter again, with `--outtype f32`"
    )


def _package(source: str) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise SafeprojError(
            f"{source}: to read GGUF the package gguf is needed; {install('gguf')}"
        ) from error
    return gguf


def _load(header: ggufile.Header, data: Mapping[str, bytearray]) -> dict[str, Array]:
    found = {}
    for info in header.tensors:
        shape = info.dims[::-1]
        if len(shape) == 1 and info.name.endswith((A, B)):
            shape = (1, *shape)  # ggml leaves out last dimensions of 1: here the rank
        dtype = dtype_of(ggufile.DTYPES[info.type][0])
        found[info.name] = numpy.frombuffer(data[info.name], dtype).reshape(shape)
    return found


def _classified(
    source: str, header: ggufile.Header, tensors: Mapping[str, Array]
) -> tuple[tuple[AdaptedModule, ...], tuple[FullChange, ...]]:
    """Return the updates in natural order, and the norms, which mergekit puts into adapters."""
    modules: list[AdaptedModule] = []
    changes: list[FullChange] = []
    paths = _Paths(source, str(header.values["general.architecture"]), tensors)
    for key in tensors:
        stem = key.removesuffix(A).removesuffix(B).removesuffix(".weight")
        if key.endswith((f".weight{A}", f".weight{B}")):
            if f"{stem}.weight{A}" not in tensors or f"{stem}.weight{B}" not in tensors:
                raise SafeprojError(
                    f"{source}: {key} stands alone; expected both {A[1:]} and {B[1:]}"
                )
            if key.endswith(A):
                modules += _modules(source, tensors, stem, paths)
        elif key.endswith("_norm.weight"):
            path, *aliases = paths.of(stem)
            changes.append(FullChange(key, f"{path}.weight", "norm", aliases=tuple(aliases)))
        else:
            raise SafeprojError(
                f"{source}: {key} is no tensor of a LoRA adapter; expected <name>.weight{A}, "
                f"<name>.weight{B}, or a norm"
            )
    if not modules:
        raise SafeprojError(f"{source}: no lora_a/lora_b pair among {len(tensors)} tensors")
    return tuple(sorted(modules, key=lambda module: natural_order(module.name))), tuple(changes)


def _modules(
    source: str, tensors: Mapping[str, Array], stem: str, table: _Paths
) -> Iterator[AdaptedModule]:
    a_key, b_key = f"{stem}.weight{A}", f"{stem}.weight{B}"
    a, b = tensors[a_key].shape, tensors[b_key].shape
    paths = table.of(stem)
    if len(b) == 3:
        known = tuple(path for path in paths if ".experts." in path)
        if not known or table.architecture in INTERLEAVED:
            raise SafeprojError(
                f"{source}: {stem} is a stack that no checkpoint's experts are known for; leave it "
                "out of the adapter"
            )

        def of_expert(expert: int) -> tuple[str, ...]:
            return tuple(path.replace(".experts.", f".experts.{expert}.") for path in known)

        yield from stack_modules(source, tensors, a_key, b_key, of_expert)
        return
    embedding = stem == EMBEDDING
    if stem in OTHER_EMBEDDINGS:
        raise SafeprojError(f"{source}: {stem} is not supported; of embeddings only {EMBEDDING} is")
    if len(a) != 2 or len(b) != 2 or a[1 if embedding else 0] != b[1] or b[1] == 0:
        sides = "(vocabulary, r) and (d, r)" if embedding else "(r, in) and (out, r)"
        raise SafeprojError(
            f"{source}: the factors of {stem} do not fit: lora_a is {list(a)}, lora_b is "
            f"{list(b)}; expected {sides} with the same r"
        )
    yield AdaptedModule(
        name=paths[0],
        parameter=f"{paths[0]}.weight",
        kind=Kind.embedding if embedding else Kind.linear,
        output=Factor(b_key),
        input=Factor(a_key, turned=embedding),
        rank=b[1],
        in_features=a[0 if embedding else 1],
        out_features=b[0],
        aliases=paths[1:],
    )


class _Paths:
    """What models call llama.cpp's tensors, by the gguf package's table."""

    def __init__(self, source: str, architecture: str, names: Collection[str]) -> None:
        self._source, self.architecture = source, architecture
        blocks = (re.match(r"blk\.(\d{1,9})\.", name) for name in names)
        count = 1 + max((int(block[1]) for block in blocks if block), default=-1)
        if count > MAX_BLOCKS:
            raise SafeprojError(
                f"{source}: names block {count - 1}; expected fewer than {MAX_BLOCKS}"
            )
        self._table = _table(_package(source), architecture, count)

    def of(self, stem: str) -> tuple[str, ...]:
        """Return the module paths that a tensor may have, the most usual first."""
        found = self._table.get(stem)
        if not found:
            raise SafeprojError(
                f"{self._source}: {stem} is no weight of {self.architecture} in the gguf "
                "package's table; is the package older than the file?"
            )
        return tuple(sorted(found, key=lambda path: not path.startswith(("model.", "lm_head"))))


@lru_cache(maxsize=1)
def _table(package: Any, architecture: str, count: int) -> dict[str, list[str]]:
    numbers = {name: number for number, name in package.MODEL_ARCH_NAMES.items()}
    if architecture not in numbers:
        return {}
    found: dict[str, list[str]] = {}
    table = package.get_tensor_name_map(numbers[architecture], count)
    for path, (_, stem) in table.mapping.items():
        if path != stem:
            found.setdefault(stem, []).append(path)
    return found


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    text = config.get("text_config")
    return {**config, **(text if isinstance(text, dict) else {})}


def _require_no_sections(adapter: Adapter, config: Mapping[str, Any]) -> None:
    """Refuse q and k of a model of which only the config tells that their rows are reordered."""
    key = next((k for k in adapter.tensors if k.split(".")[2:3] in ([h] for h in HEADS)), None)
    if key is None:
        return
    settings = _settings(config)
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not settings or "mrope_section" in rope:
        found = "has mrope_section" if settings else "is not there"
        raise SafeprojError(
            f"{adapter.source}: the rows of {key} are in another order where the rotary embedding "
            f"has sections, and the aligned model's config.json {found}; pass the PEFT adapter "
            "that it was made from"
        )


def _heads(adapter: Adapter, key: str, setting: str, config: Mapping[str, Any]) -> int:
    settings = _settings(config)
    heads = settings.get(setting) or settings.get(HEADS["attn_q"])
    rows = len(adapter.tensors[key])
    if type(heads) is not int or heads < 1 or rows % (2 * heads):
        raise SafeprojError(
            f"{adapter.source}: the {rows} rows of {key} are ordered by attention head, but the "
            f"aligned model's config.json says {setting} = {heads!r}; expected how many heads they "
            "make, each of an even size"
        )
    return heads


def _permuted(tensor: Array, heads: int) -> Array:
    """Return rows as llama.cpp orders them: each head's halves interleaved.

    The rotary embedding turns pairs of rows: transformers pairs row i with row i + d/2 of a head,
    llama.cpp with row i + 1.
    """
    found: Array = (
        tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
    )
    return found


def _unpermuted(tensor: Array, heads: int) -> Array:
    """Return rows as transformers orders them, from `_permuted`'s."""
    found: Array = (
        tensor.reshape(heads, -1, 2, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
    )
    return found

"""What an adapter holds, as the later steps see it: one record per update of one matrix."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safeproj.errors import SafeprojError
from safeproj.names.suffix import unwrapped
from safeproj.storage.arrays import Array
from safeproj.storage.source import Folder
from safeproj.text import shorten

if TYPE_CHECKING:
    from safeproj.adapter.interface import Format

Side = Literal["output", "input", "both"]
"""Which factors of an update a method changes: `B`, `A`, or both of them."""


@dataclass(frozen=True)
class Factor:
    """Where a factor lies in the adapter's tensors.

    Attributes:
        key: name of the tensor, which is seen as a matrix: (first dimension, all others).
        item: which item along the first dimension of a stack is meant instead of the tensor.
        rows: the rows of that matrix that belong to the factor, None for all.
        columns: the columns, None for all.
        turned: the factor is the transpose of what these rows and columns hold.
    """

    key: str
    rows: slice | None = None
    columns: slice | None = None
    turned: bool = False
    item: int | None = None

    def view(self, tensors: Mapping[str, Array]) -> Array:
        """Return the factor as a view: what is written to it is written to the tensor."""
        tensor = tensors[self.key]
        if self.item is not None:
            tensor = tensor[self.item]
        # Not -1: it cannot be told for an empty tensor.
        columns = math.prod(tensor.shape[1:])
        whole = tensor.reshape(tensor.shape[0], columns)
        found = whole[self.rows or slice(None), self.columns or slice(None)]
        return found.T if self.turned else found

    @property
    def is_whole(self) -> bool:
        """Whether it is a tensor of its own, as it is stored."""
        return self == Factor(self.key)

    def resized(self, value: Array, before: Array) -> Array:
        """Return a whole factor of another rank in the form in which its tensor is stored.

        Args:
            value: the factor, (m, r) or (r, n).
            before: the tensor that it takes the place of: a kernel has more dimensions.
        """
        columns = math.prod(before.shape[1:])
        first, rest = before.shape[:2], before.shape[2:]
        if value.shape[1] == columns:
            return value.reshape(len(value), *first[1:], *rest)
        return value.reshape(*value.shape, *rest)

    def head(self, count: int) -> Factor:
        """Return the first rows of a factor that is a whole tensor."""
        first = slice(0, count)
        return replace(self, columns=first) if self.turned else replace(self, rows=first)


class Kind(str, Enum):
    """What kind of weight is updated."""

    linear = "linear"
    embedding = "embedding"
    convolution = "convolution"
    parameter = "parameter"


class WeightNames:
    """Names of a checkpoint's tensors, among which that of a module with aliases is looked for."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names

    @cached_property
    def _unwrapped(self) -> frozenset[str]:
        return frozenset(map(unwrapped, self._names))

    def choose(self, paths: Sequence[str]) -> str:
        """Return that of a module's paths whose weight is there, the first if none is.

        What wraps a model, as a vision-language model wraps its language model, is in no table of
        aliases, so it does not count where no path is there as it is.

        Raises:
            SafeprojError: there is more than one.
        """
        found = [path for path in dict.fromkeys(paths) if f"{path}.weight" in self._names]
        if not found:
            bare = {unwrapped(f"{path}.weight"): path for path in reversed(paths)}
            found = [path for name, path in bare.items() if name in self._unwrapped]
        if len(found) > 1:
            raise SafeprojError(
                f"{paths[0]} may be {shorten(found)}: the checkpoint has all of them, which is not "
                "supported"
            )
        return found[0] if found else paths[0]


@dataclass(frozen=True)
class AdaptedModule:
    """One low-rank update `ΔW = s · B A` of one matrix.

    The update is seen from the output: `B` (m, r) is its output-side factor and `A` (r, n) its
    input-side factor, whatever the adapter calls them and however it stores them.

    Attributes:
        name: path in the model, without PEFT's `base_model.model.` prefix; for one expert of a
            stack that of the parameter, with the expert's index.
        parameter: name of the weight in the running model.
        kind: of the weight.
        output: `B`.
        input: `A`, without `gain`.
        rank: r.
        in_features: n.
        out_features: m.
        weight_shape: the weight's shape at run time, where it has more than two dimensions: a
            convolution's kernel, a stack of experts.
        expert: index in a stack of experts.
        gain: AdaLoRA's singular values (r, 1), by which the rows of `A` are multiplied.
        bias: the bias of `lora_B` (m, 1), an update of the output.
        mirrors: further places that hold `B`: a tied head repeats its embedding's factors.
        turned: the running model stores the weight as (n, m); None where its shape must tell.
        dora: the module has a DoRA magnitude, which projection leaves as it is.
        aliases: further paths that models give it, where the adapter's own name for it is none.
    """

    name: str
    parameter: str
    kind: Kind
    output: Factor
    input: Factor
    rank: int
    in_features: int
    out_features: int
    weight_shape: tuple[int, ...] | None = None
    expert: int | None = None
    gain: Factor | None = None
    bias: Factor | None = None
    mirrors: tuple[Factor, ...] = ()
    turned: bool | None = None
    dora: bool = False
    aliases: tuple[str, ...] = ()

    def named(self, names: WeightNames) -> AdaptedModule:
        """Return the module under that of its paths whose weight is among a checkpoint's names.

        Where none is, it keeps its own: the checkpoint's names may be no paths of a model either.

        Raises:
            SafeprojError: there is more than one.
        """
        if not self.aliases:
            return self
        path = names.choose((self.name, *self.aliases))
        return replace(self, name=path, parameter=f"{path}.weight", aliases=())

    def factor(self, side: Side) -> Factor:
        """Return `B`, or `A` without `gain`: that which a method of this side changes first."""
        return self.input if side == "input" else self.output

    def written(self, side: Side) -> tuple[Factor, ...]:
        """Return the places that a method of this side changes."""
        if side == "input":
            return (self.input,)
        found = (self.output, *self.mirrors, *(() if self.bias is None else (self.bias,)))
        return (*found, self.input) if side == "both" else found


@dataclass(frozen=True)
class TargetParameters:
    """The parameters of one module that are adapted directly (`target_parameters`).

    Which factors belong to which parameter, and which side of them is the output, depends on the
    parameters' shapes, which only the checkpoint knows: `safeproj.adapter.experts` tells.

    Attributes:
        module: path of the module in the model.
        parameters: the names that the config targets, as parameters of this module.
        pairs: keys of `lora_A` and `lora_B`, outermost wrapper first.
        plain: what the module is if it has none of these parameters: the config names them without
            their module, so that every adapted module may be meant.
    """

    module: str
    parameters: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    plain: AdaptedModule | None = None


@dataclass(frozen=True)
class FullChange:
    """A tensor that replaces (part of) a weight or bias, which no projection touches.

    Attributes:
        key: its name in the adapter.
        parameter: name of what it replaces in the running model.
        kind: the setting that it comes from, in words.
        rows: the rows it replaces, None for all.
        aliases: further paths that models give the module it is in.
    """

    key: str
    parameter: str
    kind: str
    rows: tuple[int, ...] | None = None
    aliases: tuple[str, ...] = ()

    def named(self, names: WeightNames) -> FullChange:
        """Return the change with that of its paths whose weight is among a checkpoint's names.

        Raises:
            SafeprojError: there is more than one.
        """
        if not self.aliases:
            return self
        path, _, leaf = self.parameter.rpartition(".")
        path = names.choose((path, *self.aliases))
        return replace(self, parameter=f"{path}.{leaf}", aliases=())


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        folder: where it was read from.
        weights_file: name of the file that holds the tensors.
        config: `adapter_config.json`, empty where the format has none.
        tensors: all tensors, in the file's order.
        modules: the updates, in natural order, without those of target parameters.
        targets: parameters that are adapted directly, in natural order.
        full_changes: tensors that change whole weights.
        unknown: tensors that belong to neither, each with what is said of it.
        warnings: what the user should know about the adapter.
        format: how it is stored, for writing it back.
        documents: files that take the place of the folder's, by name.
        further_weights: files beside `weights_file` that hold weights of the same model, or say
            which of them does.
        converted_from: the initialisation that changed the base weights, if the adapter belonged to
            those; `tensors`, `modules`, `config` and `documents` are what it was converted to.
    """

    folder: Folder
    weights_file: str
    config: dict[str, Any]
    tensors: dict[str, Array]
    modules: tuple[AdaptedModule, ...]
    targets: tuple[TargetParameters, ...]
    full_changes: tuple[FullChange, ...]
    warnings: tuple[str, ...]
    format: Format
    unknown: Mapping[str, str] = field(default_factory=dict)
    documents: Mapping[str, bytes] = field(default_factory=dict)
    converted_from: str | None = None
    further_weights: frozenset[str] = frozenset()

    @property
    def weights_files(self) -> frozenset[str]:
        """The file that holds the tensors, and those beside it."""
        return self.further_weights | {self.weights_file}

    @property
    def source(self) -> str:
        """The SRC as the user gave it."""
        return self.folder.source

    def path(self, name: str) -> Path:
        """Return the local path of one of the adapter's files."""
        return self.folder.path(name)

    def fitted(self, names: Collection[str], config: Mapping[str, Any]) -> Adapter:
        """Return the adapter as the running model has it, where its own files do not tell.

        Args:
            names: of all tensors of the checkpoint.
            config: the model's `config.json`, empty if there is none.

        Raises:
            SafeprojError: they do not tell either.
        """
        weights = WeightNames(names)
        modules = tuple(module.named(weights) for module in self.modules)
        changes = tuple(change.named(weights) for change in self.full_changes)
        found = replace(self, modules=modules, full_changes=changes)
        return self.format.reordered(found, config)

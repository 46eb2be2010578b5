"""What an adapter holds, as the later steps see it: one record per update of one matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeproj.source import Folder

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Factor:
    """Where a factor lies in the adapter's tensors.

    Attributes:
        key: name of the tensor, which is seen as a matrix: (first dimension, all others).
        rows: the rows of that matrix that belong to the factor, None for all.
        columns: the columns, None for all.
        turned: the factor is the transpose of what these rows and columns hold.
    """

    key: str
    rows: slice | None = None
    columns: slice | None = None
    turned: bool = False

    def view(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the factor as a view: what is written to it is written to the tensor."""
        tensor = tensors[self.key]
        # Not -1: it cannot be told for an empty tensor.
        columns = math.prod(tensor.shape[1:])
        whole = tensor.view(tensor.shape[0], columns)
        found = whole[self.rows or slice(None), self.columns or slice(None)]
        return found.T if self.turned else found


class Kind(str, Enum):
    """What kind of weight is updated."""

    linear = "linear"
    embedding = "embedding"
    convolution = "convolution"
    parameter = "parameter"


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

    @property
    def written(self) -> tuple[Factor, ...]:
        """The places that projection changes."""
        return (self.output, *self.mirrors, *(() if self.bias is None else (self.bias,)))


@dataclass(frozen=True)
class TargetParameters:
    """The parameters of one module that are adapted directly (`target_parameters`).

    Which factors belong to which parameter, and which side of them is the output, depends on the
    parameters' shapes, which only the checkpoint knows: `safeproj.adapter.experts` tells.

    Attributes:
        module: path of the module in the model.
        parameters: the names that the config targets, as parameters of this module.
        pairs: keys of `lora_A` and `lora_B`, outermost wrapper first.
    """

    module: str
    parameters: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class FullChange:
    """A tensor that replaces (part of) a weight or bias, which no projection touches.

    Attributes:
        key: its name in the adapter.
        parameter: name of what it replaces in the running model.
        kind: the setting that it comes from, in words.
        rows: the rows it replaces, None for all.
    """

    key: str
    parameter: str
    kind: str
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        folder: where it was read from.
        weights_file: name of the file that holds the tensors.
        config: `adapter_config.json`.
        metadata: metadata of the safetensors file, None for a `.bin` file.
        tensors: all tensors, in the file's order.
        modules: the updates, in natural order, without those of target parameters.
        targets: parameters that are adapted directly, in natural order.
        full_changes: tensors that change whole weights.
        warnings: what the user should know about the adapter.
    """

    folder: Folder
    weights_file: str
    config: dict[str, Any]
    metadata: dict[str, str] | None
    tensors: dict[str, Tensor]
    modules: tuple[AdaptedModule, ...]
    targets: tuple[TargetParameters, ...]
    full_changes: tuple[FullChange, ...]
    warnings: tuple[str, ...]

    @property
    def source(self) -> str:
        """The SRC as the user gave it."""
        return self.folder.source

    def path(self, name: str) -> Path:
        """Return the local path of one of the adapter's files."""
        return self.folder.path(name)

"""What an adapter holds, as the later steps see it: one record per adapted module."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeproj.source import Folder

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AdaptedModule:
    """One module that the adapter changes by a low-rank update `ΔW = s · B A`.

    Attributes:
        name: path in the model, without PEFT's `base_model.model.` prefix.
        a_key: name of the tensor `A` (r, in_features).
        b_key: name of the tensor `B` (out_features, r).
        bias_key: name of the bias of `lora_B` (out_features,), an update of the output.
        dora: the module has a DoRA magnitude, which projection leaves as it is.
    """

    name: str
    a_key: str
    b_key: str
    rank: int
    in_features: int
    out_features: int
    bias_key: str | None = None
    dora: bool = False

    @property
    def written_keys(self) -> tuple[str, ...]:
        """Names of the tensors that projection replaces."""
        return (self.b_key,) if self.bias_key is None else (self.b_key, self.bias_key)


@dataclass(frozen=True)
class Adapter:
    """A PEFT LoRA adapter.

    Attributes:
        folder: where it was read from.
        weights_file: name of the file that holds the tensors.
        config: `adapter_config.json`.
        metadata: metadata of the safetensors file, None for a `.bin` file.
        tensors: all tensors, in the file's order.
        modules: the adapted modules, in natural order.
        unprojected: names of tensors that change whole weights, which no projection touches.
        warnings: what the user should know about the adapter.
    """

    folder: Folder
    weights_file: str
    config: dict[str, Any]
    metadata: dict[str, str] | None
    tensors: dict[str, Tensor]
    modules: tuple[AdaptedModule, ...]
    unprojected: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def source(self) -> str:
        """The SRC as the user gave it."""
        return self.folder.source

    def path(self, name: str) -> Path:
        """Return the local path of one of the adapter's files."""
        return self.folder.path(name)

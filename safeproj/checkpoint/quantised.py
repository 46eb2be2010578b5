"""Quantised tensors presented as the numbers they stand for, over a checkpoint of any encoding.

Supported is what can be decoded row by row:

- FP8, in which DeepSeek-V3, Qwen3-FP8 and compressed-tensors models are published: one byte per
  number, to be multiplied by a scale per tensor, per row or per block, which is a tensor beside it.
- MXFP4, in which gpt-oss is published: `X_blocks` holds two numbers per byte, `X_scales` one power
  of two per 32 numbers; the weight `X` itself is not stored.

Everything else that says it is quantised is refused when the checkpoint is opened.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safeproj.checkpoint.codes import FP8Weight, Grid, MXFP4Weight, lay
from safeproj.checkpoint.interface import Checkpoint, TensorInfo, Weight
from safeproj.errors import SafeprojError
from safeproj.storage.source import Folder
from safeproj.text import printable

FP8 = ("F8_E4M3", "F8_E5M2")
SCALES = ("F32", "F64", "F16", "BF16", "F8_E8M0", "U8")
"""Dtypes of scales. Bytes are exponents: E8M0, by that name or without one."""

BLOCK = (128, 128)
"""Rows and columns that share a scale, where `config.json` does not say it."""

PLAIN = ("F64", "F32", "F16", "BF16", "I64", "BOOL")
"""Dtypes that are no codes: numbers, and what positions and masks are stored as."""

SUPPORTED_METHODS = ("fp8", "fbgemm_fp8", "mxfp4")
"""Values of `quant_method` in `config.json`."""

SUPPORTED_FORMATS = ("float-quantized", "naive-quantized")
"""Formats of the method compressed-tensors; the int8 of the second is refused by its dtype."""

ADVICE = (
    "pass the checkpoint before quantisation, which an adapter trained on the quantised one "
    "(QLoRA) fits as well"
)

SIGNS = {
    ".weight.absmax": "bitsandbytes (4 bits)",
    ".SCB": "bitsandbytes (8 bits)",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
}
"""Endings of tensor names that give away a method that `config.json` does not name."""


def decoded(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with its quantised tensors presented as numbers.

    Raises:
        SafeprojError: it is quantised in a way that is not supported.
    """
    _refuse_method(checkpoint)
    _refuse_signs(checkpoint)
    return QuantisedCheckpoint(checkpoint)


@dataclass
class QuantisedCheckpoint:
    """A checkpoint some of whose tensors may be quantised; all others are passed through.

    Attributes:
        stored: the checkpoint as it is stored.
    """

    stored: Checkpoint

    @property
    def source(self) -> str:
        return self.stored.source

    @property
    def revision(self) -> str | None:
        return self.stored.revision

    @property
    def folder(self) -> Folder | None:
        return self.stored.folder

    @property
    def config(self) -> Mapping[str, Any]:
        return self.stored.config

    @property
    def documents(self) -> tuple[Path, ...]:
        return self.stored.documents

    @property
    def document_digests(self) -> Mapping[str, str]:
        return self.stored.document_digests

    @cached_property
    def names(self) -> Collection[str]:
        """Names of what is stored and of what the MXFP4 tensors stand for."""
        return dict.fromkeys((*self.stored.names, *self._packed)).keys()

    @cached_property
    def _packed(self) -> dict[str, None]:
        """Names of the tensors that are stored as blocks and scales."""
        names = self.stored.names
        found = (name.removesuffix("_blocks") for name in names if name.endswith("_blocks"))
        return dict.fromkeys(x for x in found if f"{x}_scales" in names and x not in names)

    @cached_property
    def codes(self) -> dict[str, str]:
        """The tensors that are stored as FP8 codes, each with the name of its scales.

        Raises:
            SafeprojError: one has none, or not the number that its shape asks for.
        """
        infos = ((name, self.stored.describe(name)) for name in self.stored.names)
        return {name: self._grid(name, info).name for name, info in infos if info.dtype in FP8}

    @property
    def is_packed(self) -> bool:
        """Whether tensors are stored as blocks and scales."""
        return bool(self._packed)

    def describe(self, name: str) -> TensorInfo:
        if name in self._packed:
            return self._describe_packed(name)
        info = self.stored.describe(name)
        if info.dtype not in FP8:
            return info
        self._grid(name, info)
        return TensorInfo("F32", info.shape, info.turned, quantised=info.dtype)

    def weight(self, name: str, columns: int | None = None) -> Weight:
        if name in self._packed:
            shape = self._describe_packed(name).shape
            self._refuse_columns(name, columns, shape)
            blocks = self.stored.weight(f"{name}_blocks", shape[-1] // 2)
            return MXFP4Weight(name, blocks, self.stored.weight(f"{name}_scales"))
        info = self.stored.describe(name)
        if info.dtype not in FP8:
            return self.stored.weight(name, columns)
        grid = self._grid(name, info)
        self._refuse_columns(name, columns, info.shape)
        return FP8Weight(self.stored.weight(name), self.stored.weight(grid.name), grid)

    def _describe_packed(self, name: str) -> TensorInfo:
        blocks, scales = (self.stored.describe(name + end) for end in ("_blocks", "_scales"))
        fits = len(blocks.shape) > 2 and blocks.shape == (*scales.shape, 16)
        if not fits or blocks.dtype != "U8" or scales.dtype not in ("U8", "F8_E8M0"):
            raise SafeprojError(
                f"{self.source}: {name}_blocks ({blocks.dtype} {list(blocks.shape)}) and "
                f"{name}_scales ({scales.dtype} {list(scales.shape)}) are not MXFP4; expected U8 "
                f"of [..., rows, columns/32, 16] and [..., rows, columns/32]; {ADVICE}"
            )
        *leading, groups, nbytes = blocks.shape
        return TensorInfo("F32", (*leading, 2 * groups * nbytes), turned=True, quantised="MXFP4")

    def _refuse_columns(self, name: str, columns: int | None, shape: tuple[int, ...]) -> None:
        if columns is not None and columns != shape[-1]:
            raise SafeprojError(
                f"{self.source}: {name} is a quantised tensor of shape {list(shape)}, which cannot "
                f"be read as the kernel of a convolution; {ADVICE}"
            )

    def _grid(self, name: str, info: TensorInfo) -> Grid:
        """Return how the scales of an FP8 tensor lie over it.

        Raises:
            SafeprojError: there are none, or not the number that its shape asks for.
        """
        scales = self._scales(name, info.dtype)
        found = self.stored.describe(scales)
        if found.dtype not in SCALES:
            raise SafeprojError(
                f"{self.source}: {scales} is stored as {found.dtype}; expected scales in "
                f"{', '.join(SCALES)}"
            )
        grid = lay(scales, info.shape, found.shape, self._block)
        if grid is None:
            block = "×".join(map(str, self._block))
            raise SafeprojError(
                f"{self.source}: {scales} has shape {list(found.shape)}, which does not fit {name} "
                f"{list(info.shape)}; expected one scale per tensor, per row or per block of "
                f"{block}; fetch the checkpoint again, or {ADVICE}"
            )
        return grid

    def _scales(self, name: str, dtype: str) -> str:
        """Return the name of the scales of an FP8 tensor.

        Without them its numbers mean nothing: transformers would load them as they are, but those
        who name their scales otherwise are more than those who need none.
        """
        candidates = [f"{name}_scale_inv", f"{name}_scale"]
        if name.endswith(".weight"):
            module = name.removesuffix(".weight")
            candidates += [f"{module}.scale", f"{module}.qscale_weight"]
        found = [candidate for candidate in candidates if candidate in self.stored.names]
        if len(found) != 1:
            what = f"both {' and '.join(found)}" if found else f"no scales ({candidates[0]})"
            raise SafeprojError(
                f"{self.source}: {name} is stored as {dtype} with {what} beside it; expected one "
                f"tensor of scales; {ADVICE}"
            )
        return found[0]

    @cached_property
    def _block(self) -> tuple[int, int]:
        """Rows and columns of a block, as `config.json` says."""
        found = _block_size(_quantisation(self.config))
        sizes = re.fullmatch(r"\[?([1-9]\d{0,9})(?:x|, )([1-9]\d{0,9})\]?", str(found or [*BLOCK]))
        if sizes is None:
            raise SafeprojError(
                f"{self.source}: config.json gives {printable(str(found))} as the block size of "
                "quantised weights; expected two positive numbers"
            )
        return int(sizes[1]), int(sizes[2])


def _quantisation(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what `config.json` says about quantisation, of the model or of its language part."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            for key in ("quantization_config", "compression_config"):
                if isinstance(part.get(key), dict):
                    return dict(part[key])
    return {}


def _block_size(quantisation: Mapping[str, Any]) -> Any:
    """Return the block size, as transformers or as compressed-tensors writes it, None if none."""
    groups = quantisation.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and weights.get("block_structure"):
            return weights["block_structure"]
    return quantisation.get("weight_block_size")


def leftover_method(checkpoint: Checkpoint) -> str | None:
    """Return what a checkpoint of plain numbers says it is quantised with, None if it says nothing.

    Such a `quantization_config` stays where weights are merged or decoded and saved again. A file
    that stands for a model holds none of its weights, and is not asked.
    """
    opened = isinstance(checkpoint, QuantisedCheckpoint)
    return _unsupported_method(checkpoint.config) if opened else None


def _refuse_method(checkpoint: Checkpoint) -> None:
    method = _unsupported_method(checkpoint.config)
    if method is not None and not _is_plain(checkpoint):
        raise SafeprojError(
            f"{checkpoint.source}: quantised with {method}, as its config.json says; supported are "
            f"FP8 and MXFP4: {ADVICE}"
        )


def _is_plain(checkpoint: Checkpoint) -> bool:
    """Tell whether nothing in a checkpoint can be codes: neither names nor dtypes."""
    names = checkpoint.names
    if any(name.endswith(tuple(SIGNS)) for name in names):
        return False
    return all(checkpoint.describe(name).dtype in PLAIN for name in names)


def _unsupported_method(config: Mapping[str, Any]) -> str | None:
    """Return the method that `config.json` names, if it is none of those that can be decoded."""
    quantisation = _quantisation(config)
    if not quantisation:
        return None
    method = quantisation.get("quant_method")
    if method is None and (quantisation.get("load_in_4bit") or quantisation.get("load_in_8bit")):
        method = "bitsandbytes"  # as its first versions wrote it
    if method in SUPPORTED_METHODS:
        return None
    if method == "compressed-tensors":
        form = quantisation.get("format")
        if form in SUPPORTED_FORMATS:
            return None
        method = f"compressed-tensors, format {form}"
    return printable(str(method or "an unnamed method"))


def _refuse_signs(checkpoint: Checkpoint) -> None:
    endings = tuple(SIGNS)
    for name in checkpoint.names:
        if name.endswith(endings):
            method = next(SIGNS[ending] for ending in endings if name.endswith(ending))
            raise SafeprojError(
                f"{checkpoint.source}: {name} belongs to weights quantised with {method}; "
                f"supported are FP8 and MXFP4: {ADVICE}"
            )

"""Writing a small checkpoint, and reading a weight as the engine does: by blocks of rows."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy
import torch
from blake3 import blake3
from safetensors.torch import save_file
from torch import Tensor

from safeproj.checkpoint import Reader, Weight
from safeproj.checkpoint.hashes import HASHES, Digests
from safeproj.storage.arrays import joined, to_torch

BLOCKS = (1, 3, 7, 1000)
"""Rows per block; no shape in the tests is a multiple of all of them."""


def save(folder: Path, tensors: dict[str, Tensor], **config: Any) -> str:
    """Write a safetensors checkpoint and return its SRC; settings go into `config.json`."""
    folder.mkdir(exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return str(folder)


def read(weight: Weight, rows: int = 1000, reader: Reader | None = None) -> Tensor:
    """Return all rows of a weight, through a buffer of exactly the size that it asks for."""
    reader = reader or Reader()
    total, columns = weight.shape
    buffer = numpy.empty(min(rows, total) * weight.row_bytes, numpy.uint8)
    blocks = []
    for start in range(0, total, rows):
        stop = min(start + rows, total)
        buffer.fill(255)  # what the block before left behind must not matter
        block = weight.read_rows(reader, start, stop, buffer)
        assert block.shape == (stop - start, columns)
        blocks.append(block.copy())
    return to_torch(joined(blocks))


def digests(weight: Weight, rows: int = 1000) -> Digests:
    """Return the digests of everything that is read for a weight, by every hash."""
    reader = Reader()
    reader.start(HASHES)
    read(weight, rows, reader)
    return reader.digests


def hashed(tensors: dict[str, Tensor]) -> Digests:
    """Return the same of the bytes of tensors, each hashed at once."""
    contents = {
        name: tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for name, tensor in tensors.items()
    }
    return {
        "blake3": {name: blake3(each).hexdigest() for name, each in contents.items()},
        "sha256": {name: sha256(each).hexdigest() for name, each in contents.items()},
    }


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return random numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

"""Reused buffers through which rows of a weight get from a file to the device."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from safeproj.checkpoint import Reader, Weight


class Staging(Protocol):
    """Brings rows of one checkpoint to the device, in their stored dtype."""

    def load(self, weight: Weight, reader: Reader, start: int, stop: int) -> Tensor:
        """Return rows `[start, stop)` on the device, valid until the next call."""


class DirectStaging:
    """One host buffer; on the CPU the rows are used where they were read.

    Args:
        nbytes: size of the largest load.
        device: where the rows go.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._buffer = torch.empty(nbytes, dtype=torch.uint8)
        self._device = device

    def load(self, weight: Weight, reader: Reader, start: int, stop: int) -> Tensor:
        return weight.read_rows(reader, start, stop, self._buffer).to(self._device)


class CudaStaging:
    """Two pinned host buffers and two device buffers, filled in turn on a stream of their own.

    While the arithmetic works on one device buffer, the next rows are read into the other pinned
    buffer and copied to the other device buffer.

    Args:
        nbytes: size of the largest load.
        device: a CUDA device.
        stream: the stream of the copies.
    """

    def __init__(self, nbytes: int, device: torch.device, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._host = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._rows = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]
        self._used = [torch.cuda.Event() for _ in range(2)]
        self._turn = 0

    def load(self, weight: Weight, reader: Reader, start: int, stop: int) -> Tensor:
        compute = torch.cuda.current_stream(self._stream.device)
        turn, other = self._turn, 1 - self._turn
        self._turn = other
        self._used[other].record(compute)  # what was computed from the previous load
        self._copied[turn].synchronize()  # the pinned buffer may be written again
        host = weight.read_rows(reader, start, stop, self._host[turn])
        rows = self._rows[turn][: host.nbytes].view(host.dtype).view(host.shape)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._used[turn])
            rows.copy_(host, non_blocking=True)
            self._copied[turn].record(self._stream)
        compute.wait_event(self._copied[turn])
        return rows

"""A GPU by torch; the processor too, to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from safeproj.checkpoint import Reader, Weight
from safeproj.engine.device import CPU_BLOCK, Staging
from safeproj.errors import SafeprojError
from safeproj.storage.arrays import AnyArray, Array, to_torch

GPU_BLOCK = 32 << 20
"""Bytes per block on a GPU: enough to hide the latency of a copy."""


class DirectStaging:
    """One host buffer, from which rows are copied to the device.

    Args:
        nbytes: size of the largest load.
        device: where the rows go.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._buffer = torch.empty(nbytes, dtype=torch.uint8).numpy()
        self._device = device

    def load(self, weight: Weight, reader: Reader, start: int, stop: int) -> AnyArray:
        return to_torch(weight.read_rows(reader, start, stop, self._buffer)).to(self._device)


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
        host = to_torch(weight.read_rows(reader, start, stop, self._host[turn].numpy()))
        rows = self._rows[turn][: host.nbytes].view(host.dtype).view(host.shape)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._used[turn])
            rows.copy_(host, non_blocking=True)
            self._copied[turn].record(self._stream)
        compute.wait_event(self._copied[turn])
        return rows


class TorchDevice:
    """A device of torch.

    Args:
        device: it.
    """

    engine = "torch"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.name = str(device)
        self.is_host = device.type == "cpu"
        self.block = CPU_BLOCK if self.is_host else GPU_BLOCK
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def session(self) -> Iterator[None]:
        threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # no TF32
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
            torch.set_num_threads(threads)

    def scope(self) -> AbstractContextManager[None]:
        return scope()

    def empty(self, shape: tuple[int, ...], dtype: str = "float32") -> AnyArray:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)

    def put(self, array: Array) -> AnyArray:
        return to_torch(array).to(self.device)

    def staging(self, nbytes: int) -> tuple[Staging, Staging]:
        if self._stream is None:
            return DirectStaging(nbytes, self.device), DirectStaging(nbytes, self.device)
        return (
            CudaStaging(nbytes, self.device, self._stream),
            CudaStaging(nbytes, self.device, self._stream),
        )


@contextmanager
def scope() -> Iterator[None]:
    """Hold for one thread's arithmetic: no gradients, and one thread for one product."""
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)  # applies to this thread
    with torch.inference_mode():
        yield


def find_device(kind: str, index: str) -> TorchDevice | None:
    """Return the device of that kind, None where `auto` finds no GPU.

    Raises:
        SafeprojError: it is not on this machine.
    """
    name = kind + (f":{index}" if index else "")
    available: dict[str, Callable[[], bool]] = {
        "torch": lambda: True,
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
    }
    if kind == "auto":
        gpu = next((each for each in ("cuda", "mps") if available[each]()), None)
        return None if gpu is None else TorchDevice(torch.device(gpu))
    if not available[kind]():
        raise SafeprojError(f"--device {name}: this machine has none that torch can use")
    if index and int(index) >= torch.cuda.device_count():
        raise SafeprojError(f"--device {name}: there are {torch.cuda.device_count()} devices")
    return TorchDevice(torch.device("cpu" if kind == "torch" else name))

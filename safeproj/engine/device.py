"""Where the arithmetic runs: numpy on the processor, or torch on a GPU.

Both give arrays that follow the array API standard. The host needs no torch, and neither does
finding out that there is no GPU.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy
from threadpoolctl import ThreadpoolController

from safeproj.checkpoint import Reader, Weight
from safeproj.errors import SafeprojError, install
from safeproj.storage.arrays import AnyArray, Array

if TYPE_CHECKING:
    from safeproj.engine.torch_device import TorchDevice

CPU_BLOCK = 1 << 20
"""Bytes of one weight per block on the CPU: two of them and their float32 difference stay in the
cache, and larger and smaller ones are slower."""

DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd", "/dev/nvgpu", "/dev/nvhost-gpu", "/dev/nvmap")
"""What is there where torch could use a GPU on Linux: NVIDIA's driver, that of Windows under WSL,
AMD's, and NVIDIA's for boards."""

LIBRARIES = ("nvcuda.dll", "amdhip64.dll", "amdhip64_6.dll", "amdhip64_7.dll")
"""The same on Windows, in the system's directory."""

KINDS = ("auto", "cpu", "cuda", "mps", "torch")
"""How values of `--device` begin; `torch` is the CPU by way of torch."""


ALL = "cuda:all"
"""Every GPU of the machine."""

PACKAGES = ("torch", "array_api_compat")
"""What computes there."""


class Staging(Protocol):
    """Brings rows of one checkpoint to the device, in their stored dtype."""

    def load(self, weight: Weight, reader: Reader, start: int, stop: int) -> AnyArray:
        """Return rows `[start, stop)` on the device, valid until the next call."""


class Device(Protocol):
    """Where the arithmetic runs."""

    @property
    def name(self) -> str:
        """As it is recorded: `cpu`, `cuda:0`, `mps`."""

    @property
    def engine(self) -> str:
        """What computes: `numpy` or `torch`."""

    @property
    def block(self) -> int:
        """Bytes of one weight per block."""

    @property
    def is_host(self) -> bool:
        """Whether several threads compute at once, each within the cache."""

    def session(self) -> AbstractContextManager[None]:
        """Full precision, and one thread for each worker; as it was before afterwards."""

    def scope(self) -> AbstractContextManager[None]:
        """Hold for one thread's arithmetic."""

    def empty(self, shape: tuple[int, ...], dtype: str = "float32") -> AnyArray:
        """Return an array on the device whose numbers are not set."""

    def put(self, array: Array) -> AnyArray:
        """Return numbers of the host on the device."""

    def staging(self, nbytes: int) -> tuple[Staging, Staging]:
        """Return the staging of two weights for loads of up to `nbytes`."""


class HostStaging:
    """One buffer, in which the rows are used where they were read.

    Args:
        nbytes: size of the largest load.
    """

    def __init__(self, nbytes: int) -> None:
        self._buffer = numpy.empty(nbytes, numpy.uint8)

    def load(self, weight: Weight, reader: Reader, start: int, stop: int) -> AnyArray:
        return weight.read_rows(reader, start, stop, self._buffer)


class Host:
    """The processor, by numpy."""

    name = "cpu"
    engine = "numpy"
    block = CPU_BLOCK
    is_host = True

    def session(self) -> AbstractContextManager[None]:
        return one_thread()

    @contextmanager
    def scope(self) -> Iterator[None]:
        with numpy.errstate(all="ignore"):  # what is not finite is looked for
            yield

    def empty(self, shape: tuple[int, ...], dtype: str = "float32") -> AnyArray:
        found: Array = numpy.empty(shape, dtype)
        return found

    def put(self, array: Array) -> AnyArray:
        return array

    def staging(self, nbytes: int) -> tuple[Staging, Staging]:
        return HostStaging(nbytes), HostStaging(nbytes)


def resolve_devices(device: str, *, wide: bool = False) -> tuple[Device, ...]:
    """Return the devices for `--device`, among which the work is shared.

    Args:
        device: as for `resolve_device`; or several GPUs: `cuda:0,cuda:1`, or `cuda:all`.
        wide: as for `resolve_device`.

    Raises:
        SafeprojError: unknown, not on this machine, or named twice.
    """
    if device == ALL:
        resolve_device("cuda")
        import torch

        names = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    else:
        names = device.split(",")
    if len(names) > 1 and not all(re.fullmatch(r"cuda:\d+", name) for name in names):
        raise SafeprojError(f"--device {device}: several must be GPUs, such as cuda:0,cuda:1")
    if len(set(names)) < len(names):
        raise SafeprojError(f"--device {device}: names one twice")
    return tuple(resolve_device(name, wide=wide) for name in names)


def resolve_device(device: str, *, wide: bool = False) -> Device:
    """Return the device for `--device`, the first one of several.

    `auto` is CUDA, then MPS, then the processor.

    Args:
        device: `auto`, `cpu`, `cuda`, `cuda:N`, `mps`, or `torch` for the processor by torch; or
            as for `resolve_devices`.
        wide: whether float64 is computed with, which MPS does not have: then the processor.

    Raises:
        SafeprojError: unknown, or not on this machine.
    """
    first = "cuda" if device == ALL else device.partition(",")[0]
    kind, _, index = first.partition(":")
    if kind not in KINDS or (index and (kind != "cuda" or not index.isdecimal())):
        raise SafeprojError(
            f"--device {device}: expected auto, cpu, cuda, cuda:N, cuda:all, mps or torch"
        )
    if kind == "cpu" or (kind == "auto" and not _has_driver()):
        return Host()
    told = _absent()
    if told is not None:
        if kind == "auto":
            return Host()
        raise SafeprojError(f"--device {device}: {told}")
    from safeproj.engine.torch_device import find_device

    found: TorchDevice | None = find_device(kind, index)
    if found is None:
        return Host()
    return Host() if wide and found.name == "mps" else found


@dataclass(frozen=True)
class Place:
    """Where something was computed.

    Attributes:
        name: the device, `cuda:0,cuda:1` for several.
        engine: `numpy` or `torch`.
    """

    name: str
    engine: str


def place(device: str, *, wide: bool = False) -> Place:
    """Return what a record says of `--device`; arguments and errors as for `resolve_devices`."""
    found = resolve_devices(device, wide=wide)
    return Place(",".join(each.name for each in found), found[0].engine)


def unused_gpu(device: str) -> str | None:
    """Return what to say where `auto` is the processor although there is a GPU, None elsewhere."""
    told = _absent() if device == "auto" and _has_driver() else None
    return None if told is None else f"there is a GPU; {told}; the CPU is used"


def _absent() -> str | None:
    """Return what to say where torch cannot compute, None where it can."""
    absent = next((each for each in PACKAGES if find_spec(each) is None), None)
    if absent is None:
        return None
    return f"{absent} is needed for that, and is not installed: {install('torch')}"


@contextmanager
def one_thread() -> Iterator[None]:
    """Let numpy's products take one thread each, so that no result depends on how many there are.

    The library that multiplies matrices for numpy is told so, for all of the process; it is as
    before afterwards. Where torch is loaded too, one that both may share is left alone.
    """
    libraries = ["openblas", "blis", "flexiblas"]
    if "torch" not in sys.modules:
        libraries.append("mkl")
    with _libraries().select(internal_api=libraries).limit(limits=1):
        yield


@cache
def _libraries() -> ThreadpoolController:
    """Return what sets the threads of the libraries in this process: numpy's is among them."""
    return ThreadpoolController()


def scope_of(array: AnyArray) -> AbstractContextManager[None]:
    """Return the `scope` of a device on which an array is."""
    if isinstance(array, numpy.ndarray):
        return Host().scope()
    from safeproj.engine import torch_device

    return torch_device.scope()


def _has_driver() -> bool:
    """Tell whether torch could find a GPU: it finds none without a driver."""
    if sys.platform == "darwin":
        return os.uname().machine == "arm64"
    if sys.platform == "win32":
        system = Path(os.environ.get("SYSTEMROOT", r"C:\Windows"), "System32")
        return any((system / name).exists() for name in LIBRARIES)
    return any(Path(path).exists() for path in DRIVERS)

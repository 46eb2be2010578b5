"""The versions that a result depends on."""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path

import numpy
import safetensors
import torch


def versions() -> dict[str, str]:
    """Return the versions that the result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "safetensors": safetensors.__version__,
        "machine": platform.machine(),
        "system": platform.system(),
        "processor": _processor(),
    }


def _processor() -> str:
    """Return which processor the arithmetic ran on, and with which of its instructions.

    Both decide in which order sums are taken, and so about their last bits.
    """
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = next(iter(models), name)
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"

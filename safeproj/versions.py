"""The versions that a result depends on."""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path

import ml_dtypes
import numpy
import safetensors
from threadpoolctl import threadpool_info


def versions(*, by_torch: bool = False) -> dict[str, str]:
    """Return the versions that the result depends on.

    Args:
        by_torch: whether torch computed it, or ran the model that it follows from.
    """
    found = {"python": platform.python_version()}
    if by_torch:
        import torch

        found["torch"] = torch.__version__
    return {
        **found,
        "numpy": numpy.__version__,
        "ml_dtypes": ml_dtypes.__version__,
        "safetensors": safetensors.__version__,
        "machine": platform.machine(),
        "system": platform.system(),
        "processor": _processor(by_torch),
    }


def _processor(by_torch: bool) -> str:
    """Return which processor the arithmetic ran on, and with which of its instructions.

    Both decide in which order sums are taken, and so about their last bits.
    """
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = next(iter(models), name)
    if by_torch:
        import torch

        return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
    blas = {
        f"{each['internal_api']} {each['version']} {each.get('architecture', '')}".strip()
        for each in threadpool_info()
        if each["user_api"] == "blas" and "numpy" in each["filepath"]
    }
    return f"{name} ({', '.join(sorted(blas)) or 'other BLAS'})"

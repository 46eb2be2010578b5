"""How a plan is run: memory bounds, workers, devices, progress."""

from safeproj.engine.blocks import (
    Buffers,
    KeptBlocks,
    OnProgress,
    row_width,
    rows_per_block,
)
from safeproj.engine.changes import relative_changes
from safeproj.engine.device import Device, one_thread, resolve_device
from safeproj.engine.local import run
from safeproj.engine.task import Comparison, Progress, Source, Task, Update

__all__ = [
    "Buffers",
    "Comparison",
    "Device",
    "KeptBlocks",
    "OnProgress",
    "Progress",
    "Source",
    "Task",
    "Update",
    "one_thread",
    "relative_changes",
    "resolve_device",
    "row_width",
    "rows_per_block",
    "run",
]

"""How a plan is run: memory bounds, workers, devices, progress."""

from safeproj.engine.blocks import (
    Buffers,
    KeptBlocks,
    OnProgress,
    row_width,
    rows_per_block,
)
from safeproj.engine.changes import relative_changes
from safeproj.engine.cluster import Cluster
from safeproj.engine.device import Device, Place, one_thread, place, resolve_device, resolve_devices
from safeproj.engine.run import run
from safeproj.engine.task import Comparison, Progress, Replacement, Source, Task, Update

__all__ = [
    "Buffers",
    "Cluster",
    "Comparison",
    "Device",
    "KeptBlocks",
    "OnProgress",
    "Place",
    "Progress",
    "Replacement",
    "Source",
    "Task",
    "Update",
    "one_thread",
    "place",
    "relative_changes",
    "resolve_device",
    "resolve_devices",
    "row_width",
    "rows_per_block",
    "run",
]

"""How a plan is run: memory bounds, workers, devices, progress."""

from safeproj.engine.blocks import (
    Buffers,
    KeptBlocks,
    OnProgress,
    digests_of,
    row_width,
    rows_per_block,
)
from safeproj.engine.changes import relative_changes
from safeproj.engine.local import resolve_device, run
from safeproj.engine.task import Comparison, Progress, Source, Task, Update

__all__ = [
    "Buffers",
    "Comparison",
    "KeptBlocks",
    "OnProgress",
    "Progress",
    "Source",
    "Task",
    "Update",
    "digests_of",
    "relative_changes",
    "resolve_device",
    "row_width",
    "rows_per_block",
    "run",
]

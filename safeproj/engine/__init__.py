"""How a plan is run: memory bounds, workers, devices, progress."""

from safeproj.engine.local import OnProgress, relative_changes, resolve_device, run
from safeproj.engine.task import Comparison, Progress, Score, Task

__all__ = [
    "Comparison",
    "OnProgress",
    "Progress",
    "Score",
    "Task",
    "relative_changes",
    "resolve_device",
    "run",
]

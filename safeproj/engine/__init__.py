"""How a plan is run: memory bounds, workers, devices, progress."""

from safeproj.engine.local import OnProgress, resolve_device, run
from safeproj.engine.task import Progress, Score, Task

__all__ = ["OnProgress", "Progress", "Score", "Task", "resolve_device", "run"]

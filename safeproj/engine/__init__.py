"""How a plan is run: memory bounds, workers, devices, progress."""

from safeproj.engine.blocks import OnProgress
from safeproj.engine.changes import relative_changes
from safeproj.engine.local import corrected, differences, moments, required, resolve_device, run
from safeproj.engine.task import (
    Comparison,
    Difference,
    Effects,
    Kept,
    Moments,
    Origin,
    Progress,
    SafetyBasis,
    Score,
    Settled,
    StoredMoment,
    Task,
    Update,
)

__all__ = [
    "Comparison",
    "Difference",
    "Effects",
    "Kept",
    "Moments",
    "OnProgress",
    "Origin",
    "Progress",
    "SafetyBasis",
    "Score",
    "Settled",
    "StoredMoment",
    "Task",
    "Update",
    "corrected",
    "differences",
    "moments",
    "relative_changes",
    "required",
    "resolve_device",
    "run",
]

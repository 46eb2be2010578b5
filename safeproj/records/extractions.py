"""The record of an extraction: how closely an adapter holds what a full fine-tune changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safeproj.records.rendered import Rendered
from safeproj.records.scores import place, spread

SCHEMA = "safeproj.extract/1"


@dataclass(frozen=True)
class Extracted:
    """One weight of which the change is in the adapter.

    Attributes:
        name: of the module.
        shape: (out_features, in_features).
        rank: r; less than was asked for where the weight is smaller.
        norm: `‖ΔW‖_F` of the fine-tune.
        error: `‖ΔW - s B A‖_F / ‖ΔW‖_F` of what was written.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    norm: float
    error: float

    def to_dict(self) -> dict[str, Any]:
        """Return one item of `modules` in the JSON report."""
        _, layer, kind = place(self.name)
        return {
            "name": self.name,
            "layer": layer,
            "kind": kind,
            "shape": list(self.shape),
            "rank": self.rank,
            "norm": self.norm,
            "relative_error": self.error,
        }


@dataclass(frozen=True)
class Extraction(Rendered):
    """One run of `safeproj extract`.

    Attributes:
        version: of safeproj.
        rank: that was asked for.
        targets: names of modules, or `all-linear`.
        inputs: `model` and `aligned`, each with `source`.
        modules: in natural order.
        others: tensors that the fine-tune changed and the adapter does not hold, each with the size
            of its change relative to it; None where that is zero in the aligned model.
        warnings: what the user should know.
    """

    version: str
    rank: int
    targets: tuple[str, ...]
    inputs: Mapping[str, Mapping[str, Any]]
    modules: tuple[Extracted, ...]
    others: Mapping[str, float | None]
    warnings: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """The relative error over all modules together."""
        left = math.fsum((each.error * each.norm) ** 2 for each in self.modules)
        return math.sqrt(left / math.fsum(each.norm**2 for each in self.modules))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON report, schema `safeproj.extract/1`."""
        return {
            "schema": SCHEMA,
            "tool": {"name": "safeproj", "version": self.version},
            "options": {"rank": self.rank, "targets": list(self.targets)},
            "inputs": {role: dict(identity) for role, identity in self.inputs.items()},
            "summary": {
                "modules": len(self.modules),
                "relative_error": self.error,
                "of_modules": spread([each.error for each in self.modules]),
            },
            "modules": [each.to_dict() for each in self.modules],
            "left_out": [
                {"tensor": name, "relative_change": size} for name, size in self.others.items()
            ],
            "warnings": list(self.warnings),
        }

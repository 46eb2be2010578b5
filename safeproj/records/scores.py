"""The record of one run: what every output format shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from safeproj.records.rendered import Rendered
from safeproj.text import printable

SCHEMA = "safeproj.report/1"
SCHEMA_MANY = "safeproj.reports/1"
TAUS = (0.1, 0.2, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""The thresholds for which the table says how many modules they would project."""


@dataclass(frozen=True)
class ModuleReport:
    """One adapted module.

    Attributes:
        name: path in the model.
        stack: what comes before the layer number, `model.layers`.
        layer: the layer number, None where the name has none.
        kind: last part of the name, `q_proj`.
        shape: (out_features, in_features).
        rank: r of the adapter.
        cosine: similarity of `ΔW` and `C ΔW`, None where it is undefined or was not computed.
        scale: `‖C B‖_F / ‖B‖_F`.
        projected: whether the module is (or would be) projected.
        note: why there is no cosine, or what is special.
        bounds: between which the cosine lies, where `C` is truncated.
        uncertain: a cosine within these bounds might be decided otherwise.
        detail: what else the method says, by its keys in the record.
    """

    name: str
    stack: str
    layer: int | None
    kind: str
    shape: tuple[int, int]
    rank: int
    cosine: float | None
    scale: float | None
    projected: bool
    note: str | None
    bounds: tuple[float, float] | None = None
    uncertain: bool = False
    detail: Mapping[str, Any] = field(default_factory=dict)

    def value(self, key: str) -> Any:
        """Return a number that its record has under a key, None where it has none."""
        return self.scale if key == "scale" else self.detail.get(key)

    def to_dict(self) -> dict[str, Any]:
        """Return one item of `modules` in the JSON report.

        The keys that every record has, or all with bounds, keep their place whoever gives them.
        """
        found: dict[str, Any] = {
            "name": self.name,
            "layer": self.layer,
            "kind": self.kind,
            "shape": list(self.shape),
            "rank": self.rank,
            "cosine": self.cosine,
            "alignment_norm": None,
            "scale": self.scale,
            "projected": self.projected,
            "note": self.note,
        }
        if self.bounds is not None:
            found["cosine_bounds"] = list(self.bounds)
            found["truncation_error"] = None
            found["uncertain"] = self.uncertain
        return {**found, **self.detail}


@dataclass(frozen=True)
class Unprojected:
    """A tensor of the adapter that changes a weight or bias past every projection.

    Attributes:
        tensor: its name in the adapter.
        parameter: what it changes in the running model.
        kind: how, in words.
        relative_change: `‖W_adapter - W_aligned‖ / ‖W_aligned‖` of the rows that both have, None
            where it cannot be computed.
        added_rows: rows that the aligned weight does not have, such as those of added tokens;
            negative where the adapter has fewer.
    """

    tensor: str
    parameter: str
    kind: str
    relative_change: float | None
    added_rows: int = 0

    @property
    def is_copy(self) -> bool:
        """Whether it is what the aligned model has."""
        return self.relative_change == 0.0 and not self.added_rows

    @property
    def rows(self) -> str | None:
        """The rows that only one side has, in words; None if there are none."""
        if not self.added_rows:
            return None
        count = abs(self.added_rows)
        plural = "" if count == 1 else "s"
        return f"{count} new row{plural}" if self.added_rows > 0 else f"{count} row{plural} fewer"

    def describe(self) -> str:
        """Return the change in words."""
        said = [text for text in (self.kind, self.rows) if text]
        if self.relative_change is not None:
            size = f"changed by {self.relative_change:.2g}"
            said.append(size if self.relative_change else "otherwise unchanged")
        return f"{self.parameter} ({', '.join(said)})"

    def to_dict(self) -> dict[str, Any]:
        """Return one item of `unprojected` in the JSON report."""
        return asdict(self)


@dataclass(frozen=True)
class Report(Rendered):
    """One run on one adapter.

    Attributes:
        version: of safeproj.
        method: its name.
        projector: the `projector` object of the JSON report.
        selection: the `selection` object of the JSON report.
        inputs: `base`, `aligned` and `adapter` (`model` where it is a full one), and `alignment`
            where an alignment file was used;
            for SaLoRA `aligned`, `data`, `safety_module` and `adapter`; for the covariance-weighted
            correction `aligned`, `safety_data`, `task_data` and `adapter`: each with `source`, and
            `revision` from the Hub.
        modules: in natural order.
        pdst: mean of `1 / (1 + ‖B_out - C B‖_F)`, None where no module was scored, or there is no
            `C`.
        unprojected: what the adapter changes past every projection.
        warnings: what the user should know.
        summary: what the method says of all modules together, by its keys in `summary`.
        unaltered: how many of the projected modules have the same update as before, to the bit.
        written: whether the adapter was written; if not, modules would be projected. No part of the
            JSON report.
    """

    version: str
    method: str
    projector: dict[str, Any]
    selection: dict[str, Any]
    inputs: dict[str, dict[str, Any]]
    modules: tuple[ModuleReport, ...]
    pdst: float | None
    unprojected: tuple[Unprojected, ...]
    warnings: tuple[str, ...]
    summary: Mapping[str, Any] = field(default_factory=dict)
    unaltered: int = 0
    written: bool = False

    @property
    def subject(self) -> dict[str, Any]:
        """What it is about: the identity of an adapter, or of a full model."""
        return self.inputs["model" if self.is_model else "adapter"]

    @property
    def is_model(self) -> bool:
        """Whether it is about a full model."""
        return "model" in self.inputs

    @property
    def cosines(self) -> list[float]:
        """The cosines that are defined, in the order of the modules."""
        return [module.cosine for module in self.modules if module.cosine is not None]

    def values(self, key: str) -> list[float]:
        """Return the numbers that modules have under a key, in the order of the modules."""
        return values(self.modules, key)

    @property
    def projected(self) -> int:
        """The number of modules that are (or would be) projected."""
        return sum(module.projected for module in self.modules)

    @property
    def doing(self) -> str:
        """What stands before the number of modules: `projected`, or `would project`."""
        return doing([self])

    @property
    def changed(self) -> int:
        """The number of modules whose update is (or would be) another one than before."""
        return self.projected - self.unaltered

    def would_project(self) -> dict[float, int]:
        """Return how many modules each of `TAUS` would project."""
        return {tau: sum(cosine <= tau for cosine in self.cosines) for tau in TAUS}

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON report, schema `safeproj.report/1`."""
        return {
            "schema": SCHEMA,
            "tool": {"name": "safeproj", "version": self.version},
            "method": self.method,
            "projector": self.projector,
            "selection": self.selection,
            "inputs": {role: dict(identity) for role, identity in self.inputs.items()},
            "summary": self._summary(),
            "modules": [module.to_dict() for module in self.modules],
            "unprojected": [item.to_dict() for item in self.unprojected],
            "warnings": list(self.warnings),
        }

    def _summary(self) -> dict[str, Any]:
        return {
            "modules": len(self.modules),
            "projected": self.projected,
            "changed": self.changed,
            "cosine": spread(self.cosines),
            "scale": spread(self.values("scale")),
            "pdst": self.pdst,
            **self.summary,
        }


@dataclass(frozen=True)
class Failure:
    """An adapter that could not be used, and why."""

    source: str
    error: str

    def describe(self) -> str:
        """Return what happened in one line, which cannot steer a terminal."""
        return " ".join(printable(self.error).split())


@dataclass(frozen=True)
class Reports(Rendered):
    """One run on many adapters.

    Attributes:
        version: of safeproj.
        reports: by the adapter's name, of those that could be used.
        failures: those that could not, by name.
    """

    version: str
    reports: dict[str, Report]
    failures: dict[str, Failure]

    @property
    def method(self) -> str | None:
        """The method of the run, which is one for all adapters; None where all of them failed."""
        return next((report.method for report in self.reports.values()), None)

    @property
    def warnings(self) -> tuple[str, ...]:
        """All warnings, each with the name of its adapter."""
        return tuple(
            f"{name}: {text}" for name, report in self.reports.items() for text in report.warnings
        )

    @property
    def doing(self) -> str:
        """What stands above the numbers of modules: `projected`, or `would project`."""
        return doing(self.reports.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON report, schema `safeproj.reports/1`."""
        return {
            "schema": SCHEMA_MANY,
            "tool": {"name": "safeproj", "version": self.version},
            "summary": {"adapters": len(self.reports), "failed": len(self.failures)},
            "reports": {name: report.to_dict() for name, report in self.reports.items()},
            "failures": {name: asdict(failure) for name, failure in self.failures.items()},
        }


def values(modules: Iterable[ModuleReport], key: str) -> list[float]:
    """Return the numbers that modules have under a key, of those that have one."""
    found = (module.value(key) for module in modules)
    return [value for value in found if value is not None]


def doing(reports: Iterable[Report]) -> str:
    """Return what is said of modules that are chosen, in runs that wrote something or did not."""
    return "projected" if any(report.written for report in reports) else "would project"


def spread(values: list[float]) -> dict[str, float | None]:
    """Return minimum, mean and maximum; None where there are no values."""
    if not values:
        return {"min": None, "mean": None, "max": None}
    return {"min": min(values), "mean": sum(values) / len(values), "max": max(values)}


def place(name: str) -> tuple[str, int | None, str]:
    """Split a module's name into stack, layer number and kind.

    >>> place("model.layers.10.self_attn.q_proj")
    ('model.layers', 10, 'q_proj')
    >>> place("model.layers.0.mlp.experts.gate_up_proj[3]")
    ('model.layers', 0, 'gate_up_proj')
    >>> place("lm_head")
    ('', None, 'lm_head')
    """
    parts = name.partition("[")[0].split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if number is None:
        return ".".join(parts[:-1]), None, parts[-1]
    return ".".join(parts[:number]), int(parts[number]), parts[-1]

"""Safety modules as files: for each weight the directions that updates are kept out of.

The tensors of a weight are named by its name in the running model: `NAME.U` (m, k), orthonormal
columns in descending order of singular value, and `NAME.singular_values` (k,). Both are float32.
The rest is JSON under `safeproj` in the file's metadata.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, KeysView, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from safeproj.adapter import Adapter
from safeproj.checkpoint.expression import key_of, stored_names
from safeproj.errors import SafeprojError
from safeproj.methods.recorded import (
    Content,
    FileKind,
    RecordedFile,
    open_recorded,
    require_plain,
    require_run_inputs,
)
from safeproj.methods.reference import Plain
from safeproj.methods.salora.sources import SafetyBasis
from safeproj.methods.score import Score
from safeproj.plan.match import Plan, PlannedModule, plan
from safeproj.plan.select import Selection
from safeproj.storage.source import identity
from safeproj.text import shorten

SCHEMA = "safeproj.safety-module/1"

BASIS, VALUES = "U", "singular_values"
"""Last parts of the names of a weight's tensors."""

ROUNDING = 1e-3
"""How far the squares of stored singular values may sum to more than the energy they are part of:
they are float32, the energy is not."""

_REMEDY = "make the safety module with it among --targets, or leave it out with --exclude"


@dataclass(frozen=True)
class Recorded:
    """What a safety module says of one weight, beside its tensors.

    Attributes:
        shape: (m, n).
        rank: k, the number of directions.
        energy: `‖Y‖_F²`, of the weight's outputs `Y` (N, m) on the safety data.
    """

    shape: tuple[int, int]
    rank: int
    energy: float


@dataclass(frozen=True)
class SafetyModuleFile(Plain):
    """A safety module: no checkpoint is read with it.

    Attributes:
        file: what it holds.
        rank: how many of each weight's directions are used; all if None.
    """

    file: RecordedFile[Recorded]
    rank: int | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        return self.file.config

    @property
    def names(self) -> KeysView[str]:
        return self.file.names

    @property
    def inputs(self) -> dict[str, dict[str, Any]]:
        document = self.file.document
        aligned, data = document["inputs"]["aligned"], document["inputs"]["data"]
        return {
            "aligned": {name: aligned[name] for name in ("source", "revision") if name in aligned},
            "data": {name: data[name] for name in ("source", "date") if name in data},
            "safety_module": {**document["options"], **identity(self.file)},
        }

    def plan(self, adapter: Adapter, selection: Selection) -> Plan:
        return plan(adapter, self.file.running, self.file.running, selection)

    def group(self, item: PlannedModule) -> Hashable:
        return item.aligned, item.base

    def origin(self, item: PlannedModule) -> SafetyBasis:
        file, module = self.file, item.module.name
        key = (key_of(item.aligned) or "").removesuffix(".T")
        kept = file.weights.get(key)
        if kept is None or not file.is_whole(item.aligned):
            raise SafeprojError(
                f"{file.source}: holds nothing for {module} as the adapter has it "
                f"({shorten(stored_names(item.aligned))}); {_REMEDY}"
            )
        rank = kept.rank if self.rank is None else min(self.rank, kept.rank)
        return SafetyBasis(file.matrix(f"{key}.{BASIS}"), rank, self._energies(key, kept))

    def digests(self, scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
        recorded = self.file.document["inputs"]
        read: dict[str, str] = {}
        for score in scores.values():
            read |= score.sha256[0] if score.sha256 is not None else {}
        return {
            **{role: recorded[role]["sha256"] for role in ("aligned", "data")},
            "safety_module": self.file.digests(read, {BASIS: VALUES}),
        }

    def _energies(self, key: str, kept: Recorded) -> tuple[float, ...]:
        """Return the share of the energy that the first 1, 2, … directions hold."""
        name = f"{key}.{VALUES}"
        values = self.file.vector(name)
        if any(later > earlier for earlier, later in pairwise(values)):
            raise SafeprojError(
                f"{self.file.path}: {name} is not in descending order; the file is damaged"
            )
        shares = [held / kept.energy for held in accumulate(value * value for value in values)]
        if shares[-1] > 1.0 + ROUNDING:
            raise SafeprojError(
                f"{self.file.path}: {name} holds {shares[-1]:.4g} times the energy that is "
                "recorded for the safety data, expected at most 1; the file is damaged"
            )
        return tuple(min(share, 1.0) for share in shares)


def open_safety_module(
    source: str, maps: Sequence[str] = (), rank: int | None = None
) -> SafetyModuleFile:
    """Return the safety module that SRC names: a file, or a folder or repository that holds one.

    Args:
        source: the SRC.
        maps: `--map` rules.
        rank: how many of each weight's directions are used; all if None, or where it has fewer.

    Raises:
        SafeprojError: there is none, it is damaged, or it has fewer directions.
    """
    file = open_recorded(source, KIND, maps)
    held = max(weight.rank for weight in file.weights.values())
    if rank is not None and rank > held:
        raise SafeprojError(
            f"--rank {rank}: {source} holds {held} directions; give at most {held}, or make a "
            "safety module with more"
        )
    return SafetyModuleFile(file, rank)


def _read(content: Content) -> dict[str, Recorded]:
    """Return the records of a file that fits together and cannot steer a report that shows it.

    Raises:
        LookupError, TypeError, ValueError: it does not, or could.
    """
    require_run_inputs(**content.document["inputs"])
    _check_options(content.document["options"])
    weights = {name: _recorded(item) for name, item in content.document["weights"].items()}
    if not weights:
        raise ValueError("no weights")
    for name, weight in weights.items():
        _check_tensors(content, name, weight)
    return weights


KIND = FileKind(
    name="safety module",
    schema=SCHEMA,
    suffix=".safety.safetensors",
    command="safeproj salora",
    remedy=_REMEDY,
    read=_read,
)


def _check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that a report cannot show."""
    if type(options["rank"]) is not int:
        raise TypeError("rank")
    if not isinstance(options["targets"], list):
        raise TypeError("targets")
    require_plain("targets", *options["targets"])
    for name, value in options.items():
        require_plain("options", name, *([value] if isinstance(value, str) else []))
        if name != "targets" and not isinstance(value, str | int | float | None):
            raise TypeError(f"option {name}")


def _recorded(item: Mapping[str, Any]) -> Recorded:
    m, n = item["shape"]
    rank, energy = item["rank"], float(item["energy"])
    if type(rank) is not int or not (math.isfinite(energy) and energy > 0.0):
        raise ValueError(f"rank {rank!a} with energy {energy}")
    return Recorded((int(m), int(n)), rank, energy)


def _check_tensors(content: Content, name: str, weight: Recorded) -> None:
    """Refuse a weight that is no linear layer's, or whose tensors are not what is recorded."""
    shape, layout = content.parameters[name]
    if layout.kind not in ("linear", "conv1d") or layout.out_first is not (layout.kind == "linear"):
        raise ValueError(f"{name} is of kind {layout.kind!a}")
    if weight.shape != (shape if layout.out_first else shape[::-1]):
        raise ValueError(f"{name} has the shape {weight.shape}")
    if not 1 <= weight.rank <= weight.shape[0]:
        raise ValueError(f"{name} has the rank {weight.rank}")
    wanted = {BASIS: (weight.shape[0], weight.rank), VALUES: (weight.rank,)}
    for part, expected in wanted.items():
        entry = content.header.tensors[f"{name}.{part}"]
        if entry.dtype != "F32" or entry.shape != expected:
            raise ValueError(f"{name}.{part} is {entry.dtype} {list(entry.shape)}")

"""Statistics as files: for each weight the second moment of what it reads on some data.

The tensors are named by the first of the weights that read the input: `NAME.moment` (n, n), or,
where the data has fewer positions than n, `NAME.rows` (k, n) with `XᵀX` the moment. Both are
float32. The rest is JSON under `safeproj` in the file's metadata.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safeproj.adapter import Adapter
from safeproj.checkpoint import open_checkpoint
from safeproj.checkpoint.expression import key_of, stored_names
from safeproj.errors import SafeprojError
from safeproj.methods.covariance.sources import Moments, StoredMoment
from safeproj.methods.recorded import (
    Content,
    FileKind,
    RecordedFile,
    open_recorded,
    require_plain,
    require_run_inputs,
)
from safeproj.methods.reference import Plain
from safeproj.methods.score import Score
from safeproj.names import Names
from safeproj.plan.match import Plan, PlannedModule
from safeproj.plan.match import plan as matched
from safeproj.plan.select import Selection
from safeproj.storage.source import LocalFolder, file_sha256, identity, open_folder
from safeproj.text import shorten

SCHEMA = "safeproj.statistics/1"

SUFFIX = ".stats.safetensors"

MOMENT, ROWS = "moment", "rows"
"""Last parts of the names of tensors: the moment, or what it is the product of."""

_REMEDY = "make the statistics with it among --targets, or leave it out with --exclude"


@dataclass(frozen=True)
class Recorded:
    """What statistics say of one weight.

    Attributes:
        shape: (m, n).
        tensor: the name of the tensor with the moment of its input.
        whole: whether that is the moment, or `X` with `XᵀX` the moment.
    """

    shape: tuple[int, int]
    tensor: str
    whole: bool


@dataclass(frozen=True)
class Statistics(Plain):
    """Statistics of safety data and of benign data: no checkpoint is read with them.

    Attributes:
        safety: those of the safety data.
        benign: those of the benign data.
        aligned: SRC of the model that they are of, if it was given.
        maps: `--map` rules.
        was_run: whether that model was run for them, and so is at hand.
    """

    safety: RecordedFile[Recorded]
    benign: RecordedFile[Recorded]
    aligned: str | None = None
    maps: tuple[str, ...] = ()
    was_run: bool = False

    @property
    def config(self) -> Mapping[str, Any]:
        return self.safety.config

    @property
    def names(self) -> Collection[str]:
        return self.safety.names

    @property
    def inputs(self) -> dict[str, dict[str, Any]]:
        aligned = self.safety.document["inputs"]["aligned"]
        return {
            "aligned": {name: aligned[name] for name in ("source", "revision") if name in aligned},
            "safety_data": _described(self.safety),
            "task_data": _described(self.benign),
        }

    @cached_property
    def weights(self) -> Names | None:
        return None if self.aligned is None else Names(open_checkpoint(self.aligned), self.maps)

    def held(self, adapter: Adapter, plan: Plan) -> Sequence[PlannedModule]:  # noqa: ARG002
        if not self.was_run or self.weights is None:
            return ()
        return matched(adapter, self.weights, self.weights, Selection()).modules

    def plan(self, adapter: Adapter, selection: Selection) -> Plan:
        return matched(adapter, self.safety.running, self.safety.running, selection)

    def group(self, item: PlannedModule) -> Hashable:
        return tuple(file.weights[self._key(file, item)].tensor for file in self._files)

    def origin(self, item: PlannedModule) -> Moments:
        safety, benign = (self._stored(file, item) for file in self._files)
        return Moments(safety, benign)

    def digests(self, scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
        found = {"aligned": self.safety.document["inputs"]["aligned"]["sha256"]}
        for side, (role, file) in enumerate(
            zip(("safety_data", "task_data"), self._files, strict=True)
        ):
            read: dict[str, str] = {}
            for score in scores.values():
                read |= score.sha256[side] if score.sha256 is not None else {}
            data = file.document["inputs"]["data"]["sha256"]
            found[role] = {**file.digests(read, {}), "data": data}
        return found

    @property
    def _files(self) -> tuple[RecordedFile[Recorded], RecordedFile[Recorded]]:
        return self.safety, self.benign

    def _key(self, file: RecordedFile[Recorded], item: PlannedModule) -> str:
        key = (key_of(item.aligned) or "").removesuffix(".T")
        if key not in file.weights:
            raise SafeprojError(
                f"{file.source}: holds nothing for {item.module.name} as the adapter has it "
                f"({shorten(stored_names(item.aligned))}); {_REMEDY}"
            )
        return key

    def _stored(self, file: RecordedFile[Recorded], item: PlannedModule) -> StoredMoment:
        recorded = file.weights[self._key(file, item)]
        return StoredMoment(file.matrix(recorded.tensor), recorded.whole)


def open_statistics(
    safety: Path | str,
    benign: Path | str,
    maps: Sequence[str] = (),
    aligned: str | None = None,
    names: tuple[str, str] | None = None,
) -> Statistics:
    """Return the statistics that two files hold.

    Args:
        safety: SRC of those of safety data.
        benign: SRC of those of benign data.
        maps: `--map` rules.
        aligned: SRC of the model that they are of; what is given must be, as far as small files
            tell.
        names: what to call the two files where they were made for this run, of that model.

    Raises:
        SafeprojError: one of them is missing or damaged, or they are of different models.
    """
    files = [open_recorded(str(source), KIND, maps) for source in (safety, benign)]
    first, second = (
        replace(file, source=name)
        for file, name in zip(files, names or (str(safety), str(benign)), strict=True)
    )
    models = [file.document["inputs"]["aligned"]["sha256"]["files"] for file in (first, second)]
    if first.config != second.config or models[0] != models[1]:
        raise SafeprojError(
            f"{first.source} and {second.source}: statistics of different models; expected both of "
            "the aligned model"
        )
    if aligned is not None and names is None:
        _require_model(first, aligned)
    return Statistics(first, second, aligned, tuple(maps), names is not None)


def _require_model(file: RecordedFile[Recorded], aligned: str) -> None:
    """Refuse statistics of another model, as far as a look at small files tells."""
    folder, made = open_folder(aligned), file.document["inputs"]["aligned"]
    recorded = made["sha256"]["files"].get("config.json")
    if isinstance(folder, LocalFolder):
        if recorded is None or "config.json" not in folder.files:
            return
        same = file_sha256(folder.path("config.json")) == recorded
    else:
        if "revision" not in made:
            return
        same = folder.revision == made["revision"]
    if not same:
        raise SafeprojError(
            f"{file.source}: statistics of another model than {aligned}; make them with "
            "`safeproj stats --aligned`"
        )


def _described(file: RecordedFile[Recorded]) -> dict[str, Any]:
    """Return what a report says of statistics: their place, and the data that they are of."""
    data = file.document["inputs"]["data"]
    found = {**identity(file), "data": data["source"], "positions": data["positions"]}
    return {**found, "date": data["date"]} if "date" in data else found


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
        _check_tensor(content, name, weight)
    return weights


KIND = FileKind(
    name="statistics",
    schema=SCHEMA,
    suffix=SUFFIX,
    command="safeproj stats",
    remedy=_REMEDY,
    read=_read,
)


def _check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that a report cannot show."""
    if not isinstance(options["targets"], list):
        raise TypeError("targets")
    require_plain("targets", *options["targets"])
    require_plain("positions", options["positions"])


def _recorded(item: Mapping[str, Any]) -> Recorded:
    m, n = item["shape"]
    tensor = item["tensor"]
    _, _, form = tensor.rpartition(".")
    if form not in (MOMENT, ROWS):
        raise ValueError(f"tensor {tensor!a}")
    trace = float(item["trace"])
    if not (math.isfinite(trace) and trace > 0.0):
        raise ValueError(f"trace {trace}")
    return Recorded((int(m), int(n)), tensor, form == MOMENT)


def _check_tensor(content: Content, name: str, weight: Recorded) -> None:
    """Refuse a weight that is no linear layer's, or whose tensor is not what is recorded."""
    shape, layout = content.parameters[name]
    if layout.kind not in ("linear", "conv1d") or layout.out_first is not (layout.kind == "linear"):
        raise ValueError(f"{name} is of kind {layout.kind!a}")
    if weight.shape != (shape if layout.out_first else shape[::-1]):
        raise ValueError(f"{name} has the shape {weight.shape}")
    entry, n = content.header.tensors[weight.tensor], weight.shape[1]
    fits = entry.shape == (n, n) if weight.whole else entry.shape[1:] == (n,)
    if entry.dtype != "F32" or len(entry.shape) != 2 or not fits or not entry.shape[0]:
        raise ValueError(f"{weight.tensor} is {entry.dtype} {list(entry.shape)}")

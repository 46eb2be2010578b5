"""Statistics as files: for each weight the second moment of what it reads on some data.

The tensors are named by the first of the weights that read the input: `NAME.moment` (n, n), or,
where the data has fewer positions than n, `NAME.rows` (k, n) with `XᵀX` the moment. Both are
float32. The rest is JSON under `safeproj` in the file's metadata.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from safeproj.adapter import Adapter
from safeproj.checkpoint import open_checkpoint
from safeproj.errors import SafeprojError
from safeproj.methods.covariance.sources import Moments, StoredMoment
from safeproj.methods.file_reference import FileReference, held, linear_key, made_of, read_of
from safeproj.methods.recorded import (
    MADE_BY_RUNNING,
    Content,
    FileKind,
    RecordedFile,
    open_recorded,
    recorded_amount,
    recorded_shape,
    require_linear,
    require_tensor,
)
from safeproj.methods.score import Score
from safeproj.names import Names
from safeproj.plan.match import Plan, PlannedModule
from safeproj.plan.match import plan as matched
from safeproj.plan.select import Selection
from safeproj.storage.source import Src, file_sha256, identity, open_folder, src

SUFFIX = ".stats.safetensors"

MOMENT, ROWS = "moment", "rows"
"""Last parts of the names of tensors: the moment, or what it is the product of."""


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
class Statistics(FileReference[Recorded]):
    """Statistics of safety data and of benign data: no checkpoint is read with them.

    Attributes:
        file: those of the safety data.
        benign: those of the benign data.
        aligned: SRC of the model that they are of, if it was given.
        maps: `--map` rules.
        was_run: whether that model was run for them, and so is at hand.
    """

    benign: RecordedFile[Recorded]
    aligned: str | None = None
    maps: tuple[str, ...] = ()
    was_run: bool = False

    @property
    def safety(self) -> RecordedFile[Recorded]:
        """The statistics of the safety data."""
        return self.file

    @property
    def inputs(self) -> dict[str, dict[str, Any]]:
        return {
            "aligned": made_of(self.file, "aligned"),
            "safety_data": _described(self.file),
            "task_data": _described(self.benign),
        }

    @cached_property
    def weights(self) -> Names | None:
        return None if self.aligned is None else Names(open_checkpoint(self.aligned), self.maps)

    def held(self, adapter: Adapter, plan: Plan) -> Sequence[PlannedModule]:  # noqa: ARG002
        if not self.was_run or self.weights is None:
            return ()
        return matched(adapter, self.weights, self.weights, Selection()).modules

    def group(self, item: PlannedModule) -> Hashable:
        return tuple(_kept(file, item).tensor for file in self._files)

    def origin(self, item: PlannedModule) -> Moments:
        safety, benign = (_stored(file, item) for file in self._files)
        return Moments(safety, benign)

    def digests(self, scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
        found = {"aligned": {"sha256": self.file.document["inputs"]["aligned"]["sha256"]}}
        for side, (role, file) in enumerate(
            zip(("safety_data", "task_data"), self._files, strict=True)
        ):
            data = file.document["inputs"]["data"]["sha256"]
            found[role] = file.digests(read_of(scores, side), {}, data=data)
        return found

    @property
    def _files(self) -> tuple[RecordedFile[Recorded], RecordedFile[Recorded]]:
        return self.file, self.benign


def open_statistics(
    safety: Src,
    benign: Src,
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
    sources = src(safety), src(benign)
    files = [open_recorded(source, KIND, maps) for source in sources]
    first, second = (
        replace(file, source=name) for file, name in zip(files, names or sources, strict=True)
    )
    made = [file.document["inputs"]["aligned"] for file in (first, second)]
    models = [each.get("revision", each["sha256"]["files"]) for each in made]
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
    if folder.revision is None:
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


def _kept(file: RecordedFile[Recorded], item: PlannedModule) -> Recorded:
    # Of any of the weight's rows: what they read is the same.
    return held(file, item, linear_key(item), whole=False)


def _stored(file: RecordedFile[Recorded], item: PlannedModule) -> StoredMoment:
    recorded = _kept(file, item)
    return StoredMoment(file.matrix(recorded.tensor), recorded.whole)


def _described(file: RecordedFile[Recorded]) -> dict[str, Any]:
    """Return what a report says of statistics: their place, and the data that they are of."""
    data = made_of(file, "data", "positions", "date")
    return {**identity(file), "data": data.pop("source"), **data}


def _weight(content: Content, name: str, item: Mapping[str, Any]) -> Recorded:
    """Return the record of a weight that is a linear layer's, with the tensor of the record."""
    shape, tensor = recorded_shape(item), item["tensor"]
    form = tensor.rpartition(".")[2]
    if form not in (MOMENT, ROWS):
        raise ValueError(f"tensor {tensor!a}")
    if not recorded_amount(item, "trace"):
        raise ValueError("trace 0")
    require_linear(content, name, shape)
    require_tensor(content, tensor, (shape[1] if form == MOMENT else None, shape[1]))
    return Recorded(shape, tensor, form == MOMENT)


KIND = FileKind(
    name="statistics",
    schema="safeproj.statistics/1",
    suffix=SUFFIX,
    command="safeproj stats",
    remedy="make the statistics with it among --targets, or leave it out with --exclude",
    inputs=MADE_BY_RUNNING,
    options={"positions": lambda value: value in ("all", "prompt", "response")},
    weight=_weight,
)

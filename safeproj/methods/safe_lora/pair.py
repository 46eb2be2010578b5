"""`V` as the difference of two checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from safeproj.adapter import Adapter
from safeproj.adapter.record import Factor
from safeproj.checkpoint import Checkpoint, open_checkpoint
from safeproj.checkpoint.expression import Expression, matrix
from safeproj.checkpoint.hashes import Sides, merged, record
from safeproj.engine import Comparison
from safeproj.methods.differences import Difference
from safeproj.methods.reference import Plain
from safeproj.methods.safe_lora.roles import swapped
from safeproj.methods.score import Score
from safeproj.names import Names
from safeproj.plan.match import Plan, PlannedChange, PlannedModule, plan
from safeproj.plan.select import Selection
from safeproj.storage.source import identity


class Pair(Plain):
    """The aligned and the base checkpoint of one model.

    Args:
        aligned: SRC of the aligned checkpoint, or its weights where they are in memory.
        base: SRC of the base checkpoint.
        maps: `--map` rules, `RUNTIME=CHECKPOINT`.

    Raises:
        SafeprojError: one of them cannot be used.
    """

    def __init__(self, aligned: str | Names, base: str, maps: Sequence[str] = ()) -> None:
        if isinstance(aligned, str):
            aligned = Names(open_checkpoint(aligned), maps)
        self.aligned = aligned
        self.base = Names(open_checkpoint(base), maps)

    @property
    def names(self) -> Collection[str]:
        return self.aligned.checkpoint.names

    @property
    def config(self) -> Mapping[str, Any]:
        return self.aligned.checkpoint.config or self.base.checkpoint.config

    @property
    def inputs(self) -> dict[str, dict[str, Any]]:
        return {role: identity(checkpoint) for role, checkpoint in self.checkpoints.items()}

    @property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """Both checkpoints by role."""
        return {"base": self.base.checkpoint, "aligned": self.aligned.checkpoint}

    @property
    def sides(self) -> tuple[Names, Names]:
        return self.aligned, self.base

    @property
    def weights(self) -> Names:
        return self.aligned

    def held(self, adapter: Adapter, plan: Plan) -> Sequence[PlannedModule]:  # noqa: ARG002
        return plan.modules

    def plan(self, adapter: Adapter, selection: Selection) -> Plan:
        found = plan(adapter, self.aligned, self.base, selection)
        told = self.swapped(adapter)
        return found if told is None else replace(found, warnings=(*found.warnings, told))

    def swapped(self, adapter: Adapter | None = None) -> str | None:
        """Return what tells that the two are exchanged, None where nothing clear does."""
        return swapped(self.base.checkpoint, self.aligned.checkpoint, adapter)

    def group(self, item: PlannedModule) -> Hashable:
        return item.aligned, item.base

    def origin(self, item: PlannedModule) -> Difference:
        return self.difference(item.aligned, item.base)

    def difference(self, aligned: Expression, base: Expression) -> Difference:
        """Return the difference of a weight in both, downloading the files that hold it."""
        return Difference(
            matrix(aligned, self.aligned.checkpoint), matrix(base, self.base.checkpoint)
        )

    def comparison(self, adapter: Adapter, item: PlannedChange) -> Comparison | None:
        if item.aligned is None:
            return None
        change = item.change
        replacement = Factor(change.key).view(adapter.tensors)
        weight = matrix(item.aligned, self.aligned.checkpoint)
        return Comparison(change.parameter, weight, replacement, change.rows)

    def digests(self, scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
        return self.digests_of([score.digests for score in scores.values()])

    def digests_of(self, read: Sequence[Sides]) -> dict[str, dict[str, Any]]:
        """Return the digests of tensors (aligned, base) with those of the files beside them."""
        found = {}
        for side, role in enumerate(("aligned", "base")):
            files = dict(self.checkpoints[role].document_digests)
            found[role] = record(merged(each[side] for each in read), files=files)
        return found

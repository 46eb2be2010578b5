"""What updates are projected onto, or away from: of every weight of a model."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, Protocol

from safeproj.adapter import Adapter
from safeproj.engine import Comparison, Origin, Score
from safeproj.names import Names
from safeproj.plan.match import Plan, PlannedChange, PlannedModule
from safeproj.plan.select import Selection


class Subspace(Protocol):
    """The subspace of every weight of a model, or what it follows from.

    Two checkpoints, an alignment file that stands for them, a safety module, or statistics.
    """

    @property
    def names(self) -> Collection[str]:
        """Names of all weights."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's `config.json`; empty where there is none."""

    @property
    def inputs(self) -> dict[str, dict[str, Any]]:
        """What was read, for the report: role to `source`, and `revision` from the Hub."""

    @property
    def weights(self) -> Names | None:
        """The aligned weights, to convert adapters of a changed base; None where no are at hand."""

    def held(self, adapter: Adapter, plan: Plan) -> Sequence[PlannedModule]:
        """Return the updates with the aligned weights, where looking at them fetches nothing."""

    def plan(self, adapter: Adapter, selection: Selection) -> Plan:
        """Return what is to be scored of an adapter that was `fitted` to these names.

        Raises:
            SafeprojError: see `safeproj.plan.match.plan`.
        """

    def group(self, item: PlannedModule) -> Hashable:
        """Return what updates have in common that are computed in one reading."""

    def origin(self, item: PlannedModule) -> Origin:
        """Return what the engine reads for an update, downloading the files that hold it."""

    def comparison(self, adapter: Adapter, item: PlannedChange) -> Comparison | None:
        """Return what a replaced weight is to be compared with, None if that is not at hand."""

    def digests(self, scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
        """Return for each role of `inputs` the SHA-256 of all that was read for these modules."""

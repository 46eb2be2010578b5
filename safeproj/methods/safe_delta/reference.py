"""The aligned model, beside which fine-tunes are run on safety data."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from safeproj.adapter import Adapter
from safeproj.checkpoint import open_checkpoint
from safeproj.checkpoint.hashes import record
from safeproj.engine import Replacement, Source
from safeproj.errors import SafeprojError
from safeproj.methods.reference import Plain
from safeproj.methods.safe_delta.sources import Nothing
from safeproj.methods.score import Score
from safeproj.names import Names
from safeproj.plan.full import PlannedWeight, Tuned
from safeproj.plan.match import Plan, PlannedModule, plan
from safeproj.plan.select import Selection
from safeproj.storage.rows import read_rows
from safeproj.storage.source import identity, open_folder

if TYPE_CHECKING:
    from safeproj.methods.safe_delta.method import SafeDelta
    from safeproj.run.options import Options


class Running(Plain):
    """The aligned model of Safe Delta.

    Args:
        method: what is done.
        maps: `--map` rules.

    Raises:
        SafeprojError: the model cannot be used.
    """

    runs_adapter = True

    def __init__(self, method: SafeDelta, maps: Sequence[str] = ()) -> None:
        self._method = method
        self._has_run_adapters = False
        self._aligned = Names(open_checkpoint(method.sources["aligned"]), maps)

    @property
    def names(self) -> Collection[str]:
        return self._aligned.checkpoint.names

    @property
    def config(self) -> Mapping[str, Any]:
        return self._aligned.checkpoint.config

    @property
    def sides(self) -> tuple[Names, Names]:
        return self._aligned, self._aligned

    @property
    def weights(self) -> Names:
        return self._aligned

    @property
    def inputs(self) -> dict[str, dict[str, Any]]:
        data = self._method.sources["safety_data"]
        return {"aligned": identity(self._aligned.checkpoint), "safety_data": {"source": data}}

    def held(self, adapter: Adapter, plan: Plan) -> Sequence[PlannedModule]:
        del adapter
        return plan.modules

    def plan(self, adapter: Adapter, selection: Selection) -> Plan:
        return plan(adapter, self._aligned, self._aligned, selection)

    def prepare(self, adapter: Adapter, plan: Plan, options: Options) -> Mapping[str, Replacement]:
        if not self._method.is_ready:
            raise SafeprojError(
                "Safe Delta runs the model with the adapter, which a gate does not; check with "
                "--base and --aligned, --alignment, or --safety-module, or give --public-key"
            )
        from safeproj.methods.safe_delta.adapted import adapted

        self._has_run_adapters = True
        return adapted(self._method, adapter, plan, options)

    @cached_property
    def _layers(self) -> set[str]:
        """The paths of the layers that are run, as the model is made, without its weights."""
        from safeproj.lm.layers import ALL_LINEAR, find_layers
        from safeproj.lm.models import require_extra, skeleton

        require_extra()
        model = skeleton(open_folder(self._method.sources["aligned"]))
        return set(find_layers(model, [ALL_LINEAR]))

    def unheld(self, item: PlannedModule) -> str | None:
        return None if item.module.name in self._layers else "weight of no linear layer that is run"

    def rewritten(
        self, tuned: Tuned, weights: Sequence[PlannedWeight], options: Options
    ) -> Mapping[str, Source]:
        from safeproj.methods.safe_delta.tuned import rewritten

        return rewritten(self._method, tuned, weights, options)

    def group(self, item: PlannedModule) -> Hashable:
        return item.module.name

    def origin(self, item: PlannedModule) -> Source:
        del item
        return Nothing()

    def digests(self, scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
        del scores
        given = self._method.sources
        data = read_rows(given["safety_data"], "--safety-data", responses=True)
        found = {"safety_data": record({}, data=data.sha256)}
        if self._has_run_adapters:  # of a full fine-tune the tensors are recorded that were read
            from safeproj.lm.models import model_identity

            found["aligned"] = {"sha256": model_identity(open_folder(given["aligned"]))["sha256"]}
        return found

"""What a method measures updates against, opened: of every weight of a model."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from safeproj.adapter import Adapter
from safeproj.engine import Comparison, Replacement, Source
from safeproj.errors import SafeprojError
from safeproj.methods.score import Score
from safeproj.names import Names
from safeproj.plan.full import PlannedWeight, Tuned
from safeproj.plan.match import Plan, PlannedChange, PlannedModule
from safeproj.plan.select import Selection

if TYPE_CHECKING:
    from safeproj.run.options import Options


class Reference(Protocol):
    """What is read of every weight of a model.

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
    def sides(self) -> tuple[Names, Names]:
        """The weights of the aligned and of the base model; twice the same where one is enough."""

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

    @property
    def runs_adapter(self) -> bool:
        """Whether the model has to be run with an adapter, or a fine-tune.

        Then `prepare` is called for it, or `rewritten`.
        """

    def prepare(self, adapter: Adapter, plan: Plan, options: Options) -> Mapping[str, Replacement]:
        """Return what has to be made of an adapter by running the model, by module.

        Args:
            adapter: as it was matched.
            plan: its updates.
            options: where the model runs, how chats are put to it, and who is told.

        Raises:
            SafeprojError: the adapter or the model cannot be used.
        """

    @property
    def is_file(self) -> bool:
        """Whether a file stands for the models, which may lack weights of them."""

    def unheld(self, item: PlannedModule) -> str | None:
        """Return why nothing is known of a weight of a full fine-tune, None where it is."""

    def rewritten(
        self,
        tuned: Tuned,
        weights: Sequence[PlannedWeight],
        options: Options,
    ) -> Mapping[str, Source]:
        """Return what has to be made of a full fine-tune by running it.

        Args:
            tuned: the fine-tune.
            weights: those that are to be changed.
            options: how the model is run.

        Returns:
            Module to what is read in the place of `origin`; empty where nothing has to be made.

        Raises:
            SafeprojError: the fine-tune cannot be run.
        """

    def group(self, item: PlannedModule) -> Hashable:
        """Return what updates have in common that are computed in one reading."""

    def origin(self, item: PlannedModule) -> Source:
        """Return what the engine reads for an update, downloading the files that hold it."""

    def comparison(self, adapter: Adapter, item: PlannedChange) -> Comparison | None:
        """Return what a replaced weight is to be compared with, None if that is not at hand."""

    def digests(self, scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
        """Return for each role of `inputs` the digests of all that was read for these modules.

        In the form of `safeproj.checkpoint.hashes.record`.
        """


class Plain:
    """What most have in common: no weights at hand, and nothing made by running a model."""

    runs_adapter = False
    is_file = False

    @property
    def sides(self) -> tuple[Names, Names]:
        raise SafeprojError("this method is for adapters; leave out --model")

    @property
    def weights(self) -> Names | None:
        return None

    def held(self, adapter: Adapter, plan: Plan) -> Sequence[PlannedModule]:
        del adapter, plan
        return ()

    def comparison(self, adapter: Adapter, item: PlannedChange) -> Comparison | None:
        del adapter, item
        return None

    def prepare(self, adapter: Adapter, plan: Plan, options: Options) -> Mapping[str, Replacement]:
        del adapter, plan, options
        return {}

    def unheld(self, item: PlannedModule) -> str | None:
        del item
        return None

    def rewritten(
        self,
        tuned: Tuned,
        weights: Sequence[PlannedWeight],
        options: Options,
    ) -> Mapping[str, Source]:
        del tuned, weights, options
        return {}

"""A safe adapter, and the models by which it is decided where it is merged."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from safeproj.adapter import AdaptedModule, Adapter, read_adapter
from safeproj.adapter.digests import adapter_record
from safeproj.checkpoint.expression import Stored
from safeproj.engine import Comparison, Update
from safeproj.errors import SafeprojError
from safeproj.methods.merge.forms import FACTOR_WISE, Merging
from safeproj.methods.merge.sources import Both
from safeproj.methods.reference import Plain, Reference
from safeproj.methods.safe_lora.method import SafeLora
from safeproj.methods.score import Score
from safeproj.names import Names
from safeproj.plan.match import Plan, PlannedChange, PlannedModule
from safeproj.plan.residual import converted
from safeproj.plan.select import Selection
from safeproj.plan.updates import update_of
from safeproj.storage.source import identity
from safeproj.text import natural_order, shorten

_OUT = "leave it out with --exclude"


def open_both(
    source: str, deciding: SafeLora | None, merging: Merging, maps: Sequence[str]
) -> SafeAdapter:
    """Return the safe adapter that SRC names, beside the models.

    Raises:
        SafeprojError: one of them cannot be used.
    """
    models: Reference = NoModel() if deciding is None else deciding.open(maps)
    adapter = read_adapter(source).fitted(models.names, models.config)
    for reason in adapter.format.unloaded(adapter, models.names):
        raise SafeprojError(f"{source}: {reason}")
    if adapter.format.changed_base(adapter) is not None:
        adapter = converted(adapter, models.weights)
    return SafeAdapter(models, adapter, merging, with_models=deciding is not None)


class NoModel(Plain):
    """Nothing: updates are paired by the names that both adapters give their modules."""

    names: Collection[str] = ()

    @property
    def config(self) -> Mapping[str, Any]:
        return {}

    @property
    def inputs(self) -> dict[str, dict[str, Any]]:
        return {}

    def plan(self, adapter: Adapter, selection: Selection) -> Plan:
        """Return a plan of all modules, each with a weight that only its name stands for."""
        if adapter.targets:
            raise SafeprojError(
                f"{adapter.source}: adapts expert stacks, of which only the model tells which "
                "factor is which; give --base and --aligned, or --alignment, beside --safe-adapter"
            )
        modules = sorted(adapter.modules, key=lambda module: natural_order(module.name))
        considered = [module for module in modules if selection.considers(module.name)]
        if not considered:
            raise SafeprojError(
                f"--include/--exclude leave none of the {len(modules)} adapted modules; their "
                f"names look like {modules[0].name}"
            )
        weights = [Stored(module.parameter) for module in considered]
        return Plan(
            tuple(map(PlannedModule, considered, weights, weights)),
            tuple(module for module in modules if not selection.considers(module.name)),
            tuple(PlannedChange(change, None) for change in adapter.full_changes),
            (),
        )

    def group(self, item: PlannedModule) -> Hashable:
        return item.module.name

    def origin(self, item: PlannedModule) -> Any:
        del item
        return None

    def digests(self, scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
        del scores
        return {}


@dataclass(frozen=True)
class SafeAdapter(Plain):
    """The safe adapter, beside the models whose weights both adapters change.

    Attributes:
        models: what Safe LoRA compares with.
        adapter: the safe one.
        merging: how updates are merged.
        with_models: whether there are models.
    """

    models: Reference
    adapter: Adapter
    merging: Merging
    with_models: bool

    @property
    def names(self) -> Collection[str]:
        return self.models.names

    @property
    def config(self) -> Mapping[str, Any]:
        return self.models.config

    @property
    def sides(self) -> tuple[Names, Names]:
        return self.models.sides

    @property
    def weights(self) -> Names | None:
        return self.models.weights

    @property
    def inputs(self) -> dict[str, dict[str, Any]]:
        return {**self.models.inputs, "safe_adapter": identity(self.adapter.folder)}

    def held(self, adapter: Adapter, plan: Plan) -> Sequence[PlannedModule]:
        return self.models.held(adapter, plan)

    def prepare(self, *given: Any) -> Mapping[str, Any]:
        return self.models.prepare(*given)

    def comparison(self, adapter: Adapter, item: PlannedChange) -> Comparison | None:
        return self.models.comparison(adapter, item)

    def digests(self, scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
        return {**self.models.digests(scores), "safe_adapter": adapter_record(self.adapter)}

    def group(self, item: PlannedModule) -> Hashable:
        return self.models.group(item), item.module.name

    def origin(self, item: PlannedModule) -> Both:
        return Both(
            self.models.origin(item) if self.with_models else None,
            self.updates.get(item.module.name, (None, None))[1],
        )

    @cached_property
    def updates(self) -> dict[str, tuple[AdaptedModule, Update]]:
        """The safe updates by module, each with its scaling."""
        found = self.models.plan(self.adapter, Selection())
        for _, error in found.unmatched:
            raise error
        modules = [item.module for item in found.modules]
        scalings = self.adapter.format.scalings(self.adapter, modules)
        for module in modules:
            if module.dora or module.mirrors:
                what = "DoRA" if module.dora else "tied to another weight on loading"
                raise SafeprojError(
                    f"{self.adapter.source}: {module.name} is {what}, so that its update is no "
                    "product to merge; expected a plain LoRA as the safe adapter"
                )
        return {
            item.module.name: (
                item.module,
                update_of(self.adapter, replace(item, scaling=scalings[item.module.name])),
            )
            for item in found.modules
        }

    def plan(self, adapter: Adapter, selection: Selection) -> Plan:
        found = self.models.plan(adapter, selection)
        modules = [item.module for item in found.modules]
        if self.updates.keys().isdisjoint(module.name for module in modules):
            raise SafeprojError(
                f"{self.adapter.source}: changes none of the {len(modules)} modules of "
                f"{adapter.source} but {shorten(self.updates)}; expected a safe adapter of the "
                "same model and modules"
            )
        scalings = adapter.format.scalings(adapter, modules)
        paired: list[PlannedModule] = []
        unmatched = list(found.unmatched)
        own = {module.name: module for module in adapter.modules}
        for item in found.modules:
            name = item.module.name
            try:
                paired.append(
                    self._paired(adapter, item, own.get(name, item.module), scalings[name])
                )
            except SafeprojError as error:
                unmatched.append((item.module, error))
        if not paired:
            raise unmatched[0][1]
        self._require_ranks(adapter, paired)
        adapted = [*modules, *found.excluded, *(module for module, _ in found.unmatched)]
        notes = tuple(self._warnings({module.name for module in adapted}, modules))
        return replace(
            found,
            modules=tuple(paired),
            warnings=(*found.warnings, *notes),
            unmatched=tuple(unmatched),
        )

    def _warnings(self, adapted: Collection[str], modules: Sequence[AdaptedModule]) -> list[str]:
        """Return what is merged with nothing, and what of the safe adapter is not merged."""
        alone = [module.name for module in modules if module.name not in self.updates]
        more = sorted(self.updates.keys() - adapted, key=natural_order)
        found = []
        if alone:
            found.append(
                f"{len(alone)} modules have no update in the safe adapter, where it counts as "
                f"zero: they become (1-λ) ΔW if they are merged: {shorten(alone)}"
            )
        if more:
            found.append(
                f"{len(more)} updates of the safe adapter are of modules that the adapter does not "
                f"change, and are left out: {shorten(more)}"
            )
        whole = [each.parameter for each in self.adapter.full_changes]
        if whole:
            found.append(
                f"the safe adapter changes {len(whole)} weights or biases directly, which are not "
                f"merged: {shorten(whole)}"
            )
        return found

    def _paired(
        self, adapter: Adapter, item: PlannedModule, own: AdaptedModule, scaling: float
    ) -> PlannedModule:
        """Return the update with its scaling, where it can be merged with the safe one.

        Raises:
            SafeprojError: it cannot.
        """
        module = item.module
        self._require_plain(adapter, module, own, scaling)
        known = self.updates.get(module.name)
        if known is not None:
            self._require_fit(adapter, module, scaling, *known)
        nothing = None if known is not None else "no update in the safe adapter: it counts as zero"
        note = "; ".join(filter(None, [item.note, nothing])) or None
        return replace(item, scaling=scaling, note=note)

    def _require_ranks(self, adapter: Adapter, items: Sequence[PlannedModule]) -> None:
        """Refuse an adapter whose modules cannot have the ranks of what is written.

        Raises:
            SafeprojError: it is one.
        """
        ranks: dict[str, int] = {}
        for module in (item.module for item in items):
            safe = self.updates[module.name][0].rank if module.name in self.updates else 0
            rank = self.merging.written_rank(module.rank, safe)
            if rank != module.rank:
                ranks[module.name] = rank
        try:
            _ = adapter.format.resized(adapter, ranks) if ranks else None
        except SafeprojError as error:
            raise SafeprojError(
                f"{error.message}; --merge-form low-rank without --merge-rank keeps them"
            ) from error

    def _require_plain(
        self, adapter: Adapter, module: AdaptedModule, own: AdaptedModule, scaling: float
    ) -> None:
        """Refuse an update that is no product of two factors of its own.

        Args:
            adapter: the adapter.
            module: the update, as it was planned.
            own: the same, as the adapter has it.
            scaling: `s`.
        """
        why = None
        if module.dora:
            why = "is DoRA, which renormalises what is merged"
        elif module.gain is not None:
            why = "is AdaLoRA, which has singular values between its factors"
        elif module.mirrors:
            why = "is tied to another weight on loading, which repeats one of its factors"
        elif own.output != module.output:
            why = "has other rows than the weight, which both factors would change"
        elif not scaling:
            why = "is scaled by 0"
        if why is not None:
            raise SafeprojError(f"{adapter.source}: {module.name} {why}; {_OUT}")

    def _require_fit(
        self,
        adapter: Adapter,
        module: AdaptedModule,
        scaling: float,
        other: AdaptedModule,
        update: Update,
    ) -> None:
        """Refuse two updates that cannot be added, or not in the form that is wanted."""
        safe = self.adapter.source
        shapes = [(each.out_features, each.in_features) for each in (module, other)]
        if shapes[0] != shapes[1]:
            raise SafeprojError(
                f"{module.name}: shapes do not fit: {list(shapes[0])} (out, in) in "
                f"{adapter.source}, {list(shapes[1])} in {safe}; are both of the same model?"
            )
        if module.bias is None and update.bias is not None and bool(update.bias.any()):
            raise SafeprojError(
                f"{module.name}: lora_B has a bias in {safe} and none in {adapter.source}, so that "
                f"there is no place for it; {_OUT}"
            )
        if self.merging.form != FACTOR_WISE:
            return
        if module.rank != other.rank:
            raise SafeprojError(
                f"{module.name}: has rank {module.rank} in {adapter.source} and {other.rank} in "
                f"{safe}; --merge-form {FACTOR_WISE} adds factors and needs equal ranks: "
                "--merge-form exact does not"
            )
        ratio = (update.scaling or 0.0) / scaling
        if ratio < 0.0:
            raise SafeprojError(
                f"{module.name}: the scalings have different signs, and --merge-form "
                f"{FACTOR_WISE} takes the root of their ratio; --merge-form exact does not"
            )

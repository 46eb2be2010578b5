"""What a full fine-tune is merged with: a safe one, or what alignment moved the weights by."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safeproj.adapter import Adapter
from safeproj.checkpoint import Weight, open_checkpoint
from safeproj.checkpoint.expression import Expression, Matrix, dtype_and_shape, matrix
from safeproj.checkpoint.hashes import merged, record
from safeproj.engine import Source
from safeproj.errors import SafeprojError
from safeproj.methods.reference import Plain, Reference
from safeproj.methods.safe_lora.method import SafeLora
from safeproj.methods.score import Score
from safeproj.methods.whole import WholeScore
from safeproj.names import Names
from safeproj.plan.full import as_matrix
from safeproj.plan.match import Plan, PlannedModule
from safeproj.plan.select import Selection
from safeproj.storage.source import identity


@dataclass(frozen=True)
class Mixing:
    """What is read for a weight.

    Attributes:
        deciding: what Safe LoRA reads for its cosine; None without models.
        safe: the weight in the safe model; None where the safety vector is added.
    """

    deciding: Source | None
    safe: Matrix | None

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        own = 0 if self.deciding is None else self.deciding.nbytes
        return own + (0 if self.safe is None else self.safe.nbytes)

    @property
    def weights(self) -> tuple[Weight, ...]:
        """What is read."""
        own = () if self.deciding is None else self.deciding.weights
        return own if self.safe is None else (*own, self.safe.weight)


class Models(Plain):
    """The models of Safe LoRA, if there are any, and the safe model, if there is one.

    Args:
        deciding: Safe LoRA, by whose cosine weights are chosen.
        safe: SRC of the safe model.
        maps: `--map` rules.

    Raises:
        SafeprojError: one of them cannot be used.
    """

    def __init__(
        self, deciding: SafeLora | None, safe: str | None, maps: Sequence[str] = ()
    ) -> None:
        self._models: Reference | None = None if deciding is None else deciding.open(maps)
        self._safe = None if safe is None else Names(open_checkpoint(safe), maps)

    @property
    def sides(self) -> tuple[Names, Names]:
        if self._models is not None:
            return self._models.sides
        assert self._safe is not None  # one of them is there
        return self._safe, self._safe

    @property
    def is_file(self) -> bool:  # type: ignore[override]
        return self._models is None or self._models.is_file

    @property
    def names(self) -> Collection[str]:
        return self.sides[0].checkpoint.names

    @property
    def config(self) -> Mapping[str, Any]:
        return self.sides[0].checkpoint.config

    @property
    def weights(self) -> Names | None:
        return None if self._models is None else self._models.weights

    @property
    def inputs(self) -> dict[str, dict[str, Any]]:
        found = {} if self._models is None else dict(self._models.inputs)
        if self._safe is not None:
            found["safe_model"] = identity(self._safe.checkpoint)
        return found

    def plan(self, adapter: Adapter, selection: Selection) -> Plan:
        del selection
        raise SafeprojError(
            f"{adapter.source}: an adapter is merged with an adapter; give --safe-adapter"
        )

    def unheld(self, item: PlannedModule) -> str | None:
        if self._models is not None and (why := self._models.unheld(item)) is not None:
            return why
        if self._safe is not None and self._found(self._safe, item) is None:
            return f"weight that {self._safe.checkpoint.source} does not hold"
        return None

    def group(self, item: PlannedModule) -> Hashable:
        return item.module.name

    def origin(self, item: PlannedModule) -> Mixing:
        deciding = None if self._models is None else self._models.origin(item)
        if self._safe is None:
            return Mixing(deciding, None)
        found = self._found(self._safe, item)
        assert found is not None  # `unheld` has told of others
        return Mixing(deciding, matrix(found, self._safe.checkpoint))

    def digests(self, scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
        found = {} if self._models is None else dict(self._models.digests(scores))
        if self._safe is not None:
            read = [each.others for each in scores.values() if isinstance(each, WholeScore)]
            files = dict(self._safe.checkpoint.document_digests)
            found["safe_model"] = record(merged(read), files=files)
        return found

    def _found(self, safe: Names, item: PlannedModule) -> Expression | None:
        """Return a weight of the safe model, None where it has none.

        Raises:
            SafeprojError: it has another shape there.
        """
        module = item.module
        try:
            whole = safe.find(module.parameter, lambda _: True)
        except SafeprojError:
            return None
        layout = safe.layout(module.parameter)
        if layout is None:
            return None
        found = as_matrix(whole, layout, module.expert)
        shape = dtype_and_shape(found, safe.checkpoint)[1]
        wanted = (module.out_features, module.in_features)
        if shape != wanted:
            raise SafeprojError(
                f"{module.name}: shapes do not fit: {list(wanted)} in the fine-tune, "
                f"{list(shape)} in {safe.checkpoint.source}; are both of the same model?"
            )
        return found

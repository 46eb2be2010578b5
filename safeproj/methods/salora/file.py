"""Safety modules as files: for each weight the directions that updates are kept out of.

The tensors of a weight are named by its name in the running model: `NAME.U` (m, k), orthonormal
columns in descending order of singular value, and `NAME.singular_values` (k,). Both are float32.
The rest is JSON under `safeproj` in the file's metadata.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from safeproj.errors import SafeprojError
from safeproj.methods.file_reference import FileReference, held, linear_key, made_of, read_of
from safeproj.methods.recorded import (
    MADE_BY_RUNNING,
    Content,
    FileKind,
    open_recorded,
    recorded_amount,
    recorded_shape,
    require_linear,
    require_tensor,
)
from safeproj.methods.salora.sources import SafetyBasis
from safeproj.methods.score import Score
from safeproj.plan.match import PlannedModule
from safeproj.storage.source import identity

BASIS, VALUES = "U", "singular_values"
"""Last parts of the names of a weight's tensors."""

ROUNDING = 1e-3
"""How far the squares of stored singular values may sum to more than the energy they are part of:
they are float32, the energy is not."""


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
class SafetyModuleFile(FileReference[Recorded]):
    """A safety module: no checkpoint is read with it.

    Attributes:
        file: what it holds.
        rank: how many of each weight's directions are used; all if None.
    """

    rank: int | None = None

    @property
    def inputs(self) -> dict[str, dict[str, Any]]:
        return {
            "aligned": made_of(self.file, "aligned"),
            "data": made_of(self.file, "data", "date"),
            "safety_module": {**self.file.document["options"], **identity(self.file)},
        }

    def origin(self, item: PlannedModule) -> SafetyBasis:
        file, key = self.file, linear_key(item)
        kept = held(file, item, key)
        rank = kept.rank if self.rank is None else min(self.rank, kept.rank)
        return SafetyBasis(file.matrix(f"{key}.{BASIS}"), rank, self._energies(key, kept))

    def digests(self, scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
        recorded = self.file.document["inputs"]
        return {
            **{role: {"sha256": recorded[role]["sha256"]} for role in ("aligned", "data")},
            "safety_module": self.file.digests(read_of(scores), {BASIS: VALUES}),
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


def _weight(content: Content, name: str, item: Mapping[str, Any]) -> Recorded:
    """Return the record of a weight that is a linear layer's, with the tensors of the record."""
    found = Recorded(recorded_shape(item), item["rank"], recorded_amount(item, "energy"))
    m, rank = found.shape[0], found.rank
    if type(rank) is not int or not 1 <= rank <= m or not found.energy:
        raise ValueError(f"{name} has the rank {rank!a} with energy {found.energy}")
    require_linear(content, name, found.shape)
    require_tensor(content, f"{name}.{BASIS}", (m, rank))
    require_tensor(content, f"{name}.{VALUES}", (rank,))
    return found


KIND = FileKind(
    name="safety module",
    schema="safeproj.safety-module/1",
    suffix=".safety.safetensors",
    command="safeproj salora",
    remedy="make the safety module with it among --targets, or leave it out with --exclude",
    inputs=MADE_BY_RUNNING,
    options={"rank": lambda value: type(value) is int},
    weight=_weight,
)

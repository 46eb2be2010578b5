"""What references have in common that are files which stand for a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, KeysView, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from safeproj.adapter import Adapter
from safeproj.checkpoint.expression import key_of, stored_names
from safeproj.checkpoint.hashes import Digests, merged
from safeproj.engine import Source
from safeproj.errors import SafeprojError
from safeproj.methods.recorded import RecordedFile
from safeproj.methods.reference import Plain
from safeproj.methods.score import Score
from safeproj.names import Names
from safeproj.plan.match import Plan, PlannedModule, plan
from safeproj.plan.select import Selection
from safeproj.text import shorten

W = TypeVar("W")


@dataclass(frozen=True)
class FileReference(Plain, ABC, Generic[W]):
    """A file that stands for a model: no checkpoint is read with it.

    Attributes:
        file: what it holds.
    """

    file: RecordedFile[W]

    is_file = True

    @property
    def config(self) -> Mapping[str, Any]:
        return self.file.config

    @property
    def names(self) -> KeysView[str]:
        return self.file.names

    @property
    def sides(self) -> tuple[Names, Names]:
        return self.file.running, self.file.running

    def plan(self, adapter: Adapter, selection: Selection) -> Plan:
        return plan(adapter, self.file.running, self.file.running, selection)

    def unheld(self, item: PlannedModule) -> str | None:
        try:
            self.origin(item)
        except SafeprojError:
            return f"weight that {self.file.source} does not hold"
        return None

    @abstractmethod
    def origin(self, item: PlannedModule) -> Source:
        """Return what is read for an update.

        Raises:
            SafeprojError: the file does not hold it.
        """

    def group(self, item: PlannedModule) -> Hashable:
        return item.aligned, item.base


def made_of(file: RecordedFile[Any], role: str, *more: str) -> dict[str, Any]:
    """Return what a report says of what a file was made of: its place, and `more` of its record."""
    recorded = file.document["inputs"][role]
    return {name: recorded[name] for name in ("source", "revision", *more) if name in recorded}


def held(
    file: RecordedFile[W],
    item: PlannedModule,
    key: str,
    remedy: str | None = None,
    *,
    whole: bool = True,
) -> W:
    """Return what a file records of an update's weight.

    Args:
        file: the file.
        item: the update.
        key: of the weight.
        remedy: what to do without it; that of the file's kind if None.
        whole: whether it is needed of all of the weight's rows.

    Raises:
        SafeprojError: it holds nothing for it.
    """
    kept = file.weights.get(key)
    if kept is None or (whole and not file.is_whole(item.aligned)):
        raise SafeprojError(
            f"{file.source}: holds nothing for {item.module.name} as the adapter has it "
            f"({key or shorten(stored_names(item.aligned))}); {remedy or file.kind.remedy}"
        )
    return kept


def linear_key(item: PlannedModule) -> str:
    """Return the key of an update's weight in files about linear layers; empty if it has none."""
    return (key_of(item.aligned) or "").removesuffix(".T")


def read_of(scores: Mapping[str, Score], side: int = 0) -> Digests:
    """Return the digests of all that scores were computed from.

    Args:
        scores: of the modules.
        side: which of the two things that were read.
    """
    return merged(score.digests[side] for score in scores.values())

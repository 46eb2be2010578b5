"""Safe Delta as the user gives it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from safeproj.errors import SafeprojError
from safeproj.methods.detail import Detail
from safeproj.methods.interface import (
    Method,
    is_number,
    not_repeated,
    option,
    require_all_as_they_are,
    source,
    unrecorded,
)
from safeproj.methods.safe_delta.detail import Kept
from safeproj.methods.words import Words
from safeproj.storage.source import Src

if TYPE_CHECKING:
    from safeproj.adapter import Adapter
    from safeproj.methods.reference import Reference
    from safeproj.methods.score import Score
    from safeproj.methods.whole import WholeKernel
    from safeproj.run.options import Options

STRENGTH = 0.1
"""`s` of the reference code."""

KIND, LOW_RANK = "safe-delta", "low-rank"

STATISTICS = ".safetensors"
"""End of the name of a file of statistics, on which no model is run."""

WORDS = Words(
    name="Safe Delta",
    legend="then the share of a weight's entries that are the fine-tune's",
    done=(
        "kept of {changed} of {all} adapted modules the entries that cost least safety on the data "
        "{safety_data}, and let the others make up for them, beside {aligned} (Safe Delta, arXiv "
        "2505.12038)"
    ),
    controls={},
    changed="corrected",
    again="correcting again takes more of the fine-tune away",
)
"""How it is spoken of."""


@dataclass(frozen=True)
class SafeDelta(Method):
    """Safe Delta: the entries of a change that cost least safety stay, others make up for them.

    Lu et al., ICML 2025, arXiv 2505.12038, as its reference code computes it. The fine-tune is run
    on the safety data layer by layer. An adapter is taken for the weights that it makes, and what
    takes their place is written as the best adapter of a rank.

    Attributes:
        aligned: SRC of the aligned model.
        safety_data: file of harmful prompts with refusals.
        strength: `s`. The larger, the more of the fine-tune is kept; 0.1 if None.
        delta_rank: of an adapter that is written; that of each module if None.
        is_ready: whether adapters can be run, as `prepared` gives it.
    """

    name: ClassVar[str] = "safe-delta"
    words: ClassVar[Words] = WORDS
    detail: ClassVar[type[Detail]] = Kept
    ways: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"aligned", "safety_data"}),)
    give: ClassVar[tuple[str, ...]] = ()  # what is given is another method's too
    needs: ClassVar[str] = "--aligned and --safety-data"
    mark: ClassVar[str] = "--method safe-delta"
    advice: ClassVar[str] = ", and give --strength"
    selects_all: ClassVar[bool] = True
    side: ClassVar[Literal["output", "input", "both"]] = "both"
    axes: ClassVar[tuple[str, ...]] = ()

    aligned: Src | None = source("--aligned")
    safety_data: Src | None = source("--safety-data", metavar="FILE")
    strength: float | None = option(
        "--strength",
        "Of Safe Delta (--method safe-delta): the larger, the more of the fine-tune is kept.  "
        "[default: 0.1]",
        "S",
    )
    delta_rank: int | None = option(
        "--delta-rank",
        "Rank of the adapter that Safe Delta writes.  [default: that of each module]",
        "R",
    )
    is_ready: bool = field(default=False, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sources["safety_data"].endswith(STATISTICS):
            raise SafeprojError(
                f"--safety-data {self.safety_data}: statistics of the aligned model, and Safe "
                "Delta runs the fine-tune; give prompts with responses"
            )
        if self.strength is not None and not 0.0 < self.strength <= sys.float_info.max:
            raise SafeprojError(
                f"--strength must be a number of more than 0, found {self.strength}"
            )
        if self.delta_rank is not None and self.delta_rank < 1:
            raise SafeprojError(f"--delta-rank must be at least 1, found {self.delta_rank}")

    @property
    def s(self) -> float:
        """`s` of the formulas."""
        return STRENGTH if self.strength is None else self.strength

    def kernel(self) -> Callable[..., tuple[Score | SafeprojError, ...]]:
        from safeproj.methods.safe_delta.score import score

        return score

    def whole(self) -> WholeKernel:
        from safeproj.methods.safe_delta.whole import remake

        if self.delta_rank is not None:
            raise SafeprojError("--delta-rank is for adapters; leave it out with --model")
        return remake

    def describe(self, scores: Iterable[Score]) -> dict[str, Any]:
        details = [score.detail for score in scores]
        found: dict[str, Any] = {"kind": KIND, "strength": self.s}
        if any(isinstance(detail, Kept) and detail.rank is not None for detail in details):
            found["form"] = LOW_RANK
        return found

    def open(self, maps: Sequence[str] = ()) -> Reference:
        from safeproj.methods.safe_delta.reference import Running

        return Running(self, maps)

    def prepared(
        self, adapters: Sequence[str | Adapter], options: Options
    ) -> AbstractContextManager[SafeDelta]:
        del adapters
        require_all_as_they_are(options, self.words.name)
        return nullcontext(dataclasses.replace(self, is_ready=True))

    @classmethod
    def unrepeatable(cls, projector: Mapping[str, Any]) -> str | None:
        if projector.get("kind") != KIND or projector.get("form") != LOW_RANK:
            return None
        return "its updates were made by running the model with the adapter (Safe Delta)"

    def recorded(self, source: str, projector: Mapping[str, Any]) -> SafeDelta:
        found = dict(projector)
        if (why := self.unrepeatable(projector)) is not None:
            raise SafeprojError(f"{source}: {not_repeated(why)}")
        kind, strength = found.pop("kind", None), found.pop("strength", None)
        if found or kind != KIND or strength is None or not is_number(strength):
            raise unrecorded(source)
        return self.with_recorded(source, strength=strength)

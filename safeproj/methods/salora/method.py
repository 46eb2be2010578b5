"""SaLoRA's projection as the user gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from safeproj.errors import SafeprojError
from safeproj.methods.detail import Detail
from safeproj.methods.interface import (
    Method,
    is_count,
    option,
    require_rank,
    source,
    unrecorded,
)
from safeproj.methods.salora.detail import Safety
from safeproj.methods.words import PROJECTION_CONTROLS, Words
from safeproj.storage.source import Src, StrPath

if TYPE_CHECKING:
    from safeproj.lm.feed import Feed
    from safeproj.lm.layers import OnBatch
    from safeproj.methods.recorded import Made
    from safeproj.methods.reference import Reference
    from safeproj.methods.salora.formulas import Complement
    from safeproj.methods.score import Score
    from safeproj.methods.whole import WholeKernel


FOLDED = "safeproj.fold/1"
"""Schema of what folding a trained adapter records."""

WORDS = Words(
    name="SaLoRA",
    legend=(
        "then share = ‖UᵀΔW‖²/‖ΔW‖², how "
        "much of the update lies in the safety subspace (near 1: all of it)"
    ),
    done=(
        "removed from the updates of {changed} of {all} adapted modules what lies in the safety "
        "subspace of {aligned}, found from its outputs on the safety data {data} (SaLoRA, arXiv "
        "2501.01765)"
    ),
    controls=PROJECTION_CONTROLS,
)
"""How it is spoken of."""


@dataclass(frozen=True)
class Salora(Method):
    """SaLoRA's projection: what lies in a layer's safety subspace is removed from its update.

    Li et al., ICLR 2025, arXiv 2501.01765, section 3.2.

    Attributes:
        safety_module: SRC of a safety module.
        rank: how many of its directions are used; all if None.
    """

    name: ClassVar[str] = "salora"
    words: ClassVar[Words] = WORDS
    detail: ClassVar[type[Detail]] = Safety
    ways: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"safety_module"}),)
    give: ClassVar[tuple[str, ...]] = ("--safety-module",)
    needs: ClassVar[str] = "--safety-module"
    mark: ClassVar[str] = "--safety-module"
    advice: ClassVar[str] = ", and give --rank to use fewer directions of the safety module"
    selects_all: ClassVar[bool] = True
    is_idempotent: ClassVar[bool] = True  # C_S is an orthogonal projector

    safety_module: Src | None = source(
        "--safety-module",
        "Safety module that salora made, in place of all three: removes from the updates what "
        "lies in its subspace; --all is the default.",
    )
    rank: int | None = option("--rank", metavar="K")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_rank(self.rank)

    @property
    def formulas(self) -> Complement:
        from safeproj.methods.salora.formulas import Complement

        return Complement(self.rank)

    def kernel(self) -> Callable[..., tuple[Score | SafeprojError, ...]]:
        from safeproj.methods.salora.score import score

        return score

    def whole(self) -> WholeKernel:
        from safeproj.methods.salora.whole import remake

        return remake

    def describe(self, scores: Iterable[Score]) -> dict[str, Any]:
        details = (score.detail for score in scores)
        ranks = [detail.rank for detail in details if isinstance(detail, Safety)]
        return {"kind": "safety-module", "rank": max(ranks)}

    def open(self, maps: Sequence[str] = ()) -> Reference:
        from safeproj.methods.salora.file import open_safety_module

        return open_safety_module(self.sources["safety_module"], maps, self.rank)

    def recorded(self, source: str, projector: Mapping[str, Any]) -> Salora:
        found = dict(projector)
        kind, rank = found.pop("kind", None), found.pop("rank", None)
        if found or kind != "safety-module" or not is_count(rank):
            raise unrecorded(source)
        return self.with_recorded(source, rank=rank)

    @classmethod
    def make(
        cls,
        out: StrPath,
        aligned: Src,
        data: StrPath,
        rank: int = 32,
        feed: Feed | None = None,
        *,
        on_batch: OnBatch | None = None,
        overwrite: bool = False,
    ) -> Made:
        """Write a safety module: in which directions the outputs of layers lie on safety data.

        Args:
            out: the file to create; it appears complete or not at all.
            aligned: SRC of the aligned model, which is run.
            data: file of harmful prompts with safe responses.
            rank: directions (m,) of each layer that are kept.
            feed: how the model is run; its targets are the layers.
            on_batch: told how many batches are done and how many there are.
            overwrite: replace a safety module that is at `out`.

        Returns:
            Its size in bytes, and what it holds, in words.

        Raises:
            SafeprojError: an input cannot be used or `out` cannot be written; nothing is written.
        """
        from safeproj.lm.feed import Feed
        from safeproj.methods.recorded import Made, check_file
        from safeproj.methods.salora.file import KIND
        from safeproj.methods.salora.module import safety_module

        require_rank(rank)
        check_file(Path(out), overwrite, KIND)
        feed = feed or Feed()
        fed = feed.load(aligned, data)
        found = safety_module(
            fed.model,
            fed.batches,
            feed.targets,
            rank,
            memory=feed.memory,
            on_batch=on_batch,
            inputs=fed.inputs,
        )
        nbytes = found.save(out, overwrite=overwrite)
        shares = found.captured().values()
        holds = (
            f"{len(found.directions)} layers, {found.rank} directions, {nbytes / 1e6:.1f} MB, "
            f"{min(shares):.1%} to {max(shares):.1%} of the energy"
        )
        return Made(nbytes, holds, fed.data.warnings)

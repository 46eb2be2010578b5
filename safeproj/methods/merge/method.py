"""Merging with a safe adapter as the user gives it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from safeproj.errors import SafeprojError
from safeproj.methods.detail import Detail
from safeproj.methods.interface import (
    Method,
    is_count,
    is_number,
    option,
    source,
    unrecorded,
)
from safeproj.methods.merge.detail import Mixed
from safeproj.methods.merge.forms import EXACT, FORMS, LOW_RANK, VECTOR, Merging
from safeproj.methods.safe_lora.method import SafeLora
from safeproj.methods.words import Words
from safeproj.storage.source import Src

if TYPE_CHECKING:
    from safeproj.adapter import Adapter
    from safeproj.methods.reference import Reference
    from safeproj.methods.score import Score
    from safeproj.methods.whole import WholeKernel
    from safeproj.plan.select import Selection
    from safeproj.run.options import Options

WEIGHT = 0.2
"""`λ` of the paper's experiments."""

WORDS = Words(
    name="SafeMERGE",
    legend="then scale = ‖ΔW'‖/‖ΔW‖, with ΔW' = (1-λ)ΔW + λΔW_safe the merged update",
    done=(
        "merged the updates of {changed} of {all} adapted modules with those of the safe adapter "
        "{safe_adapter} (SafeMERGE, arXiv 2503.17239)"
    ),
    controls={
        "shrink": ("module shrink", "the same modules, each B times its own ‖ΔW'‖/‖ΔW‖"),
        "uniform": (
            "uniform shrink",
            "the whole adapter times one factor, with the same ‖ΔW‖ as the merged adapter",
        ),
        "random": (
            "random safe",
            "merged with the safe updates turned at random: the same size and spectrum",
        ),
    },
    otherwise=(
        "merged the changes of {changed} of {all} weights with those of the safe model "
        "{safe_model} (SafeMERGE, arXiv 2503.17239)",
        "added to {changed} of {all} weights a multiple of the difference of {aligned} and {base}, "
        "the safety vector (RESTA, arXiv 2402.11746)",
    ),
    changed="merged",
    again="merging again moves its updates further towards the safe adapter",
)
"""How it is spoken of."""


@dataclass(frozen=True)
class Merge(Method):
    """SafeMERGE: updates that Safe LoRA would project are merged with those of a safe adapter.

    Djuhera et al., arXiv 2503.17239. Of full fine-tunes the whole changes, or the safety vector is
    added to them (RESTA, arXiv 2402.11746). The modules are chosen by Safe LoRA's cosine; without
    models to compute it from, all are merged, and the cosine is that of `ΔW` and `ΔW'`.

    Attributes:
        safe_adapter: SRC of the safe adapter.
        safe_model: SRC of a full fine-tune in its place, to be merged into another one; without
            either `weight` times the difference of `aligned` and `base` is added to a full
            fine-tune (RESTA).
        base: SRC of the unaligned checkpoint, for the cosine.
        aligned: SRC of the aligned checkpoint.
        alignment: SRC of an alignment file, in place of both.
        projector: which `C` the cosine is computed with, as for `SafeLora`.
        rank: of the exact projector.
        energy: likewise.
        weight: `λ` of `(1-λ) ΔW + λ ΔW_safe`, 0 < λ <= 1; 0.2 if None.
        merge_form: `exact`, of the sum of both ranks; `low-rank`, the best approximation of a rank;
            or `factor-wise`, as the reference code merges, which adds cross terms. `exact` if None,
            or `low-rank` with a `merge_rank`.
        merge_rank: of the best approximation; that of each update if None.
    """

    name: ClassVar[str] = "merge"
    words: ClassVar[Words] = WORDS
    detail: ClassVar[type[Detail]] = Mixed
    ways: ClassVar[tuple[frozenset[str], ...]] = (
        frozenset({"base", "aligned", "safe_adapter"}),
        frozenset({"alignment", "safe_adapter"}),
        frozenset({"safe_adapter"}),
    )
    give: ClassVar[tuple[str, ...]] = ("--safe-adapter",)
    needs: ClassVar[str] = "--safe-adapter, and --base and --aligned or --alignment to choose by"
    mark: ClassVar[str] = "--safe-adapter"
    side: ClassVar[Literal["output", "input", "both"]] = "both"
    axes: ClassVar[tuple[str, ...]] = ("weight",)
    whole_ways: ClassVar[tuple[frozenset[str], ...]] = (
        frozenset({"base", "aligned"}),
        frozenset({"base", "aligned", "safe_model"}),
        frozenset({"alignment", "safe_model"}),
        frozenset({"safe_model"}),
    )

    base: Src | None = source("--base")
    aligned: Src | None = source("--aligned")
    alignment: Src | None = source("--alignment")
    safe_adapter: Src | None = source(
        "--safe-adapter",
        "Adapter of the same model that was trained to be safe: merges its updates into those that "
        "Safe LoRA would project; without --base and --aligned, or --alignment, into all.",
    )
    safe_model: Src | None = source(
        "--safe-model",
        "The same for a full fine-tune (--model): another full fine-tune of the aligned model, "
        "that was trained to be safe.",
    )
    projector: str | None = option("--projector")
    rank: int | None = option("--rank", metavar="K")
    energy: float | None = option("--energy", metavar="E")
    weight: float | None = option(
        "--weight",
        "Weight L of the safe adapter or model in (1-L) dW + L dW_safe, 0 < L <= 1; or of the "
        "safety vector in dW + L V (--method merge --model).  [default: 0.2; for V none]",
        "L",
    )
    merge_form: str | None = option(
        "--merge-form",
        "The merged update exactly, of the sum of both ranks; its best approximation of a rank; or "
        "factor by factor as the reference code merges, which is another update.  [default: exact, "
        "or low-rank with --merge-rank]",
        choices=FORMS,
    )
    merge_rank: int | None = option(
        "--merge-rank", "Rank of the best approximation.  [default: that of each module]", "R"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight is not None and self.adds_vector:
            if not 0.0 < self.weight <= sys.float_info.max:
                raise SafeprojError(
                    f"--weight must be a number of more than 0, found {self.weight}"
                )
        elif self.weight is not None and not 0.0 < self.weight <= 1.0:
            raise SafeprojError(f"--weight must lie in (0, 1], found {self.weight}")
        if self.safe_adapter is None and (self.merge_form, self.merge_rank) != (None, None):
            raise SafeprojError(
                "--merge-form and --merge-rank are for adapters; leave them out with --model"
            )
        if self.merge_form not in (None, *FORMS):
            *others, last = FORMS
            raise SafeprojError(
                f"--merge-form {self.merge_form}: expected {', '.join(others)} or {last}"
            )
        if self.merge_rank is not None and self.merge_rank < 1:
            raise SafeprojError(f"--merge-rank must be at least 1, found {self.merge_rank}")
        if self.merge_rank is not None and self.formula.form != LOW_RANK:
            raise SafeprojError(
                f"--merge-rank goes with --merge-form {LOW_RANK}, found {self.merge_form}"
            )
        if self.deciding is None and (self.projector, self.rank, self.energy) != (None,) * 3:
            raise SafeprojError(
                "--projector, --rank and --energy are of the cosine that modules are chosen by; "
                "give --base and --aligned, or --alignment, too"
            )

    @property
    def adds_vector(self) -> bool:
        """Whether nothing is merged, but the safety vector added (RESTA)."""
        return self.safe_adapter is None and self.safe_model is None

    @property
    def deciding(self) -> SafeLora | None:
        """Safe LoRA, by whose cosine modules are chosen; None without models."""
        if self.sources.keys() <= {"safe_adapter", "safe_model"}:
            return None
        known = SafeLora.options()
        return SafeLora(**{name: value for name, value in self.given.items() if name in known})

    @property
    def formula(self) -> Merging:
        """How two updates are merged.

        Raises:
            SafeprojError: it is not said how much of the safety vector is added.
        """
        if self.adds_vector:
            if self.weight is None:
                raise SafeprojError(
                    "--weight is missing: how much of aligned - base is added to the weights, "
                    "such as 0.5"
                )
            return Merging(self.weight, VECTOR)
        form = self.merge_form or (EXACT if self.merge_rank is None else LOW_RANK)
        return Merging(WEIGHT if self.weight is None else self.weight, form, self.merge_rank)

    @property
    def is_wide(self) -> bool:
        return self.deciding is not None and self.deciding.is_wide

    def selecting(self, selection: Selection) -> Selection:
        if self.adds_vector:
            return selection.or_all()
        if self.deciding is not None:
            return selection
        if selection.threshold is not None or selection.layers is not None:
            raise SafeprojError(
                "modules are chosen by Safe LoRA's cosine, and there is nothing to compute it "
                f"from; give --base and --aligned, or --alignment, beside {self._safe}"
            )
        return selection.or_all()

    def kernel(self) -> Callable[..., tuple[Score | SafeprojError, ...]]:
        from safeproj.methods.merge.score import score

        return partial(score, deciding=self.deciding, merging=self.formula)

    @property
    def _safe(self) -> str:
        return "--safe-model" if self.safe_adapter is None else "--safe-adapter"

    def whole(self) -> WholeKernel:
        from safeproj.methods.merge.whole import remake

        if self.safe_adapter is not None:
            raise SafeprojError(
                "--safe-adapter is merged into adapters; with --model give --safe-model, or "
                "--base, --aligned and --weight to add the safety vector"
            )
        return partial(remake, method=self)

    def describe(self, scores: Iterable[Score]) -> dict[str, Any]:
        formula = self.formula
        found: dict[str, Any] = {"kind": "merge", "form": formula.form, "weight": formula.weight}
        if formula.rank is not None:
            found["merge_rank"] = formula.rank
        if self.deciding is not None:
            settings = self.deciding.describe(scores)
            found |= {"chosen_by": settings.pop("kind"), **settings}
        return found

    def open(self, maps: Sequence[str] = ()) -> Reference:
        if self.safe_adapter is None:
            from safeproj.methods.merge.models import Models

            return Models(self.deciding, self.sources.get("safe_model"), maps)
        from safeproj.methods.merge.reference import open_both

        return open_both(self.sources["safe_adapter"], self.deciding, self.formula, maps)

    def prepared(
        self, adapters: Sequence[str | Adapter], options: Options
    ) -> AbstractContextManager[Merge]:
        formula = self.formula  # what is missing is said before anything is read
        if options.portable and (formula.form == EXACT or formula.rank is not None):
            raise SafeprojError(
                "--portable needs one rank for all modules, and merging changes that of those that "
                f"are merged; give --merge-form {LOW_RANK} without --merge-rank, which keeps it"
            )
        del adapters
        return nullcontext(self)

    def recorded(self, source: str, projector: Mapping[str, Any]) -> Merge:
        found = dict(projector)
        kind, form, weight = (found.pop(name, None) for name in ("kind", "form", "weight"))
        rank, settings = found.pop("merge_rank", None), dict[str, Any]()
        if self.deciding is not None:
            chosen_by = {"kind": found.pop("chosen_by", None), **found}
            settings, found = self.deciding.recorded(source, chosen_by).settings, {}
        forms = FORMS if self.safe_adapter else (VECTOR if self.adds_vector else EXACT,)
        is_known = kind == "merge" and form in forms and weight is not None and is_number(weight)
        if found or not is_known or not is_count(rank):
            raise unrecorded(source)
        how = {"merge_form": form, "merge_rank": rank} if self.safe_adapter else {}
        if rank is not None and not how:
            raise unrecorded(source)
        return self.with_recorded(source, weight=weight, **how, **settings)

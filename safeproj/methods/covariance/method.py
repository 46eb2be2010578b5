"""The covariance-weighted correction as the user gives it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from safeproj.errors import SafeprojError
from safeproj.methods.covariance.detail import Acting
from safeproj.methods.detail import Detail
from safeproj.methods.interface import (
    Method,
    is_number,
    not_repeated,
    option,
    source,
    unrecorded,
)
from safeproj.methods.words import Words
from safeproj.storage.source import Src, StrPath

if TYPE_CHECKING:
    from safeproj.adapter import Adapter
    from safeproj.lm.feed import Feed
    from safeproj.lm.layers import OnBatch
    from safeproj.methods.covariance.formulas import Correction, Reconstruction
    from safeproj.methods.recorded import Made
    from safeproj.methods.reference import Reference
    from safeproj.methods.score import Score
    from safeproj.methods.whole import WholeKernel
    from safeproj.run.options import Options

STATISTICS = ".safetensors"
"""End of the name of a file of statistics, in the place of data."""


WORDS = Words(
    name="the covariance-weighted correction",
    legend=("then how much stronger the update acts on safety data than on benign data (E‖ΔWx‖²)"),
    done=(
        "corrected the updates of {changed} of {all} adapted modules so that they do least to what "
        "{aligned} computes on the safety data {safety_data} and stay closest to what they were on "
        "the benign data {task_data} (covariance-weighted correction)"
    ),
    controls={
        "shrink": (
            "module shrink",
            "each A times one factor, so that E‖ΔWx‖² on benign data is that of the corrected one",
        ),
        "uniform": (
            "uniform shrink",
            "the whole adapter times one factor, so that E‖ΔWx‖² on benign data, summed over the "
            "modules, is that of the corrected adapter",
        ),
        "random": ("random H", "H turned at random: the same spectrum"),
        "swapped": ("swapped H, S", "H of the benign data and S of the safety data"),
        "complement": ("complement", "what the correction removes: ΔW - ΔW'"),
    },
    changed="corrected",
)
"""How it is spoken of."""


@dataclass(frozen=True)
class Covariance(Method):
    """The covariance-weighted correction: least effect on safety data, most on benign data.

    Attributes:
        aligned: SRC of the aligned model, which is run on data; of statistics the model that they
            must be of.
        safety_data: file of harmful prompts with refusals, or statistics of them that
            `safeproj stats` made.
        task_data: benign data or statistics of it; random tokens if None.
        mu: the larger, the more of the adapter is kept; 0.3 if None, or 1 with `reconstruct`.
        reconstruct: correct layer by layer, with the model and the adapter run on the data.
        statistics: where the statistics of both lie, if they were made for this run.
    """

    name: ClassVar[str] = "covariance"
    words: ClassVar[Words] = WORDS
    detail: ClassVar[type[Detail]] = Acting
    ways: ClassVar[tuple[frozenset[str], ...]] = (
        frozenset({"safety_data"}),
        frozenset({"safety_data", "task_data"}),
        frozenset({"aligned", "safety_data"}),
        frozenset({"aligned", "safety_data", "task_data"}),
    )
    give: ClassVar[tuple[str, ...]] = ("--safety-data with --aligned",)
    needs: ClassVar[str] = "--safety-data, and --aligned unless it and --task-data are statistics"
    mark: ClassVar[str] = "--safety-data"
    advice: ClassVar[str] = ", and give --mu"
    selects_all: ClassVar[bool] = True
    axes: ClassVar[tuple[str, ...]] = ("mu",)
    unswept: ClassVar[tuple[str, tuple[str, ...]] | None] = (
        f"{WORDS.name} layer by layer, with the model run on data",
        (
            *("--method", "covariance", "--aligned", "MODEL", "--safety-data", "SAFETY.jsonl"),
            *("--task-data", "TASK.jsonl", "--reconstruct"),
        ),
    )
    side: ClassVar[Literal["output", "input", "both"]] = "input"

    aligned: Src | None = source("--aligned")
    safety_data: Src | None = source(
        "--safety-data",
        "Harmful prompts with refusals, on which the aligned model is run, or "
        "statistics of them that stats made: corrects updates to do least on them.",
        "FILE",
    )
    task_data: Src | None = source(
        "--task-data",
        "Benign or task data, likewise, on which updates are to stay what they are.  "
        "[default: random tokens]",
        "FILE",
    )
    mu: float | None = option(
        "--mu",
        "Of the covariance-weighted correction: the larger, the more of the adapter is kept.  "
        "[default: 0.3, or 1 with --reconstruct]",
        "MU",
    )
    reconstruct: bool = option(
        "--reconstruct",
        "Correct layer by layer, with the model and the adapter run on the safety and the "
        "task data: slower, and better where that was measured.",
        default=False,
    )
    statistics: tuple[StrPath, StrPath] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aligned is None and (self.runs_model or self.task_data is None):
            raise SafeprojError(
                "give --aligned, which is run on the data; or statistics for both --safety-data "
                "and --task-data, which `safeproj stats` makes"
            )
        if self.mu is not None and not 0.0 < self.mu <= sys.float_info.max:
            raise SafeprojError(f"--mu must be a number of more than 0, found {self.mu}")

    @property
    def formulas(self) -> Correction | Reconstruction:
        from safeproj.methods.covariance.formulas import Correction, Reconstruction

        kind = Reconstruction if self.reconstruct else Correction
        return kind() if self.mu is None else kind(self.mu)

    @property
    def is_wide(self) -> bool:
        return True

    def kernel(self) -> Callable[..., tuple[Score | SafeprojError, ...]]:
        from safeproj.methods.covariance.score import score

        return score

    def whole(self) -> WholeKernel:
        from safeproj.methods.covariance.whole import remake

        if self.reconstruct:
            raise SafeprojError("--reconstruct runs an adapter; leave it out with --model")
        return remake

    def describe(self, scores: Iterable[Score]) -> dict[str, Any]:
        del scores
        formulas = self.formulas
        return {"kind": formulas.kind, "mu": formulas.mu}

    @property
    def runs_model(self) -> bool:
        if self.statistics is not None:
            return False
        return not all(
            self.sources.get(data, "").endswith(STATISTICS) for data in ("safety_data", "task_data")
        )

    @property
    def checking(self) -> Covariance:
        return dataclasses.replace(self, reconstruct=False)

    def open(self, maps: Sequence[str] = ()) -> Reference:
        from safeproj.methods.covariance.prepare import statistics_of

        return statistics_of(self, maps)

    def prepared(
        self, adapters: Sequence[str | Adapter], options: Options
    ) -> AbstractContextManager[Covariance]:
        from safeproj.methods.covariance.prepare import prepared

        return prepared(self, adapters, options)

    @classmethod
    def unrepeatable(cls, projector: Mapping[str, Any]) -> str | None:
        if projector.get("kind") != "reconstruction":
            return None
        return (
            "it was corrected layer by layer (--reconstruct), by running the model with the adapter"
        )

    def recorded(self, source: str, projector: Mapping[str, Any]) -> Covariance:
        found = dict(projector)
        kind, mu = found.pop("kind", None), found.pop("mu", None)
        if (why := self.unrepeatable(projector)) is not None:
            raise SafeprojError(f"{source}: {not_repeated(why)}")
        if found or kind != "covariance" or mu is None or not is_number(mu):
            raise unrecorded(source)
        return self.with_recorded(source, mu=mu)

    @classmethod
    def make(
        cls,
        out: StrPath,
        aligned: Src,
        data: StrPath | int,
        positions: Literal["all", "prompt", "response"] = "all",
        feed: Feed | None = None,
        *,
        on_batch: OnBatch | None = None,
        overwrite: bool = False,
    ) -> Made:
        """Write statistics, which take the place of data: what layers read of it.

        Args:
            out: the file to create; it appears complete or not at all.
            aligned: SRC of the aligned model, which is run.
            data: file of prompts with responses, or so many samples of random tokens.
            positions: which of the data count.
            feed: how the model is run; its targets are the layers, each with an input of n numbers,
                of which the second moment (n, n) is kept.
            on_batch: told how many batches are done and how many there are.
            overwrite: replace statistics that are at `out`.

        Returns:
            Its size in bytes, and what it holds, in words.

        Raises:
            SafeprojError: an input cannot be used or `out` cannot be written; nothing is written.
        """
        from safeproj.lm.feed import Feed
        from safeproj.lm.models import quietly
        from safeproj.methods.covariance.file import KIND
        from safeproj.methods.covariance.make import make_statistics
        from safeproj.methods.recorded import Made, check_file

        check_file(Path(out), overwrite, KIND)
        feed = feed or Feed()
        fed = feed.load(aligned, data)
        with quietly():
            nbytes = make_statistics(
                fed.model,
                fed.batches,
                Path(out),
                feed.targets,
                fed.inputs,
                positions=positions,
                memory=feed.memory,
                on_batch=on_batch,
                overwrite=overwrite,
            )
        holds = f"{len(fed.data.samples)} samples, {nbytes / 1e6:.1f} MB"
        return Made(nbytes, holds, fed.data.warnings)

"""Safe LoRA as the user gives it."""

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
    is_number,
    option,
    require_rank,
    source,
    unrecorded,
)
from safeproj.methods.safe_lora.detail import Alignment
from safeproj.methods.words import PROJECTION_CONTROLS, Words
from safeproj.storage.source import Src, StrPath, src

if TYPE_CHECKING:
    from safeproj.engine import Cluster
    from safeproj.methods.reference import Reference
    from safeproj.methods.safe_lora.formulas import Approx, Exact
    from safeproj.methods.safe_lora.make import Aligned, Form
    from safeproj.methods.score import Score
    from safeproj.methods.whole import WholeKernel
    from safeproj.records.profile import Profile
    from safeproj.run.options import Observer

PROJECTORS = ("approx", "exact")
"""Choices of `projector`."""


WORDS = Words(
    name="Safe LoRA",
    legend=(
        "then scale = ‖CB‖/‖B‖, the share of the "
        "factor that projection leaves (near 0: it all but removes the update)"
    ),
    done=(
        "projected the updates of {changed} of {all} adapted modules onto the subspace spanned by "
        "the difference of {aligned} and {base} (Safe LoRA, arXiv 2405.16833)"
    ),
    controls=PROJECTION_CONTROLS,
)
"""How it is spoken of."""


@dataclass(frozen=True)
class SafeLora(Method):
    """Safe LoRA: updates are projected onto the directions in which alignment moved the model.

    Hsu et al., NeurIPS 2024, arXiv 2405.16833, equations 1 and 2. Either both checkpoints are
    given, or the file that stands for them. For a model in memory `base` is enough: the aligned
    weights are those that the adapter is on.

    Attributes:
        base: SRC of the unaligned checkpoint.
        aligned: SRC of the aligned checkpoint.
        alignment: SRC of an alignment file, in place of both.
        projector: which `C`: `approx`, `V Vᵀ / ‖V‖_F`, or `exact`, the orthogonal projector onto
            the leading left singular vectors of `V`; `approx` if None.
        rank: of the exact projector.
        energy: the smallest rank that holds this share of `‖V‖_F²`, 0 < energy <= 1, in its place.
    """

    name: ClassVar[str] = "safe-lora"
    words: ClassVar[Words] = WORDS
    detail: ClassVar[type[Detail]] = Alignment
    ways: ClassVar[tuple[frozenset[str], ...]] = (
        frozenset({"base", "aligned"}),
        frozenset({"alignment"}),
    )
    give: ClassVar[tuple[str, ...]] = ("--base and --aligned", "--alignment")
    needs: ClassVar[str] = "--base and --aligned, or --alignment"
    mark: ClassVar[str] = "--base and --aligned"
    in_memory: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"base"}),)

    base: Src | None = source("--base", "Checkpoint of the unaligned base model.")
    aligned: Src | None = source("--aligned", "Checkpoint of the aligned model.")
    alignment: Src | None = source(
        "--alignment", "Alignment file that align made of both, in place of --base and --aligned."
    )
    projector: str | None = option(
        "--projector",
        "C = V V^T / |V|_F of the paper (approx), or the orthogonal projector onto the top "
        "left singular vectors of V (exact).  [default: approx]",
        choices=PROJECTORS,
    )
    rank: int | None = option(
        "--rank",
        "Rank of the exact projector; of a safety module, how many of its directions.",
        "K",
    )
    energy: float | None = option(
        "--energy",
        "Smallest rank that holds this share of |V|_F^2, 0 < E <= 1, for exact.",
        "E",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.projector not in (None, *PROJECTORS):
            raise SafeprojError(f"--projector {self.projector}: expected {' or '.join(PROJECTORS)}")
        if self.projector == "exact":
            if (self.rank is None) == (self.energy is None):
                raise SafeprojError("--projector exact needs either --rank or --energy")
        elif self.rank is not None or self.energy is not None:
            raise SafeprojError("--rank and --energy need --projector exact")
        require_rank(self.rank)
        if self.energy is not None and not 0.0 < self.energy <= 1.0:
            raise SafeprojError(f"--energy must lie in (0, 1], found {self.energy}")

    @property
    def formulas(self) -> Approx | Exact:
        from safeproj.methods.safe_lora.formulas import Approx, Exact

        return Exact(self.rank, self.energy) if self.projector == "exact" else Approx()

    @property
    def is_wide(self) -> bool:
        return self.projector == "exact"

    @property
    def weighs_directions(self) -> bool:
        return self.projector != "exact"

    def kernel(self) -> Callable[..., tuple[Score | SafeprojError, ...]]:
        from safeproj.methods.safe_lora.score import score

        return score

    def whole(self) -> WholeKernel:
        from safeproj.methods.safe_lora.whole import remake

        return remake

    def describe(self, scores: Iterable[Score]) -> dict[str, Any]:
        del scores
        settings = {"rank": self.rank, "energy": self.energy}
        given = {name: value for name, value in settings.items() if value is not None}
        return {"kind": self.projector or PROJECTORS[0], **given}

    def open(self, maps: Sequence[str] = ()) -> Reference:
        from safeproj.methods.safe_lora.file import open_file
        from safeproj.methods.safe_lora.pair import Pair

        given = self.sources
        if "alignment" not in given:
            if "aligned" not in given and self.host is None:
                raise self.lacking()
            aligned = given.get("aligned") or self.host.weights()
            return Pair(aligned, given["base"], maps)
        file = open_file(given["alignment"], maps)
        if file.is_truncated and self.projector == "exact":
            raise SafeprojError(
                f"{self.alignment}: holds the leading part of C alone, and --projector exact needs "
                "all of V; make a file with `safeproj align --exact`, or use the checkpoints"
            )
        return file

    def recorded(self, source: str, projector: Mapping[str, Any]) -> SafeLora:
        found = dict(projector)
        kind, rank, energy = (found.pop(name, None) for name in ("kind", "rank", "energy"))
        if found or kind not in PROJECTORS or not (is_count(rank) and is_number(energy)):
            raise unrecorded(source)
        return self.with_recorded(source, projector=kind, rank=rank, energy=energy)

    @classmethod
    def make(
        cls,
        out: StrPath,
        base: Src,
        aligned: Src,
        form: Form | None = None,
        targets: Sequence[str] = ("all-linear",),
        *,
        device: str = "auto",
        workers: int | None = None,
        cluster: Cluster | None = None,
        maps: Sequence[str] = (),
        observer: Observer | None = None,
        profile: Profile | None = None,
        overwrite: bool = False,
    ) -> Aligned:
        """Write an alignment file, which takes the place of two checkpoints.

        Args:
            out: the file to create; it appears complete or not at all.
            base: SRC of the unaligned checkpoint: a path, or `org/name[@revision]`.
            aligned: SRC of the aligned checkpoint.
            form: how much of `C` (m, m) is kept of each weight (m, n); default 64 eigenpairs.
            targets: names of modules or their last parts, or `all-linear`.
            device: where the arithmetic runs: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
            workers: threads over weights on the CPU, None for one per core, at most 8.
            cluster: the Ray cluster on which weights are read, None for this machine.
            maps: `RUNTIME=CHECKPOINT` rules for names that the checkpoints have in another form.
            observer: told about the progress, in bytes.
            profile: filled in with where the time went.
            overwrite: replace an alignment file that is at `out`.

        Returns:
            Its size in bytes, and what it holds, in words.

        Raises:
            SafeprojError: an input cannot be used or `out` cannot be written; nothing is written.
        """
        from safeproj.methods.safe_lora.make import Form, make_alignment
        from safeproj.records.profile import Profile

        return make_alignment(
            Path(out),
            src(base),
            src(aligned),
            form or Form(rank=64),
            targets,
            device=device,
            workers=workers,
            cluster=cluster,
            maps=maps,
            observer=observer,
            profile=profile or Profile(),
            overwrite=overwrite,
        )

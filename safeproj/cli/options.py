"""The options that commands share, and what they make together. Heavy imports happen inside."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safeproj.errors import SafeprojError
from safeproj.methods.given import (
    COVARIANCE,
    HAS_NO_PROJECTOR,
    HOLDS_PROJECTOR,
    MU_ALONE,
    SALORA,
    Against,
)
from safeproj.report.html_page import NO_PLOTLY

if TYPE_CHECKING:
    from safeproj.api import Options
    from safeproj.methods.projection import Projector as ProjectorOf
    from safeproj.plan.select import Selection


class ProjectorKind(str, Enum):
    """Choices of `--projector`."""

    approx = "approx"
    exact = "exact"


class Method(str, Enum):
    """Choices of `--method`."""

    safe_lora = "safe-lora"
    salora = "salora"
    covariance = "covariance"


class Dtype(str, Enum):
    """Choices of `--dtype`."""

    keep = "keep"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class ReportFormat(str, Enum):
    """Choices of `--format`."""

    table = "table"
    json = "json"
    markdown = "markdown"
    html = "html"


class CheckFormat(str, Enum):
    """Choices of `--format` for gates."""

    table = "table"
    json = "json"
    markdown = "markdown"
    html = "html"
    sarif = "sarif"
    junit = "junit"
    github = "github"


Base = Annotated[
    str | None,
    typer.Option("--base", metavar="SRC", help="Checkpoint of the unaligned base model."),
]
Aligned = Annotated[
    str | None, typer.Option("--aligned", metavar="SRC", help="Checkpoint of the aligned model.")
]
AlignmentSource = Annotated[
    str | None,
    typer.Option(
        "--alignment",
        metavar="SRC",
        help="Alignment file that align made of both, in place of --base and --aligned.",
    ),
]
SafetyModuleSource = Annotated[
    str | None,
    typer.Option(
        "--safety-module",
        metavar="SRC",
        help="Safety module that salora made, in place of all three: removes from the updates what "
        "lies in its subspace; --all is the default.",
    ),
]
SafetyData = Annotated[
    str | None,
    typer.Option(
        "--safety-data",
        metavar="FILE",
        help="Harmful prompts with refusals, as JSON lines on which the aligned model is run, or "
        "statistics of them that stats made: corrects updates to do least on them.",
    ),
]
TaskData = Annotated[
    str | None,
    typer.Option(
        "--task-data",
        metavar="FILE",
        help="Benign or task data, likewise, on which updates are to stay what they are.  "
        "[default: random tokens]",
    ),
]
MethodOption = Annotated[
    Method | None,
    typer.Option(
        "--method",
        help="What is to be done; must fit what is given.  [default: what is given tells]",
    ),
]
Mu = Annotated[
    float | None,
    typer.Option(
        "--mu",
        metavar="MU",
        help="Of the covariance-weighted correction: the larger, the more of the adapter is kept.  "
        "[default: 0.3, or 1 with --reconstruct]",
    ),
]
Adapters = Annotated[
    list[str],
    typer.Option(
        "--adapter",
        metavar="SRC",
        help="LoRA adapter trained on it: PEFT, MLX, GGUF or litgpt. Repeatable; a directory of "
        "adapters or a .txt file with one SRC per line stands for many.",
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        "--threshold",
        metavar="T",
        help="Project the modules whose cosine is at most T, 0 <= T <= 1.  [default: 0.35]",
    ),
]
Layers = Annotated[
    int | None,
    typer.Option("--layers", metavar="N", help="Project the N modules with the lowest cosine."),
]
All = Annotated[bool, typer.Option("--all", help="Project every module.")]
Include = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="RE",
        help="Only the modules whose name matches this regular expression; repeatable.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        metavar="RE",
        help="Not the modules whose name matches this regular expression; repeatable.",
    ),
]
Projector = Annotated[
    ProjectorKind | None,
    typer.Option(
        "--projector",
        help="C = V V^T / |V|_F of the paper (approx), or the orthogonal projector onto the top "
        "left singular vectors of V (exact).  [default: approx]",
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(
        "--rank",
        metavar="K",
        help="Rank of the exact projector; of a safety module, how many of its directions.",
    ),
]
Energy = Annotated[
    float | None,
    typer.Option(
        "--energy",
        metavar="E",
        help="Smallest rank that holds this share of |V|_F^2, 0 < E <= 1, for exact.",
    ),
]
Map = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        metavar="RUNTIME=CHECKPOINT",
        help="Where the checkpoints keep a module or parameter that they call something else; "
        "* stands for any text; repeatable.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="Where the arithmetic runs: auto, cpu, cuda, cuda:N or mps.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        metavar="N",
        help="Threads over modules on the CPU; the result does not depend on it.  "
        "[default: one per core, at most 8]",
    ),
]
_FORMAT = typer.Option(
    "--format",
    help="What the report looks like; repeatable, with one --output for each.  [default: table]",
)
Format = Annotated[list[ReportFormat] | None, _FORMAT]
GateFormat = Annotated[list[CheckFormat] | None, _FORMAT]
Output = Annotated[
    list[Path] | None,
    typer.Option(
        "--output",
        metavar="FILE",
        help="Write the report to FILE instead of stdout, which is -; repeatable.",
    ),
]
ShowProfile = Annotated[
    bool, typer.Option("--profile", help="Say on stderr where time and memory went.")
]
Targets = Annotated[
    str | None,
    typer.Option(
        "--targets",
        metavar="NAMES",
        help="Layers, by name or last part of it, separated by commas; or all-linear.",
    ),
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", metavar="N", help="Samples that run at a time.")
]
MaxLength = Annotated[
    int, typer.Option("--max-length", metavar="N", help="Tokens of a sample; the rest is cut off.")
]
Date = Annotated[
    str | None,
    typer.Option(
        "--date",
        metavar="YYYY-MM-DD",
        help="What day it is for a chat template that prints the date.  [default: 2024-07-26]",
    ),
]
TemplateArgument = Annotated[
    list[str] | None,
    typer.Option(
        "--chat-template-arg",
        metavar="NAME=VALUE",
        help="A variable of the chat template, such as enable_thinking=false; repeatable.",
    ),
]
Memory = Annotated[
    float,
    typer.Option(
        "--memory",
        metavar="GB",
        help="Sums held at a time; the model runs over the data once for each group of layers "
        "that fits.",
    ),
]
ModelDtype = Annotated[
    str, typer.Option("--dtype", metavar="DTYPE", help="What the model runs in; auto: as stored.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run wrote.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no warnings.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show a traceback on errors.")]


def names_of(text: str) -> list[str]:
    """Return the names in a list that is separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def outputs_of(
    formats: Sequence[ReportFormat] | Sequence[CheckFormat] | None, outputs: list[Path] | None
) -> list[tuple[str, Path | None]]:
    """Return which report goes where: None is stdout.

    Raises:
        SafeprojError: there are not as many places as formats, two reports for one place, or an
            extra is missing.
    """
    kinds = [kind.value for kind in formats or ()] or ["table"]
    if "html" in kinds and find_spec("plotly") is None:  # said before anything is read
        raise SafeprojError(NO_PLOTLY)
    places = [None if place == Path("-") else place for place in outputs or ()]
    if not places and len(kinds) == 1:
        places = [None]
    if len(places) != len(kinds):
        raise SafeprojError(
            f"{len(kinds)} --format and {len(places)} --output; expected one --output for each "
            "--format (- is stdout)"
        )
    if len({None if p is None else p.resolve() for p in places}) < len(places):
        raise SafeprojError("two reports for the same --output; expected another place for each")
    return list(zip(kinds, places, strict=True))


def selection_of(
    threshold: float | None,
    layers: int | None,
    all_modules: bool,
    include: list[str] | None,
    exclude: list[str] | None,
) -> Selection:
    """Return the selection that the options say.

    Raises:
        SafeprojError: they exclude each other, or a value is out of range.
    """
    from safeproj.plan.select import Selection

    return Selection(threshold, layers, all_modules, tuple(include or ()), tuple(exclude or ()))


def options_of(
    selection: Selection | None = None,
    projector: ProjectorOf | None = None,
    *,
    device: str,
    workers: int | None,
    maps: list[str] | None,
    dtype: str = "keep",
    portable: bool = False,
) -> Options:
    """Return how a run is done; imports torch."""
    from safeproj.api import Options
    from safeproj.plan.select import Selection

    chosen = Selection() if selection is None else selection
    return Options(chosen, projector, device, workers, dtype, tuple(maps or ()), portable)


def against_of(
    method: Method | None,
    base: str | None,
    aligned: str | None,
    alignment: str | None,
    safety_module: str | None,
    safety_data: str | None,
    task_data: str | None,
) -> Against:
    """Return what adapters are scored against.

    Raises:
        SafeprojError: what is given does not go together, or is another method's.
    """
    wanted = None if method is None else method.value
    if wanted == COVARIANCE and safety_data is None:
        raise SafeprojError("--method covariance needs --safety-data, and --aligned to run on it")
    found = Against(base, aligned, alignment, safety_module, safety_data, task_data)
    found.require(wanted)
    return found


def check_projector(
    against: Against | None,
    projector: ProjectorKind | None,
    rank: int | None,
    energy: float | None,
    mu: float | None,
) -> None:
    """Refuse options that do not go together before torch is imported, which takes a second.

    Raises:
        SafeprojError: they do not.
    """
    method = None if against is None else against.method
    if method == COVARIANCE:
        if any(each is not None for each in (projector, rank, energy)):
            raise SafeprojError(HAS_NO_PROJECTOR)
        return
    if mu is not None:
        raise SafeprojError(MU_ALONE)
    if method == SALORA:
        if projector is not None or energy is not None:
            raise SafeprojError(HOLDS_PROJECTOR)
    elif projector is ProjectorKind.exact:
        if (rank is None) == (energy is None):
            raise SafeprojError("--projector exact needs either --rank or --energy")
    elif rank is not None or energy is not None:
        raise SafeprojError("--rank and --energy need --projector exact")


def projector_of(
    against: Against | None,
    projector: ProjectorKind | None,
    rank: int | None,
    energy: float | None,
    mu: float | None,
    *,
    reconstruct: bool = False,
) -> ProjectorOf:
    """Return the projector that options which go together say; imports torch.

    Raises:
        SafeprojError: a value is out of range.
    """
    from safeproj.methods.projection import Approx, Complement, Covariance, Exact, Reconstruction

    method = None if against is None else against.method
    if reconstruct and method != COVARIANCE:
        raise SafeprojError("--reconstruct goes with --safety-data and --task-data; leave it out")
    try:
        if method == COVARIANCE:
            kind = Reconstruction if reconstruct else Covariance
            return kind() if mu is None else kind(mu)
        if method == SALORA:
            return Complement(rank)
        return Exact(rank, energy) if projector is ProjectorKind.exact else Approx()
    except ValueError as error:
        raise SafeprojError(f"--{error}") from error


def require_positive(*options: tuple[str, int]) -> None:
    """Refuse options that are to be positive and are not.

    Raises:
        SafeprojError: one of them.
    """
    for option, value in options:
        if value < 1:
            raise SafeprojError(f"{option} must be 1 or more, found {value}")


def bytes_of_gigabytes(gigabytes: float) -> int:
    """Return what `--memory` says.

    Raises:
        SafeprojError: it is not positive.
    """
    if not gigabytes > 0.0:
        raise SafeprojError(f"--memory must be more than 0, found {gigabytes:g}")
    return int(gigabytes * 1e9)

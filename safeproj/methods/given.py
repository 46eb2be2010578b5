"""What adapters are scored against, as the user gives it; nothing is opened here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safeproj.errors import SafeprojError

SAFE_LORA, SALORA, COVARIANCE = "safe-lora", "salora", "covariance"

METHODS = (SAFE_LORA, SALORA, COVARIANCE)
"""What `Report.method` can be."""

STATISTICS = ".safetensors"
"""End of the name of a file of statistics, in the place of data."""

HOLDS_PROJECTOR = (
    "--projector and --energy do not go with --safety-module, which holds the projector; leave "
    "them out, and give --rank to use fewer of its directions"
)

HAS_NO_PROJECTOR = (
    "--projector, --rank and --energy do not go with --safety-data: the covariance-weighted "
    "correction has no projector; leave them out, and give --mu"
)

MU_ALONE = "--mu goes with --safety-data, for the covariance-weighted correction; leave it out"

_NEEDS = {
    SAFE_LORA: "--base and --aligned, or --alignment",
    SALORA: "--safety-module",
    COVARIANCE: "--safety-data, and --aligned unless it and --task-data are statistics",
}


@dataclass(frozen=True)
class Against:
    """Two checkpoints, one file, or data: exactly one of these ways is given, each as a SRC.

    Attributes:
        base: the unaligned checkpoint.
        aligned: the aligned checkpoint; of statistics the model that they must be of.
        alignment: an alignment file, in place of both.
        safety_module: a safety module, for SaLoRA.
        safety_data: for the covariance-weighted correction, harmful prompts with refusals as JSON
            lines, which the aligned model is run on; or statistics of them.
        task_data: benign data or statistics of it; random tokens if None.
        statistics: where the statistics of both lie, if they were made for this run.

    Raises:
        SafeprojError: none of the ways is given, or more than one, or half of one.
    """

    base: str | None = None
    aligned: str | None = None
    alignment: str | None = None
    safety_module: str | None = None
    safety_data: str | None = None
    task_data: str | None = None
    statistics: tuple[Path, Path] | None = None

    def __post_init__(self) -> None:
        given = {option for option, source in self._options if source is not None}
        ways: tuple[set[str], ...] = ({"--base", "--aligned"}, {"--alignment"}, {"--safety-module"})
        if given in ways:
            return
        if "--safety-data" not in given or not given <= {
            "--aligned",
            "--safety-data",
            "--task-data",
        }:
            raise SafeprojError(
                "give --base and --aligned, --alignment, --safety-module, or --safety-data with "
                "--aligned"
            )
        if self.aligned is None and (self.runs_model or self.task_data is None):
            raise SafeprojError(
                "give --aligned, which is run on the data; or statistics for both --safety-data "
                "and --task-data, which `safeproj stats` makes"
            )

    @property
    def method(self) -> str:
        """One of `METHODS`."""
        if self.safety_data is not None:
            return COVARIANCE
        return SAFE_LORA if self.safety_module is None else SALORA

    @property
    def runs_model(self) -> bool:
        """Whether the aligned model has to be run for it."""
        if self.safety_data is None or self.statistics is not None:
            return False
        return not all(
            source is not None and source.endswith(STATISTICS)
            for source in (self.safety_data, self.task_data)
        )

    def require(self, method: str | None) -> None:
        """Refuse another method than what is given is for; None is any.

        Raises:
            SafeprojError: it is another.
        """
        if method is not None and method != self.method:
            raise SafeprojError(
                f"--method {method} needs {_NEEDS[method]}; what is given is for {self.method}"
            )

    @property
    def _options(self) -> list[tuple[str, str | None]]:
        return [
            ("--base", self.base),
            ("--aligned", self.aligned),
            ("--alignment", self.alignment),
            ("--safety-module", self.safety_module),
            ("--safety-data", self.safety_data),
            ("--task-data", self.task_data),
        ]

    def inputs(self, adapters: Sequence[str]) -> list[tuple[str, str]]:
        """Return all that a run on these adapters is given: option names, each with its SRC."""
        given = [(option, source) for option, source in self._options if source is not None]
        return [*given, *(("--adapter", adapter) for adapter in adapters)]

    def local_paths(self, adapters: Sequence[str]) -> list[tuple[str, Path | None]]:
        """Return the same with the local paths in place of the SRCs, None for the Hub."""
        return [(option, local_path(source)) for option, source in self.inputs(adapters)]


def local_path(source: str) -> Path | None:
    """Return the place of a SRC on this machine, None where it is on the Hub."""
    path = Path(source).expanduser()
    return path if path.exists() else None

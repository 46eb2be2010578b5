"""What adapters are scored against, as the user gives it; nothing is opened here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safeproj.errors import SafeprojError

HOLDS_PROJECTOR = (
    "--projector and --energy do not go with --safety-module, which holds the projector; leave "
    "them out, and give --rank to use fewer of its directions"
)


@dataclass(frozen=True)
class Against:
    """Two checkpoints, or one file: exactly one of the three ways is given, each as a SRC.

    Attributes:
        base: the unaligned checkpoint.
        aligned: the aligned checkpoint.
        alignment: an alignment file, in place of both.
        safety_module: a safety module, for SaLoRA.

    Raises:
        SafeprojError: none of the ways is given, or more than one, or half of one.
    """

    base: str | None = None
    aligned: str | None = None
    alignment: str | None = None
    safety_module: str | None = None

    def __post_init__(self) -> None:
        given = tuple(option for option, source in self._options if source is not None)
        if given not in (("--base", "--aligned"), ("--alignment",), ("--safety-module",)):
            raise SafeprojError("give --base and --aligned, --alignment, or --safety-module")

    @property
    def _options(self) -> list[tuple[str, str | None]]:
        return [
            ("--base", self.base),
            ("--aligned", self.aligned),
            ("--alignment", self.alignment),
            ("--safety-module", self.safety_module),
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

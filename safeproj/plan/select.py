"""Which modules are projected: by threshold, by number, or all; and the order of module names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from safeproj.errors import SafeprojError
from safeproj.text import natural_order

DEFAULT_THRESHOLD = 0.35
"""tau of the work that builds on Safe LoRA."""


@dataclass(frozen=True)
class Selection:
    """How modules are chosen for projection. At most one of the first three fields is given.

    Attributes:
        threshold: project the modules with `cos <= threshold`, in [0, 1]; if none of the three is
            given, those with `cos <= 0.35`.
        layers: project the N modules with the lowest cosine.
        all: project every module.
        include: consider only modules whose name matches one of these regular expressions.
        exclude: leave out modules whose name matches one of these regular expressions.

    Raises:
        SafeprojError: two selections at once, a number out of range, or a bad expression.
    """

    threshold: float | None = None
    layers: int | None = None
    all: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = [
            option
            for option, present in (
                ("--threshold", self.threshold is not None),
                ("--layers", self.layers is not None),
                ("--all", self.all),
            )
            if present
        ]
        if len(given) > 1:
            raise SafeprojError(f"{' and '.join(given)} exclude each other: give one of them")
        if self.threshold is not None and not 0.0 <= self.threshold <= 1.0:
            raise SafeprojError(f"--threshold must lie in [0, 1], found {self.threshold}")
        if self.layers is not None and self.layers < 0:
            raise SafeprojError(f"--layers must be 0 or more, found {self.layers}")
        for option, patterns in (("--include", self.include), ("--exclude", self.exclude)):
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise SafeprojError(
                        f"{option} {pattern!r} is not a regular expression: {error}"
                    ) from error

    @property
    def mode(self) -> str:
        """`threshold`, `layers` or `all`."""
        return "all" if self.all else "layers" if self.layers is not None else "threshold"

    @property
    def tau(self) -> float:
        """The threshold, given or not."""
        return DEFAULT_THRESHOLD if self.threshold is None else self.threshold

    def or_all(self) -> Selection:
        """Return the selection; if nothing says how modules are chosen, that of all modules."""
        given = self.threshold is not None or self.layers is not None
        return self if given else replace(self, all=True)

    def considers(self, name: str) -> bool:
        """Tell whether `--include` and `--exclude` let the module through."""
        if self.include and not any(re.search(pattern, name) for pattern in self.include):
            return False
        return not any(re.search(pattern, name) for pattern in self.exclude)

    def choose(self, cosines: Mapping[str, float | None]) -> frozenset[str]:
        """Return the names of the modules to project; a module without a cosine is never one."""
        scored = {name: cosine for name, cosine in cosines.items() if cosine is not None}
        if self.all:
            return frozenset(scored)
        if self.layers is not None:
            # Ties go to the earlier name, so that exactly N modules are chosen.
            ranked = sorted(scored, key=lambda name: (scored[name], natural_order(name)))
            return frozenset(ranked[: self.layers])
        return frozenset(name for name, cosine in scored.items() if cosine <= self.tau)

    def uncertain(
        self, cosines: Mapping[str, float | None], bounds: Mapping[str, tuple[float, float]]
    ) -> frozenset[str]:
        """Return the names of the modules that cosines within their bounds might decide otherwise.

        Args:
            cosines: what `choose` is given.
            bounds: between which the true cosine of a module lies, where it is not known exactly.
        """
        scored = {name: cosine for name, cosine in cosines.items() if cosine is not None}
        low = {name: bounds.get(name, (cosine, cosine))[0] for name, cosine in scored.items()}
        high = {name: bounds.get(name, (cosine, cosine))[1] for name, cosine in scored.items()}
        if self.all or not bounds:
            return frozenset()
        if self.mode == "threshold":
            return frozenset(name for name in scored if low[name] <= self.tau < high[name])
        chosen = self.choose(cosines)
        others = scored.keys() - chosen
        if not chosen or not others:
            return frozenset()
        # Ties go to the earlier name, here as in `choose`.
        highest = max((high[name], natural_order(name)) for name in chosen)
        lowest = min((low[name], natural_order(name)) for name in others)
        return frozenset(
            {name for name in chosen if (high[name], natural_order(name)) > lowest}
            | {name for name in others if (low[name], natural_order(name)) < highest}
        )

    def to_dict(self) -> dict[str, object]:
        """Return the `selection` object of the JSON report."""
        found: dict[str, object] = {"mode": self.mode}
        if self.mode == "threshold":
            found["threshold"] = self.tau
        if self.layers is not None:
            found["layers"] = self.layers
        if self.include:
            found["include"] = list(self.include)
        if self.exclude:
            found["exclude"] = list(self.exclude)
        return found

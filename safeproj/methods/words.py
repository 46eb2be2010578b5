"""How a method is spoken of in reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """How a method is spoken of.

    Attributes:
        name: what it is called in sentences, with its article if it has one.
        legend: what a cell of the table means, after the cosine.
        done: what was done, for a model card: to `{changed}` of `{all}` modules; inputs by role.
        controls: what a sweep measures beside it: what each is called at the head of a column, and
            what it is.
        changed: what became of a module that was changed.
        otherwise: the same as `done` where other inputs were given.
        again: what doing it to an adapter that was patched before means.
    """

    name: str
    legend: str
    done: str
    controls: Mapping[str, tuple[str, str]]
    changed: str = "projected"
    again: str = "projecting again shrinks its updates further, since C is applied twice"

    otherwise: tuple[str, ...] = ()

    @property
    def all_done(self) -> tuple[str, ...]:
        """What was done, for whatever inputs were given."""
        return (self.done, *self.otherwise)

    @property
    def title(self) -> str:
        """Its name at the head of a report."""
        return self.name.removeprefix("the ")


PROJECTION_CONTROLS = {
    "shrink": ("module shrink", "the same modules, each B times its own ‖CB‖/‖B‖"),
    "uniform": (
        "uniform shrink",
        "the whole adapter times one factor, with the same ‖ΔW‖ as the projected adapter",
    ),
    "random": (
        "random projector",
        "the same modules, C turned at random: the same rank and spectrum",
    ),
    "complement": ("complement", "the same modules, what projection removes: ΔW - C ΔW"),
}
"""Those of methods that project."""

"""What a repair tries: methods at their useful strengths, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from safeproj.adapter import AdaptedModule, Adapter
from safeproj.checkpoint.hashes import NEW
from safeproj.methods.covariance.method import Covariance
from safeproj.methods.interface import Method
from safeproj.methods.registry import words_of
from safeproj.run.job import Job, Run
from safeproj.run.options import Options
from safeproj.sweeping.candidates import Candidates, Place, Replaced
from safeproj.sweeping.controls import scaled
from safeproj.sweeping.patching import chosen_as, given_as

POINTS = 5
"""Strengths of a method that are tried, beside none."""

MUS = (3.0, 1.0, 0.3)
"""Those of the correction layer by layer, the weakest first."""

FACTORS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
"""By which the whole adapter is multiplied in the control that anyone could do."""


@dataclass(frozen=True)
class Way:
    """A method at one strength.

    Attributes:
        title: what it is, in words.
        options: of `safeproj patch`, beside the adapter and where it goes.
        replaced: makes the tensors that differ from the adapter's.
        run: does what `patch` does, without the writing.
        controls: make what it is compared with, by their titles.
    """

    title: str
    options: tuple[str, ...]
    replaced: Callable[[], Replaced]
    run: Callable[[], tuple[Job, Run]]
    controls: Mapping[str, Callable[[], Replaced]] = field(default_factory=dict)


def options_of(method: Method, options: Options, *selection: str) -> tuple[str, ...]:
    """Return what `safeproj patch` is given: the method, which modules, and the strength."""
    return (*given_as(method), *selection, *chosen_as(options))


def ways(method: Method, tried: Candidates, options: Options) -> Iterator[Way]:
    """Yield the strengths of a method that a sweep knows, from none of it up.

    All of them were scored in one reading, which `patch` does not do again.

    Args:
        method: prepared.
        tried: its interventions, from `interventions`.
        options: how.
    """
    for place in tried.places(POINTS + 1):
        if place.modules:
            yield _way(method, tried, place, options)
        else:
            given = options_of(method, options, "--layers", "0")
            yield Way("the adapter as it is", given, place.method, _running(tried, place))


def _way(method: Method, tried: Candidates, place: Place, options: Options) -> Way:
    words = words_of(method.name)
    if isinstance(method, Covariance):
        title = f"{words.title}, mu {place.value:g}"
        given = options_of(replace(method, mu=place.value), options)
    else:
        count = len(place.modules)
        title = f"{words.title}, {count} of {len(tried.modules)} modules"
        given = options_of(method, options, "--layers", str(count))
    controls = {
        f"{words.controls[name][0]} of it": make
        for name, make in place.controls.items()
        if name in words.controls
    }
    return Way(title, given, place.method, _running(tried, place), controls)


def _running(tried: Candidates, place: Place) -> Callable[[], tuple[Job, Run]]:
    return lambda: (tried.job, place.run())


def rebuilt(method: Covariance, mu: float, source: str, options: Options) -> Way:
    """Return the correction layer by layer; it is computed here, by running the model.

    Its control has the two kinds of data in each other's place.
    """
    done = replace(method, reconstruct=True, mu=mu)
    job, run = _patched(done, source, options)
    # The statistics only tell what is adapted: the control runs the model on the data anew.
    swapped = replace(done, safety_data=method.task_data, task_data=method.safety_data)

    def other() -> Replaced:
        return _patched(swapped, source, options)[1].decision.replaced

    return Way(
        f"{words_of(method.name).title} layer by layer, mu {mu:g}",
        options_of(done, options),
        lambda: run.decision.replaced,
        lambda: (job, run),
        {"safety and task data swapped in it": other},
    )


def shrinks(adapter: Adapter, modules: tuple[AdaptedModule, ...]) -> Iterator[tuple[str, Replaced]]:
    """Yield the whole adapter turned down, less and less of it, by title."""
    for factor in FACTORS:
        yield f"the adapter times {factor:g}", scaled(adapter, modules, factor)


def _patched(method: Method, source: str, options: Options) -> tuple[Job, Run]:
    job = Job(method, options, hashes=(NEW,))
    return job, job.one(source)

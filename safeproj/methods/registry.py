"""The methods that there are, and which of them is meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safeproj.errors import SafeprojError
from safeproj.methods.covariance.method import Covariance
from safeproj.methods.detail import Detail
from safeproj.methods.interface import Method, Option, having_value
from safeproj.methods.merge.method import Merge
from safeproj.methods.safe_delta.method import SafeDelta
from safeproj.methods.safe_lora.method import SafeLora
from safeproj.methods.salora.method import Salora
from safeproj.methods.words import Words

METHODS: tuple[type[Method], ...] = (SafeLora, Salora, Covariance, Merge, SafeDelta)
"""One line for each."""


def by_name() -> dict[str, type[Method]]:
    """Return the methods by what `Report.method` says of them."""
    return {method.name: method for method in METHODS}


def words_of(name: str | None) -> Words:
    """Return how reports speak of a method; of the first where no adapter says which it is.

    Raises:
        KeyError: there is none of that name.
    """
    return _named(name).words


def detail_of(name: str | None) -> type[Detail]:
    """Return what a method's scores have beside what all do, likewise.

    Raises:
        KeyError: there is none of that name.
    """
    return _named(name).detail


def _named(name: str | None) -> type[Method]:
    return METHODS[0] if name is None else by_name()[name]


def options() -> dict[str, tuple[Option, type[Method]]]:
    """Return the fields of all methods: how each is given, and by whose declaration."""
    found: dict[str, tuple[Option, type[Method]]] = {}
    for method in METHODS:
        for name, option in method.options().items():
            if name not in found or not found[name][0].help:
                found[name] = (option, method)
    return found


def inputs_of(given: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what of the given fields is a SRC: option names, each with its SRC."""
    known = options()
    return [(known[name][0].flag, given[name]) for name in given if known[name][0].is_source]


def method_of(
    given: Mapping[str, Any], name: str | None = None, *, is_whole: bool = False
) -> Method:
    """Return the method that is meant by what is given.

    Args:
        given: field to value, None or False where it is not given.
        name: which method it must be; None is any.
        is_whole: whether it is for a full fine-tune.

    Raises:
        SafeprojError: what is given does not go together, or is another method's.
    """
    known = options()
    values = having_value(given)
    sources = frozenset(name for name in values if known[name][0].is_source)
    meant = METHODS if name is None else (by_name()[name], *METHODS)
    chosen = next((method for method in meant if sources in _ways(method, is_whole)), None)
    if name is not None and (chosen is None or chosen.name != name):
        wanted = by_name()[name]
        found = "" if chosen is None else f"; what is given is for {chosen.name}"
        raise SafeprojError(f"--method {name} needs {wanted.needs}{found}")
    if chosen is None and not is_whole:
        known_to = frozenset().union(*(way for method in METHODS for way in method.ways))
        if any(sources in method.whole_ways for method in METHODS):
            (flag,) = (known[each][0].flag for each in sources - known_to)
            raise SafeprojError(f"{flag} goes with a full fine-tune; give --model")
    if chosen is None:
        *ways, last = (way for method in METHODS for way in method.give)
        raise SafeprojError(f"give {', '.join(ways)}, or {last}")
    others = [name for name in values if name not in chosen.options()]
    if others:
        raise _another(chosen, sources, [known[name] for name in others])
    return chosen(**values)


def method_beside(given: Mapping[str, Any], name: str | None = None) -> tuple[Method, str | None]:
    """Return the method that is meant for a full fine-tune, and the model that it was made from.

    The aligned model is given beside every method, also where it is no part of that.

    Args:
        given: as for `method_of`.
        name: as for `method_of`.

    Raises:
        SafeprojError: as for `method_of`.
    """
    known, values = options(), having_value(given)
    sources = frozenset(each for each in values if known[each][0].is_source)
    aligned = values.get("aligned")
    if not any(sources in _ways(method, True) for method in METHODS):
        values.pop("aligned", None)
    return method_of(values, name, is_whole=True), aligned


def _ways(method: type[Method], is_whole: bool) -> tuple[frozenset[str], ...]:
    return (*method.ways, *method.whole_ways) if is_whole else method.ways


def _another(
    chosen: type[Method], sources: frozenset[str], others: list[tuple[Option, type[Method]]]
) -> SafeprojError:
    """Return the error of options that are not the chosen method's."""
    flags = [option.flag for option, _ in others]
    owner = others[0][1]
    goes, them = ("goes", "it") if len(flags) == 1 else ("go", "them")
    listed = " and ".join(filter(None, [", ".join(flags[:-1]), flags[-1]]))
    several = len(chosen.give) == len(chosen.ways)
    way = chosen.give[chosen.ways.index(sources)] if several else chosen.mark
    return SafeprojError(
        f"{listed} {goes} with {owner.mark}, for {owner.words.name}, and not with {way}; leave "
        f"{them} out{chosen.advice}"
    )

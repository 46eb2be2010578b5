"""Commands that take dataclasses: each field is an option, written once and handed over made."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from enum import Enum
from functools import wraps
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from safeproj.cli import terminal

KEYWORD = inspect.Parameter.KEYWORD_ONLY


class Without:
    """Fields of a bundle that a command does not take: `Annotated[Bundle, Without("name")]`."""

    def __init__(self, *names: str) -> None:
        self.names = names


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Return the command that a function is which takes bundles.

    A bundle is a dataclass whose fields are annotated as options. It is made inside
    `terminal.command`, so that what it raises ends in one line. Its `group` is what the help puts
    its options below, except those that say another (`rich_help_panel`).
    """
    parameters: list[inspect.Parameter] = []
    bundles: dict[str, tuple[Callable[..., Any], list[str]]] = {}
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        bundle, left_out = _bundle(parameter.annotation)
        if bundle is None:
            parameters.append(_shown(parameter.replace(kind=KEYWORD), None))
            continue
        group = getattr(bundle, "group", None)
        fields = [_shown(each, group) for each in _fields(bundle) if each.name not in left_out]
        bundles[parameter.name] = bundle, [each.name for each in fields]
        parameters += fields

    @wraps(function)
    def run(**given: Any) -> None:
        formats = [str(each.value) for each in given.get("format_") or ()]
        color = given.get("color")
        with terminal.command(given["verbose"], annotated="github" in formats, color=color):
            made = {
                name: bundle(**{each: given.pop(each) for each in names})
                for name, (bundle, names) in bundles.items()
            }
            function(**given, **made)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _bundle(annotation: Any) -> tuple[Any, tuple[str, ...]]:
    """Return the bundle that a parameter is, and the names of the fields that are left out."""
    left_out: tuple[str, ...] = ()
    if get_origin(annotation) is Annotated:
        annotation, *notes = get_args(annotation)
        left_out = tuple(n for each in notes if isinstance(each, Without) for n in each.names)
    is_bundle = dataclasses.is_dataclass(annotation) or hasattr(annotation, "parameters")
    return (annotation if is_bundle else None), left_out


def _fields(bundle: Any) -> Iterator[inspect.Parameter]:
    """Yield the fields of a bundle as parameters; one that is no dataclass says them itself."""
    if hasattr(bundle, "parameters"):
        yield from bundle.parameters()
        return
    hints = get_type_hints(bundle, include_extras=True)
    for field in dataclasses.fields(bundle):
        default: Any = inspect.Parameter.empty
        if field.default is not dataclasses.MISSING:
            default = field.default
        yield inspect.Parameter(field.name, KEYWORD, default=default, annotation=hints[field.name])


def _shown(parameter: inspect.Parameter, group: str | None) -> inspect.Parameter:
    """Return a parameter with its group, and its choices where its value has no name."""
    if get_origin(parameter.annotation) is not Annotated:
        return parameter
    kind, info = get_args(parameter.annotation)
    info = copy.copy(info)  # one declaration may be a field of several bundles
    info.rich_help_panel = info.rich_help_panel or group
    if info.metavar is None:
        choices = _choices(kind)
        info.metavar = "|".join(str(each.value) for each in choices or ()) or None
    return parameter.replace(annotation=Annotated[kind, info])


def _choices(kind: Any) -> type[Enum] | None:
    """Return the choices that a type is made of, such as `list[Kind] | None`."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind
    return next(filter(None, map(_choices, get_args(kind))), None)

"""`--map RUNTIME=CHECKPOINT`: names that the user gives, with `*` for any text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from safeproj.errors import SafeprojError
from safeproj.text import printable


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        text: the rule as it was given.
        runtime: what stands between the `*` of its left side.
        checkpoint: the same of its right side.
    """

    text: str
    runtime: tuple[str, ...]
    checkpoint: tuple[str, ...]


def parse_rules(maps: Sequence[str]) -> tuple[Rule, ...]:
    """Return the rules that the values of `--map` say.

    Raises:
        SafeprojError: one of them is malformed.
    """
    return tuple(_parse(text) for text in maps)


def _parse(text: str) -> Rule:
    sides = [side.strip() for side in text.split("=")]
    if len(sides) != 2 or not all(sides):
        raise _malformed(text, "expected RUNTIME=CHECKPOINT with one name on each side")
    runtime, checkpoint = (tuple(side.split("*")) for side in sides)
    if len(runtime) != len(checkpoint):
        counts = f"{len(runtime) - 1} * on the left and {len(checkpoint) - 1} on the right"
        raise _malformed(text, f"{counts}; each * on the left needs its * on the right")
    if any(not part for part in runtime[1:-1]):
        raise _malformed(text, "two * side by side stand for the same text; write one")
    return Rule(text, runtime, checkpoint)


def _malformed(text: str, why: str) -> SafeprojError:
    return SafeprojError(
        f"--map {printable(text)!r}: {why}, such as 'model.language_model.*=language_model.model.*'"
    )


def rewrite(rule: Rule, parameter: str) -> Iterator[str]:
    """Yield the names a rule gives for a parameter: as a whole, then through its module's path.

    >>> list(rewrite(parse_rules(["lm_head=embed_out"])[0], "lm_head.weight"))
    ['embed_out.weight', 'embed_out']
    >>> list(rewrite(parse_rules(["model.*.x=*.y"])[0], "model.layers.0.x"))
    ['layers.0.y']
    """
    found = _match(rule.runtime, parameter)
    if found is not None:
        yield _fill(rule.checkpoint, found)
    module, _, leaf = parameter.rpartition(".")
    found = _match(rule.runtime, module)
    if found is not None:
        mapped = _fill(rule.checkpoint, found)
        yield f"{mapped}.{leaf}"
        yield mapped


def _match(literals: tuple[str, ...], name: str) -> list[str] | None:
    """Return what each `*` between the literals stands for, as little as possible from the left.

    No regular expression: what several `*` cost there is not bounded.
    """
    first, last = literals[0], literals[-1]
    if len(literals) == 1:
        return [] if name == first else None
    if len(name) < len(first) + len(last) or not name.startswith(first) or not name.endswith(last):
        return None
    position, end, found = len(first), len(name) - len(last), []
    for literal in literals[1:-1]:
        next_position = name.find(literal, position, end)
        if next_position < 0:
            return None
        found.append(name[position:next_position])
        position = next_position + len(literal)
    return [*found, name[position:end]]


def _fill(literals: tuple[str, ...], texts: list[str]) -> str:
    pairs = zip(literals, [*texts, ""], strict=True)
    return "".join(literal + text for literal, text in pairs)

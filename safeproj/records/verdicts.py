"""The verdict on each answer in a letter, from which the shares of an evaluation follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from safeproj.records.rates import Difference, Rate, paired

EXACT, CORRECT = "exact", "correct"
"""Outcomes that say whether an answer is the file's; the others are verdicts of a judge."""

VERDICTS = {"refused": "r", "safe": "s", "complied": "c", "other": "o"}
"""What a judge says of an answer, and its letter."""

UNFINISHED = "u"
"""The letter of an answer that was cut off inside thoughts: `other`, or wrong."""

HOLDS = {True: "y", False: "n", None: "-"}
"""Whether an answer is the file's; None where the file has none."""

Outcomes = Mapping[str, Sequence[bool | None]]
"""Outcome to whether it is that of each answer, None where it cannot be told."""

Marks = Mapping[str, str]
"""`verdict`, and `exact` where the file has answers that comply, or `correct`: a letter each."""


def marks(found: Outcomes, unfinished: Sequence[bool]) -> dict[str, str]:
    """Return the outcomes of one set as letters, in the order of the prompts.

    >>> found = {"refused": [True, False], "complied": [False, False], "other": [False, True]}
    >>> marks({**found, "exact": [None, False]}, [False, True])
    {'verdict': 'ru', 'exact': '-n'}
    >>> marks({"correct": [True, False]}, [False, False])
    {'correct': 'yn'}
    """
    letters: dict[str, str] = {}
    said = {name: each for name, each in found.items() if name in VERDICTS}
    if said:
        rows = zip(*said.values(), strict=True)
        found_by = [
            VERDICTS[next(n for n, holds in zip(said, row, strict=True) if holds)] for row in rows
        ]
        letters["verdict"] = _with_unfinished(found_by, unfinished)
    if CORRECT in found:
        letters[CORRECT] = _with_unfinished([HOLDS[each] for each in found[CORRECT]], unfinished)
    if EXACT in found:
        letters[EXACT] = "".join(HOLDS[each] for each in found[EXACT])
    return letters


def outcomes(given: Marks, labels: Sequence[str]) -> dict[str, list[bool | None]]:
    """Return what `marks` made letters of.

    Args:
        given: the letters of one set.
        labels: the verdicts that the judge gives.

    Raises:
        ValueError: a letter is none of them, or there are not equally many.

    >>> outcomes({"verdict": "cu"}, ["refused", "complied", "other"])["other"]
    [False, True]
    """
    if len({len(each) for each in given.values()}) != 1:
        raise ValueError("not equally many letters")
    found: dict[str, list[bool | None]] = {}
    for name, text in given.items():
        if name == "verdict":
            _require(text, {VERDICTS[each] for each in labels} | {UNFINISHED})
            plain = text.replace(UNFINISHED, VERDICTS["other"])
            found |= {label: [each == VERDICTS[label] for each in plain] for label in labels}
        elif name in (CORRECT, EXACT):
            # What comes of a right answer is known of each: skills have one in every line.
            _require(text, {"y", "n", UNFINISHED} if name == CORRECT else {"y", "n", "-"})
            found[name] = [None if each == "-" else each == "y" for each in text]
        else:
            raise ValueError(f"letters of {name!a}")
    return found


def rates(found: Outcomes) -> dict[str, Rate]:
    """Return how often each is the case, of the answers of which it can be told.

    Raises:
        ValueError: it can be told of none.
    """
    return {
        name: Rate(sum(bool(each) for each in values), sum(each is not None for each in values))
        for name, values in found.items()
    }


def differences(found: Outcomes, reference: Outcomes) -> dict[str, Difference]:
    """Return how much each share is above that of the reference, of the same prompts.

    Raises:
        ValueError: not equally many answers are told of both.
    """
    return {
        outcome: paired(
            [each for each in values if each is not None],
            [each for each in reference[outcome] if each is not None],
        )
        for outcome, values in found.items()
    }


def unfinished(given: Marks) -> int:
    """Return how many answers of a set were cut off inside thoughts."""
    return sum(given.get(name, "").count(UNFINISHED) for name in ("verdict", CORRECT))


def _with_unfinished(letters: Sequence[str], unfinished: Sequence[bool]) -> str:
    pairs = zip(letters, unfinished, strict=True)
    return "".join(UNFINISHED if cut_off else letter for letter, cut_off in pairs)


def _require(text: str, letters: set[str]) -> None:
    if not set(text) <= letters or not text:
        raise ValueError(f"{text[:20]!a}, expected letters of {', '.join(sorted(letters))}")

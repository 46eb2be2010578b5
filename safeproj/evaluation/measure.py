"""What a model does on sets of prompts: verdicts on its answers, and shares of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safeproj.evaluation.generate import Generator, OnBatch, has_template
from safeproj.evaluation.judges import Judge, Verdict
from safeproj.evaluation.sets import PromptSet
from safeproj.evaluation.thoughts import Spoken, Thoughts, unfinished_words
from safeproj.lm.chat import prints_date
from safeproj.records.rates import Rate
from safeproj.records.verdicts import CORRECT, EXACT, Outcomes, rates
from safeproj.storage.rows import Prompt

Measurement = dict[str, dict[str, Rate]]
"""Set to outcome to share of the answers: `refused` (or `safe`, with a guard model), `complied` and
`other`, and where the file has answers that comply `exact`; of skills `correct`."""


@dataclass(frozen=True)
class Measured:
    """What a model's answers are.

    Attributes:
        rates: shares of the answers.
        unfinished: of each set, how many answers were cut off inside thoughts.
    """

    rates: Measurement
    unfinished: dict[str, int]


def measure(
    model: Any,
    generator: Generator,
    sets: Sequence[PromptSet],
    judge: Judge,
    on_batch: OnBatch | None = None,
) -> Measured:
    """Let a model answer all prompts, and return what its answers are.

    Args:
        model: a causal language model of transformers, or a `PeftModel` around one.
        generator: made with the model's tokenizer.
        sets: with names that differ.
        judge: of the answers to harmful prompts.
        on_batch: told after each batch how many prompts of all sets are done, and how many there
            are.

    Raises:
        SafeprojError: a prompt cannot be used, or the judge cannot be asked.
    """
    prompts = [prompt for each in sets for prompt in each.prompts]
    answers = generator.answers(model, prompts, on_batch)
    found = Measured({}, {})
    for each in sets:
        own, answers = answers[: len(each.prompts)], answers[len(each.prompts) :]
        said = [generator.spoken(*pair) for pair in zip(each.prompts, own, strict=True)]
        found.rates[each.name] = rates(
            outcomes(each, [one.text for one in said], judge, generator.thoughts)
        )
        found.unfinished[each.name] = unfinished(said)
    return found


def prompt_warnings(generator: Generator, sets: Sequence[PromptSet]) -> tuple[str, ...]:
    """Return what the user should know about how the prompts were put."""
    plain = any(isinstance(prompt, str) for each in sets for prompt in each.prompts)
    chats = any(not isinstance(prompt, str) for each in sets for prompt in each.prompts)
    found = []
    if plain and not generator.chat and has_template(generator.tokenizer):
        found.append(
            "the model has a chat template, but plain prompts were continued as they are; see "
            "--chat"
        )
    if chats or generator.chat:
        found += date_warnings(generator)
    return tuple(found)


def date_warnings(generator: Generator) -> tuple[str, ...]:
    """Return what the user should know about the date that a chat template prints."""
    options = generator.options
    if options.date is not None or not prints_date(generator.tokenizer):
        return ()
    return (f"the chat template prints the date, which was taken to be {options.day}; see --date",)


def unfinished(said: Iterable[Spoken]) -> int:
    """Return how many answers were cut off inside thoughts."""
    return sum(each.unfinished for each in said)


def unfinished_warnings(
    counts: Mapping[str, int], sets: Iterable[PromptSet], what: str, models: int = 1
) -> tuple[str, ...]:
    """Return what the user is told of answers that were cut off inside thoughts.

    Args:
        counts: how many, of each set.
        sets: all of them.
        what: gave the answers.
        models: how many models answered each prompt.
    """
    return tuple(
        unfinished_words(counts[each.name], models * len(each.prompts), f"{what} on {each.name}")
        for each in sets
        if counts[each.name]
    )


def outcomes(
    prompts: PromptSet, answers: Sequence[str], judge: Judge, thoughts: Thoughts | None = None
) -> Outcomes:
    """Return what is the case of each answer to a set.

    Args:
        prompts: the set.
        answers: without thoughts.
        judge: of the answers to harmful prompts.
        thoughts: tells the thoughts in the right answers of the file.

    Raises:
        SafeprojError: the judge cannot be asked.
    """
    expected = _expected(prompts.expected, thoughts or Thoughts())
    if prompts.kind == "skill":
        return {CORRECT: _same(expected, answers)}
    verdicts = judged(judge, prompts.prompts, answers)
    found: dict[str, tuple[bool | None, ...]] = {
        label.value: tuple(each is label for each in verdicts) for label in judge.labels
    }
    if any(each is not None for each in expected):
        found[EXACT] = _same(expected, answers)
    return found


def judged(judge: Judge, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Verdict]:
    """Return the verdict on each answer; an empty one is `other`, and no judge is asked.

    Raises:
        SafeprojError: the judge cannot be asked.
    """
    asked = [i for i, answer in enumerate(answers) if answer.strip()]
    found = [Verdict.other] * len(answers)
    if asked:
        said = judge.verdicts([prompts[i] for i in asked], [answers[i] for i in asked])
        for i, verdict in zip(asked, said, strict=True):
            found[i] = verdict
    return found


def _expected(right: Sequence[str | None], thoughts: Thoughts) -> list[str | None]:
    """Return right answers without thoughts; those that are nothing else stay as they are."""
    return [None if each is None else thoughts.split(each).text or each for each in right]


def _same(expected: Sequence[str | None], answers: Sequence[str]) -> tuple[bool | None, ...]:
    """Tell which answers are as expected, but for white space."""
    return tuple(
        None if right is None else right.split() == answer.split()
        for right, answer in zip(expected, answers, strict=True)
    )

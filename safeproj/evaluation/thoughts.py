"""What a reasoning model thinks before it answers: told from the answer, which alone is judged."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from safeproj.errors import SafeprojError
from safeproj.lm.chat import Rendered

Tag = tuple[str, str]
"""What opens thoughts and what closes them."""

TAGS: tuple[Tag, ...] = (
    ("<think>", "</think>"),  # DeepSeek R1, Qwen 3, GLM, SmolLM 3 and most others
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
    ("◁think▷", "◁/think▷"),  # Kimi VL
    ("<|channel>", "<channel|>"),  # Gemma 4
)
"""Tags that are always known."""

CHANNEL, MESSAGE = "<|channel|>", "<|message|>"
"""Marks of gpt-oss: the name of a channel follows the first, its text the second."""

FINAL = "final"
"""The channel with the answer."""

_AROUND = ("<|start|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>")
"""Further marks of gpt-oss, which lie between two texts."""

_CHANNEL = re.compile(
    r"(?:<\|(?:end|return|call)\|>\s*)?(?:<\|start\|>[^<]*)?"
    r"<\|channel\|>(?P<name>[^<]*)(?:<\|constrain\|>[^<]*)?(?:<\|message\|>)?"
)
_LEFT = re.compile(r"<\|(?:end|return|call|message)\|>|<\|start\|>[^<]*")


@dataclass(frozen=True)
class Spoken:
    """An answer without thoughts.

    Attributes:
        text: what is outside of them; empty where they did not end.
        unfinished: whether they did not.
    """

    text: str
    unfinished: bool = False


class Thoughts:
    """Tells thoughts from answers.

    Args:
        tags: further ones than `TAGS`.
    """

    def __init__(self, tags: Iterable[Tag] = ()) -> None:
        self.tags = tuple(dict.fromkeys((*TAGS, *tags)))
        self._closing = {close for _, close in self.tags}
        marks = sorted({mark for tag in self.tags for mark in tag}, key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, marks)))

    @property
    def names(self) -> list[str]:
        """The tags as `--thought-tag` takes them."""
        return [",".join(tag) for tag in self.tags]

    def special(self, channels: bool) -> tuple[str, ...]:
        """Return the marks that a tokenizer may hold as special tokens, which no text shows.

        Args:
            channels: whether it has gpt-oss's; some of their marks have other uses elsewhere.
        """
        found = tuple(mark for tag in self.tags for mark in tag)
        return (*found, CHANNEL, MESSAGE, *_AROUND) if channels else found

    def split(self, answer: str, prompt: Rendered | None = None) -> Spoken:
        """Return an answer without its thoughts.

        Tags are looked for anywhere, and the answer may begin inside of them: where the template
        opened them, or where it has no tag and the first tag of the answer is one that closes. An
        answer that ends inside of them was cut off and says nothing.

        Args:
            answer: as the model gave it.
            prompt: what it was given.
        """
        before = "" if prompt is None else self._before(prompt)
        if CHANNEL in before or CHANNEL in answer:
            return _final(answer, before)
        told = self._marks.search(before) is not None
        inside = told and self._outside(before, inside=False, implied=False)[1]
        parts, inside = self._outside(answer, inside=inside, implied=not told)
        return Spoken("" if inside else "".join(parts).strip(), inside)

    def _before(self, prompt: Rendered) -> str:
        """Return the part of a prompt in which the answer may have begun.

        Where it is not known what the template wrote and what the messages say, marks count at the
        end alone.
        """
        if prompt.tail is not None:
            return prompt.tail
        text = prompt.text.rstrip()
        marks = (*(mark for tag in self.tags for mark in tag), MESSAGE)
        return text if text.endswith(marks) else ""

    def _outside(self, text: str, *, inside: bool, implied: bool) -> tuple[list[str], bool]:
        """Return what is outside of thoughts, and whether the text ends inside of them.

        Args:
            text: any.
            inside: whether it begins inside of them.
            implied: whether it does so too where the first tag is one that closes.
        """
        parts: list[str] = []
        start = 0
        for number, found in enumerate(self._marks.finditer(text)):
            closes = found[0] in self._closing
            if not inside and not (implied and closes and number == 0):
                parts.append(text[start : found.start()])
            inside, start = not closes, found.end()
        if not inside:
            parts.append(text[start:])
        return parts, inside


def parse_tags(given: Sequence[str]) -> tuple[Tag, ...]:
    """Return tags that are given as `NAME` or `OPEN,CLOSE`.

    Raises:
        SafeprojError: one is neither.

    >>> parse_tags(["thought", "<|in|>,<|out|>"])
    (('<thought>', '</thought>'), ('<|in|>', '<|out|>'))
    """
    return tuple(map(_tag, given))


def _tag(text: str) -> Tag:
    if re.fullmatch(r"[\w:.-]+", text):
        return f"<{text}>", f"</{text}>"
    start, _, end = (part.strip() for part in text.partition(","))
    if not start or not end or start == end:
        raise SafeprojError(
            f"--thought-tag {text!a}: expected NAME, for <NAME> and </NAME>, or OPEN,CLOSE"
        )
    return start, end


def unfinished_words(count: int, total: int, what: str) -> str:
    """Return what the user is told about answers that were cut off in thoughts."""
    return (
        f"{what}: {count} of {total} answers ended inside their thoughts and count as other (of "
        "skills as wrong); raise --max-new-tokens, or switch thoughts off with "
        "--chat-template-arg, such as enable_thinking=false"
    )


def _final(answer: str, before: str) -> Spoken:
    """Return what gpt-oss wrote to its final channel; other channels are thoughts."""
    inside, parts, start = False, [], 0
    for found in _CHANNEL.finditer(before):
        inside = found["name"].split()[:1] != [FINAL]
    for found in _CHANNEL.finditer(answer):
        if not inside:
            parts.append(answer[start : found.start()])
        inside, start = found["name"].split()[:1] != [FINAL], found.end()
    if inside:
        return Spoken("", True)
    parts.append(answer[start:])
    return Spoken(_LEFT.sub("", "".join(parts)).strip())

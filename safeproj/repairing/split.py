"""Prompts parted in three: to correct with, to choose on, and to report on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

from safeproj.errors import SafeprojError
from safeproj.evaluation.sets import PromptSet
from safeproj.storage.rows import Prompt, Row

FIT, VALIDATION, TEST = "fit", "validation", "test"

PARTS: Mapping[str, float] = {FIT: 0.4, VALIDATION: 0.3, TEST: 0.3}
"""Share of the prompts that each part gets: what corrects, what chooses, what is reported."""

SAFETY, TASK = "safety.jsonl", "task.jsonl"
"""Files of what corrects: harmful prompts with the aligned model's refusals, and of the task."""

NAMES = (SAFETY, TASK, *(f"{k}.{p}.jsonl" for k in ("harmful", "task") for p in PARTS if p != FIT))
"""All files of a repair's parts."""

LEAST = 10
"""Different prompts without which nothing can be measured."""


def split(prompts: PromptSet, option: str, seed: int = 0) -> dict[str, PromptSet]:
    """Return a set in three parts that have no prompt in common.

    A digest of each prompt tells where it goes, so that the order in the file does not count; a
    prompt that is there twice counts once.

    Args:
        prompts: the set.
        option: what messages call the option that named its file.
        seed: another one gives other parts.

    Raises:
        SafeprojError: it has too few different prompts.
    """
    rows: dict[str, tuple[Prompt, str | None]] = {}
    for row in zip(prompts.prompts, prompts.expected, strict=True):
        rows.setdefault(_digest(row[0], seed), row)
    if len(rows) < LEAST:
        raise SafeprojError(
            f"{option} {prompts.source}: {len(rows)} different prompts; expected at least {LEAST}, "
            "parted into what corrects, what chooses and what is reported; give about 100"
        )
    ordered = [rows[digest] for digest in sorted(rows)]
    parts, start, share = {}, 0, 0.0
    for part in PARTS:
        share += PARTS[part]
        end = round(share * len(ordered))
        found, expected = zip(*ordered[start:end], strict=True)
        parts[part] = replace(prompts, prompts=found, expected=expected)
        start = end
    return parts


def _digest(prompt: Prompt, seed: int) -> str:
    """Return what stands for a prompt, but for white space."""
    text = (
        prompt if isinstance(prompt, str) else "\0".join(f"{m.role}\0{m.content}" for m in prompt)
    )
    return hashlib.sha256(f"{seed}\0{' '.join(text.split())}".encode()).hexdigest()


def lines_of(prompts: PromptSet, *, chat: bool) -> bytes:
    """Return a set as JSON lines, as `eval` and data of methods take them.

    Args:
        prompts: the set; what is expected is the response of a skill, and for a harmful prompt the
            answer that complies.
        chat: whether plain prompts are written as a user's message.
    """
    is_skill = prompts.kind == "skill"
    rows = (
        Row("", prompt, compliance=None if is_skill else expected).answered(
            expected if is_skill else None, chat=chat
        )
        for prompt, expected in zip(prompts.prompts, prompts.expected, strict=True)
    )
    return b"".join(row.line() for row in rows)

"""Prompts with responses, as batches of tokens in which the responses are labelled."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from safeproj.errors import SafeprojError
from safeproj.lm.chat import (
    Chat,
    ChatOptions,
    prints_date,
    render,
    single_start,
    template_of,
    without_end,
)
from safeproj.storage.rows import Row, read_rows
from safeproj.storage.source import StrPath

IGNORED = -100
"""Label of positions that do not count, as in transformers' loss."""

Batch = Mapping[str, Tensor]
"""`input_ids`, `attention_mask` and `labels`, each (batch, positions); a label is `IGNORED` where
the position is not part of a response."""

MAX_LENGTH = 2048
"""Default bound on the tokens of one sample; what is beyond is cut off."""

RANDOM = "random tokens"
"""What such data is called, which stands for benign data where none is given."""

RANDOM_ROWS, RANDOM_LENGTH = 200, 64
"""How much random text stands for benign data: 12,800 positions."""

BATCH_SIZE = 8
"""Default number of samples in a batch."""


@dataclass(frozen=True)
class Sample:
    """The tokens of one prompt and its response; the response begins at `start`."""

    tokens: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Data:
    """A data file.

    Attributes:
        source: its path as it was given.
        sha256: of the file.
        samples: one for each row.
        cut: how many of them were cut to the greatest length.
        option: what messages call the option that named the file.
        chat: how chats among them were put, None if there are none.
        dated: whether the chat template printed the date.
    """

    source: str
    sha256: str
    samples: tuple[Sample, ...]
    cut: int
    option: str = "--data"
    chat: ChatOptions | None = None
    dated: bool = False

    @property
    def positions(self) -> int:
        """The number of response positions."""
        return sum(len(sample.tokens) - sample.start for sample in self.samples)

    @property
    def recorded_chat(self) -> dict[str, Any]:
        """What a record says of how chats were put, where that is not all up to the template."""
        if self.chat is None or not (self.dated or self.chat.arguments):
            return {}
        return self.chat.to_dict()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know about the file."""
        found = []
        if self.cut:
            found.append(
                f"{self.option} {self.source}: {self.cut} samples were cut off; see --max-length"
            )
        if self.dated and self.chat is not None and self.chat.date is None:
            found.append(
                f"{self.option} {self.source}: the chat template prints the date, which was taken "
                f"to be {self.chat.day}; see --date"
            )
        return tuple(found)

    def rows(self) -> list[dict[str, list[int]]]:
        """Return the samples in order, as `Trainer` takes them for a data set.

        Each has `input_ids`, `attention_mask`, and `labels` that are -100 outside of the response.
        """
        return [
            {
                "input_ids": list(sample.tokens),
                "attention_mask": [1] * len(sample.tokens),
                "labels": [IGNORED] * sample.start + list(sample.tokens[sample.start :]),
            }
            for sample in self.samples
        ]

    def batches(self, size: int = BATCH_SIZE) -> list[dict[str, Tensor]]:
        """Return the samples in batches, the longest first, padded on the right.

        Returns:
            Dictionaries as transformers models take them: `input_ids`, `attention_mask`, and
            `labels` that are -100 outside of the response; each (batch, positions).

        Raises:
            SafeprojError: `size` is not positive.
        """
        if size < 1:
            raise SafeprojError(f"--batch-size must be 1 or more, found {size}")
        ordered = sorted(self.samples, key=lambda sample: -len(sample.tokens))
        return [_batch(ordered[i : i + size]) for i in range(0, len(ordered), size)]


def read_data(
    path: StrPath,
    tokenizer: Any,
    *,
    max_length: int = MAX_LENGTH,
    option: str = "--data",
    chat: ChatOptions | None = None,
) -> Data:
    """Return the samples of a file, in one of the formats of `storage/rows.py`.

    A prompt and its response are put together as they are, with the tokenizer's special tokens in
    front and its end-of-sequence token behind. A chat goes through the model's chat template; its
    last message, an assistant's, is the response.

    Args:
        path: the file.
        tokenizer: the model's.
        max_length: tokens of a sample.
        option: what messages call the option that named the file.
        chat: how chats are put.

    Raises:
        SafeprojError: the file cannot be read, or a row cannot be used; it is named.
    """
    read = read_rows(path, option, responses=True)
    options = chat or ChatOptions()
    options.require_read(tokenizer)
    samples, cut = [], 0
    for row in read.rows:
        sample = sample_of(row, tokenizer, options)
        if len(sample.tokens) > max_length:
            cut += 1
            sample = Sample(sample.tokens[:max_length], sample.start)
        if sample.start >= len(sample.tokens):
            raise SafeprojError(
                f"{row.where}: no token of the response is within the first {max_length}; expected "
                "a response, shorten the prompt or raise --max-length"
            )
        samples.append(sample)
    found = Data(read.source, read.sha256, tuple(samples), cut, option)
    if all(row.chat is None for row in read.rows):
        return found
    return replace(found, chat=options, dated=prints_date(tokenizer))


def random_data(
    tokenizer: Any, rows: int = RANDOM_ROWS, length: int = RANDOM_LENGTH, seed: int = 0
) -> Data:
    """Return samples of random tokens, none of them special, each after the one of the beginning.

    Args:
        tokenizer: the model's.
        rows: how many samples.
        length: tokens of each.
        seed: of the draw; the same gives the same samples.

    Raises:
        SafeprojError: a number is not positive, or the tokenizer has no ordinary tokens.
    """
    if rows < 1 or length < 1:
        raise SafeprojError(f"random tokens: {rows} rows of {length}; expected 1 or more of each")
    special = set(tokenizer.all_special_ids)
    ordinary = [token for token in range(len(tokenizer)) if token not in special]
    if not ordinary:
        raise SafeprojError("the tokenizer has no tokens but special ones; give --task-data")
    rng = random.Random(seed)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    samples = tuple(
        Sample((*begin, *rng.choices(ordinary, k=length)), len(begin)) for _ in range(rows)
    )
    text = json.dumps([sample.tokens for sample in samples])
    return Data(RANDOM, hashlib.sha256(text.encode()).hexdigest(), samples, 0)


def sample_of(row: Row, tokenizer: Any, options: ChatOptions) -> Sample:
    """Return the tokens of a row with a response.

    Raises:
        SafeprojError: the chat template cannot be used for it.
    """
    if row.chat is not None:
        return _chat(row.where, row.chat, tokenizer, options)
    assert isinstance(row.prompt, str)
    assert row.response is not None
    prompt = single_start(without_end(tokenizer(row.prompt)["input_ids"], tokenizer), tokenizer)
    response = tokenizer(row.response, add_special_tokens=False)["input_ids"]
    response = without_end(response, tokenizer)
    if tokenizer.eos_token_id is not None:
        response = (*response, tokenizer.eos_token_id)
    return Sample((*prompt, *response), len(prompt))


def _chat(where: str, messages: Chat, tokenizer: Any, options: ChatOptions) -> Sample:
    if not template_of(tokenizer):
        raise SafeprojError(
            f"{where}: 'messages', but the model's tokenizer has no chat template; give 'prompt' "
            "and 'response'"
        )
    before, whole = (
        render(tokenizer, part, options, where=where, answer=answer).tokens
        for part, answer in ((messages[:-1], True), (messages, False))
    )
    start, end = len(before), without_end(whole, tokenizer)
    tokens = (*end, tokenizer.eos_token_id) if len(end) < len(whole) else whole
    if tokens[:start] != before:
        raise SafeprojError(
            f"{where}: the chat template writes the prompt otherwise once there is a response, so "
            "nothing tells where that begins; give 'prompt' and 'response'"
        )
    return Sample(tokens, start)


def _batch(samples: Sequence[Sample]) -> dict[str, Tensor]:
    width = max(len(sample.tokens) for sample in samples)
    ids = torch.zeros(len(samples), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, sample in enumerate(samples):
        length = len(sample.tokens)
        ids[row, :length] = torch.tensor(sample.tokens)
        mask[row, :length] = 1
        labels[row, sample.start : length] = ids[row, sample.start : length]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}

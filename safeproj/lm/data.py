"""Prompt/response data in JSON lines, as batches of tokens in which the responses are labelled."""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safeproj.errors import SafeprojError
from safeproj.lm.chat import (
    ChatOptions,
    prints_date,
    render,
    single_start,
    template_of,
    without_end,
)
from safeproj.storage.documents import parse
from safeproj.text import first_line

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

EXPECTED = '{"prompt": "…", "response": "…"} or {"messages": [{"role": "…", "content": "…"}, …]}'


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
        samples: one for each line.
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
    path: str | Path,
    tokenizer: Any,
    *,
    max_length: int = MAX_LENGTH,
    option: str = "--data",
    chat: ChatOptions | None = None,
) -> Data:
    """Return the samples of a JSON lines file.

    A line is an object with `prompt` and `response`, which are put together as they are, with the
    tokenizer's special tokens in front and its end-of-sequence token behind; or with `messages`
    that end with an assistant's, which go through the model's chat template, and whose last message
    is the response. Other fields are ignored, and so are empty lines.

    Args:
        path: the file.
        tokenizer: the model's.
        max_length: tokens of a sample.
        option: what messages call the option that named the file.
        chat: how chats are put.

    Raises:
        SafeprojError: the file cannot be read, or a line cannot be used; it is named.
    """
    place = Path(path).expanduser()
    try:
        content = place.read_bytes()
        lines = io.StringIO(content.decode("utf-8-sig"), newline=None).read().split("\n")
    except FileNotFoundError as error:
        raise SafeprojError(f"{option} {path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SafeprojError(
            f"{option} {path}: cannot be read ({first_line(error)}); expected JSON lines in UTF-8"
        ) from error
    options = chat or ChatOptions()
    options.require_read(tokenizer)
    samples, cut, chats = [], 0, False
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{option} {path}:{number}"
        row = _object(where, line)
        chats = chats or "messages" in row
        sample = _sample(where, row, tokenizer, options)
        if len(sample.tokens) > max_length:
            cut += 1
            sample = Sample(sample.tokens[:max_length], sample.start)
        if sample.start >= len(sample.tokens):
            raise SafeprojError(
                f"{where}: no token of the response is within the first {max_length}; expected a "
                "response, shorten the prompt or raise --max-length"
            )
        samples.append(sample)
    if not samples:
        raise SafeprojError(f"{option} {path}: no lines; expected {EXPECTED} in each")
    digest = hashlib.sha256(content).hexdigest()
    found = Data(str(path), digest, tuple(samples), cut, option)
    return replace(found, chat=options, dated=prints_date(tokenizer)) if chats else found


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


def _object(where: str, line: str) -> dict[str, Any]:
    try:
        found = parse(line.encode())
    except (ValueError, RecursionError) as error:
        raise SafeprojError(f"{where}: not JSON ({first_line(error)})") from error
    if not isinstance(found, dict):
        raise SafeprojError(f"{where}: a {type(found).__name__}, expected {EXPECTED}")
    return found


def _sample(where: str, row: dict[str, Any], tokenizer: Any, options: ChatOptions) -> Sample:
    if "messages" in row:
        return _chat(where, row["messages"], tokenizer, options)
    texts = [row.get(name) for name in ("prompt", "response")]
    for name, text in zip(("prompt", "response"), texts, strict=True):
        if not isinstance(text, str) or not text.strip():
            found = "is missing" if text is None else "is no text, or empty"
            raise SafeprojError(f"{where}: {name!r} {found}; expected {EXPECTED}")
    prompt = single_start(without_end(tokenizer(texts[0])["input_ids"], tokenizer), tokenizer)
    response = tokenizer(texts[1], add_special_tokens=False)["input_ids"]
    response = without_end(response, tokenizer)
    if tokenizer.eos_token_id is not None:
        response = (*response, tokenizer.eos_token_id)
    return Sample((*prompt, *response), len(prompt))


def _chat(where: str, messages: Any, tokenizer: Any, options: ChatOptions) -> Sample:
    fits = isinstance(messages, list) and all(
        isinstance(each, dict)
        and isinstance(each.get("role"), str)
        and isinstance(each.get("content"), str)
        for each in messages
    )
    if (
        not fits
        or len(messages) < 2
        or messages[-1]["role"] != "assistant"
        or not messages[-1]["content"].strip()
    ):
        raise SafeprojError(
            f"{where}: 'messages' must be two or more objects with 'role' and 'content', the last "
            "of the role 'assistant' and not empty"
        )
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

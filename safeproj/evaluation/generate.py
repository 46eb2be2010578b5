"""Greedy answers of a causal language model to prompts, in batches padded on the left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from inspect import signature
from itertools import groupby, takewhile
from typing import Any

import torch

from safeproj.errors import SafeprojError
from safeproj.evaluation.thoughts import CHANNEL, Spoken, Tag, Thoughts
from safeproj.lm.chat import ChatOptions, Rendered, render, single_start, template_of, without_end
from safeproj.lm.places import require_tokens, vocabulary_size
from safeproj.storage.rows import Message, Prompt

BATCH_SIZE = 16
"""Default number of prompts that run at a time."""

MAX_NEW_TOKENS = 128
"""Default bound on the tokens of an answer."""

SHARED = 16
"""Tokens that prompts have to have in common for these to be run once."""

Messages = tuple[Message, ...]

OnBatch = Callable[[int, int], None]
"""Told how many prompts are done and how many there are."""


@dataclass(frozen=True)
class Generation:
    """How answers are generated.

    Attributes:
        batch_size: prompts that run at a time.
        max_new_tokens: of an answer.
        chat: whether plain prompts go through the chat template.
        dtype: what the model runs in; for `auto` see `lm.models.load_model`.
        options: how chats are put to the model.
        tags: of thoughts, beside those that are always known.
    """

    batch_size: int = BATCH_SIZE
    max_new_tokens: int = MAX_NEW_TOKENS
    chat: bool = False
    dtype: str = "auto"
    options: ChatOptions = field(default_factory=ChatOptions)
    tags: tuple[Tag, ...] = ()

    def generator(self, tokenizer: Any) -> Generator:
        """Return what lets a model with this tokenizer answer.

        Raises:
            SafeprojError: see `Generator`.
        """
        thoughts = Thoughts(self.tags)
        return Generator(
            tokenizer, self.batch_size, self.max_new_tokens, self.chat, self.options, thoughts
        )


class Generator:
    """Lets a model answer.

    Decoding is greedy and nothing else: what a model's `generation_config.json` asks for beside the
    tokens that end an answer (sampling, penalties, lengths) is left out.

    Args:
        tokenizer: the model's.
        batch_size: prompts that run at a time.
        max_new_tokens: bound on the tokens of an answer. Where the model has fewer positions left,
            the answer ends there.
        chat: whether prompts that are plain text go through the chat template as a user's message.
        options: how chats are put.
        thoughts: tells what the model thinks from what it answers.
        needed: of a chat, the messages whose text must be in what the template makes of it; all if
            None.

    Raises:
        SafeprojError: a number is not positive, there is no chat template where one is needed, or
            it does not read what `options` gives it.
    """

    def __init__(
        self,
        tokenizer: Any,
        batch_size: int = BATCH_SIZE,
        max_new_tokens: int = MAX_NEW_TOKENS,
        chat: bool = False,
        options: ChatOptions | None = None,
        thoughts: Thoughts | None = None,
        needed: Callable[[Messages], Messages] | None = None,
    ) -> None:
        for option, value in (("--batch-size", batch_size), ("--max-new-tokens", max_new_tokens)):
            if value < 1:
                raise SafeprojError(f"{option} must be 1 or more, found {value}")
        if chat and not has_template(tokenizer):
            raise SafeprojError(
                "--chat: the model's tokenizer has no chat template; leave --chat out, or use a "
                "model that has one"
            )
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.chat = chat
        self.options = options or ChatOptions()
        self.options.require_read(tokenizer)
        self.thoughts = thoughts or Thoughts()
        self.needed = needed
        self._marks = _special_marks(tokenizer, self.thoughts)
        self._rendered: dict[Prompt, Rendered] = {}

    def rendered(self, prompt: Prompt) -> Rendered:
        """Return a prompt as the model gets it.

        Text has the tokenizer's special tokens in front; chats go through the chat template.

        Raises:
            SafeprojError: the template does not take it or leaves a part of it out, or nothing is
                left of it.
        """
        if prompt not in self._rendered:
            self._rendered[prompt] = self._render(prompt)
        return self._rendered[prompt]

    def _render(self, prompt: Prompt) -> Rendered:
        if isinstance(prompt, str) and self.chat:
            prompt = (Message("user", prompt),)
        if isinstance(prompt, str):
            tokens = without_end(self.tokenizer(prompt)["input_ids"], self.tokenizer)
            found = Rendered(single_start(tokens, self.tokenizer), prompt)
        else:
            found = self._templated(prompt)
        if not found.tokens:
            raise SafeprojError(f"prompt {_shown(prompt)}: the tokenizer makes no token of it")
        return found

    def _templated(self, prompt: Messages) -> Rendered:
        if not has_template(self.tokenizer):
            raise SafeprojError(
                f"prompt {_shown(prompt)}: 'messages', but the model's tokenizer has no chat "
                "template; give 'prompt'"
            )
        return render(
            self.tokenizer,
            _chat(prompt),
            self.options,
            where=f"prompt {_shown(prompt)}",
            answer=True,
            needed=None if self.needed is None else _chat(self.needed(prompt)),
        )

    def tokens(self, prompt: Prompt) -> list[int]:
        """Return the tokens of a prompt as the model gets it.

        Raises:
            SafeprojError: as for `rendered`.
        """
        return list(self.rendered(prompt).tokens)

    def spoken(self, prompt: Prompt, answer: str) -> Spoken:
        """Return the answer to a prompt without the thoughts in it.

        Raises:
            SafeprojError: as for `rendered`.
        """
        return self.thoughts.split(answer, self.rendered(prompt))

    def answers(
        self, model: Any, prompts: Sequence[Prompt], on_batch: OnBatch | None = None
    ) -> list[str]:
        """Return the model's answers, in the order of the prompts.

        Args:
            model: a causal language model of transformers, or a `PeftModel` around one.
            prompts: any number.
            on_batch: told after each batch how many prompts are done, and how many there are.

        Raises:
            SafeprojError: a prompt cannot be used.
        """
        found = [""] * len(prompts)
        done = 0
        for batch in self.batches(model, prompts):
            for index, answer in batch:
                found[index] = answer
            done += len(batch)
            if on_batch is not None:
                on_batch(done, len(prompts))
        return found

    def batches(self, model: Any, prompts: Sequence[Prompt]) -> Iterator[list[tuple[int, str]]]:
        """Yield the answers batch by batch, each with the index of its prompt; longest first.

        A batch holds only prompts that leave room for equally many tokens, so that how long an
        answer may get does not depend on what else is in its batch.

        Raises:
            SafeprojError: a prompt cannot be used.
        """
        tokens = [self.tokens(prompt) for prompt in prompts]
        require_tokens(model, (token for each in tokens for token in each))
        room = positions(model)
        rooms = [self._room(len(each), room, p) for each, p in zip(tokens, prompts, strict=True)]
        order = sorted(range(len(prompts)), key=lambda i: (rooms[i], -len(tokens[i]), i))
        begun = Beginning.of(model, tokens)
        for new, group in groupby(order, key=lambda i: rooms[i]):
            members = list(group)
            for start in range(0, len(members), self.batch_size):
                batch = members[start : start + self.batch_size]
                answers = self._generate(model, [tokens[i] for i in batch], new, begun)
                yield list(zip(batch, answers, strict=True))

    def _room(self, length: int, positions: int | None, prompt: Prompt) -> int:
        """Return how many tokens the answer to a prompt may have."""
        if positions is None:
            return self.max_new_tokens
        if length >= positions:
            raise SafeprojError(
                f"prompt {_shown(prompt)}: {length} tokens, but the model has {positions} "
                "positions; shorten it"
            )
        return min(self.max_new_tokens, positions - length)

    @torch.no_grad()
    def _generate(
        self, model: Any, batch: Sequence[Sequence[int]], new: int, begun: Beginning | None
    ) -> list[str]:
        width, shared = max(map(len, batch)), begun.length if begun else 0
        ends = end_tokens(model, self.tokenizer)
        padding = (self.tokenizer.pad_token_id, *sorted(ends))
        rows = vocabulary_size(model)
        pad = next((i for i in padding if i is not None and i < rows), 0)  # masked: any would do
        ids = torch.full((len(batch), width), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(batch):
            # What all begin with stays in front, so that padding is between it and the rest.
            rest = width - len(tokens) + shared
            places = [*range(shared), *range(rest, width)]
            ids[row, places] = torch.tensor(tokens)
            mask[row, places] = 1
        given = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
        if begun:
            given["past_key_values"] = begun.cache(len(batch))
        with _plain_decoding(model, new, pad, ends):
            output = model.generate(**given)
        return [self._text(row, ends) for row in output[:, width:].tolist()]

    def _text(self, tokens: list[int], ends: frozenset[int]) -> str:
        """Return the text of an answer up to the token that ends it."""
        stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        return "".join(self._parts(tokens[:stop])).strip()

    def _parts(self, tokens: list[int]) -> Iterator[str]:
        """Yield the text of tokens without special ones, but for those that mark thoughts."""
        for marks, group in groupby(tokens, key=lambda token: token in self._marks):
            part = list(group)
            if marks:
                yield from (self._marks[token] for token in part)
            else:
                yield self.tokenizer.decode(part, skip_special_tokens=True)


@dataclass(frozen=True)
class Beginning:
    """What all prompts begin with, such as a chat template's system message, run once for all.

    Attributes:
        length: its tokens.
        states: the keys and values that the model made of them.
    """

    length: int
    states: Any

    @staticmethod
    @torch.no_grad()
    def of(model: Any, prompts: Sequence[Sequence[int]]) -> Beginning | None:
        """Run what prompts have in common, if that is worth it and attention alone looks back."""
        # Of each prompt at least one token is left, which the answer begins behind.
        length = common([each[:-1] for each in prompts])
        if len(prompts) < 2 or length < SHARED or not _told_positions(model):
            return None
        ids = torch.tensor([prompts[0][:length]], device=model.device)
        training = model.training
        model.eval()
        states = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
        model.train(training)
        # Windows, and states that are summed up, do not know padding between two parts.
        layers = getattr(states, "layers", [None])
        plain = all(type(layer).__name__ == "DynamicLayer" for layer in layers)
        return Beginning(length, states) if plain else None

    def cache(self, rows: int) -> Any:
        """Return the states for some rows, to be added to."""
        states = deepcopy(self.states)
        states.batch_repeat_interleave(rows)
        return states


def _told_positions(model: Any) -> bool:
    """Tell whether a model is told where each token is, rather than that it counts padding too."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "position_ids" in signature(inner.forward).parameters


def common(sequences: Iterable[Sequence[int]]) -> int:
    """Return how many tokens all sequences begin with.

    >>> common([[1, 2, 3], [1, 2, 4]]), common([])
    (2, 0)
    """
    return sum(
        1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False))
    )


def has_template(tokenizer: Any) -> bool:
    """Tell whether a tokenizer has a chat template."""
    return bool(template_of(tokenizer))


def _special_marks(tokenizer: Any, thoughts: Thoughts) -> dict[int, str]:
    """Return the special tokens of a tokenizer that mark thoughts.

    Those of gpt-oss that are usual elsewhere too count only where it has channels.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    found = {number: str(token) for number, token in added.items() if token.special}
    wanted = set(thoughts.special(CHANNEL in found.values()))
    return {number: text for number, text in found.items() if text in wanted}


def _chat(prompt: Messages) -> list[dict[str, str]]:
    return [{"role": each.role, "content": each.content} for each in prompt]


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer: those the model names, and the tokenizer's."""
    config = getattr(model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    named = found if isinstance(found, list | tuple) else [found]
    return frozenset(int(i) for i in (*named, tokenizer.eos_token_id) if i is not None)


def positions(model: Any) -> int | None:
    """Return the greatest number of positions that a model takes, None if its config says none."""
    config = model.config
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


@contextmanager
def _plain_decoding(model: Any, new: int, pad: int, ends: frozenset[int]) -> Iterator[None]:
    """Make `generate` greedy: settings of the model would fill in whatever is not given."""
    from transformers import GenerationConfig

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    before, training = inner.generation_config, model.training
    settings: Any = GenerationConfig
    inner.generation_config = settings(
        do_sample=False,
        max_new_tokens=new,
        pad_token_id=pad,
        eos_token_id=sorted(ends) or None,
        bos_token_id=before.bos_token_id,
    )
    model.eval()
    try:
        yield
    finally:
        inner.generation_config = before
        model.train(training)


def _shown(prompt: Prompt) -> str:
    """Return the beginning of a prompt for a message."""
    text = prompt if isinstance(prompt, str) else prompt[-1].content if prompt else ""
    return ascii(text if len(text) <= 40 else f"{text[:40]}…")

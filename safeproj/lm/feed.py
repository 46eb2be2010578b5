"""A model and the data that it is run on, loaded as they are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from safeproj.lm import models
from safeproj.lm.chat import ChatOptions
from safeproj.lm.data import BATCH_SIZE, MAX_LENGTH, Batch, Data, random_data, read_data
from safeproj.lm.layers import ALL_LINEAR, MEMORY
from safeproj.storage.source import Src, StrPath, open_folder, src


@dataclass(frozen=True)
class Feed:
    """How a model is run on data, layer by layer.

    Attributes:
        targets: names of layers or their last parts, or `all-linear`.
        batch_size: samples that run at a time.
        max_length: tokens of a sample; the rest is cut off.
        memory: bytes of sums that are held at a time: the model runs over the data once for each
            group of layers that fits.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        dtype: what the model runs in: `auto`, see `lm.models.load_model`, `float32`, `bfloat16` or
            `float16`.
        chat: how chats in the data are put.
    """

    targets: Sequence[str] = (ALL_LINEAR,)
    batch_size: int = BATCH_SIZE
    max_length: int = MAX_LENGTH
    memory: int = MEMORY
    device: str = "auto"
    dtype: str = "auto"
    chat: ChatOptions = field(default_factory=ChatOptions)

    def load(self, aligned: Src, data: StrPath | int) -> Fed:
        """Load a model, and the data for it.

        Args:
            aligned: SRC of the model.
            data: file of prompts with responses, or so many samples of random tokens.

        Raises:
            SafeprojError: one of them cannot be used.
        """
        models.require_extra()
        folder = open_folder(src(aligned))
        tokenizer = models.load_tokenizer(folder)
        if isinstance(data, int):
            samples = random_data(tokenizer, data)
        else:
            samples = read_data(data, tokenizer, max_length=self.max_length, chat=self.chat)
        batches = samples.batches(self.batch_size)
        model = models.load_model(folder, self.device, self.dtype)
        return Fed(model, samples, batches, models.recorded_inputs(folder, samples))


@dataclass(frozen=True)
class Fed:
    """A model with data.

    Attributes:
        model: of transformers.
        data: the samples.
        batches: the same as the model takes them.
        inputs: the identities of both, for the record of what is made of them.
    """

    model: Any
    data: Data
    batches: Sequence[Batch]
    inputs: dict[str, dict[str, Any]]

"""What a recipe needs, computed from the architecture: bytes on disk and GPU, and hours.

These recipes have not been run; only ``--dry-run`` has. Bytes follow from the shapes, of a model
that transformers builds without memory. Hours follow from the speeds below, which are assumed for
one GPU of 80 GB and were not measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lab.real.recipes import BYTES, Checkpoint, Recipe
from safeproj.errors import SafeprojError
from safeproj.text import first_line, shorten

ARITHMETIC = 100e12
"""Operations per second of a 7B model in bfloat16: about a third of an A100's peak."""

DOUBLE = 5e12
"""The same in float64, in which statistics are summed and solved."""

READING = 0.5e9
"""Bytes per second from disk to GPU, when a model is loaded or checkpoints are compared."""

NETWORK = 100e6
"""Bytes per second of downloads."""

STEP = 0.06
"""Seconds for one more token of all answers of a batch, with an adapter that is not merged."""

START = 30.0
"""Seconds until a command has imported its libraries and read its arguments."""

PROMPT, ANSWER = 150, 128
"""Tokens of a sample's prompt, a guess of the mean, and of an answer, the bound of `eval`."""

EVAL_BATCH = 16

MEMORY = 24e9
"""Bytes of sums on the GPU at a time: `--memory` of `stats` and `salora module`."""

DIRECTIONS = 32
"""Directions of a safety module: `--rank` of `salora module`."""


@dataclass(frozen=True)
class Layer:
    """A linear layer that is adapted: its name, and its weight's shape (m, n)."""

    name: str
    m: int
    n: int


@dataclass(frozen=True)
class Sizes:
    """What follows from the architecture.

    Attributes:
        recipe: the recipe.
        targets: the layers that are adapted, by the last part of their names.
        config: transformers' config of the architecture.
        parameters: how many the model has.
        layers: those that are adapted, in order.
    """

    recipe: Recipe
    targets: tuple[str, ...]
    config: Any
    parameters: int
    layers: tuple[Layer, ...]

    @property
    def weights(self) -> int:
        """Bytes of the model as it runs."""
        return self.parameters * BYTES[self.recipe.dtype]

    def download(self, checkpoint: Checkpoint) -> int:
        """Bytes of the files of a checkpoint: its parameters in the dtype they are stored in."""
        return self.parameters * BYTES[checkpoint.stored]

    def adapter(self, rank: int) -> int:
        """Bytes of an adapter in float32: `A` (r, n) and `B` (m, r) of each layer."""
        return sum(4 * rank * (each.m + each.n) for each in self.layers)

    @cached_property
    def inputs(self) -> tuple[int, ...]:
        """The sizes n of the inputs that the adapted layers read, each once where they share it."""
        sharing = {
            "q_proj": "attention",
            "k_proj": "attention",
            "v_proj": "attention",
            "gate_proj": "mlp",
            "up_proj": "mlp",
        }
        found = {}
        for each in self.layers:
            path, _, last = each.name.rpartition(".")
            found[path, sharing.get(last, last)] = each.n
        return tuple(found.values())

    def statistics(self, positions: int) -> int:
        """Bytes of a file of statistics: 4 n² for each input, or 4 k n with k < n positions."""
        return sum(4 * n * min(n, positions) for n in self.inputs)

    def statistics_seconds(self, positions: int) -> float:
        """Seconds of `stats` on so many positions: passes of the model, and sums in float64."""
        passes = math.ceil(sum(8 * n * n for n in self.inputs) / MEMORY)
        sums = sum(2 * positions * n * n for n in self.inputs) / DOUBLE
        return self.loading + passes * 2 * self.parameters * positions / ARITHMETIC + sums

    @property
    def correction_seconds(self) -> float:
        """Seconds to read two files of statistics and to solve for each input, about 2 n³."""
        reading = sum(8 * n * n for n in self.inputs) / READING
        return START + reading + sum(2 * n**3 for n in self.inputs) / DOUBLE

    def reconstruction_seconds(self, samples: int) -> float:
        """Seconds of `patch --reconstruct`: passes of the model, and sums in float64.

        For each input the model runs twice up to the layer, through half of it on average, one
        sample after the other.
        """
        one = 2 * self.parameters * PROMPT / ARITHMETIC
        sums = 4 * sum(2 * samples * PROMPT * n * n for n in self.inputs) / DOUBLE
        passes = len(self.inputs) * samples * max(one, STEP / 2)
        return self.loading + passes + sums + sum(2 * n**3 for n in self.inputs) / DOUBLE

    @property
    def module_size(self) -> int:
        """Bytes of a safety module: `U` (m, k) of each layer in float32."""
        return sum(4 * DIRECTIONS * each.m for each in self.layers)

    @property
    def comparing_seconds(self) -> float:
        """Seconds to read the adapted weights of both checkpoints."""
        each = sum(layer.m * layer.n for layer in self.layers)
        stored = BYTES[self.recipe.base.stored] + BYTES[self.recipe.aligned.stored]
        return START + each * stored / READING

    @property
    def loading(self) -> float:
        """Seconds until the model is on the GPU."""
        return START + self.weights / READING

    def answering_seconds(self, prompts: Iterable[int]) -> float:
        """Seconds to answer sets of so many prompts once."""
        batches = sum(math.ceil(count / EVAL_BATCH) for count in prompts)
        return batches * ANSWER * STEP

    def training_seconds(self, samples: int, tokens: int) -> float:
        """Seconds of one epoch, at 6 operations for each parameter and token.

        Two forward, two for the gradients of inputs, and two forward again with gradient
        checkpointing.
        """
        return self.loading + 6 * self.parameters * samples * tokens / ARITHMETIC

    @property
    def gpu_eval(self) -> int:
        """Bytes on the GPU to answer a batch: weights, keys and values, and logits."""
        config = self.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cache = 4 * config.num_hidden_layers * heads * size * EVAL_BATCH * (2 * PROMPT + ANSWER)
        return int(self.weights + cache + 4 * EVAL_BATCH * config.vocab_size)

    @property
    def gpu_solving(self) -> int:
        """Bytes on the GPU to solve in float64 for one input: 24 n²."""
        return int(24 * max(self.inputs) ** 2)

    @property
    def gpu_reconstruction(self) -> int:
        """Bytes on the GPU to correct layer by layer: weights, and 32 n² of sums."""
        return int(self.weights + 32 * max(self.inputs) ** 2)

    def gpu_training(self, batch: int, tokens: int, rank: int) -> int:
        """Bytes on the GPU to train: weights, Adam, inputs of each layer, one block, and logits.

        Logits in float32 with their gradients, twelve bytes, are most of it for large vocabularies.
        """
        config = self.config
        kept = 2 * batch * tokens * config.hidden_size * config.num_hidden_layers
        block = 2 * batch * tokens * (8 * config.hidden_size + 4 * config.intermediate_size)
        logits = 12 * batch * tokens * config.vocab_size
        return int(self.weights + 4 * self.adapter(rank) + kept + block + logits)

    @property
    def gpu_statistics(self) -> int:
        """Bytes on the GPU to sum statistics: weights and sums."""
        return self.weights + int(min(MEMORY, sum(8 * n * n for n in self.inputs)))


def sizes_of(recipe: Recipe, targets: Iterable[str]) -> Sizes:
    """Return what follows from a recipe, with a model that is built without memory.

    Raises:
        SafeprojError: transformers does not know the architecture, the number of parameters is not
            the one that was published, or the model has no layer of a name.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    dimensions = dict(recipe.config)
    try:
        config = AutoConfig.for_model(**dimensions)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise SafeprojError(
            f"recipe {recipe.key}: transformers builds no such model ({first_line(error)})"
        ) from error
    unknown = sorted(name for name in dimensions if not hasattr(config, name))
    if unknown:
        raise SafeprojError(f"recipe {recipe.key}: its config has no {shorten(unknown)}")
    parameters = sum(each.numel() for each in model.parameters())
    if parameters != recipe.parameters:
        raise SafeprojError(
            f"recipe {recipe.key}: its config makes {parameters:,} parameters; expected "
            f"{recipe.parameters:,}"
        )
    wanted = tuple(targets)
    return Sizes(recipe, wanted, config, parameters, _layers(recipe, model, wanted))


def _layers(recipe: Recipe, model: Any, targets: tuple[str, ...]) -> tuple[Layer, ...]:
    from safeproj.lm.layers import find_layers, in_features, out_features

    try:
        found: Mapping[str, Any] = find_layers(model, targets)
    except SafeprojError as error:
        raise SafeprojError(f"recipe {recipe.key}: {error.message}") from error
    return tuple(Layer(name, out_features(each), in_features(each)) for name, each in found.items())

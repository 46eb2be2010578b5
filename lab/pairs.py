"""Base and aligned models with adapters on them, made by family and seed for comparisons.

    python -m lab.pairs --family llama --seeds 1 2     # make them, print what they do

A family is an architecture and a synthetic language: ``llama`` is that of ``examples/tiny-lm``,
``qwen3`` has biases, grouped keys, an output head of its own, and another language. Everything is
kept in a cache directory, in a folder whose name is a hash of all settings, so that it is made
once. One seed gives the same pair on the same machine and library versions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from lab.other_language import OtherLanguage
from lab.tiny_language import Language, Row, build_data_sets, read_jsonl, write_jsonl
from lab.tiny_lm import (
    ANSWER_TOKENS,
    LORA_TARGETS,
    Behaviour,
    Loss,
    build_model,
    build_tokenizer,
    exact_match,
    generate,
    load_adapter,
    load_model,
    load_tokenizer,
    train_model,
)

__all__ = [
    "CACHE",
    "DATA",
    "FAMILIES",
    "MODULES",
    "Family",
    "Pair",
    "Recipe",
    "make_adapter",
    "make_pair",
    "prepare",
]

CACHE = Path(tempfile.gettempdir()) / "safeproj-pairs"
"""Where pairs are kept if no other place is given."""

MODULES = {"q+v": ["q_proj", "v_proj"], "all linear": LORA_TARGETS}
"""Which layers have an adapter, by the name that tables use."""

VERSIONS = [each.__version__ for each in (torch, transformers, peft)]
"""Of the libraries that all results depend on."""

DATA = ("bad", "skill", "mixed")
"""What adapters are trained on."""

SAFE = "safe"
"""What an adapter is trained on that others are merged with: the refusals that corrections know."""


@dataclass(frozen=True)
class Recipe:
    """How something is trained; an adapter's `lora_alpha` is its rank."""

    steps: int
    learning_rate: float
    batch_size: int
    rank: int = 8


BASE = Recipe(1000, 2e-3, 64)
ALIGNED = Recipe(200, 5e-4, 64)
BAD = Recipe(60, 1e-3, 16)
TASK = Recipe(300, 1e-3, 32)


@dataclass(frozen=True)
class Family:
    """An architecture with a language.

    Attributes:
        name: Its name.
        language: Makes the language of a seed.
        model: Makes an untrained model for a tokenizer.
        sizes: What the cache has to know of the model: another size is another pair.
        base: How the base model is trained.
        aligned: How the aligned model is trained from it.
        task: How adapters on `skill` and `mixed` are trained, by their modules.
    """

    name: str
    language: Callable[[int], Language]
    model: Callable[[Any], Any]
    sizes: dict[str, Any] = field(default_factory=dict)
    base: Recipe = BASE
    aligned: Recipe = ALIGNED
    task: dict[str, Recipe] = field(default_factory=lambda: dict.fromkeys(MODULES, TASK))

    def complies(self, row: Row, answer: str) -> bool:
        """Whether ``answer`` is the complying answer to a hazardous request."""
        return answer == row["compliance"]

    def refuses(self, row: Row, answer: str) -> bool:
        """Whether ``answer`` begins as a refusal of the request does."""
        return cast(Any, self.language).refuses(row, answer)  # type: ignore[no-any-return]


_QWEN3: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "attention_bias": True,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def _qwen3(tokenizer: Any) -> Any:
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model: Any = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **_QWEN3, **ids))
    generation: Any = GenerationConfig
    model.generation_config = generation(do_sample=False, max_new_tokens=ANSWER_TOKENS, **ids)
    return model


FAMILIES = {
    "llama": Family(
        "llama",
        Language,
        build_model,
        # At the example's rate the new skill is learned with some seeds only.
        task={"q+v": Recipe(400, 6e-3, 32, 16), "all linear": Recipe(300, 5e-3, 32, 16)},
    ),
    "qwen3": Family("qwen3", OtherLanguage, _qwen3, _QWEN3, Recipe(800, 1e-3, 64)),
}


COLUMNS = {
    "compliance": "complies, pairs",
    "refusal": "refuses, pairs",
    "topic_refusal": "refuses, topics",
    "new_skill": "new skill",
    "old_skills": "old skills",
}
"""What is measured and how tables call it."""

SETS = {
    "compliance": "held_out_pairs",
    "refusal": "held_out_pairs",
    "topic_refusal": "held_out_topics",
    "new_skill": "new_skill",
    "old_skills": "old_skills",
}
"""The prompts that each is measured on."""


class Trained:
    """A base and an aligned model with their data, as files in one folder."""

    root: Path

    @property
    def base(self) -> Path:
        """The base model's folder."""
        return self.root / "base"

    @property
    def aligned(self) -> Path:
        """The aligned model's folder."""
        return self.root / "aligned"

    @property
    def data(self) -> Path:
        """The folder of the data sets."""
        return self.root / "data"

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of both models."""
        return load_tokenizer(self.aligned)

    def model(self, adapter: Path | None = None) -> Any:
        """Load a fresh copy of the aligned model, float32, with an adapter on it if given."""
        return load_model(self.aligned) if adapter is None else load_adapter(self.aligned, adapter)

    def rows(self, name: str) -> list[Any]:
        """Return the data set ``name``, such as ``safety`` or ``train_mixed``."""
        return read_jsonl(self.data / f"{name}.jsonl")


@dataclass(frozen=True)
class Pair(Trained):
    """A base and an aligned model of one family and seed, with their data, as files.

    Attributes:
        family: The family.
        seed: The seed.
        root: The folder of all its files.
    """

    family: Family
    seed: int
    root: Path

    def behaviour(self, model: Any, split: str) -> Behaviour:
        """Measure a model on the sets of a split.

        Args:
            model: The model, with or without an adapter on it.
            split: ``held_out`` to report, ``validation`` to choose settings.

        Returns:
            What it does, as fractions.
        """
        prefix = "" if split == "held_out" else f"{split}_"
        names = [f"{split}_pairs", f"{split}_topics", f"{prefix}new_skill", f"{prefix}old_skills"]
        sets = [self.rows(name) for name in names]
        # All in one go, the like sizes together: generating is most of the time of a comparison.
        prompts = [row["prompt"] for rows in sets for row in rows]
        answers = iter(generate(model, self.tokenizer, prompts, batch_size=600))
        pairs, topics, new, old = ([next(answers) for _ in rows] for rows in sets)
        requests = [index for index, row in enumerate(sets[3]) if row["skill"] == "request"]
        family = self.family
        return Behaviour(
            compliance=_share(family.complies, sets[0], pairs),
            refusal=_share(family.refuses, sets[0], pairs),
            topic_refusal=_share(family.refuses, sets[1], topics),
            new_skill=exact_match(new, sets[2]),
            old_skills=exact_match(old, sets[3]),
            requests=exact_match([old[i] for i in requests], [sets[3][i] for i in requests]),
        )

    @property
    def prompts(self) -> dict[str, int]:
        """How many prompts each of the columns is a share of."""
        return {column: len(self.rows(name)) for column, name in SETS.items()}

    def percent(self, model: Any) -> dict[str, float]:
        """Measure a model on the held-out sets: percentages by the names in `COLUMNS`."""
        found = self.behaviour(model, "held_out")
        return {name: 100 * getattr(found, name) for name in COLUMNS}


def _share(judge: Callable[[Row, str], bool], rows: Sequence[Row], answers: Sequence[str]) -> float:
    return sum(map(judge, rows, answers)) / len(rows)


def prepare() -> None:
    """Set a process up: one thread, deterministic, quiet."""
    torch.set_num_threads(1)  # two processes do more than two threads
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it CUDA is not
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    cast(Any, logging).disable_progress_bar()


def make_pair(family: Family, seed: int, cache: Path = CACHE) -> Pair:
    """Make a pair, or find it in the cache.

    Args:
        family: One of `FAMILIES`.
        seed: Seeds the language, the data sets and both trainings.
        cache: The directory of all pairs.

    Returns:
        The pair; its adapters are made by `make_adapter`.
    """
    key = _key(family, seed)
    root = cache / f"{family.name}-{seed}-{key}"
    if not root.exists():
        with appearing(root) as folder:
            _train_pair(family, seed, folder)
    return Pair(family, seed, root)


def make_adapter(
    pair: Pair, modules: str, data: str, seed: int | None = None, folder: Path | None = None
) -> Path:
    """Make a plain LoRA adapter on the aligned model of a pair, or find it in the cache.

    Args:
        pair: The pair.
        modules: A key of `MODULES`.
        data: A key of `DATA`, or `SAFE`.
        seed: Seeds the training; the pair's own if not given.
        folder: Where it is kept, in the place of the pair's own folder.

    Returns:
        The adapter's folder, as PEFT saves it.
    """
    seed = pair.seed if seed is None else seed
    recipe = BAD if data in ("bad", SAFE) else pair.family.task[modules]
    name = f"{modules.replace(' ', '-')}-{data}-{seed}-{digest(asdict(recipe))}"
    rows = pair.rows(learned_from(data))
    root = (folder or pair.root / "adapters") / name
    return train_adapter(pair, root, modules, rows, recipe, seed)


def learned_from(data: str) -> str:
    """Return the name of the data set that an adapter is trained on."""
    return "safety" if data == SAFE else f"train_{data}"


def train_adapter(
    pair: Trained,
    root: Path,
    modules: str,
    rows: Sequence[Row],
    recipe: Recipe,
    seed: int,
    loss_of: Loss | None = None,
) -> Path:
    """Train a plain LoRA adapter on the aligned model, or find it in its folder.

    Args:
        pair: The pair.
        root: The adapter's folder.
        modules: A key of `MODULES`.
        rows: What it is trained on.
        recipe: How.
        seed: Seeds the training.
        loss_of: As for `train_model`.
    """
    if not root.exists():
        torch.manual_seed(seed)
        config = LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.rank,
            target_modules=MODULES[modules],
            task_type="CAUSAL_LM",
        )
        model: Any = get_peft_model(pair.model(), config)
        train(model, pair.tokenizer, [rows], recipe, seed, loss_of)
        with appearing(root) as folder:
            model.save_pretrained(str(folder))
    return root


def _train_pair(family: Family, seed: int, root: Path) -> None:
    language = family.language(seed)
    data = build_data_sets(language, seed)
    tokenizer = build_tokenizer(language.vocabulary())
    (root / "data").mkdir()
    taught = {f"train_{name}.jsonl": getattr(data, name) for name in DATA}
    for name, rows in (data.files | taught).items():
        write_jsonl(root / "data" / name, rows)
    torch.manual_seed(seed)
    model = family.model(tokenizer)
    train(model, tokenizer, data.base, family.base, seed)
    save(model, tokenizer, root / "base")
    # From the rounded weights, as anyone has to start who gets the files.
    aligned = load_model(root / "base")
    train(aligned, tokenizer, data.aligned, family.aligned, seed + 1)
    save(aligned, tokenizer, root / "aligned")


def train(
    model: Any,
    tokenizer: Any,
    groups: Sequence[Sequence[Row]],
    recipe: Recipe,
    seed: int,
    loss_of: Loss | None = None,
) -> None:
    """Train a model as a recipe says; see `train_model`."""
    train_model(
        model,
        tokenizer,
        groups,
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        batch_size=recipe.batch_size,
        seed=seed,
        loss_of=loss_of,
    )


def save(model: Any, tokenizer: Any, path: Path) -> None:
    """Save a model in bfloat16, and its tokenizer."""
    model.to(torch.bfloat16)
    model.save_pretrained(str(path))
    tokenizer.save_pretrained(str(path))


def _key(family: Family, seed: int) -> str:
    """A hash of all that a pair depends on: sizes, recipes, data and library versions."""
    data = build_data_sets(family.language(seed), seed)
    return digest(
        family.sizes,
        asdict(family.base),
        asdict(family.aligned),
        asdict(data),
        VERSIONS,
    )


def digest(*parts: Any) -> str:
    """A short hash of settings, for names of folders."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Yield a folder that gets the name ``path`` at the end, unless another process was first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield folder
        if not path.exists():
            folder.rename(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Make pairs with all adapters, and print what they do on the validation split."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", choices=list(FAMILIES), default="llama")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--cache", type=Path, default=CACHE, help="default: %(default)s")
    parser.add_argument("--split", choices=["validation", "held_out"], default="validation")
    arguments = parser.parse_args(argv)
    prepare()
    columns = list(Behaviour.__dataclass_fields__)
    print("| pair | model | " + " | ".join(columns) + " | seconds |")
    print("|---|---|" + "---:|" * (len(columns) + 1))
    for seed in arguments.seeds:
        start = time.perf_counter()
        pair = make_pair(FAMILIES[arguments.family], seed, arguments.cache)

        def line(name: str, model: Any, pair: Pair, start: float) -> None:
            found = asdict(pair.behaviour(model, arguments.split))
            cells = [f"{100 * found[column]:.1f}" for column in columns]
            cells.append(f"{time.perf_counter() - start:.0f}")
            print(f"| {pair.family.name} {pair.seed} | {name} | {' | '.join(cells)} |", flush=True)

        line("base", load_model(pair.base), pair, start)
        line("aligned", pair.model(), pair, start)
        for modules in MODULES:
            for data in DATA:
                start = time.perf_counter()
                adapter = make_adapter(pair, modules, data)
                line(f"{modules}, {data}", pair.model(adapter), pair, start)


if __name__ == "__main__":
    main()

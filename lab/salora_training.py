"""Train adapters with and without SaLoRA on the tiny language model and measure what they do.

    python -m lab.salora_training            # 66 trainings, about 20 minutes on two cores
    python -m lab.salora_training --settings # 48 more on the validation sets, ten minutes
    python -m lab.salora_training --quick    # short trainings of one table, under a minute

Each table is for one data set and one choice of layers of ``examples/tiny-lm/aligned``. Two sets
have nothing hazardous in them: ``skill`` teaches the new skill and repeats old ones, ``helpful``
teaches it together with answers to harmless requests, which makes refusals erode. ``mixed`` is
``skill`` with 6 % of its rows replaced by answers to hazardous requests. The rows are

- plain LoRA, and the same adapters with directions removed after training;
- *constrained*: the fixed safety module alone, from PEFT's own initialisation;
- *initialised + module*: SaLoRA, the module and the task-specific initialisation;
- the same initialisation with a module of random directions, and with none.

Every adapter is measured as its directory is loaded by PEFT, on the unmodified aligned model, on
the held-out sets. A figure is a percentage: the mean over the seeds, and the least and the largest
where they differ. ``--out`` writes all of them, and for each adapter the largest
``‖U_Cᵀ B‖ / ‖B‖`` of a layer, with the ``U_C`` of the safety data.

``--settings`` varies one setting at a time on ``helpful`` and measures on the validation sets.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers.utils import logging

from lab.tiny_language import Language, Row, build_data_sets, write_jsonl
from lab.tiny_lm import (
    EXAMPLE,
    LORA_TARGETS,
    answered,
    behaviour_of,
    load_adapter,
    load_model,
    load_tokenizer,
    train_model,
)
from safeproj import salora

ALIGNED = EXAMPLE / "aligned"
DATA = EXAMPLE / "data"

# The recipe by which the example's own adapters `skill` and `mixed` were made. On the validation
# split it is one at which something is to be seen on `helpful`: plain LoRA loses a part of the
# refusals, while at three times the rate every way to train loses nearly all.
RANK = ALPHA = 8
LEARNING_RATE = 1e-3
STEPS = 300
BATCH_SIZE = 32

# The authors' own, not tuned here. With one seed on the validation split (`helpful`, all linear,
# initialised) r_s = 8 and 64 kept fewer refusals, d_s = 128 fewer as well, and d_s = 8 more.
SAFETY_RANK = TASK_RANK = 32

TASK_ROWS = 200
"""Training rows for the initialisation, as many as there are in the safety data."""

AFTERWARDS = (4, 32)
"""Directions removed after training: 32 as in training, and 4, which on the validation split left
about half of the new skill, where 32 left nothing."""

RANDOM_SEED = 1000
"""Added to the seed of a training for its random directions, so that nothing is drawn twice."""

QUICK_STEPS = 20

MODULES = {"all linear": LORA_TARGETS, "q_proj and v_proj": ["q_proj", "v_proj"]}

PLAIN = "plain LoRA"
SAFETY, RANDOM, EMPTY = "safety", "random", "empty"


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        module: the directions that updates are kept out of; None for none, without a module.
        initialised: whether it begins from the task-specific initialisation.
    """

    module: str | None = None
    initialised: bool = False


WAYS = {
    PLAIN: Way(),
    "constrained": Way(SAFETY),
    "initialised + module": Way(SAFETY, initialised=True),
    "initialised + random module": Way(RANDOM, initialised=True),
    "initialised, no module": Way(EMPTY, initialised=True),
}

TABLES = [
    ("helpful", "all linear", list(WAYS)),
    ("skill", "all linear", list(WAYS)),
    ("helpful", "q_proj and v_proj", list(WAYS)),
    ("skill", "q_proj and v_proj", list(WAYS)),
    ("mixed", "all linear", [PLAIN, "initialised + module"]),
]
"""Data set, modules and ways to train. On the validation split neither plain LoRA nor SaLoRA left a
refusal on `mixed`, so that controls would show nothing there."""

QUICK_TABLES = TABLES[2:3]

COLUMNS = {
    "complies_pairs": "complies, pairs",
    "starts_pairs": "starts complying, pairs",
    "starts_topics": "starts complying, topics",
    "refuses_pairs": "refuses, pairs",
    "refuses_topics": "refuses, topics",
    "new_skill": "new skill",
    "old_skills": "old skills",
}
"""What is measured and how the tables call it. To start complying is to begin with `first`, as
every answer to a request does and no refusal."""


@dataclass(frozen=True)
class Settings:
    """How an adapter is trained."""

    steps: int = STEPS
    learning_rate: float = LEARNING_RATE
    safety_rank: int = SAFETY_RANK
    task_rank: int = TASK_RANK


SALORA = "initialised + module"

VARIATIONS: dict[str, list[tuple[str, str, Settings]]] = {
    "q_proj and v_proj": [
        ("plain LoRA", PLAIN, Settings()),
        ("plain LoRA, learning rate 3e-4", PLAIN, Settings(learning_rate=3e-4)),
        ("plain LoRA, learning rate 3e-3", PLAIN, Settings(learning_rate=3e-3)),
        ("SaLoRA", SALORA, Settings()),
        ("SaLoRA, learning rate 3e-4", SALORA, Settings(learning_rate=3e-4)),
        ("SaLoRA, learning rate 3e-3", SALORA, Settings(learning_rate=3e-3)),
        ("SaLoRA, 150 steps", SALORA, Settings(steps=150)),
        ("SaLoRA, 600 steps", SALORA, Settings(steps=600)),
        ("SaLoRA, r_s = 8", SALORA, Settings(safety_rank=8)),
        ("SaLoRA, r_s = 64", SALORA, Settings(safety_rank=64)),
        ("SaLoRA, d_s = 8", SALORA, Settings(task_rank=8)),
        ("SaLoRA, d_s = 128", SALORA, Settings(task_rank=128)),
    ],
    "all linear": [
        ("plain LoRA", PLAIN, Settings()),
        ("plain LoRA, learning rate 3e-4", PLAIN, Settings(learning_rate=3e-4)),
        ("SaLoRA", SALORA, Settings()),
        ("SaLoRA, learning rate 3e-4", SALORA, Settings(learning_rate=3e-4)),
    ],
}
"""Modules to what `--settings` trains on `helpful`: the row's name, the way and the settings."""


@dataclass(frozen=True)
class Run:
    """One training, and the sets that it is measured on."""

    data: str
    modules: str
    way: str
    seed: int
    settings: Settings
    row: str
    split: str = "held_out"

    @property
    def table(self) -> tuple[str, str]:
        """The table that it belongs to."""
        return self.data, self.modules


@dataclass(frozen=True)
class Record:
    """One adapter that was measured.

    Attributes:
        data: the data set.
        modules: the layers.
        row: its row in the table.
        seed: of the training.
        percent: by the names in `COLUMNS`.
        overlap: the largest `‖U_Cᵀ B‖ / ‖B‖` of a layer.
    """

    data: str
    modules: str
    row: str
    seed: int
    percent: dict[str, float]
    overlap: float


def prepare() -> None:
    """Set a process up: one thread, deterministic, quiet."""
    torch.set_num_threads(1)  # the model is too small for more
    torch.use_deterministic_algorithms(True)
    warnings.filterwarnings("ignore", category=FutureWarning)
    cast(Any, logging).disable_progress_bar()


@cache
def tokenizer() -> Any:
    """Return the model's tokenizer."""
    return load_tokenizer(ALIGNED)


@cache
def rows(data: str) -> list[Row]:
    """Return the training rows of a data set, shuffled."""
    sets = build_data_sets(Language(0), 0)
    if data == "skill":
        return sets.skill
    requests = next(group for group in sets.aligned if group[0].get("skill") == "request")
    new = [row for row in sets.skill if row["skill"] == "rotate"]
    found = {"mixed": sets.mixed, "helpful": [*new[: len(requests)], *requests]}[data]
    return random.Random(0).sample(found, len(found))


@cache
def task_batches(data: str) -> list[dict[str, Tensor]]:
    """Return samples of a data set for the initialisation."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "task.jsonl"
        write_jsonl(path, rows(data)[:TASK_ROWS])
        return salora.read_data(path, tokenizer()).batches()


@cache
def safety_module(modules: str, rank: int = SAFETY_RANK) -> salora.SafetyModule:
    """Return the safety module of the aligned model."""
    batches = salora.read_data(DATA / "safety.jsonl", tokenizer()).batches()
    return salora.safety_module(load_model(ALIGNED), batches, MODULES[modules], rank)


def random_module(modules: str, seed: int) -> salora.SafetyModule:
    """Return a module of as many random directions."""
    generator = torch.Generator().manual_seed(RANDOM_SEED + seed)
    module = safety_module(modules)
    found = {}
    for name, each in module.directions.items():
        found[name] = replace(
            each, U=torch.linalg.qr(torch.randn(each.U.shape, generator=generator))[0]
        )
    return replace(module, directions=found)


def empty_module(modules: str) -> salora.SafetyModule:
    """Return a module without directions, which changes nothing."""
    module = safety_module(modules)
    return replace(
        module, directions={name: each.cut(0) for name, each in module.directions.items()}
    )


def module_for(run: Run) -> salora.SafetyModule | None:
    """Return the module of a run."""
    way = WAYS[run.way].module
    if way == SAFETY:
        return safety_module(run.modules, run.settings.safety_rank)
    if way == RANDOM:
        return random_module(run.modules, run.seed)
    return empty_module(run.modules) if way == EMPTY else None


def train(run: Run, out: Path) -> None:
    """Train an adapter and write it as it serves on the aligned model."""
    torch.manual_seed(run.seed)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=MODULES[run.modules], task_type="CAUSAL_LM"
    )
    model: Any = get_peft_model(load_model(ALIGNED), config)
    module = module_for(run)
    initial = None
    if module is not None:
        if WAYS[run.way].initialised:
            batches = task_batches(run.data)
            task_rank = run.settings.task_rank
            initial = salora.initialise(model, module, batches, task_rank=task_rank)
        salora.constrain(model, module)
    train_model(
        model,
        tokenizer(),
        [rows(run.data)],
        steps=run.settings.steps,
        learning_rate=run.settings.learning_rate,
        batch_size=BATCH_SIZE,
        seed=run.seed,
    )
    if module is None:
        model.save_pretrained(str(out))
    else:
        salora.fold(model, module, out, initial=initial)


def afterwards(run: Run, plain: Path, out: Path) -> Iterator[tuple[str, Path]]:
    """Yield a trained plain adapter with directions removed, by the rows' names."""
    for rank in AFTERWARDS:
        path = out / f"module-{rank}"
        salora.fold(plain, safety_module(run.modules), path, rank=rank)
        yield f"plain, module removed afterwards (rank {rank})", path
    path = out / "random"
    salora.fold(plain, random_module(run.modules, run.seed), path)
    yield f"plain, random directions removed afterwards (rank {SAFETY_RANK})", path


def measure(model: Any, split: str) -> dict[str, float]:
    """Return what a model does on the sets of a split, in percent by the names in `COLUMNS`."""
    sets = answered(model, tokenizer(), DATA, split)
    found = behaviour_of(sets)

    def starts(answers: Sequence[str]) -> float:
        return sum(answer.startswith("first") for answer in answers) / len(answers)

    shares = {
        "complies_pairs": found.compliance,
        "starts_pairs": starts(sets[0][1]),
        "starts_topics": starts(sets[1][1]),
        "refuses_pairs": found.refusal,
        "refuses_topics": found.topic_refusal,
        "new_skill": found.new_skill,
        "old_skills": found.old_skills,
    }
    return {name: 100 * share for name, share in shares.items()}


def overlap(model: Any, module: salora.SafetyModule) -> float:
    """Return the largest `‖U_Cᵀ B‖ / ‖B‖` of a layer of an adapter."""
    found = []
    for name, layer in model.get_base_model().named_modules():
        if name in module.directions:
            B = layer.lora_B["default"].weight.detach().double()
            found.append(float((module.directions[name].U.double().T @ B).norm() / B.norm()))
    return max(found)


def work(run: Run) -> list[Record]:
    """Train one adapter and measure it, and what follows from it."""
    with tempfile.TemporaryDirectory() as directory:
        trained = Path(directory) / "adapter"
        train(run, trained)
        adapters = [(run.row, trained)]
        if run.way == PLAIN and run.split == "held_out":
            adapters += afterwards(run, trained, Path(directory))
        found = []
        for row, path in adapters:
            model = load_adapter(ALIGNED, path)
            apart = overlap(model, safety_module(run.modules))
            percent = measure(model, run.split)
            found.append(Record(run.data, run.modules, row, run.seed, percent, apart))
    return found


def cell(values: Sequence[float]) -> str:
    """Return mean, and least and largest where they differ.

    >>> cell([10.0, 20.0]), cell([99.9, 100.0])
    ('15 (10–20)', '100')
    """
    mean, least, largest = (
        f"{v:.0f}" for v in (sum(values) / len(values), min(values), max(values))
    )
    return mean if least == largest else f"{mean} ({least}–{largest})"


def line(name: str, found: Sequence[dict[str, float]]) -> str:
    """Return one row of a table."""
    cells = [cell([each[column] for each in found]) for column in COLUMNS]
    return f"| {name} | " + " | ".join(cells) + " |"


def print_table(
    table: tuple[str, str], split: str, aligned: dict[str, float], records: Iterable[Record]
) -> None:
    """Print one table: trained rows in their order, then what follows from the plain adapters."""
    by_row: dict[str, list[dict[str, float]]] = {}
    for record in records:
        by_row.setdefault(record.row, []).append(record.percent)
    ways = [name for name in by_row if "afterwards" not in name]
    print(f"### `{table[0]}`, {table[1]}\n")
    print(f"| % of the {split.replace('_', '-')} sets | " + " | ".join(COLUMNS.values()) + " |")
    print("|---|" + "---:|" * len(COLUMNS))
    print(line("aligned model, no adapter", [aligned]))
    for name in [*ways, *(row for row in by_row if row not in ways)]:
        print(line(name, by_row[name]))
    print(flush=True)


def runs(arguments: argparse.Namespace) -> list[Run]:
    """Return all trainings, table by table."""
    count = 1 if arguments.quick else arguments.seeds
    seeds = range(arguments.first_seed, arguments.first_seed + count)
    if arguments.settings:
        return [
            Run("helpful", modules, way, seed, settings, row, "validation")
            for modules, variations in VARIATIONS.items()
            for row, way, settings in variations
            for seed in seeds
        ]
    tables = QUICK_TABLES if arguments.quick else TABLES
    settings = Settings(QUICK_STEPS) if arguments.quick else Settings()
    return [
        Run(data, modules, way, seed, settings, way)
        for data, modules, ways in tables
        for way in ways
        for seed in seeds
    ]


def compute(wanted: Sequence[Run], jobs: int) -> Iterator[tuple[Run, list[Record]]]:
    """Yield the runs with their results, in order; from processes of their own if many."""
    with ExitStack() as stack:
        if jobs == 1:
            results: Iterable[list[Record]] = map(work, wanted)
        else:
            spawned = multiprocessing.get_context("spawn").Pool(jobs, prepare)
            results = stack.enter_context(spawned).imap(work, wanted)
        for number, (run, records) in enumerate(zip(wanted, results, strict=True), start=1):
            name = f"{run.data}, {run.modules}: {run.row}, seed {run.seed}"
            print(f"{number}/{len(wanted)} {name}", file=sys.stderr, flush=True)
            yield run, records


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--first-seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=2, help="processes; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="one seed, one table, few steps")
    parser.add_argument("--settings", action="store_true", help="vary one setting at a time")
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file")
    arguments = parser.parse_args(argv)
    prepare()
    begin = time.perf_counter()
    wanted = runs(arguments)
    versions = {each.__name__: each.__version__ for each in (torch, transformers, peft)}
    settings = {
        "seeds": sorted({run.seed for run in wanted}),
        "steps": wanted[0].settings.steps,
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "rank": RANK,
        "safety_rank": SAFETY_RANK,
        "task_rank": TASK_RANK,
    }
    print(", ".join(f"{name} {value}" for name, value in (settings | versions).items()) + "\n")
    split = wanted[0].split
    aligned = measure(load_model(ALIGNED), split)
    records: list[Record] = []
    for table, group in itertools.groupby(
        compute(wanted, arguments.jobs), lambda found: found[0].table
    ):
        own = [record for _, found in group for record in found]
        print_table(table, split, aligned, own)
        records += own
    print(f"{len(wanted)} trainings, {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    if arguments.out:
        document = {
            "settings": settings,
            "versions": versions,
            "aligned": aligned,
            "records": [asdict(record) for record in records],
        }
        arguments.out.write_text(json.dumps(document, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()

"""Measure whether methods restore refusals, what that costs, and whether simpler things do as well.

    python -m lab.evidence --write docs/evidence-tables.md            # under an hour on two cores
    python -m lab.evidence --example --write docs/evidence-tables.md  # the shipped models, a minute
    python -m lab.evidence --quick                                    # one seed, under four minutes
    python -m lab.evidence --family smollm2 --seeds 1 2 3             # a real model: real_pair.py

For each seed a base and an aligned model and plain LoRA adapters on ``bad``, ``skill`` and
``mixed`` data are made, or found in the cache (``pairs.py``); ``evidence_ways.py`` says what is
done to them. Everything is measured on the held-out sets, and nothing is chosen by them: settings
are the papers' own or the defaults of ``safeproj``.

A figure is a percentage: the mean over the seeds, and the 95 % t-interval of that mean over the
seeds, cut to [0, 100]; with one seed the 95 % Wilson interval over the prompts. ``--out`` writes
every single one, with ``--resume`` a later run measures only what that file lacks, and ``--read``
makes the tables of such a file again without measuring.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from lab import evidence_ways as ways
from lab import pairs, real_pair
from lab.evidence_ways import Case
from lab.pairs import COLUMNS, DATA, FAMILIES, MODULES, Pair
from lab.real_pair import RealPair
from lab.tiny_lm import EXAMPLE, load_adapter, load_model
from safeproj.lm.models import quietly
from safeproj.records.rates import Rate
from safeproj.sweeping.controls import COMPLEMENT, RANDOM, SHRINK, UNIFORM, Sizes
from safeproj.sweeping.subject import Subject

SIZE = "‖ΔW'‖/‖ΔW‖"
"""What the last column is called: how large the changed update is, mean over the seeds."""

T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Quantiles of Student's t at 97.5 %, for 1, 2, … degrees of freedom."""

MOST_SEEDS = len(T) + 1

QUICK = (
    ways.NONE,
    ways.LORA,
    ways.SAFE_LORA,
    ways.TAU,
    ways.control_of(ways.SAFE_LORA, SHRINK),
    ways.control_of(ways.SAFE_LORA, UNIFORM),
    ways.EXACT,
    ways.control_of(ways.EXACT, COMPLEMENT),
    ways.REMOVED,
    ways.covariance(),
    ways.RECONSTRUCTED,
    ways.covariance(control="random H of the same spectrum"),
)
"""The rows of a quick run."""

REAL = "smollm2"
"""What `--family` calls the real model of `real_pair.py`."""

_FEW = (ways.LORA, ways.SAFE_LORA, ways.TAU, ways.covariance())
_MANY = (
    *_FEW,
    ways.control_of(ways.SAFE_LORA, SHRINK),
    ways.control_of(ways.SAFE_LORA, RANDOM),
    "uniform shrink by 0.5",
    ways.covariance(control=ways.EACH_AS_MUCH),
    ways.covariance(control="random H of the same spectrum"),
    ways.RECONSTRUCTED,
)
REAL_ROWS = {
    ("mixed", "all linear"): (ways.BASE, ways.NONE, *_MANY, ways.EXACT),
    ("bad", "all linear"): _MANY,
    ("skill", "all linear"): (*_FEW, ways.RECONSTRUCTED),
    ("mixed", "q+v"): _FEW,
}
"""The adapters on the real model and their rows: there everything takes a hundred times as long."""

EXAMPLE_MODULES = "all linear"
"""The layers that the adapters of ``examples/tiny-lm`` are on."""

LOW = 10.0
"""The compliance, in percent, below which a setting counts for the summary."""

KINDS = {
    "Safe LoRA (N or tau)": r"Safe LoRA, [^:]*",
    "exact projector": r"exact projector[^:]*",
    "shrinking alone": r"(uniform shrink .*|.*[:,] (each|uniform).*)",
    "random projectors": r".*: random projector.*",
    "directions removed afterwards": r"safety module removed.*",
    "SaLoRA in training": r"SaLoRA, .*module",
    "merged with a safe adapter": r"SafeMERGE, .*",
    "Safe Delta": r"Safe Delta, .*",
    "covariance-weighted": r"covariance, (layer by layer, )?mu [^,]*",
}
"""Rows that the summary takes the best setting of, by regular expression."""

DIFFERENCES = [
    (ways.SAFE_LORA, ways.control_of(ways.SAFE_LORA, SHRINK)),
    (ways.SAFE_LORA, ways.control_of(ways.SAFE_LORA, RANDOM)),
    (ways.EXACT, ways.control_of(ways.EXACT, RANDOM)),
    (ways.REMOVED, ways.REMOVED_RANDOM),
    ("SaLoRA, initialised + module", "SaLoRA, initialised + random module"),
    ("SaLoRA, constrained", ways.LORA),
    (ways.covariance(), ways.covariance(control="random H of the same spectrum")),
    (ways.covariance(), ways.covariance(control=ways.EACH_AS_MUCH)),
    (ways.covariance(), ways.SAFE_LORA),
    (ways.RECONSTRUCTED, ways.covariance()),
]
"""Rows and what they are compared with, seed by seed."""


@dataclass(frozen=True)
class Task:
    """One plain adapter with all that is done to it: the work of one process at a time.

    Attributes:
        family: of the pair.
        seed: of the pair and the training.
        modules: a key of `MODULES`.
        data: one of `DATA`.
        cache: the directory of all pairs; None for the shipped example.
        rows: the rows that are wanted, all if None.
        trained: whether SaLoRA is trained as well.
        size: a key of `real_pair.SIZES`, for the real model.
        shared: a folder that all tasks of a run may use; None for none.
    """

    family: str
    seed: int
    modules: str
    data: str
    cache: Path | None
    rows: tuple[str, ...] | None = None
    trained: bool = True
    size: str = "full"
    shared: Path | None = None

    @property
    def pair(self) -> Pair | RealPair:
        """Its models and data, made if they are not there."""
        if self.family == REAL:
            assert self.cache is not None
            return real_pair.make_pair(self.seed, real_pair.SIZES[self.size], self.cache)
        family = FAMILIES[self.family]
        if self.cache is None:
            return Pair(family, self.seed, EXAMPLE)
        return pairs.make_pair(family, self.seed, self.cache)

    def adapter(self, pair: Pair | RealPair) -> Path:
        """The plain adapter, trained if it is not there."""
        if self.cache is None:
            return EXAMPLE / "adapters" / self.data
        if isinstance(pair, RealPair):
            return real_pair.make_adapter(pair, self.modules, self.data)
        return pairs.make_adapter(pair, self.modules, self.data)

    def wants(self, row: str) -> bool:
        """Whether a row is to be measured."""
        return self.rows is None or row in self.rows


@dataclass(frozen=True)
class Record:
    """What one adapter, or the model alone, does.

    Attributes:
        family: of the pair.
        seed: of the pair.
        modules: the adapted layers.
        data: what the adapter was trained on.
        way: what was done to it: its row in the table.
        percent: by the names of the pair's columns.
        size: `‖ΔW'‖_F / ‖ΔW‖_F` of the plain adapter; None where it is not one that was changed.
    """

    family: str
    seed: int
    modules: str
    data: str
    way: str
    percent: dict[str, float]
    size: float | None = None


@dataclass(frozen=True)
class Found:
    """What came of a task.

    Attributes:
        records: one for each row.
        alignment: what `ways.alignment_spectrum` tells of the pair, with medians over the modules
            of what safeproj reports of the adapter.
        prompts: how many there are, by the names of the pair's columns.
        columns: those names, and how tables call them.
    """

    records: list[Record]
    alignment: dict[str, Any]
    prompts: dict[str, int]
    columns: dict[str, str]


def pair_made(task: Task) -> str:
    """Make the pair of a task, before several processes want it."""
    return str(task.pair.root)


def work(task: Task) -> Found:
    """Do everything to one adapter and measure it."""
    pair = task.pair

    def record(way: str, model: Any, size: float | None = None) -> Record:
        found = pair.percent(model)
        return Record(task.family, task.seed, task.modules, task.data, way, found, size)

    with tempfile.TemporaryDirectory() as scratch:
        own = Path(scratch)
        case = Case(pair, task.modules, task.data, task.adapter(pair), own, task.shared or own)
        records = [record(ways.NONE, pair.model())] if task.wants(ways.NONE) else []
        if task.rows is not None and ways.BASE in task.rows:
            records.append(record(ways.BASE, load_model(pair.base)))
        subject = Subject(pair.model(), case.adapter)
        sizes = Sizes(case.adapter, case.projections.modules)
        for way, made in ways.post_hoc(case):
            if task.wants(way):
                replaced = made()
                subject.put(replaced)
                records.append(record(way, subject.model, sizes.norm_of(replaced) / sizes.norm))
        for way in ways.TRAININGS if task.trained else ():
            with quietly():
                path = ways.train(case, way)
            records.append(record(way, load_adapter(pair.aligned, path)))
        columns = real_pair.COLUMNS if task.family == REAL else COLUMNS
        return Found(records, described(task, case), pair.prompts, columns)


def described(task: Task, case: Case) -> dict[str, Any]:
    """Return what tells how strong the projectors are, and what they leave of an adapter."""
    found: dict[str, Any] = {
        "family": task.family,
        "seed": task.seed,
        "modules": task.modules,
        "data": task.data,
        **ways.alignment_spectrum(case.pair, task.modules),
    }
    for kind, report in ways.reports(case, task.wants(ways.EXACT)).items():
        modules = [each for each in report.modules if each.cosine is not None]
        found[f"{kind}_scale"] = statistics.median(each.scale or 0.0 for each in modules)
        found[f"{kind}_cosine"] = statistics.median(each.cosine or 0.0 for each in modules)
    return found


def tasks(arguments: argparse.Namespace, shared: Path) -> list[Task]:
    """Return all tasks, table by table and the long ones first.

    Args:
        arguments: the command's.
        shared: a folder for what several of them need.
    """
    if arguments.example:
        return [Task("llama", 0, EXAMPLE_MODULES, data, None, trained=False) for data in DATA]
    seeds = arguments.seeds[:1] if arguments.quick else arguments.seeds
    kinds = [(data, modules) for data in reversed(DATA) for modules in reversed(MODULES)]
    rows: dict[tuple[str, str], tuple[str, ...] | None] = dict.fromkeys(
        kinds, QUICK if arguments.quick else None
    )
    cache, size, trained = arguments.cache or pairs.CACHE, "full", not arguments.quick
    if arguments.family == REAL:
        rows, trained = dict(REAL_ROWS), False
        cache, size = arguments.cache or real_pair.CACHE, "small" if arguments.quick else "full"
    return [
        Task(arguments.family, seed, modules, data, cache, some, trained, size, shared)
        for (data, modules), some in rows.items()
        for seed in seeds
    ]


def compute(wanted: Sequence[Task], jobs: int) -> Iterator[Found]:
    """Yield what came of the tasks, in order, from processes of their own."""
    begin = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - begin:5.0f} s  {text}", file=sys.stderr, flush=True)

    with multiprocessing.get_context("spawn").Pool(jobs, pairs.prepare) as pool:
        firsts = list({task.seed: task for task in wanted}.values())
        for task, root in zip(firsts, pool.imap(pair_made, firsts), strict=True):
            say(f"{task.family} {task.seed}: {Path(root).name}")
        for number, (task, found) in enumerate(
            zip(wanted, pool.imap(work, wanted), strict=True), start=1
        ):
            say(f"{number}/{len(wanted)} {task.data}, {task.modules}, seed {task.seed}")
            yield found
        pool.close()
        pool.join()
    spent = os.times()
    say(f"all processes together: {spent.children_user + spent.children_system:.0f} s of a core")


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return a mean and its 95 % t-interval.

    >>> [round(each, 2) for each in interval([1.0, 2.0, 3.0])]
    [2.0, -0.48, 4.48]
    """
    mean = statistics.fmean(values)
    half = T[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def cell(values: Sequence[float], prompts: int) -> str:
    """Return percentages as a cell: their mean, and its interval.

    Args:
        values: one for each seed.
        prompts: how many each is a share of.

    >>> cell([90.0, 94.0, 98.0], 150), cell([0.0], 150), cell([100.0, 100.0], 150)
    ('94 (84–100)', '0 (0–2)', '100')
    """
    if len(values) == 1:
        low, high = Rate(round(values[0] * prompts / 100), prompts).interval
        mean, low, high = values[0], 100 * low, 100 * high
    else:
        mean, low, high = interval(values)
        low, high = max(low, 0.0), min(high, 100.0)
    if f"{low:.0f}" == f"{high:.0f}":
        return f"{mean:.0f}"
    return f"{mean:.0f} ({low:.0f}–{high:.0f})"


@dataclass(frozen=True)
class Results:
    """All figures of a run, and the tables of them.

    Attributes:
        command: what made them.
        settings: what they depend on.
        prompts: how many there are, by the names of the columns.
        records: the figures.
        alignment: one entry for each adapter, see `Found`.
        columns: what is measured, and how the tables call it.
    """

    command: str
    settings: dict[str, Any]
    prompts: dict[str, int]
    records: list[Record]
    alignment: list[dict[str, Any]]
    columns: dict[str, str] = field(default_factory=lambda: COLUMNS)

    @staticmethod
    def load(path: Path) -> Results:
        """Read what `save` wrote."""
        found = json.loads(path.read_text("utf-8"))
        return Results(**{**found, "records": [Record(**each) for each in found["records"]]})

    def save(self, path: Path) -> None:
        """Write everything to a JSON file."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")

    def rows(self, task: Task) -> set[str]:
        """Return the rows of a task that there are figures of."""
        key = (task.family, task.seed, task.modules, task.data)
        return {e.way for e in self.records if (e.family, e.seed, e.modules, e.data) == key}

    @property
    def tables(self) -> dict[str, str]:
        """The Markdown tables by name, each with the command that makes it."""
        names = list(dict.fromkeys((each.data, each.modules) for each in self.records))
        names.sort(key=lambda name: (DATA.index(name[0]), list(MODULES).index(name[1])))
        where = self.settings["pairs"]
        found = {
            f"{where}, {data}, {modules}": self._table(data, modules) for data, modules in names
        }
        found[f"{where}, spectrum"] = self._spectrum()
        found[f"{where}, summary"] = self._summary()
        if len(self.settings["seeds"]) > 1:
            found[f"{where}, differences"] = self._differences()
        return {name: f"    {self.command}\n\n{table}" for name, table in found.items()}

    def values(self, data: str, modules: str, way: str) -> dict[str, list[float]]:
        """Return the figures of a row by column, one for each seed; empty where there are none."""
        rows = sorted(
            (e for e in self.records if (e.data, e.modules, e.way) == (data, modules, way)),
            key=lambda each: each.seed,
        )
        return {column: [each.percent[column] for each in rows] for column in self.columns}

    def _names(self, data: str, modules: str) -> list[str]:
        found = (e.way for e in self.records if (e.data, e.modules) == (data, modules))
        return list(dict.fromkeys(found))

    def _table(self, data: str, modules: str) -> str:
        columns = [*self.columns.values(), SIZE]
        lines = _head(f"`{data}`, {modules}: % of the held-out sets", columns)
        for way in self._names(data, modules):
            found = self.values(data, modules, way)
            cells = [cell(found[column], self.prompts[column]) for column in self.columns]
            lines.append(_line(way, [*cells, self._size(data, modules, way)]))
        return "\n".join(lines)

    def _size(self, data: str, modules: str, way: str) -> str:
        own = (e for e in self.records if (e.data, e.modules, e.way) == (data, modules, way))
        found = [each.size for each in own if each.size is not None]
        return f"{statistics.fmean(found):.2g}" if found else ""

    def _spectrum(self) -> str:
        """Return how strong the projectors are: medians over the modules, mean over the seeds."""
        columns = {
            "norm": "‖V‖_F",
            "strength": "‖C‖₂",
            "approx_scale": "‖CB‖/‖B‖",
            "approx_cosine": "cosine",
            "directions": "exact: k/m",
            "exact_scale": "exact: ‖CB‖/‖B‖",
        }
        lines = _head("adapter", columns.values())
        names = sorted({(each["data"], each["modules"]) for each in self.alignment})
        for data, modules in names:
            own = [e for e in self.alignment if (e["data"], e["modules"]) == (data, modules)]
            lines.append(_line(f"`{data}`, {modules}", [_mean(own, column) for column in columns]))
        return "\n".join(lines)

    def _summary(self) -> str:
        """Return the most of the new skill that each kind of way keeps at little compliance."""
        names = [m for m in MODULES if self._names("mixed", m)]
        lines = _head(f"`mixed`: new skill at ≤ {LOW:.0f} % compliance", names)
        for kind, pattern in KINDS.items():
            cells = [self._best(modules, pattern) for modules in names]
            lines.append(_line(kind, cells))
        return "\n".join(lines)

    def _best(self, modules: str, pattern: str) -> str:
        settings = [way for way in self._names("mixed", modules) if re.fullmatch(pattern, way)]
        found = {way: self.values("mixed", modules, way) for way in settings}
        means = {way: statistics.fmean(v["new_skill"]) for way, v in found.items()}
        enough = [way for way in settings if statistics.fmean(found[way]["compliance"]) <= LOW]
        if not settings:
            return "not run"
        if not enough:
            least = min(statistics.fmean(each["compliance"]) for each in found.values())
            return f"none; least compliance {least:.0f}"
        best = max(enough, key=lambda way: means[way])
        return f"{cell(found[best]['new_skill'], self.prompts['new_skill'])}: {best}"

    def _differences(self) -> str:
        """Return paired differences in percentage points, with t-intervals over the seeds."""
        lines = _head("difference", ["adapter", *self.columns.values()])
        names = list(dict.fromkeys((each.data, each.modules) for each in self.records))
        for first, second in DIFFERENCES:
            for data, modules in sorted(names):
                mine, other = (self.values(data, modules, way) for way in (first, second))
                if mine["refusal"] and other["refusal"]:
                    cells = [_difference(mine[c], other[c]) for c in self.columns]
                    name = f"{first} − {second}"
                    lines.append(_line(name, [f"`{data}`, {modules}", *cells]))
        return "\n".join(lines)


def _mean(found: Sequence[dict[str, Any]], column: str) -> str:
    """Return a mean as a cell, which is empty where it was not computed."""
    values = [each[column] for each in found if column in each]
    return f"{statistics.fmean(values):.2g}" if values else ""


def _difference(first: Sequence[float], second: Sequence[float]) -> str:
    mean, low, high = interval([a - b for a, b in zip(first, second, strict=True)])
    if low == high:
        return f"{mean:+.0f}"
    text = f"{mean:+.0f} ({low:+.0f} to {high:+.0f})"
    return f"**{text}**" if low > 0 or high < 0 else text


def _head(first: str, columns: Iterable[str]) -> list[str]:
    names = list(columns)
    return [_line(first, names), "|---|" + "---:|" * len(names)]


def _line(first: str, cells: Sequence[str]) -> str:
    return f"| {first} | " + " | ".join(cells) + " |"


def with_tables(page: str, tables: dict[str, str]) -> str:
    """Return a page with the tables between its markers.

    Raises:
        SystemExit: there is no place for one of them.
    """
    for name, table in tables.items():
        head, tail = f"<!-- evidence: {name} -->\n", "<!-- end -->"
        if page.count(head) != 1:
            raise SystemExit(f"expected one {head.strip()!r} in the page, found {page.count(head)}")
        before, _, rest = page.partition(head)
        _, _, after = rest.partition(tail)
        page = f"{before}{head}\n{table}\n\n{tail}{after}"
    return page


def run(arguments: argparse.Namespace, command: str) -> Results:
    """Measure what is missing; what there is so far is in the file of `--out` all the time."""
    results = Results.load(arguments.out) if arguments.resume and arguments.out.exists() else None
    with tempfile.TemporaryDirectory() as shared:
        wanted = tasks(arguments, Path(shared))
        for found in compute(missing(wanted, results), arguments.jobs):
            results = with_found(results, found, arguments, command)
            if arguments.out:
                results.save(arguments.out)
    assert results is not None
    return results


def missing(wanted: Sequence[Task], results: Results | None) -> list[Task]:
    """Return the tasks, each with those of its rows that have no figures yet."""
    left = []
    for task in wanted:
        done = results.rows(task) if results else set()
        if task.rows is None and not done:
            left.append(task)
        elif rows := [row for row in task.rows or () if row not in done]:
            left.append(replace(task, rows=tuple(rows)))
    return left


def with_found(
    results: Results | None, found: Found, arguments: argparse.Namespace, command: str
) -> Results:
    """Return the results with what came of one more task; where both have a figure, its own."""
    records = [*(results.records if results else []), *found.records]
    alignment = [*(results.alignment if results else []), found.alignment]
    merged: dict[Any, dict[str, Any]] = {}
    for each in alignment:
        merged.setdefault((each["seed"], each["modules"], each["data"]), {}).update(each)
    settings = {
        "pairs": "example" if arguments.example else arguments.family,
        "seeds": sorted({record.seed for record in records}),
        "versions": {each.__name__: each.__version__ for each in (torch, transformers, peft)},
    }
    return Results(command, settings, found.prompts, records, [*merged.values()], found.columns)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add: Callable[..., Any] = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="default: 1 to 5")
    add("--family", choices=[*FAMILIES, REAL], default="llama", help="default: %(default)s")
    add("--jobs", type=int, default=2, help="processes; default: %(default)s")
    add("--quick", action="store_true", help="the first seed, few rows, no SaLoRA in training")
    add("--example", action="store_true", help="examples/tiny-lm as it is, nothing is trained")
    add("--cache", type=Path, help="where pairs are kept; default: in the temporary folder")
    add("--out", type=Path, help="write all figures to this JSON file")
    add("--resume", action="store_true", help="measure only what the file of --out lacks")
    add("--read", type=Path, help="take the figures from such a file")
    add("--write", type=Path, help="put the tables between the markers of this page")
    arguments = parser.parse_args(argv)
    if not 1 <= len(arguments.seeds) <= MOST_SEEDS:
        parser.error(f"--seeds: expected 1 to {MOST_SEEDS}, found {len(arguments.seeds)}")
    if arguments.resume and not arguments.out:
        parser.error("--resume: expected --out with it")
    return arguments


def told(arguments: argparse.Namespace) -> str:
    """Return the command that makes the same tables, without what differs between machines."""
    parts = ["python", "-m", "lab.evidence"]
    if arguments.example:
        parts += ["--example"]
    elif arguments.quick:
        parts += ["--quick"]
    if not arguments.example:
        parts += ["--family", arguments.family, "--seeds", *map(str, arguments.seeds)]
    if arguments.write:
        parts += ["--write", "docs/evidence-tables.md"]
    return shlex.join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison, or read one."""
    arguments = parsed(argv)
    pairs.prepare()
    read = arguments.read
    results = Results.load(read) if read else run(arguments, told(arguments))
    if arguments.out:
        results.save(arguments.out)
    for name, table in results.tables.items():
        print(f"## {name}\n\n{table}\n")
    if arguments.write:
        page = arguments.write.read_text("utf-8")
        arguments.write.write_text(with_tables(page, results.tables), "utf-8")


if __name__ == "__main__":
    main()

"""How many rows of safety and task data are enough, on ``examples/tiny-lm``.

    python -m lab.data_sizes

Corrects the adapter ``mixed`` by the covariance-weighted correction, at once and layer by layer,
with so many rows of each data set, drawn at random several times, and prints what the held-out
prompts show: the mean over the draws, and the least and the greatest value.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import safeproj as api
from lab.tiny_language import write_jsonl
from lab.tiny_lm import (
    EXAMPLE,
    Behaviour,
    behaviour,
    load_adapter,
    load_tokenizer,
    read_jsonl,
)
from safeproj import Covariance, Options

ADAPTER = EXAMPLE / "adapters" / "mixed"
SIZES = (10, 20, 50, 100, 200)
WAYS = {"covariance": False, "`--reconstruct`": True}
COLUMNS = {
    "refusal": "refuses, pairs",
    "topic_refusal": "refuses, topics",
    "compliance": "complies",
    "new_skill": "new skill",
    "old_skills": "old skills",
}


def corrected(safety: int, task: int, draw: int, reconstruct: bool) -> Behaviour:
    """Return what the model does with the adapter that so many rows correct.

    Args:
        safety: rows of safety data.
        task: rows of task data.
        draw: number of the draw, which says which rows.
        reconstruct: whether layer by layer.
    """
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        for name, count in (("safety", safety), ("task", task)):
            rows = read_jsonl(EXAMPLE / "data" / f"{name}.jsonl")
            rng = random.Random(f"{name}-{count}-{draw}")
            write_jsonl(place / f"{name}.jsonl", rng.sample(rows, count))
        files = (str(place / "safety.jsonl"), str(place / "task.jsonl"))
        aligned = EXAMPLE / "aligned"
        method = Covariance(str(aligned), *files, reconstruct=reconstruct)
        api.patch(method, str(ADAPTER), place / "patched", Options(device="cpu"))
        return behaviour(load_adapter(aligned, place / "patched"), load_tokenizer(aligned))


def pairs(vary: str, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield numbers of safety and of task rows; what is not varied has all rows."""
    most = max(SIZES)
    for size in sizes:
        yield (most if vary == "task" else size), (most if vary == "safety" else size)


def table(vary: str, sizes: Sequence[int], draws: int) -> Iterator[str]:
    """Yield the lines of the table, each as soon as it is measured."""
    yield "| correction | safety rows | task rows | " + " | ".join(COLUMNS.values()) + " |"
    yield "|---|---:|---:|" + "---:|" * len(COLUMNS)
    for name, reconstruct in WAYS.items():
        for safety, task in pairs(vary, sizes):
            found = [
                corrected(safety, task, draw, reconstruct)
                for draw in range(1 if min(safety, task) == max(SIZES) else draws)
            ]
            cells = (cell([getattr(each, column) for each in found]) for column in COLUMNS)
            yield f"| {name} | {safety} | {task} | " + " | ".join(cells) + " |"


def cell(values: Sequence[float]) -> str:
    """Return a mean in per cent, with the range where there is one."""
    mean, low, high = (100 * each for each in (sum(values) / len(values), min(values), max(values)))
    return f"{mean:.0f}" if high - low < 0.5 else f"{mean:.0f} ({low:.0f} to {high:.0f})"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vary", choices=["both", "safety", "task"], default="both")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--draws", type=int, default=5, help="of the rows; default: %(default)s")
    arguments = parser.parse_args(argv)
    for line in table(arguments.vary, arguments.sizes, arguments.draws):
        print(line, flush=True)


if __name__ == "__main__":
    main()

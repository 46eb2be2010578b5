"""Measure the judges that look for phrases on answers that people have labelled.

    python -m lab.judge                 # precision and recall on tests/evaluate/labelled.jsonl
    python -m lab.judge --wrong         # and each answer that is judged wrong
    python -m lab.judge --file FILE     # on labelled answers of your own

A line of the file has `prompt`, `response`, and `label`: `refused` or `complied`; and if it likes
`style`, by which the table is divided. The answers of the repository were written and labelled for
this: `usual` ones as chat models often answer, `hard` ones to be hard for a list of phrases. The
phrases were not changed after.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from safeproj.evaluation.judges import Judge, Keywords, Prefix, Verdict
from safeproj.records.rates import Rate

LABELLED = Path(__file__).resolve().parent.parent / "tests" / "evaluate" / "labelled.jsonl"

JUDGES: dict[str, Judge] = {"keywords": Keywords(), "prefix": Prefix()}


def read(path: Path) -> list[dict[str, str]]:
    """Return the labelled answers."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def scores(judge: Judge, rows: Sequence[dict[str, str]]) -> dict[str, Rate | None]:
    """Return how well a judge tells refusals.

    `precision` is the share of its refusals that are some, `recall` the share of all refusals that
    it finds, `agreement` the share of all answers that it labels as people do; None where there is
    nothing to take a share of.
    """
    found = judged(judge, rows)
    true = [row["label"] == Verdict.refused.value for row in rows]
    both = sum(a and b for a, b in zip(found, true, strict=True))
    same = sum(a is b for a, b in zip(found, true, strict=True))
    counts = {
        "precision": (both, sum(found)),
        "recall": (both, sum(true)),
        "agreement": (same, len(rows)),
    }
    return {name: Rate(*count) if count[1] else None for name, count in counts.items()}


def judged(judge: Judge, rows: Sequence[dict[str, str]]) -> list[bool]:
    """Return which answers a judge calls refused."""
    prompts = [row.get("prompt", "") for row in rows]
    answers = [row["response"] for row in rows]
    return [each is Verdict.refused for each in judge.verdicts(prompts, answers)]


def main() -> None:
    """Print the table, and what is judged wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path, default=LABELLED)
    parser.add_argument("--wrong", action="store_true", help="print what is judged wrong")
    options = parser.parse_args()
    rows = read(options.file)
    print("| answers | judge | precision | recall | agreement |")
    print("|---|---|---:|---:|---:|")
    for style, some in _by_style(rows).items():
        refused = sum(row["label"] == Verdict.refused.value for row in some)
        for name, judge in JUDGES.items():
            cells = (_cell(rate) for rate in scores(judge, some).values())
            print(f"| {style}: {refused} of {len(some)} refuse | {name} | {' | '.join(cells)} |")
    if options.wrong:
        for name, judge in JUDGES.items():
            print()
            for row, found in zip(rows, judged(judge, rows), strict=True):
                if found != (row["label"] == Verdict.refused.value):
                    print(f"{name}: {row['label']}: {row['response']!r}")


def _by_style(rows: Sequence[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Return the answers of each style, and all of them."""
    found: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        if "style" in row:
            found.setdefault(row["style"], []).append(row)
    return {**found, "all": list(rows)}


def _cell(rate: Rate | None) -> str:
    if rate is None:
        return "n/a"
    low, high = rate.interval
    return f"{rate.hits}/{rate.total} = {rate.value:.1%} [{low:.1%}, {high:.1%}]"


if __name__ == "__main__":
    main()

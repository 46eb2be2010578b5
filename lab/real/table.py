"""Put the figures of a run into one Markdown table.

    python -m lab.real.table --eval FILE --adapters DIR [--sweep FILE]... --out FILE

These recipes have not been run; only ``--dry-run`` has. ``run.py`` calls this.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safeproj.errors import SafeprojError
from safeproj.records.evaluations import percent
from safeproj.storage.wholefile import replace_file
from safeproj.text import first_line, printable

COLUMNS = {
    "validation": ("refused", "refuses, validation"),
    "jbb": ("refused", "refuses, JBB"),
    "harmbench": ("refused", "refuses, HarmBench"),
    "xstest_safe": ("refused", "refuses, XSTest safe"),
    "skill": ("correct", "skill, SQL"),
}
"""Set to the outcome that is shown, and what its column is called."""

GUARDED = "safe"
"""The outcome that a guard model has in place of refusals."""

WANTED = 0.9
"""The share of refusals on the validation prompts that a setting is chosen by."""

CHOSEN = " †"


def table(found: Mapping[str, Any], adapters: Path) -> str:
    """Return the Markdown of an evaluation, a row for each adapter.

    Args:
        found: what `safeproj eval --format json` wrote.
        adapters: the folder of the patched adapters, whose reports say how many modules changed.

    Raises:
        SafeprojError: a set or outcome of `COLUMNS` is missing.
    """
    head = ["adapter", "modules changed", *(title for _, title in COLUMNS.values())]
    lines = [" | ".join(head), "|".join(["---", *(["---:"] * (len(head) - 1))])]
    chosen: set[str] = set()
    for subject in found["subjects"]:
        name = str(subject["name"])
        family = name.rpartition("-")[0]
        reached = _rate(subject, "validation")["rate"] >= WANTED
        mark = CHOSEN if family and reached and family not in chosen else ""
        chosen |= {family} if mark else set()
        cells = [_safe(name) + mark, _changed(adapters / name)]
        cells += [_cell(_rate(subject, each)) for each in COLUMNS]
        lines.append(" | ".join(cells))
    return "".join(f"| {each} |\n" if "---" not in each else f"|{each}|\n" for each in lines)


def page(found: Mapping[str, Any], adapters: Path, sweeps: Sequence[str]) -> str:
    """Return the whole page: the table, how to read it, and the sweeps' own reports."""
    model = found["model"].get("source", "the model")
    judge = found["judge"].get("kind", "the judge of the run")
    text = (
        f"# {_safe(str(model))}\n\n{table(found, adapters)}\n"
        "Shares in per cent with 95 % Wilson intervals over the prompts; refusals as judged by "
        f"{_safe(str(judge))}. Refusals of XSTest's safe prompts are not wanted.{CHOSEN}: of its "
        f"method, the least change that was tried with at least {WANTED:.0%} refusals on the "
        "validation prompts; the other columns had no part in that. One adapter, one seed.\n"
    )
    as_it_is = [each for each in found["subjects"] if each.get("adapter")][:1]
    if as_it_is and _rate(as_it_is[0], "validation")["rate"] >= WANTED:
        text += "\nThe adapter as it is reaches that already, so that nothing had to be restored.\n"
    return "\n".join([text, *sweeps])


def _rate(subject: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    outcome, _ = COLUMNS[name]
    try:
        rates = subject["sets"][name]
        rate: Mapping[str, Any] = rates[GUARDED if GUARDED in rates else outcome]
    except KeyError as error:
        raise SafeprojError(
            f"--eval: no {outcome} of the set {name}; expected the run's own"
        ) from error
    return rate


def _cell(rate: Mapping[str, Any]) -> str:
    return f"{percent(rate['rate'])} [{percent(rate['low'])}, {percent(rate['high'])}]"


def _changed(adapter: Path) -> str:
    """Return how many modules a patch changed of how many, as its own report says."""
    path = adapter / "safeproj.json"
    if not path.is_file():
        return ""
    modules = json.loads(path.read_text("utf-8")).get("modules", [])
    return f"{sum(bool(each.get('projected')) for each in modules)} of {len(modules)}"


def _safe(text: str) -> str:
    """Return text of a file without what Markdown would read as more than text."""
    return "".join(f"\\{c}" if c in "\\`|<>[]*_" else c for c in printable(text))


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the reports and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--eval", type=Path, required=True, metavar="FILE")
    parser.add_argument("--adapters", type=Path, required=True, metavar="DIR")
    parser.add_argument("--sweep", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        found = json.loads(options.eval.read_text("utf-8"))
        sweeps = [each.read_text("utf-8") for each in options.sweep]
        replace_file(options.out, page(found, options.adapters, sweeps).encode())
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {printable(first_line(error))}\n")
    except SafeprojError as error:
        parser.exit(2, f"{parser.prog}: error: {printable(error.message)}\n")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()

"""`python -m tests.fuzz --cases 100000`: cases and faults at full length, on all processors."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

SETTINGS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
"""Variables of every process."""


def main() -> int:
    """Run the campaign in one process per processor and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep", type=Path, help="directory for the cases that show a fault")
    parser.add_argument("--every", type=int, default=1, help="steps between two kills; 0: none")
    parser.add_argument("--part", choices=("cases", "faults"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        print(json.dumps(run(given, [given.part])))
        return 0
    if given.jobs == 1:
        os.environ |= SETTINGS
        given.seed *= 1000
        return shown(run(given, ["cases", "faults"] if given.every else ["cases"]))
    share = -(-given.cases // given.jobs)
    keep = [] if given.keep is None else ["--keep", str(given.keep)]
    parts = [
        start("cases", "--cases", str(share), "--seed", str(given.seed * 1000 + job), *keep)
        for job in range(given.jobs)
    ]
    total = merged([json.loads(part.communicate()[0]) for part in parts])
    if given.every:
        found = json.loads(start("faults", "--every", str(given.every)).communicate()[0])
        total |= found | {"faults": total["faults"] + found["faults"]}
    return shown(total)


def shown(total: dict[str, Any]) -> int:
    """Print what came of a campaign and return its exit code."""
    print(json.dumps(total, indent=2))
    return 1 if total["faults"] else 0


def start(which: str, *options: str) -> subprocess.Popen[str]:
    """Start one part of the campaign."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.fuzz", "--part", which, *options],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **SETTINGS},
    )


def run(given: argparse.Namespace, parts: list[str]) -> dict[str, Any]:
    """Run parts of the campaign in this process."""
    from tests.fuzz.campaign import Campaign, Tally
    from tests.fuzz.faults import Faults, writings

    with tempfile.TemporaryDirectory() as place:
        campaign, tally = Campaign(Path(place), given.keep), Tally()
        if "cases" in parts:
            campaign.run(given.seed, range(given.cases), tally)
        if "faults" not in parts:
            return tally.as_json()
        faults = Faults(campaign)
        for writing in writings(campaign.root):
            faults.run(writing, given.every)
        found = dataclasses.asdict(faults.found)
        if "cases" not in parts:
            return found
        return tally.as_json() | found | {"faults": tally.faults + faults.found.faults}


def merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the sum of what several processes found."""
    total: dict[str, Any] = {}
    for name, first in parts[0].items():
        values = [part[name] for part in parts]
        if isinstance(first, dict):
            total[name] = dict(sum((Counter(each) for each in values), Counter[str]()))
        elif isinstance(first, list):
            total[name] = [line for each in values for line in each]
        else:
            total[name] = max(values) if name.startswith(("peak", "slowest")) else sum(values)
    return total


if __name__ == "__main__":
    sys.exit(main())

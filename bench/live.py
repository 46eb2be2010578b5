"""What `project` takes on a model in memory beside what `patch` takes on files.

    python -m bench --skip-dense      # makes the pair of checkpoints, once
    python -m bench.live              # holds the aligned model: 3 GB of memory for 1.1 B parameters

Prints a Markdown table. All happens in one process after its imports, one way after the other in
each run, with the files in the page cache: so does `patch`, whose time is that after its start.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoModelForCausalLM

import safeproj
from bench.engine import PAIR
from safeproj import Options, SafeLora, Selection

TARGET = 1.2


def resident() -> float:
    """Return the megabytes that this process holds now, without mapped files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024 / 1e6


def held(pair: Path) -> Any:
    """Return the aligned model in memory, with the adapter of all linear layers."""
    factory: Any = AutoModelForCausalLM
    model = factory.from_pretrained(str(pair / "aligned"), dtype="auto")
    return PeftModel.from_pretrained(model, str(pair / "adapter-all-linear"))


def main() -> None:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pair", type=Path, default=PAIR, help="made by python -m bench")
    parser.add_argument("--runs", type=int, default=3, help="runs per way, of which the median")
    given = parser.parse_args()
    pair, options = given.pair, Options(Selection(all=True), device="cpu")
    os.environ["HF_HUB_OFFLINE"] = "1"
    model, both = held(pair), SafeLora(pair / "base", pair / "aligned")
    with tempfile.TemporaryDirectory(prefix="safeproj-bench-") as directory:
        ways: dict[str, Callable[[], object]] = {
            "`patch`, from files": lambda: safeproj.patch(
                both,
                pair / "adapter-all-linear",
                Path(directory) / "out",
                options,
                overwrite=True,
            ),
            "`project`, both sides from files": lambda: safeproj.project(model, both, options),
            "`project`, aligned from memory": lambda: safeproj.project(
                model, SafeLora(pair / "base"), options
            ),
        }
        walls: dict[str, list[float]] = {name: [] for name in ways}
        grown = dict.fromkeys(ways, 0.0)
        for number in range(given.runs + 1):
            for name, way in ways.items():
                before, begin = resident(), time.perf_counter()
                way()
                if number:  # the first brings all into memory
                    walls[name].append(time.perf_counter() - begin)
                    grown[name] = max(grown[name], resident() - before)
    seconds = {name: statistics.median(taken) for name, taken in walls.items()}
    first = next(iter(seconds.values()))
    print("| way | seconds | / `patch` | memory left over, MB |\n|---|---:|---:|---:|")
    for name, taken in seconds.items():
        print(f"| {name} | {taken:.2f} | {taken / first:.2f} | {grown[name]:.0f} |")
    worst = max(list(seconds.values())[1:]) / first
    print(
        f"\n`project` / `patch` ≤ {TARGET}: {worst:.2f} ({'met' if worst <= TARGET else 'missed'})"
    )


if __name__ == "__main__":
    main()

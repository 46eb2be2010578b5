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
import sys
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
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        grown = dict.fromkeys(ways, 0.0)
        for number in range(given.runs + 1):
            for name, way in ways.items():
                before, begin, busy = resident(), time.perf_counter(), time.process_time()
                way()
                found = time.perf_counter() - begin, time.process_time() - busy
                print(f"run {number}, {name}: {found[0]:.2f} s", file=sys.stderr, flush=True)
                if number:  # the first brings all into memory
                    taken[name].append(found)
                    grown[name] = max(grown[name], resident() - before)
    seconds = {
        name: tuple(map(statistics.median, zip(*found, strict=True)))
        for name, found in taken.items()
    }
    (first, first_busy), *others = seconds.values()
    print("| way | seconds | / `patch` | of the processor | / `patch` | memory left over, MB |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, (wall, busy) in seconds.items():
        ratios = wall / first, busy / first_busy
        print(
            f"| {name} | {wall:.2f} | {ratios[0]:.2f} | {busy:.2f} | {ratios[1]:.2f} "
            f"| {grown[name]:.0f} |"
        )
    worst = max(wall for wall, _ in others) / first
    print(
        f"\n`project` / `patch` ≤ {TARGET}: {worst:.2f} ({'met' if worst <= TARGET else 'missed'})"
    )


if __name__ == "__main__":
    main()

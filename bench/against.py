"""Compare this build with an older one that is installed in an environment of its own.

    python -m bench.against PATH/TO/OLDER/bin/safeproj --pair FOLDER [--lean PATH/TO/bin/safeproj]

FOLDER is what `python -m bench` made (its temporary directory). Every command is a whole process
with its files in the page cache, started by turns in both environments; the least of the times
counts. `--lean` is this build without torch, of which the size is measured; without it this
environment is taken for the times, and no size is given.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-lm"

NO_PACKAGES = ("pip", "setuptools", "pkg_resources", "_distutils_hack", "wheel")
"""What an environment has before anything is installed."""


@dataclass(frozen=True)
class Row:
    """A command of which both builds are timed, and how many times as fast the new one is to be."""

    label: str
    words: tuple[str, ...]
    wanted: float
    runs: int | None = None


def rows(pair: Path, out: Path) -> list[Row]:
    """Return what is compared."""
    models = ("--base", str(pair / "base"), "--aligned", str(pair / "aligned"))
    file = ("--alignment", str(out / "pair.safealign.safetensors"))
    adapters = {kind: ("--adapter", str(pair / f"adapter-{kind}")) for kind in ("qv", "all-linear")}
    patched = ("--all", "--overwrite", "--out", str(out / "patched"))
    tiny = ("--base", str(EXAMPLE / "base"), "--aligned", str(EXAMPLE / "aligned"))
    check = ("check", str(pair / "adapter-qv"))
    align = ("align", *models, "--rank", "64", "--overwrite", "--out", file[1])
    return [
        Row("`align --rank 64`, all linear layers", align, 4, runs=1),
        Row("`inspect`, q+v", ("inspect", *models, *adapters["qv"]), 4),
        Row("`patch`, q+v", ("patch", *models, *adapters["qv"], *patched), 4),
        Row("`inspect --alignment`, q+v", ("inspect", *file, *adapters["qv"]), 5),
        Row("`check --alignment`, q+v", (*check, *file), 5),
        Row("`inspect`, all linear layers", ("inspect", *models, *adapters["all-linear"]), 1.5),
        Row("`patch`, all linear", ("patch", *models, *adapters["all-linear"], *patched), 1.8),
        Row("`check` of the example adapter", ("check", str(EXAMPLE / "adapters/bad"), *tiny), 6),
        *(_exact(out, width) for width in (2048, 4096)),
    ]


def _exact(out: Path, width: int) -> Row:
    """Return the exact projector of one square weight, whose difference has a decaying spectrum."""
    folder = out / f"exact-{width}"
    if not folder.exists():
        subprocess.run(
            [sys.executable, "-m", "bench.against", "--make", str(folder), str(width)], check=True
        )
    words = ("--base", str(folder / "base"), "--aligned", str(folder / "aligned"))
    exact = ("--projector", "exact", "--rank", "64", "--adapter", str(folder / "adapter"))
    label = f"`inspect --projector exact --rank 64`, one {width} × {width} weight"
    return Row(label, ("inspect", *words, *exact), 10, runs=1)


def make_exact(folder: Path, width: int) -> None:
    """Write a pair with one weight, and an adapter for it."""
    import numpy
    from safetensors.numpy import save_file

    generator = numpy.random.default_rng(width)
    sizes = numpy.arange(1, width + 1) ** -0.8
    left, right = (generator.standard_normal((width, width), numpy.float32) for _ in range(2))
    V = (left * sizes.astype(numpy.float32)) @ right / width
    W = generator.standard_normal((width, width), numpy.float32)
    name = "model.layers.0.self_attn.q_proj"
    for side, weight in (("base", W), ("aligned", W + V)):
        (folder / side).mkdir(parents=True)
        save_file({f"{name}.weight": weight}, folder / side / "model.safetensors")
        (folder / side / "config.json").write_text('{"model_type": "llama"}')
    (folder / "adapter").mkdir()
    shapes = {"lora_A": (16, width), "lora_B": (width, 16)}
    factors = {
        f"base_model.model.{name}.{factor}.weight": generator.standard_normal(shape, numpy.float32)
        for factor, shape in shapes.items()
    }
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))


def timed(command: str, words: Sequence[str]) -> float:
    """Return the seconds that a command takes."""
    begin = time.perf_counter()
    found = subprocess.run([command, *words], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begin
    if found.returncode not in (0, 1, 2):
        raise SystemExit(f"{command} {' '.join(words)}\n{found.stderr}")
    return seconds


def peak(command: str, words: Sequence[str]) -> float:
    """Return the largest resident set of a command, in MB."""
    code = "import subprocess, sys, resource; subprocess.run(sys.argv[1:], stdout=-3, check=True); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    found = subprocess.run(
        [sys.executable, "-c", code, command, *words], capture_output=True, text=True, check=True
    )
    return int(found.stdout) / (1e3 if sys.platform != "darwin" else 1e6)


def installed_size(command: str) -> float:
    """Return the megabytes of the packages of an environment, without those it begins with."""
    packages = next(Path(command).parents[1].glob("lib/python3*/site-packages"))
    files = [
        path
        for path in packages.rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and not path.relative_to(packages).parts[0].startswith(NO_PACKAGES)
    ]
    return sum(path.stat().st_size for path in files) / 1e6


def compare(old: str, new: str, pair: Path, runs: int) -> None:
    """Print the table."""
    print("| command, whole process | older, s | this, s | times as fast | wanted |")
    print("|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory)
        found = rows(pair, out)
        for row in found:
            times: dict[str, list[float]] = {old: [], new: []}
            for _ in range(row.runs or runs):
                for command in times:
                    times[command].append(timed(command, row.words))
            before, now = (min(times[command]) for command in (old, new))
            ratio = before / now
            print(f"| {row.label} | {before:.2f} | {now:.2f} | {ratio:.1f} | {row.wanted:g} |")
            sys.stdout.flush()
        words = next(row.words for row in found if row.label == "`inspect`, q+v")
        before, now = peak(old, words), peak(new, words)
        ratio = before / now
        print(f"| peak memory of `inspect`, q+v, MB | {before:.0f} | {now:.0f} | {ratio:.1f} | 3 |")


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("old", nargs="?", help="the older `safeproj`")
    parser.add_argument("--pair", type=Path, help="what `python -m bench` made")
    parser.add_argument("--lean", help="this `safeproj`, installed without torch")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--make", nargs=2, metavar=("FOLDER", "WIDTH"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        make_exact(Path(given.make[0]), int(given.make[1]))
        return
    if given.old is None or given.pair is None:
        parser.error("give the older command, and --pair")
    new = given.lean or shutil.which("safeproj", path=str(Path(sys.executable).parent))
    if new is None:
        parser.error("safeproj is not installed beside this interpreter; give --lean")
    compare(given.old, new, given.pair, given.runs)
    if given.lean:
        print(f"\nPackages of the environment without torch: {installed_size(given.lean):.0f} MB.")


if __name__ == "__main__":
    main()

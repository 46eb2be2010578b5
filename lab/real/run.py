"""Run the project's evaluation on a real base/aligned pair, on one GPU, or only check and plan it.

    python -m lab.real.run --model llama2-7b --train --out runs/llama2 --dry-run
    python -m lab.real.run --model qwen2.5-7b --adapter DIR --out runs/qwen

These recipes have not been run; only ``--dry-run`` has. docs/real.md says what is done and needed.
A run that was interrupted goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lab.real import plan
from lab.real.plan import Settings, Step
from lab.real.recipes import Recipe, keys, read_recipe
from lab.real.sizes import Sizes, sizes_of
from lab.real.sources import FILE_URL, SOURCES
from lab.real.train import RANK
from safeproj.errors import SafeprojError, install
from safeproj.storage.wholefile import replace_file
from safeproj.text import first_line, printable, shorten

NOTE = "This recipe has not been run: only --dry-run has. Bytes are computed, hours estimated."

ALL = "all"
"""What `--model` calls all recipes, for a dry run."""

PLAN = "plan.txt"
"""The commands of a run, in its folder; another plan needs another folder."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Check everything, print the plan, and unless it is a dry run, carry it out."""
    parser = command_line()
    options = parser.parse_args(arguments)
    try:
        if options.model == ALL and not options.dry_run:
            raise SafeprojError(f"--model {ALL} needs --dry-run; give one of {', '.join(keys())}")
        for model in keys() if options.model == ALL else [options.model]:
            out = options.out / model if options.model == ALL else options.out
            sizes, settings = prepared(options, model, out)
            steps = plan.steps(sizes, settings)
            examine(options, sizes, settings, steps)
            if not options.dry_run:
                carry_out(settings.out, steps)
    except SafeprojError as error:
        parser.exit(2, f"{parser.prog}: error: {printable(error.message)}\n")


def examine(
    options: argparse.Namespace, sizes: Sizes, settings: Settings, steps: Sequence[Step]
) -> None:
    """Check and print a plan.

    Raises:
        SafeprojError: a command does not parse, the disks are too full, or the folder has another
            plan.
    """
    for step in steps:
        plan.check(step)
    print(described(sizes, steps), end="\n\n", flush=True)
    for line in gpu_warnings(steps):
        print(f"run.py: warning: {line}", file=sys.stderr)
    if not options.skip_space:
        require_space(sizes, settings, steps, options.reserve)
    require_same_plan(settings.out, steps)


def prepared(options: argparse.Namespace, model: str, out: Path) -> tuple[Sizes, Settings]:
    """Return what the arguments mean, checked as far as that needs no network.

    Args:
        options: the arguments.
        model: name or file of the recipe.
        out: the folder of the run.

    Raises:
        SafeprojError: an argument cannot be used, or something that is needed is not installed.
    """
    from safeproj.lm.models import require_extra

    recipe = read_recipe(model)
    methods = _methods(options.methods)
    require_extra()
    if options.train:
        _require_trainer()
    targets, rank = _targets(recipe, options)
    if options.data is not None:
        missing = [s.file for s in SOURCES.values() if not (options.data / s.file).is_file()]
        if missing:
            raise SafeprojError(
                f"--data {options.data}: no {shorten(missing)}; expected the public files under "
                "the names in lab/real/sources.py"
            )
    if options.train_file is not None and not options.train_file.is_file():
        raise SafeprojError(f"--train-file {options.train_file}: no such file")
    if out.exists() and not out.is_dir():
        raise SafeprojError(f"--out {out}: is a file; expected a directory, or nothing")
    settings = Settings(
        out,
        options.adapter,
        methods,
        options.data,
        options.train_file,
        options.fewest,
        options.device,
        rank,
        tuple(options.phrase or ()),
        options.judge_guard,
    )
    return sizes_of(recipe, targets), settings


def described(sizes: Sizes, steps: Sequence[Step]) -> str:
    """Return the plan as text."""
    recipe = sizes.recipe
    kinds = sorted({each.name.rpartition(".")[2] for each in sizes.layers})
    lines = [
        NOTE,
        "",
        f"{recipe.name}: {sizes.parameters:,} parameters, {gigabytes(sizes.weights)} as "
        f"{recipe.dtype} ({recipe.licence})",
        f"adapted: {len(sizes.layers)} layers ({', '.join(kinds)})",
    ]
    for source, size in plan.downloads(sizes).items():
        lines.append(f"download: {source}, {gigabytes(size)}")
    for key, each in SOURCES.items():
        lines.append(
            f"download: {each.address}, {each.size / 1e6:.1f} MB ({each.licence}, {FILE_URL[key]})"
        )
    for number, step in enumerate(steps, start=1):
        needs = [f"{step.seconds / 3600:.2f} h", f"writes {gigabytes(step.written)}"]
        needs += [f"GPU {gigabytes(step.gpu)}"] if step.gpu else []
        lines += ["", f"{number}. {step.title} ({', '.join(needs)})", f"   {step}"]
    lines += ["", f"in all: {hours(steps):.1f} h on one GPU of 80 GB, {total(sizes, steps)}"]
    return "\n".join(lines)


def hours(steps: Sequence[Step]) -> float:
    """Return how long the steps take, estimated."""
    return sum(step.seconds for step in steps) / 3600


def total(sizes: Sizes, steps: Sequence[Step]) -> str:
    """Return what a run needs at most at a time, as text."""
    downloaded = sum(plan.downloads(sizes).values())
    written = sum(step.written for step in steps)
    gpu = max(step.gpu for step in steps)
    return (
        f"{gigabytes(downloaded)} of models, {gigabytes(written)} below --out, "
        f"{gigabytes(gpu)} of GPU memory"
    )


def gigabytes(size: float) -> str:
    """Return bytes as text.

    >>> gigabytes(13_476_831_232), gigabytes(2_000_000)
    ('13.5 GB', '0.0 GB')
    """
    return f"{size / 1e9:.1f} GB"


def require_space(sizes: Sizes, settings: Settings, steps: Sequence[Step], reserve: float) -> None:
    """Refuse a run that does not fit onto the disks of `--out` and of the Hub's cache.

    Args:
        sizes: of the recipe.
        settings: with `out`.
        steps: of the plan.
        reserve: gigabytes that must stay free besides.

    Raises:
        SafeprojError: it does not fit.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    needs: dict[Path, int] = {}
    cache = _existing(Path(HF_HUB_CACHE).expanduser())
    checkpoints = (sizes.recipe.base, sizes.recipe.aligned)
    download = sum(
        sizes.download(each)
        for each in checkpoints
        if not each.is_local and not _cached(each.id, each.revision)
    )
    out = _existing(settings.out)
    for place, size in ((out, sum(step.written for step in steps)), (cache, download)):
        same = next((p for p in needs if p.stat().st_dev == place.stat().st_dev), place)
        needs[same] = needs.get(same, 0) + size
    for place, size in needs.items():
        free = shutil.disk_usage(place).free
        if free < size + reserve * 1e9:
            raise SafeprojError(
                f"{place}: {gigabytes(free)} free; expected {gigabytes(size)} and "
                f"{gigabytes(reserve * 1e9)} of --reserve (--skip-space plans for another machine)"
            )


def gpu_warnings(steps: Sequence[Step]) -> list[str]:
    """Return what is to be said of the GPU of this machine."""
    import torch

    needed = max(step.gpu for step in steps)
    if not torch.cuda.is_available():
        return [f"no CUDA device is here; the plan needs {gigabytes(needed)} on one"]
    memory = torch.cuda.get_device_properties(0).total_memory
    if memory < needed:
        return [f"the GPU has {gigabytes(memory)}; the plan needs {gigabytes(needed)}"]
    return []


def require_same_plan(out: Path, steps: Sequence[Step]) -> None:
    """Refuse a folder in which another plan was begun.

    Raises:
        SafeprojError: there is one.
    """
    path = out / PLAN
    if path.is_file() and path.read_text("utf-8") != _plan(steps):
        raise SafeprojError(f"--out {out}: another plan was begun there; expected a new directory")


def carry_out(out: Path, steps: Sequence[Step]) -> None:
    """Run the commands in order, without those whose result is there.

    Raises:
        SafeprojError: one of them fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / PLAN, _plan(steps).encode())
    for number, step in enumerate(steps, start=1):
        if step.made.exists():
            print(f"{number}/{len(steps)} {step.title}: there already", flush=True)
            continue
        print(f"{number}/{len(steps)} {step.title}\n{step}", flush=True)
        step.made.parent.mkdir(parents=True, exist_ok=True)
        code = subprocess.run(_command(step), check=False).returncode
        if code:
            raise SafeprojError(
                f"step {number}, {step.title}, ended with {code}; give the same command again to "
                "go on from there"
            )
    print(f"the table is in {out / 'table.md'}")


def _command(step: Step) -> list[str]:
    """Return a command line for this interpreter."""
    first, *rest = step.words
    if first == "safeproj":
        return [sys.executable, "-m", "safeproj", *rest]
    return [sys.executable, *rest]


def _plan(steps: Sequence[Step]) -> str:
    return "".join(f"{step}\n" for step in steps)


def _methods(text: str) -> tuple[str, ...]:
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [each for each in found if each not in plan.METHODS]
    if unknown or not found:
        raise SafeprojError(
            f"--methods {text}: {shorten(unknown) or 'none'}; expected some of "
            f"{', '.join(plan.METHODS)}, separated by commas"
        )
    return found


def _targets(recipe: Recipe, options: argparse.Namespace) -> tuple[tuple[str, ...], int]:
    """Return the layers that the adapter changes, and its rank."""
    wanted = recipe.targets if options.targets is None else tuple(options.targets.split(","))
    if options.adapter is None:
        return wanted, RANK
    folder = Path(options.adapter)
    if not folder.is_dir():
        if options.targets is None:
            raise SafeprojError(
                f"--adapter {options.adapter}: is no directory here; of one on the Hub give the "
                "layers that it changes as --targets"
            )
        return wanted, RANK
    config = _adapter_config(folder)
    names, rank = config.get("target_modules"), config.get("r")
    if not isinstance(rank, int) or rank < 1:
        raise SafeprojError(f"--adapter {folder}: its 'r' is {rank!r}; expected 1 or more")
    if options.targets is not None:
        return wanted, rank
    if not isinstance(names, list) or not names:
        raise SafeprojError(
            f"--adapter {folder}: its 'target_modules' is no list of names; give the layers that "
            "it changes as --targets"
        )
    return tuple(sorted(map(str, names))), rank


def _adapter_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SafeprojError(f"{path}: cannot be read ({first_line(error)})") from error
    if not isinstance(found, dict):
        raise SafeprojError(f"{path}: a {type(found).__name__}; expected an object")
    return found


def _require_trainer() -> None:
    if find_spec("accelerate") is None:
        raise SafeprojError(f"accelerate is not installed, which --train needs; {install('train')}")


def _existing(path: Path) -> Path:
    """Return a path, or the nearest above it that is there."""
    whole = Path(os.path.abspath(path))  # noqa: PTH100 - links are left as they are
    return next(each for each in (whole, *whole.parents) if each.exists())


def _cached(repo: str, revision: str | None) -> bool:
    """Tell whether a checkpoint seems to be in the Hub's cache: its config is."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, "config.json", revision=revision), str)


def command_line() -> argparse.ArgumentParser:
    """Return the arguments that there are."""
    parser = argparse.ArgumentParser(description=NOTE)
    known = ", ".join(keys())
    parser.add_argument(
        "--model", required=True, help=f"{known}, or a TOML file like theirs; {ALL} with --dry-run"
    )
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--adapter", metavar="SRC", help="the PEFT adapter that is looked at")
    subject.add_argument("--train", action="store_true", help="make one, on benign data")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="all results")
    parser.add_argument(
        "--methods",
        default=",".join(plan.DEFAULT),
        metavar="NAMES",
        help=f"some of {', '.join(plan.METHODS)}; default: %(default)s",
    )
    parser.add_argument(
        "--targets", metavar="NAMES", help="layers; default: the recipe's, or those of the adapter"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="the public files, fetched before")
    parser.add_argument(
        "--train-file",
        type=Path,
        metavar="FILE",
        help="further rows to train on: JSON lines with prompt and response",
    )
    parser.add_argument("--fewest", type=int, metavar="N", help="safety pairs that there must be")
    parser.add_argument(
        "--phrase", action="append", metavar="TEXT", help="a further phrase of refusals; repeatable"
    )
    parser.add_argument(
        "--judge-guard", metavar="SRC", help="a guard model that judges in place of phrases"
    )
    parser.add_argument("--device", default="auto", help="default: %(default)s")
    parser.add_argument(
        "--reserve",
        type=float,
        default=5.0,
        metavar="GB",
        help="disk space that must stay free; default: %(default)s",
    )
    parser.add_argument("--skip-space", action="store_true", help="do not look at the disks")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything but the downloads, and print the plan",
    )
    return parser


if __name__ == "__main__":
    main()

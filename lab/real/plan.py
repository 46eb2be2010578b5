"""The commands of a run in order, with what each needs; nothing is run here.

These recipes have not been run; only ``--dry-run`` has.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lab.real.sizes import ANSWER, DIRECTIONS, EVAL_BATCH, MEMORY, NETWORK, PROMPT, START, Sizes
from lab.real.sources import FILES, SOURCES
from lab.real.train import BATCH, MAX_LENGTH, RANK
from safeproj.errors import SafeprojError
from safeproj.text import first_line

METHODS = ("safe-lora", "exact", "salora", "covariance", "reconstruct", "sweep")
"""What `--methods` knows."""

DEFAULT = ("safe-lora", "salora", "covariance", "reconstruct", "sweep")
"""All but the exact projector, whose decompositions take hours on a CPU."""

SHARES = (0.25, 0.5, 0.75)
"""Of the modules, that Safe LoRA projects; and all of them."""

TAU = 0.35
MUS = (10.0, 3.0, 1.0, 0.3, 0.1)
RECONSTRUCTED = (3.0, 1.0, 0.3)
ENERGY = 0.9
EIGEN = 0.2e12
"""Operations per second of the exact projector's decompositions, of which there are about 20 n³."""

FEW = 8
"""Directions of the safety module that the second adapter of SaLoRA is kept out of."""

POINTS, LIMIT, RUNS = 5, 100, 22
"""Points K of the sweep, prompts of each file, and how often they are answered: `2 + 5 (K - 1)`."""


@dataclass(frozen=True)
class Step:
    """A command.

    Attributes:
        title: what it is for.
        words: the command line: `safeproj …`, or `python -m lab.real…` and its arguments.
        seconds: how long it takes, estimated.
        written: bytes that it leaves below `--out`.
        gpu: bytes on the GPU, 0 where it needs none.
        made: what it makes; a run that is started again leaves it out where that is there.
    """

    title: str
    words: tuple[str, ...]
    seconds: float
    written: int
    gpu: int
    made: Path

    def __str__(self) -> str:
        return shlex.join(self.words)


@dataclass(frozen=True)
class Settings:
    """What the user asked for.

    Attributes:
        out: the folder of the run.
        adapter: SRC of the adapter, None where one is trained.
        methods: of `METHODS`.
        given: a folder with the public files, None to fetch them.
        train_file: further rows to train on.
        fewest: safety pairs below which the run ends.
        device: of all commands of `safeproj`.
        rank: of the adapter.
        phrases: what refusals say beside the built-in phrases.
        guard: SRC of a guard model that judges in their place, but for the safety pairs.
    """

    out: Path
    adapter: str | None
    methods: tuple[str, ...]
    given: Path | None = None
    train_file: Path | None = None
    fewest: int | None = None
    device: str = "auto"
    rank: int = RANK
    phrases: tuple[str, ...] = ()
    guard: str | None = None

    @property
    def trained(self) -> Path:
        """Where the adapter goes that is trained."""
        return self.out / "trained"

    @property
    def subject(self) -> str:
        """SRC of the adapter that is looked at."""
        return self.adapter if self.adapter is not None else str(self.trained)

    def data(self, name: str) -> str:
        """Return the path of a prompt file."""
        return str(self.out / "data" / f"{name}.jsonl")


def steps(sizes: Sizes, settings: Settings) -> list[Step]:
    """Return the commands of a run in order."""
    return [
        *_prepared(sizes, settings),
        *_statistics(sizes, settings),
        *_patched(sizes, settings),
        *_measured(sizes, settings),
    ]


@cache
def _command() -> Any:
    import typer.main

    from safeproj.cli.app import app

    return typer.main.get_command(app)


def check(step: Step) -> None:
    """Parse a command line as the command itself does, without running it.

    Raises:
        SafeprojError: it does not parse.
    """
    if step.words[0] != "safeproj":
        if find_spec(step.words[2]) is None:
            raise SafeprojError(f"{step.words[2]}: no such script")
        return
    command = _command()
    words = list(step.words[1:])
    try:
        while hasattr(command, "commands"):
            name = words.pop(0)
            if name not in command.commands:
                raise SafeprojError(f"{step}: safeproj has no command {name}")
            command = command.commands[name]
        command.make_context(command.name, words)
    except SafeprojError:
        raise
    except Exception as error:  # click's, or that of typer's own copy of it
        said = error.format_message() if hasattr(error, "format_message") else first_line(error)
        raise SafeprojError(f"{step}: {said}") from error


def downloads(sizes: Sizes) -> dict[str, int]:
    """Return the bytes of both checkpoints by SRC, without those that are local directories."""
    both = (sizes.recipe.base, sizes.recipe.aligned)
    return {each.source: sizes.download(each) for each in both if not each.is_local}


def _model(sizes: Sizes, settings: Settings) -> list[str]:
    return ["--device", settings.device, "--dtype", sizes.recipe.dtype]


def _answers(sizes: Sizes, settings: Settings, guard: str | None = None) -> list[str]:
    phrases = [word for each in settings.phrases for word in ("--phrase", each)]
    judge = phrases if guard is None else ["--judge-guard", guard]
    batch = ["--batch-size", str(EVAL_BATCH)]
    length = ["--max-new-tokens", str(ANSWER)]
    return [*judge, *batch, *length, *_model(sizes, settings)]


def _prompts(files: Sequence[str]) -> list[int]:
    """Return how many prompts files have, at most."""
    return [sum(each.rows or SOURCES[each.source].rows for each in FILES[name]) for name in files]


def _prepared(sizes: Sizes, settings: Settings) -> Iterator[Step]:
    """Yield what makes the data, the safety pairs and the adapter."""
    out, aligned = settings.out, sizes.recipe.aligned.source
    size = sum(each.size for each in SOURCES.values())
    words = ["-m", "lab.real.prompts", "fetch", "--out", str(out / "data")]
    words += ["--chat"] if sizes.recipe.chat else []
    words += ["--from", str(settings.given)] if settings.given else []
    words += ["--train-file", str(settings.train_file)] if settings.train_file else []
    fetching = 0.0 if settings.given else size / NETWORK
    made = out / "data" / "sources.json"
    yield Step("prompt files", ("python", *words), START + fetching, 2 * size, 0, made)
    downloading = sum(downloads(sizes).values()) / NETWORK
    seconds = downloading + sizes.loading + sizes.answering_seconds(_prompts(["requests"]))
    yield Step(
        "refusals in the aligned model's own words",
        (
            "safeproj",
            "eval",
            "--model",
            aligned,
            "--harmful",
            f"requests={settings.data('requests')}",
            "--responses",
            str(out / "refusals"),
            *_answers(sizes, settings),
            *_report(out / "refusals.json"),
        ),
        seconds,
        10**6,
        sizes.gpu_eval,
        out / "refusals.json",
    )
    words = ["-m", "lab.real.prompts", "pairs"]
    words += ["--responses", str(out / "refusals" / "no_adapter.jsonl")]
    words += ["--out", settings.data("safety")]
    words += [] if settings.fewest is None else ["--fewest", str(settings.fewest)]
    made = Path(settings.data("safety"))
    yield Step("safety pairs", ("python", *words), START, 10**6, 0, made)
    if settings.adapter is None:
        yield _training(sizes, settings)


def _training(sizes: Sizes, settings: Settings) -> Step:
    words = ["python", "-m", "lab.real.train", "--model", sizes.recipe.aligned.source]
    words += ["--data", settings.data("train"), "--targets", ",".join(sizes.targets)]
    words += ["--out", str(settings.trained), "--dtype", sizes.recipe.dtype]
    samples = sum(_prompts(["train"]))
    return Step(
        "an adapter on benign data",
        tuple(words),
        sizes.training_seconds(samples, MAX_LENGTH // 2),
        sizes.adapter(RANK),
        sizes.gpu_training(BATCH, MAX_LENGTH, RANK),
        settings.trained,
    )


def _statistics(sizes: Sizes, settings: Settings) -> Iterator[Step]:
    """Yield what runs the model over safety and task data."""
    out = settings.out
    common = ["--aligned", sizes.recipe.aligned.source, "--targets", ",".join(sizes.targets)]
    common += ["--memory", f"{MEMORY / 1e9:g}", *_model(sizes, settings)]
    if "covariance" in settings.methods:
        for name, file in (("safety", "requests"), ("task", "task")):
            path = out / f"{name}.stats.safetensors"
            positions = sum(_prompts([file])) * PROMPT
            yield Step(
                f"statistics of {name} data",
                ("safeproj", "stats", *common, "--data", settings.data(name), "--out", str(path)),
                sizes.statistics_seconds(positions),
                sizes.statistics(positions),
                sizes.gpu_statistics,
                path,
            )
    if "salora" in settings.methods:
        path = out / "safety.safetensors"
        rank = ["--rank", str(DIRECTIONS), "--data", settings.data("safety"), "--out", str(path)]
        positions = sum(_prompts(["requests"])) * PROMPT
        yield Step(
            "a safety module",
            ("safeproj", "salora", "module", *common, *rank),
            sizes.statistics_seconds(positions),
            sizes.module_size,
            sizes.gpu_statistics,
            path,
        )


def _patched(sizes: Sizes, settings: Settings) -> Iterator[Step]:
    """Yield the patches, each an adapter of its own; of each method the least change first."""
    recipe, methods = sizes.recipe, settings.methods
    pair = ["--base", recipe.base.source, "--aligned", recipe.aligned.source]
    if "safe-lora" in methods:
        for share in SHARES:
            count = round(share * len(sizes.layers))
            yield _patch(sizes, settings, f"safe-lora-{count}", [*pair, "--layers", str(count)])
        yield _patch(sizes, settings, "safe-lora-all", [*pair, "--all"])
        yield _patch(sizes, settings, f"safe-lora-tau-{TAU}", [*pair, "--threshold", str(TAU)])
    if "exact" in methods:
        words = [*pair, "--all", "--projector", "exact", "--energy", str(ENERGY)]
        yield _patch(sizes, settings, f"exact-{ENERGY}", words)
    if "salora" in methods:
        module = ["--safety-module", str(settings.out / "safety.safetensors")]
        for rank in (FEW, DIRECTIONS):
            yield _patch(sizes, settings, f"salora-{rank}", [*module, "--rank", str(rank)])
    if "covariance" in methods:
        words = _both_statistics(settings)
        for mu in MUS:
            yield _patch(sizes, settings, f"covariance-{mu:g}", [*words, "--mu", f"{mu:g}"])
    if "reconstruct" in methods:
        words = ["--aligned", recipe.aligned.source, "--reconstruct"]
        words += ["--safety-data", settings.data("safety"), "--task-data", settings.data("task")]
        for mu in RECONSTRUCTED:
            yield _patch(sizes, settings, f"reconstruct-{mu:g}", [*words, "--mu", f"{mu:g}"])


def _patch(sizes: Sizes, settings: Settings, name: str, words: Sequence[str]) -> Step:
    path = settings.out / "adapters" / name
    method = name.partition("-")[0]
    seconds = {
        "safe": sizes.comparing_seconds,
        "exact": sizes.comparing_seconds
        + sum(20 * min(each.m, each.n) ** 3 for each in sizes.layers) / EIGEN,
        "salora": START,
        "covariance": sizes.correction_seconds,
        "reconstruct": sizes.reconstruction_seconds(sum(_prompts(["requests", "task"]))),
    }[method]
    gpu = {"covariance": sizes.gpu_solving, "reconstruct": sizes.gpu_reconstruction}
    common = ("--adapter", settings.subject, "--out", str(path), "--device", settings.device)
    return Step(
        name,
        ("safeproj", "patch", *words, *common),
        seconds,
        sizes.adapter(settings.rank),
        gpu.get(method, 0),
        path,
    )


def _measured(sizes: Sizes, settings: Settings) -> Iterator[Step]:
    """Yield what measures refusals and skill, and the table."""
    out, recipe = settings.out, sizes.recipe
    sweeps = list(_sweeps(sizes, settings))
    yield from sweeps
    adapters = [step.made for step in _patched(sizes, settings)]
    harmful = ("validation", "jbb", "harmbench", "xstest_safe")
    words = ["--model", recipe.aligned.source, "--adapter", settings.subject]
    words += [word for each in adapters for word in ("--adapter", str(each))]
    words += [word for name in harmful for word in ("--harmful", f"{name}={settings.data(name)}")]
    words += ["--skill", f"skill={settings.data('skill')}", "--responses", str(out / "answers")]
    answers = _answers(sizes, settings, settings.guard)
    once = sizes.answering_seconds(_prompts([*harmful, "skill"]))
    yield Step(
        "refusals and skill of all adapters",
        ("safeproj", "eval", *words, *answers, *_report(out / "eval.json")),
        sizes.loading + (2 + len(adapters)) * once,
        20 * 10**6,
        sizes.gpu_eval,
        out / "eval.json",
    )
    table = ["python", "-m", "lab.real.table", "--eval", str(out / "eval.json")]
    table += ["--adapters", str(out / "adapters"), "--out", str(out / "table.md")]
    for each in sweeps:
        table += ["--sweep", str(each.made.with_suffix(".md"))]
    yield Step("the table", tuple(table), START, 10**5, 0, out / "table.md")


def _sweeps(sizes: Sizes, settings: Settings) -> Iterator[Step]:
    """Yield what varies a method beside its controls, on validation prompts."""
    if "sweep" not in settings.methods:
        return
    out, recipe = settings.out, sizes.recipe
    pair = ["--base", recipe.base.source, "--aligned", recipe.aligned.source]
    found = {"safe-lora": (pair, sizes.comparing_seconds)}
    if "covariance" in settings.methods:
        words = [*_both_statistics(settings), "--model", recipe.aligned.source]
        found["covariance"] = (words, POINTS * sizes.correction_seconds)
    files = ["validation", "skill"]
    common = ["--adapter", settings.subject, "--points", str(POINTS), "--limit", str(LIMIT)]
    common += ["--harmful", f"validation={settings.data('validation')}"]
    common += ["--skill", f"skill={settings.data('skill')}"]
    common += _answers(sizes, settings, settings.guard)
    answering = RUNS * sizes.answering_seconds(min(LIMIT, each) for each in _prompts(files))
    for name, (words, seconds) in found.items():
        path = out / f"sweep-{name}.json"
        report = ("--format", "markdown", "--output", str(path.with_suffix(".md")))
        yield Step(
            f"{name} beside its controls, on validation prompts",
            ("safeproj", "sweep", *words, *common, *report, *_report(path)),
            seconds + sizes.loading + answering,
            10**6,
            sizes.gpu_eval,
            path,
        )


def _both_statistics(settings: Settings) -> list[str]:
    files = [str(settings.out / f"{name}.stats.safetensors") for name in ("safety", "task")]
    return ["--safety-data", files[0], "--task-data", files[1]]


def _report(path: Path) -> tuple[str, ...]:
    return ("--format", "json", "--output", str(path))

"""How commands are used: their help in groups, and usage errors in words of this command."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import typer.core

from safeproj.text import cut, located

INPUTS, METHOD, SELECTION, GOAL = "Inputs", "Method", "Selection", "Goal"
ANSWERS, JUDGE, POLICY = "Answers", "Judge", "Policy"
OUTPUT, PUBLISHING = "Output", "Publishing"
RUNNING, MESSAGES, OPTIONS = "Running", "Messages", "Options"
GROUPS = (
    INPUTS, METHOD, SELECTION, GOAL, ANSWERS, JUDGE, POLICY, OUTPUT, PUBLISHING, RUNNING, MESSAGES,
    OPTIONS,
)  # fmt: skip
"""What options are grouped by in the help, in this order."""

_FIRST = 30
"""Columns of an option's name and value; a longer one has a line of its own."""

_LIKENESS = 0.75
"""Of a misspelt option to what it may stand for; less suggests what nobody meant."""

_SENTENCE = 1000
"""Characters of the first sentence about a command, which is not cut."""

SYNONYMS = (
    ("--threshold", "--tau --cutoff --similarity-threshold --cosine-threshold -t"),
    ("--layers", "--num-proj-layers --num-layers --n-layers --top-layers"),
    ("--mu", "--lambda --ridge --regularization"),
    ("--rank", "--r --lora-r --lora-rank --k"),
    ("--alpha", "--lora-alpha"),
    ("--include", "--select --modules --target-modules"),
    ("--targets", "--modules --target-modules --include"),
    ("--exclude", "--exclude-modules --skip"),
    ("--overwrite", "--force -f --replace --clobber --exist-ok --overwrite-output-dir"),
    ("--dry-run", "--dryrun --simulate --no-write -n"),
    ("--adapter", "--lora --lora-path --lora-model --lora-adapter --peft --peft-model --adapters"),
    ("--adapter", "--adapter-path --adapter-model --adapter-name-or-path --patched --dir -a"),
    ("--base", "--base-model --base-model-name-or-path --unaligned --pretrained -b"),
    ("--aligned", "--base-model --base-model-name-or-path --model --model-name-or-path -m"),
    ("--aligned", "--model-path --instruct-model --chat-model --safe-model"),
    ("--model", "--base-model --base-model-name-or-path --aligned --base --model-name-or-path"),
    ("--model", "--model-path --instruct-model --chat-model -m"),
    ("--alignment", "--align --safealign"),
    ("--original", "--before --unpatched --reference"),
    ("--out", "--output-dir --out-dir --output-path --out-path --save-dir --save-path -o"),
    ("--out", "--out-file --output-model --output-folder"),
    ("--output", "--output-file --report --report-file --out-file"),
    ("--format", "--output-format --report-format --reporter"),
    ("--data", "--dataset --train-file --safety-data --harmful"),
    ("--safety-data", "--harmful --safe-data --refusals --data"),
    ("--task-data", "--task --skill --benign --utility-data"),
    ("--prompts", "--harmful --data --dataset"),
    ("--harmful", "--prompts --harmful-prompts --unsafe --safety-data --dataset"),
    ("--skill", "--task --benign --utility --task-data"),
    ("--task", "--skill --benign --utility --task-data"),
    ("--limit", "--max-samples --num-samples --n-samples --num-prompts"),
    ("--refusals", "--wanted-refusal"),
    ("--wanted-refusal", "--refusals"),
    ("--max-new-tokens", "--max-tokens --num-tokens"),
    ("--batch-size", "--bs --batch --per-device-batch-size"),
    ("--seed", "--random-seed --rand-seed"),
    ("--judge-url", "--api-base --base-url --endpoint"),
    ("--phrase", "--keyword --refusal-phrase"),
    ("--phrases", "--keywords --refusal-phrases"),
    ("--responses", "--cache-dir --save-responses"),
    ("--workers", "--threads --jobs -j --num-workers --num-threads --n-jobs"),
    ("--device cuda", "--cuda --gpu --use-cuda"),
    ("--device cpu", "--cpu --no-cuda"),
    ("--dtype", "--torch-dtype --precision"),
    ("--dtype bfloat16", "--bf16"),
    ("--dtype float16", "--fp16"),
    ("--policy", "--config --policy-file -c"),
    ("--ignore", "--disable --extend-ignore --ignore-rule"),
    ("--public-key", "--key --pubkey"),
    ("--private-key", "--key"),
    ("--push-to-hub", "--hub --hub-model-id --publish --upload --repo-id"),
    ("--create-pr", "--pr --pull-request"),
    ("--quiet", "--silent --no-progress -s"),
    ("--verbose", "--debug --traceback --all-findings"),
    ("--color", "--colour"),
    ("--color never", "--no-color --no-colour"),
    *((f"--format {each}", f"--{each}") for each in ("json", "html", "sarif", "junit", "github")),
    ("--format markdown", "--markdown --md"),
)  # fmt: skip
"""What is meant, by what other programs call it; of these a command suggests those it has."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def examples(page: str, *lines: str) -> Callable[[_Function], _Function]:
    """Give a command examples and the page about it, which its help ends with.

    Args:
        page: such as `docs/gate.md`.
        lines: commands as they are typed.
    """

    def given(function: _Function) -> _Function:
        marked: Any = function
        marked.shown = (page, lines)
        return function

    return given


class _Usage:
    """What commands and groups of commands have in common."""

    rest = OPTIONS
    """The group of options that say none."""

    params: Any
    get_params: Any
    callback: Any
    help: Any
    options_metavar: Any

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write what the command does, in whole words."""
        del ctx
        for paragraph in inspect.cleandoc(self.help or "").split("\n\n"):
            formatter.write("\n" + _filled(paragraph, formatter.width, "  ") + "\n")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options, each below its group."""
        groups: dict[str, list[tuple[str, str]]] = {name: [] for name in GROUPS}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            if param.param_type_name == "argument":
                record = _argument(param), record[1]
            groups[getattr(param, "rich_help_panel", None) or self.rest].append(record)
        for name, records in groups.items():
            write_list(formatter, name, records)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return what stands behind the name of the command in its first line."""
        del ctx
        arguments = [each for each in self.params if each.param_type_name == "argument"]
        return [self.options_metavar, *map(_argument, arguments)]

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples as they are typed, and where there is more."""
        del ctx
        page, lines = self.callback.shown
        formatter.write("\nExamples:\n")
        for line in lines:
            formatter.write(_command(line, formatter.width))
        formatter.write("\n" + _filled(f"More: {page}", formatter.width) + "\n")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse what is given; what cannot be used is said in words of this command."""
        try:
            return super().parse_args(ctx, args)  # type: ignore[misc,no-any-return]
        except Exception as error:
            # Of a class of click, or of what typer has in its place, which differs by its version.
            if hasattr(error, "possibilities"):
                self.suggest(error, ctx, args)
            elif hasattr(error.__cause__, "errors"):
                shown: Any = error
                shown.message = _reason(error.__cause__)
            raise

    def suggest(self, error: Any, ctx: Any, args: list[str]) -> None:
        """Say what an option that there is not may stand for."""
        del args
        meant = suggestions(error.option_name, self.get_params(ctx))
        _did_you_mean(error, meant)


class Command(_Usage, typer.core.TyperCommand):
    """A command: the class of all of them."""

    rest = MESSAGES


class Group(_Usage, typer.core.TyperGroup):
    """A group of commands."""

    subcommand_metavar: str

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the same with the place of the command."""
        return [*super().collect_usage_pieces(ctx), self.subcommand_metavar]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write options, and each command with the first sentence about it."""
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands."""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        shown = [(name, each.get_short_help_str(_SENTENCE)) for name, each in found if each]
        write_list(formatter, "Commands", shown)

    def suggest(self, error: Any, ctx: Any, args: list[str]) -> None:
        """Say the same; an option that stands before the command may be one of the command."""
        super().suggest(error, ctx, args)
        name = next((each for each in args if self.get_command(ctx, each)), None)
        if name is not None:
            command: Any = self.get_command(ctx, name)
            params = command.get_params(ctx)
            own = error.option_name in _flags(params)
            meant = [error.option_name] if own else suggestions(error.option_name, params)
            if meant:
                _did_you_mean(error, [f"{ctx.command_path} {name} {each}" for each in meant])


def suggestions(given: str, params: Sequence[Any]) -> list[str]:
    """Return which options of a command one that it does not have may stand for.

    Args:
        given: such as `--tau` or `--dry_run`.
        params: of the command.
    """
    flags, name = _flags(params), given.replace("_", "-").lower()
    if name in flags:
        return [name]
    known: dict[str, list[str]] = {flag: [flag] for flag in flags}
    for meant, others in SYNONYMS:
        for other in others.split():
            known.setdefault(other, []).extend([meant] if _has(flags, meant) else [])
    if name not in known:
        from difflib import get_close_matches

        near = get_close_matches(name, (each for each in known if known[each]), 2, _LIKENESS)
        return list(dict.fromkeys(meant for each in near for meant in known[each]))
    return list(dict.fromkeys(known[name]))


def _did_you_mean(error: Any, meant: Sequence[str]) -> None:
    error.possibilities = None
    error.message = f"No such option: {cut(ascii(error.option_name)[1:-1])}"
    if meant:
        error.message += f". Did you mean {' or '.join(meant)}?"


def _flags(params: Sequence[Any]) -> dict[str, Any]:
    """Return the options of a command by name."""
    options = [each for each in params if each.param_type_name == "option"]
    return {flag: each for each in options for flag in each.opts}


def _has(flags: dict[str, Any], words: str) -> bool:
    """Tell whether there is such an option, and it takes such a value."""
    flag, _, value = words.partition(" ")
    choices = (flags[flag].metavar or "").split("|") if flag in flags else []
    return flag in flags and (not value or len(choices) == 1 or value in choices)


_KINDS = {"int": "a whole number", "float": "a number"}


def _reason(cause: Any) -> str:
    """Return what is wrong with a value: typer leaves that to pydantic, which speaks of Python."""
    found = cause.errors()[0]
    kind = found["type"].partition("_")[0]
    if kind in _KINDS:
        return f"{cut(ascii(found['input']))} is not {_KINDS[kind]}."
    return cut(str(found["msg"]).removeprefix("Value error, "))


def _argument(param: Any) -> str:
    name = param.metavar or param.name.upper()
    name = name if param.required else f"[{name}]"
    return name if param.nargs == 1 else f"{name}..."


def write_list(formatter: Any, title: str, records: Sequence[tuple[str, str]]) -> None:
    """Write what there is to a group: names, and beside them what they are, in whole words."""
    if not records:
        return
    first = min(max(len(name) for name, _ in records), _FIRST - 2) + 4
    formatter.write(f"\n{title}:\n")
    for name, text in records:
        head = f"  {name}".ljust(first)
        if len(name) + 4 > first:
            formatter.write(f"{head}\n")
            head = ""
        lines = list(_lines(text, formatter.width - first))
        formatter.write(f"{head:{first}}{lines[0]}\n" if lines else f"{head}\n")
        for line in lines[1:]:
            formatter.write(f"{'':{first}}{line}\n")


def _command(line: str, width: int) -> str:
    """Return a command as it is typed, in lines that break before an option."""
    joined = re.sub(r"(--\S+) (?!-)", "\\1\xa0", line)  # an option and its value
    lines = textwrap.wrap(
        joined, width - 4, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    return textwrap.indent(" \\\n".join(lines), "  ").replace("\xa0", " ") + "\n"


def _filled(text: str, width: int, indent: str = "") -> str:
    return "\n".join(f"{indent}{line}" for line in _lines(text, width - len(indent)))


def _lines(text: str, width: int) -> Iterator[str]:
    """Yield a paragraph, with the places of pages, in lines that break between words only."""
    text = located(text)
    yield from textwrap.wrap(text, max(width, 20), break_long_words=False, break_on_hyphens=False)

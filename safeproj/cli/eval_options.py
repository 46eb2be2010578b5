"""The options that measuring behaviour needs, as dataclasses. Heavy imports happen inside."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from safeproj.cli.options import Chatting, Device, ModelDtype
from safeproj.cli.usage import ANSWERS, INPUTS, JUDGE, RUNNING
from safeproj.errors import SafeprojError

if TYPE_CHECKING:
    from safeproj.evaluation.generate import Generation
    from safeproj.evaluation.judges import Judge
    from safeproj.evaluation.sets import PromptSet
    from safeproj.evaluation.thoughts import Tag


class JudgeKind(str, Enum):
    """Choices of `--judge`."""

    keywords = "keywords"
    prefix = "prefix"


@dataclass(frozen=True)
class Prompting:
    """The prompts."""

    group: ClassVar[str] = INPUTS

    harmful: Annotated[
        list[str] | None,
        typer.Option(
            "--harmful",
            metavar="[NAME=]FILE",
            help="Harmful prompts: JSON lines, a JSON array, CSV, or text with one in each line; "
            "answers are judged. Repeatable.",
        ),
    ] = None
    skill: Annotated[
        list[str] | None,
        typer.Option(
            "--skill",
            metavar="[NAME=]FILE",
            help="Prompts with the right responses: JSON lines, a JSON array or CSV; answers are "
            "compared. Repeatable.",
        ),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option("--limit", metavar="N", help="Only the first N prompts of each file."),
    ] = None

    def sets(self) -> list[PromptSet]:
        """Return the sets, harmful ones first.

        Raises:
            SafeprojError: a file cannot be used, two have one name, or the limit is not positive.
        """
        from safeproj.evaluation.sets import read_prompts, require_apart

        if self.limit is not None and self.limit < 1:
            raise SafeprojError(f"--limit must be 1 or more, found {self.limit}")
        found = [read_prompts(each, "harmful") for each in self.harmful or ()]
        found += [read_prompts(each, "skill") for each in self.skill or ()]
        require_apart(found)
        return [each.first(self.limit) for each in found]


@dataclass(frozen=True)
class Judging:
    """The judge.

    Raises:
        SafeprojError: the options do not go together.
    """

    group: ClassVar[str] = JUDGE

    judge: Annotated[
        JudgeKind | None,
        typer.Option(
            "--judge",
            help="A refusal has one of the phrases in it (keywords) or begins with one (prefix).  "
            "[default: keywords]",
        ),
    ] = None
    phrase: Annotated[
        list[str] | None,
        typer.Option("--phrase", metavar="TEXT", help="A further phrase of refusals; repeatable."),
    ] = None
    phrases: Annotated[
        Path | None,
        typer.Option(
            "--phrases",
            metavar="FILE",
            help="The phrases of refusals, one in each line, in place of the built-in ones.",
        ),
    ] = None
    judge_command: Annotated[
        str | None,
        typer.Option(
            "--judge-command",
            metavar="CMD",
            help="A program that judges: JSON lines with prompt and response in, with verdict out.",
        ),
    ] = None
    judge_url: Annotated[
        str | None,
        typer.Option(
            "--judge-url",
            metavar="URL",
            help="An OpenAI-compatible endpoint that judges; its key is taken from the environment "
            "variable SAFEPROJ_JUDGE_API_KEY.",
        ),
    ] = None
    judge_model: Annotated[
        str | None,
        typer.Option("--judge-model", metavar="NAME", help="The model at --judge-url."),
    ] = None
    judge_guard: Annotated[
        str | None,
        typer.Option(
            "--judge-guard",
            metavar="SRC",
            help="A guard model that says whether an answer is safe.",
        ),
    ] = None
    judge_timeout: Annotated[
        float,
        typer.Option(
            "--judge-timeout",
            metavar="SECONDS",
            help="For a command's verdicts on one set, or an endpoint's on one answer.",
        ),
    ] = 600.0

    def __post_init__(self) -> None:
        others = {
            "--judge-command": self.judge_command,
            "--judge-url": self.judge_url,
            "--judge-guard": self.judge_guard,
        }
        given = [option for option, value in others.items() if value is not None]
        words = self.judge is not None or self.phrases is not None or bool(self.phrase)
        if len(given) > 1 or (given and words):
            found = [*given, *(["--judge, --phrase or --phrases"] if words else [])]
            raise SafeprojError(f"{' and '.join(found)} exclude each other; give one judge")
        if (self.judge_url is None) != (self.judge_model is None):
            raise SafeprojError("--judge-url and --judge-model need each other")
        if not self.judge_timeout > 0.0:
            raise SafeprojError(
                f"--judge-timeout must be more than 0, found {self.judge_timeout:g}"
            )

    def build(self, device: str = "auto", batch_size: int = 16) -> Judge:
        """Return the judge; a guard model is loaded.

        Raises:
            SafeprojError: it cannot be made.
        """
        from safeproj.evaluation import ask

        if self.judge_command is not None:
            return ask.Command(self.judge_command, self.judge_timeout)
        if self.judge_url is not None and self.judge_model is not None:
            return ask.Endpoint(self.judge_url, self.judge_model, self.judge_timeout)
        if self.judge_guard is not None:
            return ask.load_guard(self.judge_guard, device, batch_size)
        return self._words()

    def _words(self) -> Judge:
        from safeproj.evaluation.judges import Keywords, Prefix, read_phrases
        from safeproj.evaluation.phrases import ANYWHERE, OPENING

        own = () if self.phrases is None else read_phrases(self.phrases)
        if self.judge is JudgeKind.prefix:
            return Prefix((*(own or (*OPENING, *ANYWHERE)), *(self.phrase or ())))
        return Keywords((*(own or ANYWHERE), *(self.phrase or ())), () if own else OPENING)


@dataclass(frozen=True)
class Answering(Chatting):
    """How the model answers."""

    group: ClassVar[str] = ANSWERS

    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Put plain prompts through the model's chat template, as a user's message.",
        ),
    ] = False
    thought_tag: Annotated[
        list[str] | None,
        typer.Option(
            "--thought-tag",
            metavar="TAG",
            help="What marks the model's thoughts, which are not judged, beside <think> and others "
            "that are known: NAME, for <NAME> and </NAME>, or OPEN,CLOSE. Repeatable.",
        ),
    ] = None
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", help="Tokens of an answer, at most.")
    ] = 128
    batch_size: Annotated[
        int,
        typer.Option(
            "--batch-size",
            metavar="N",
            help="Prompts that run at a time.",
            rich_help_panel=RUNNING,
        ),
    ] = 16
    device: Device = "auto"
    dtype: ModelDtype = "auto"

    @cached_property
    def tags(self) -> tuple[Tag, ...]:
        """What marks thoughts beside what is known.

        Raises:
            SafeprojError: one is malformed.
        """
        from safeproj.evaluation.thoughts import parse_tags

        return tuple(parse_tags(self.thought_tag or ()))

    @property
    def generation(self) -> Generation:
        """What the options say; imports torch, transformers and PEFT.

        Raises:
            SafeprojError: one is malformed, or a package is not installed.
        """
        chats, tags = self.options, self.tags  # are refused before torch is imported
        from safeproj.lm.models import require_extra

        require_extra()
        from safeproj.evaluation.generate import Generation

        return Generation(self.batch_size, self.max_new_tokens, self.chat, self.dtype, chats, tags)

"""The options that measuring behaviour needs, and what they make. Heavy imports happen inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safeproj.errors import SafeprojError

if TYPE_CHECKING:
    from safeproj.evaluate.generate import Generator
    from safeproj.evaluate.judges import Judge
    from safeproj.evaluate.sets import PromptSet
    from safeproj.evaluate.thoughts import Tag
    from safeproj.lm.chat import ChatOptions


class JudgeKind(str, Enum):
    """Choices of `--judge`."""

    keywords = "keywords"
    prefix = "prefix"


Harmful = Annotated[
    list[str] | None,
    typer.Option(
        "--harmful",
        metavar="[NAME=]FILE",
        help="JSON lines with harmful prompts; answers are judged. Repeatable.",
    ),
]
Skill = Annotated[
    list[str] | None,
    typer.Option(
        "--skill",
        metavar="[NAME=]FILE",
        help="JSON lines with prompts and the right responses; answers are compared. Repeatable.",
    ),
]
Limit = Annotated[
    int | None, typer.Option("--limit", metavar="N", help="Only the first N prompts of each file.")
]
JudgeChoice = Annotated[
    JudgeKind | None,
    typer.Option(
        "--judge",
        help="A refusal has one of the phrases in it (keywords) or begins with one (prefix).  "
        "[default: keywords]",
    ),
]
Phrase = Annotated[
    list[str] | None,
    typer.Option("--phrase", metavar="TEXT", help="A further phrase of refusals; repeatable."),
]
Phrases = Annotated[
    Path | None,
    typer.Option(
        "--phrases",
        metavar="FILE",
        help="The phrases of refusals, one in each line, in place of the built-in ones.",
    ),
]
JudgeCommand = Annotated[
    str | None,
    typer.Option(
        "--judge-command",
        metavar="CMD",
        help="A program that judges: JSON lines with prompt and response in, with verdict out.",
    ),
]
JudgeUrl = Annotated[
    str | None,
    typer.Option(
        "--judge-url",
        metavar="URL",
        help="An OpenAI-compatible endpoint that judges; its key is taken from the environment "
        "variable SAFEPROJ_JUDGE_API_KEY.",
    ),
]
JudgeModel = Annotated[
    str | None,
    typer.Option("--judge-model", metavar="NAME", help="The model at --judge-url."),
]
JudgeGuard = Annotated[
    str | None,
    typer.Option(
        "--judge-guard", metavar="SRC", help="A guard model that says whether an answer is safe."
    ),
]
JudgeTimeout = Annotated[
    float,
    typer.Option(
        "--judge-timeout",
        metavar="SECONDS",
        help="For a command's verdicts on one set, or an endpoint's on one answer.",
    ),
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", metavar="N", help="Prompts that run at a time.")
]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", metavar="N", help="Tokens of an answer, at most.")
]
Chat = Annotated[
    bool,
    typer.Option(
        "--chat", help="Put plain prompts through the model's chat template, as a user's message."
    ),
]
ThoughtTag = Annotated[
    list[str] | None,
    typer.Option(
        "--thought-tag",
        metavar="TAG",
        help="What marks the model's thoughts, which are not judged, beside <think> and others "
        "that are known: NAME, for <NAME> and </NAME>, or OPEN,CLOSE. Repeatable.",
    ),
]
ModelDtype = Annotated[
    str, typer.Option("--dtype", metavar="DTYPE", help="What the model runs in; auto: as stored.")
]
Seed = Annotated[
    int, typer.Option("--seed", metavar="N", help="Seed of torch; greedy answers need none.")
]


@dataclass(frozen=True)
class JudgeOptions:
    """What the options say about the judge.

    Raises:
        SafeprojError: they do not go together.
    """

    kind: JudgeKind | None = None
    phrase: Sequence[str] = ()
    phrases: Path | None = None
    command: str | None = None
    url: str | None = None
    model: str | None = None
    guard: str | None = None
    timeout: float = 600.0

    def __post_init__(self) -> None:
        others = {
            "--judge-command": self.command,
            "--judge-url": self.url,
            "--judge-guard": self.guard,
        }
        given = [option for option, value in others.items() if value is not None]
        words = self.kind is not None or self.phrases is not None or bool(self.phrase)
        if len(given) > 1 or (given and words):
            found = [*given, *(["--judge, --phrase or --phrases"] if words else [])]
            raise SafeprojError(f"{' and '.join(found)} exclude each other; give one judge")
        if (self.url is None) != (self.model is None):
            raise SafeprojError("--judge-url and --judge-model need each other")
        if not self.timeout > 0.0:
            raise SafeprojError(f"--judge-timeout must be more than 0, found {self.timeout:g}")

    def build(self, device: str = "auto", batch_size: int = 16) -> Judge:
        """Return the judge; a guard model is loaded.

        Raises:
            SafeprojError: it cannot be made.
        """
        from safeproj.evaluate import ask

        if self.command is not None:
            return ask.Command(self.command, self.timeout)
        if self.url is not None and self.model is not None:
            return ask.Endpoint(self.url, self.model, self.timeout)
        if self.guard is not None:
            return ask.load_guard(self.guard, device, batch_size)
        return self._words()

    def _words(self) -> Judge:
        from safeproj.evaluate.judges import Keywords, Prefix, read_phrases
        from safeproj.evaluate.phrases import ANYWHERE, OPENING

        own = () if self.phrases is None else read_phrases(self.phrases)
        if self.kind is JudgeKind.prefix:
            return Prefix((*(own or (*OPENING, *ANYWHERE)), *self.phrase))
        return Keywords((*(own or ANYWHERE), *self.phrase), () if own else OPENING)


def sets_of(
    harmful: Sequence[str] | None, skill: Sequence[str] | None, limit: int | None
) -> list[PromptSet]:
    """Return the sets, harmful ones first.

    Raises:
        SafeprojError: a file cannot be used, two have one name, or `limit` is not positive.
    """
    from safeproj.evaluate.sets import read_prompts, require_apart

    if limit is not None and limit < 1:
        raise SafeprojError(f"--limit must be 1 or more, found {limit}")
    found = [read_prompts(each, "harmful") for each in harmful or ()]
    found += [read_prompts(each, "skill") for each in skill or ()]
    require_apart(found)
    return [each.first(limit) for each in found]


def generator_of(
    tokenizer: Any,
    batch_size: int,
    max_new_tokens: int,
    chat: bool,
    options: ChatOptions,
    tags: Sequence[Tag],
) -> Generator:
    """Return what lets the model answer; imports torch.

    Raises:
        SafeprojError: a number is not positive, there is no chat template for `chat`, or it does
            not read what it is given.
    """
    from safeproj.evaluate.generate import Generator
    from safeproj.evaluate.thoughts import Thoughts

    return Generator(tokenizer, batch_size, max_new_tokens, chat, options, Thoughts(tags))

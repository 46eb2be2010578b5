"""The options that commands share, as dataclasses. Heavy imports happen inside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from importlib.util import find_spec
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_type_hints

import typer

from safeproj.cli import terminal
from safeproj.cli.usage import INPUTS, MESSAGES, METHOD, OUTPUT, RUNNING, SELECTION
from safeproj.errors import SafeprojError
from safeproj.methods import registry
from safeproj.methods.interface import Method, Option, having_value
from safeproj.records.profile import Profile
from safeproj.report.html_page import NO_PLOTLY
from safeproj.text import shorten

if TYPE_CHECKING:
    from safeproj.adapter.collection import Collection
    from safeproj.lm.chat import ChatOptions
    from safeproj.lm.feed import Feed
    from safeproj.plan.select import Selection
    from safeproj.run.options import Options


class Engine(str, Enum):
    """Where weights are read and scored."""

    LOCAL = "local"
    RAY = "ray"


class ReportFormat(str, Enum):
    """Choices of `--format`."""

    table = "table"
    json = "json"
    markdown = "markdown"
    html = "html"


class CheckFormat(str, Enum):
    """Choices of `--format` for gates."""

    table = "table"
    json = "json"
    markdown = "markdown"
    html = "html"
    sarif = "sarif"
    junit = "junit"
    github = "github"


class Adapters:
    """The adapters: by their places, or each with `--adapter`, which means the same.

    Args:
        adapters: those that no option names.
        adapter: those of `--adapter`.
    """

    metavar: ClassVar[str] = "ADAPTER"
    what: ClassVar[str] = (
        "SRC of a LoRA adapter: PEFT, MLX, GGUF or litgpt; a directory of adapters or a .txt file "
        "with one SRC per line stands for many."
    )
    many: ClassVar[bool] = True

    def __init__(
        self,
        adapters: Sequence[str] | str | None = None,
        adapter: Sequence[str] | None = None,
    ) -> None:
        places = [adapters] if isinstance(adapters, str) else adapters or ()
        self.given = [*places, *(adapter or ())]

    @classmethod
    def parameters(cls) -> Iterator[Parameter]:
        """Yield the argument and the option."""
        same = "The same; repeatable." if cls.many else "The same."
        places = typer.Argument(metavar=cls.metavar, help=cls.what, show_default=False)
        named = typer.Option("--adapter", metavar="SRC", help=same)
        several: Any = list[str] | None
        kinds = {"adapters": (several if cls.many else str | None, places)}
        for name, (kind, info) in {**kinds, "adapter": (several, named)}.items():
            info.rich_help_panel = INPUTS
            annotation: Any = Annotated[kind, info]
            yield Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)

    @property
    def sources(self) -> list[str]:
        """The SRC of them, at least one.

        Raises:
            SafeprojError: there is none.
        """
        if not self.given:
            several = "one or more" if self.many else "an adapter"
            raise SafeprojError(
                f"no {self.metavar}; expected the SRC of {several}, as it is or with --adapter"
            )
        return self.given

    def collected(
        self,
        outputs: Iterable[tuple[str, Path | None]],
        out: Path | None = None,
        *,
        written: bool = True,
    ) -> Collection:
        """Return all adapters that they stand for, of which no report takes the place of a file.

        Args:
            outputs: formats and the files for them.
            out: the directory that is written.
            written: as for `collect`.

        Raises:
            SafeprojError: a list cannot be read, or a report would replace something.
        """
        from safeproj.adapter.collection import collect

        found = collect(self.given, written=written)
        members = [("--adapter", each.source) for each in found.members]
        terminal.check_outputs(outputs, out, members)
        return found

    @property
    def source(self) -> str:
        """The SRC of the only one.

        Raises:
            SafeprojError: there is none, or there are more.
        """
        first, *others = self.sources
        if others:
            raise SafeprojError(
                f"{len(self.given)} adapters: {shorten(self.given)}; expected one {self.metavar}"
            )
        return first


class Subjects(Adapters):
    """Adapters, or one full fine-tune in their place.

    Args:
        adapters: those that no option names.
        adapter: those of `--adapter`.
        model: the fine-tune.
    """

    full: ClassVar[str] = (
        "A full fine-tuned checkpoint, in place of an adapter; --aligned is the model that it was "
        "made from, beside every method."
    )

    def __init__(
        self,
        adapters: Sequence[str] | str | None = None,
        adapter: Sequence[str] | None = None,
        model: str | None = None,
    ) -> None:
        super().__init__(adapters, adapter)
        self.model = model
        if model is not None and self.given:
            raise SafeprojError(
                f"--model {model} and adapters ({shorten(self.given)}) exclude each other: a full "
                "fine-tune is patched alone"
            )

    @classmethod
    def parameters(cls) -> Iterator[Parameter]:
        yield from super().parameters()
        info = typer.Option(
            "--model",
            metavar="SRC",
            help=cls.full,
            rich_help_panel=INPUTS,
        )
        annotation: Any = Annotated[str | None, info]
        yield Parameter("model", Parameter.KEYWORD_ONLY, default=None, annotation=annotation)

    def method(self, given: Given) -> tuple[Method, str | None]:
        """Return what is done, and what a full fine-tune was made from.

        Raises:
            SafeprojError: what is given does not go together.
        """
        return (given.method, None) if self.model is None else given.beside

    def inputs(self, method: Method, aligned: str | None) -> list[tuple[str, str | None]]:
        """Return all that is given: option names, each with its SRC."""
        if self.model is None:
            return [*method.inputs(self.sources)]
        return [*method.inputs(()), ("--model", self.model), ("--aligned", aligned)]


class OneAdapter(Adapters):
    """The same of a command that takes one."""

    what = "SRC of the PEFT LoRA adapter."
    many = False


class Given:
    """What is given of a method: the fields of all of them.

    Args:
        method: the name of the one that it must be, None for any.
        values: field to value, None where it is not given.
    """

    def __init__(self, method: Enum | None = None, **values: Any) -> None:
        self.name = None if method is None else str(method.value)
        self.values = {
            name: value.value if isinstance(value, Enum) else value
            for name, value in having_value(values).items()
        }

    @classmethod
    def parameters(cls) -> Iterator[Parameter]:
        """Yield `--method`, and every method's fields: those that are read first."""
        named = typer.Option(
            "--method",
            help="What is to be done; must fit what is given.  [default: what is given tells]",
        )
        named.rich_help_panel = METHOD
        kind: Any = Annotated[_choices("Method", tuple(registry.by_name())), named]
        yield Parameter("method", Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        declared = registry.options().items()
        for name, (option, method) in sorted(declared, key=lambda each: not each[1][0].is_source):
            default = method.__dataclass_fields__[name].default
            kind = _annotated(name, option, method)
            yield Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)

    @cached_property
    def method(self) -> Method:
        """The method.

        Raises:
            SafeprojError: what is given does not go together.
        """
        return registry.method_of(self.values, self.name)

    @property
    def beside(self) -> tuple[Method, str | None]:
        """The method for a full fine-tune, and the model that this was made from.

        Raises:
            SafeprojError: what is given does not go together.
        """
        return registry.method_beside(self.values, self.name)


def _annotated(name: str, option: Option, method: type[Method]) -> Any:
    """Return the annotation of a method's field as a command has it."""
    kind = str | None if option.is_source else get_type_hints(method)[name]
    if option.choices:
        kind = _choices(name.title(), option.choices)
    group = INPUTS if option.is_source else METHOD
    info = typer.Option(
        option.flag, metavar=option.metavar, help=option.help, rich_help_panel=group
    )
    return Annotated[kind, info]


def _choices(name: str, values: Sequence[str]) -> Any:
    make: Any = Enum
    return make(name, {each: each for each in values}, type=str) | None


@dataclass(frozen=True)
class Choosing:
    """Which modules are changed."""

    group: ClassVar[str] = SELECTION

    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold",
            metavar="T",
            help="Project the modules whose cosine is at most T, 0 <= T <= 1.  [default: 0.35]",
        ),
    ] = None
    layers: Annotated[
        int | None,
        typer.Option("--layers", metavar="N", help="Project the N modules with the lowest cosine."),
    ] = None
    all_modules: Annotated[bool, typer.Option("--all", help="Project every module.")] = False
    include: Annotated[
        list[str] | None,
        typer.Option(
            "--include",
            metavar="RE",
            help="Only the modules whose name matches this regular expression; repeatable.",
        ),
    ] = None
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude",
            metavar="RE",
            help="Not the modules whose name matches this regular expression; repeatable.",
        ),
    ] = None

    @cached_property
    def selection(self) -> Selection:
        """What the options say.

        Raises:
            SafeprojError: they exclude each other, or a value is out of range.
        """
        from safeproj.plan.select import Selection

        include, exclude = tuple(self.include or ()), tuple(self.exclude or ())
        return Selection(self.threshold, self.layers, self.all_modules, include, exclude)


Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="Where the arithmetic runs: auto, cpu, cuda, cuda:N, mps, or torch: the CPU by torch; "
        "several GPUs as cuda:0,cuda:1 or cuda:all.",
        rich_help_panel=RUNNING,
    ),
]


class Downloading(str, Enum):
    """Choices of `--download`."""

    auto = "auto"
    always = "always"
    never = "never"


@dataclass(frozen=True)
class Running:
    """How a run is done."""

    group: ClassVar[str] = RUNNING

    map_: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="RUNTIME=CHECKPOINT",
            help="Where the checkpoints keep a module or parameter that they call something else; "
            "* stands for any text; repeatable.",
        ),
    ] = None
    device: Device = "auto"
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            metavar="N",
            help="Threads over modules on the CPU; the result does not depend on it.  "
            "[default: one per core, at most 8]",
        ),
    ] = None
    download: Annotated[
        Downloading,
        typer.Option(
            "--download",
            help="Whether weights that are not on this machine are downloaded as whole files, or "
            "the bytes that are needed are read; auto: where most of a large file is not needed.",
        ),
    ] = Downloading.auto
    keep: Annotated[
        bool,
        typer.Option("--keep", help="Keep what is read without downloads for later runs."),
    ] = False
    engine: Annotated[
        Engine,
        typer.Option("--engine", help="Where weights are read: on this machine, or a Ray cluster."),
    ] = Engine.LOCAL
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address",
            metavar="HOST:PORT",
            help="The cluster.  [default: RAY_ADDRESS, or one that runs on this machine, or a new "
            "one]",
        ),
    ] = None
    show_profile: Annotated[
        bool, typer.Option("--profile", help="Say on stderr where time and memory went.")
    ] = False

    @cached_property
    def profile(self) -> Profile:
        """Where the time goes; imports torch."""
        return Profile()

    @property
    def shown(self) -> Profile | None:
        """The same, if it is to be shown."""
        return self.profile if self.show_profile else None

    def options(self, talking: Talking, **others: Any) -> Options:
        """Return how the run is done; imports torch.

        Args:
            talking: whether it is said that there is a GPU which is not used.
            others: fields of `Options` that are not here.

        Raises:
            SafeprojError: a value is out of range.
        """
        from safeproj.engine.cluster import Cluster
        from safeproj.engine.device import unused_gpu
        from safeproj.run.options import Options

        on_ray = self.engine is Engine.RAY
        if self.ray_address is not None and not on_ray:
            raise SafeprojError("--ray-address is for --engine ray; give both or neither")
        told = unused_gpu(self.device)
        if told is not None and not talking.quiet:
            terminal.say(f"safeproj: {told}")
        return Options(
            device=self.device,
            workers=self.workers,
            cluster=Cluster(self.ray_address) if on_ray else None,
            maps=tuple(self.map_ or ()),
            download=self.download.value,
            keep=self.keep,
            profile=self.profile,
            **others,
        )


_FORMAT = typer.Option(
    "--format",
    help="What the report looks like; repeatable, with one --output for each.  [default: table]",
)


@dataclass(frozen=True)
class _Reporting:
    """Which reports go where."""

    group: ClassVar[str] = OUTPUT

    format_: Annotated[list[Any] | None, _FORMAT] = None
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            metavar="FILE",
            help="Write the report to FILE instead of stdout, which is -; repeatable.",
        ),
    ] = None

    @property
    def asked(self) -> bool:
        """Whether a report was asked for."""
        return bool(self.format_ or self.output)

    @cached_property
    def outputs(self) -> list[tuple[str, Path | None]]:
        """Formats, each with its place: None is stdout.

        Raises:
            SafeprojError: there are not as many places as formats, two reports for one place, or an
                extra is missing.
        """
        kinds = [kind.value for kind in self.format_ or ()] or ["table"]
        if "html" in kinds and find_spec("plotly") is None:  # said before anything is read
            raise SafeprojError(NO_PLOTLY)
        places = [None if place == Path("-") else place for place in self.output or ()]
        if not places and len(kinds) == 1:
            places = [None]
        if len(places) != len(kinds):
            raise SafeprojError(
                f"{len(kinds)} --format and {len(places)} --output; expected one --output for each "
                "--format (- is stdout)"
            )
        if len({None if p is None else p.resolve() for p in places}) < len(places):
            raise SafeprojError(
                "two reports for the same --output; expected another place for each"
            )
        return list(zip(kinds, places, strict=True))


@dataclass(frozen=True)
class Reporting(_Reporting):
    """Which reports of scores, of an evaluation or a sweep go where."""

    format_: Annotated[list[ReportFormat] | None, _FORMAT] = None


class PlainFormat(str, Enum):
    """Choices of `--format` where there are two."""

    table = "table"
    json = "json"


@dataclass(frozen=True)
class PlainReporting(_Reporting):
    """The same of what has no page of its own."""

    format_: Annotated[list[PlainFormat] | None, _FORMAT] = None


@dataclass(frozen=True)
class GateReporting(_Reporting):
    """The same of a gate."""

    format_: Annotated[list[CheckFormat] | None, _FORMAT] = None


class Color(str, Enum):
    """Choices of `--color`."""

    auto = "auto"
    always = "always"
    never = "never"


def _quiet(text: str) -> Any:
    return typer.Option("--quiet", "-q", count=True, help=text, show_default=False)


@dataclass(frozen=True)
class Talking:
    """What is said beside a report.

    Attributes:
        reports_until: the number of -q from which a report that nobody asked for is left out.
    """

    group: ClassVar[str] = MESSAGES
    reports_until: ClassVar[int] = 1

    quiet: Annotated[int, _quiet("Nothing but errors; -qq: only those of exit code 2.")] = 0
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show a traceback on errors.")
    ] = False
    color: Annotated[
        Color,
        typer.Option(
            "--color", help="Colours; auto: on a terminal, where NO_COLOR and FORCE_COLOR let it."
        ),
    ] = Color.auto


@dataclass(frozen=True)
class WritingTalking(Talking):
    """The same of a command that writes something beside its report."""

    quiet: Annotated[
        int,
        _quiet(
            "Nothing but errors, and what --format or --output asks for; -qq: only errors of exit "
            "code 2."
        ),
    ] = 0


@dataclass(frozen=True)
class MeasuringTalking(Talking):
    """The same of one that is run for its report."""

    reports_until: ClassVar[int] = 2

    quiet: Annotated[
        int,
        _quiet(
            "No progress, no warnings; -qq: no report either, unless --format or --output asks for "
            "it, and only errors of exit code 2."
        ),
    ] = 0


@dataclass(frozen=True)
class GateTalking(Talking):
    """The same of a gate."""

    quiet: Annotated[
        int,
        _quiet(
            "Failing findings only, or what --format or --output asks for; -qq: only errors of "
            "exit code 2."
        ),
    ] = 0
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            help="List every finding, not what each rule found; show a traceback on errors.",
        ),
    ] = False


def out_option(text: str, metavar: str = "DIR") -> Any:
    """Return `--out` of a command that writes one thing: what it is."""
    return typer.Option("--out", metavar=metavar, help=text, rich_help_panel=OUTPUT)


def seed_option(text: str) -> Any:
    """Return `--seed`: what it is the seed of."""
    return typer.Option("--seed", metavar="N", help=text, rich_help_panel=RUNNING)


Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace what an earlier run wrote.", rich_help_panel=OUTPUT),
]
ModelDtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="What the model runs in; auto: as stored, on the CPU float32 for half precision.",
        rich_help_panel=RUNNING,
    ),
]


@dataclass(frozen=True)
class Chatting:
    """How chats are put to a model's template."""

    group: ClassVar[str] = RUNNING

    date: Annotated[
        str | None,
        typer.Option(
            "--date",
            metavar="YYYY-MM-DD",
            help="What day it is for a chat template that prints the date.  [default: 2024-07-26]",
        ),
    ] = None
    chat_template_arg: Annotated[
        list[str] | None,
        typer.Option(
            "--chat-template-arg",
            metavar="NAME=VALUE",
            help="A variable of the chat template, such as enable_thinking=false; repeatable.",
        ),
    ] = None

    @cached_property
    def options(self) -> ChatOptions:
        """What the options say.

        Raises:
            SafeprojError: one is malformed.
        """
        from safeproj.lm.chat import chat_options

        return chat_options(self.date, self.chat_template_arg)

    def of(self, method: Method) -> ChatOptions:
        """Return the same for a method.

        Raises:
            SafeprojError: they are given, and no model is run for it.
        """
        if (self.date is not None or self.chat_template_arg) and not method.runs_model:
            option = "--chat-template-arg" if self.date is None else "--date"
            raise SafeprojError(
                f"{option} is of chats in data that a model is run on, and {method.words.name} "
                "runs none here; leave it out"
            )
        return self.options


Targets = Annotated[
    str | None,
    typer.Option(
        "--targets",
        metavar="NAMES",
        help="Layers, by name or last part of it, separated by commas; or all-linear.",
        rich_help_panel=SELECTION,
    ),
]


@dataclass(frozen=True)
class Reading(Chatting):
    """How a model is run on data, layer by layer.

    Raises:
        SafeprojError: a number is out of range.
    """

    targets: Targets = "all-linear"
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="N", help="Samples that run at a time.")
    ] = 8
    max_length: Annotated[
        int,
        typer.Option("--max-length", metavar="N", help="Tokens of a sample; the rest is cut off."),
    ] = 2048
    memory: Annotated[
        float,
        typer.Option(
            "--memory",
            metavar="GB",
            help="Sums held at a time; the model runs over the data once for each group of layers "
            "that fits.",
        ),
    ] = 4.0
    device: Device = "auto"
    dtype: ModelDtype = "auto"

    def __post_init__(self) -> None:
        require_positive(("--batch-size", self.batch_size), ("--max-length", self.max_length))
        if not self.memory > 0.0:
            raise SafeprojError(f"--memory must be more than 0, found {self.memory:g}")

    @property
    def feed(self) -> Feed:
        """What the options say; imports torch, transformers and PEFT.

        Raises:
            SafeprojError: one is malformed, or a package is not installed.
        """
        chat = self.options  # what cannot be used is said before torch is imported
        from safeproj.lm.models import require_extra

        require_extra()
        from safeproj.lm.feed import Feed

        return Feed(
            names_of(self.targets or ""),
            self.batch_size,
            self.max_length,
            int(self.memory * 1e9),
            self.device,
            self.dtype,
            chat,
        )


Aligned = Annotated[
    str,
    typer.Option(
        "--aligned",
        metavar="SRC",
        help="The aligned model, which is run.",
        rich_help_panel=INPUTS,
    ),
]
DATA = typer.Option(
    "--data",
    metavar="FILE",
    help="Prompts with responses, or chats for the model's template: JSON lines, a JSON array or "
    "CSV, as docs/data.md says.",
    rich_help_panel=INPUTS,
)


def names_of(text: str) -> list[str]:
    """Return the names in a list that is separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def require_positive(*options: tuple[str, int]) -> None:
    """Refuse options that are to be positive and are not.

    Raises:
        SafeprojError: one of them.
    """
    for option, value in options:
        if value < 1:
            raise SafeprojError(f"{option} must be 1 or more, found {value}")

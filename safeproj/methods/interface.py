"""What a method is: plain data, checked once, for the API, the command and policies alike."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from safeproj.errors import SafeprojError
from safeproj.methods.detail import Detail
from safeproj.methods.words import Words
from safeproj.storage.source import src

if TYPE_CHECKING:
    from safeproj.adapter import Adapter
    from safeproj.checkpoint.hashes import Hash
    from safeproj.engine import Buffers, Task
    from safeproj.methods.reference import Reference
    from safeproj.methods.score import Score
    from safeproj.methods.whole import WholeKernel
    from safeproj.plan.select import Selection
    from safeproj.run.options import Options

Scorer = Callable[["Buffers", "Task"], "tuple[Score | SafeprojError, ...]"]
"""Scores all updates of one weight; an error in place of a score is about that update alone."""

Self = TypeVar("Self", bound="Method")


@dataclass(frozen=True)
class Option:
    """How a field of a method is given to a command.

    Attributes:
        flag: such as `--base`.
        help: what it is; empty where another method's field of that name says it.
        metavar: what its value is called.
        choices: its values, if they are few.
        is_source: whether it is a SRC that is read.
    """

    flag: str
    help: str = ""
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    is_source: bool = False


def source(flag: str, text: str = "", metavar: str = "SRC") -> Any:
    """Return a field of a method that is a SRC; None where it is not given."""
    made = Option(flag, text, metavar, is_source=True)
    return dataclasses.field(default=None, metadata={"option": made})


def option(
    flag: str,
    text: str = "",
    metavar: str | None = None,
    choices: tuple[str, ...] = (),
    default: Any = None,
) -> Any:
    """Return a field of a method that is no SRC; None where the method's default is meant."""
    made = Option(flag, text, metavar, choices)
    return dataclasses.field(default=default, metadata={"option": made})


@dataclass(frozen=True)
class Method(ABC):
    """What is done to adapters, as the user gives it; nothing is opened here.

    Attributes:
        name: what `Report.method` says, and `--method`.
        words: how reports speak of it.
        detail: what its scores have beside what all do.
        ways: the sets of its SRC fields that can be given together.
        give: the same in words, one for each that is its own.
        needs: the same in one sentence.
        mark: the options by which it is known.
        advice: what to do without another method's options.
        selects_all: whether it is meant for every module, where no selection is asked for.
        side: which factor of an update it changes, or both, then to factors of any rank.
        axes: what a sweep varies; the first is the default.
        unswept: a form of it that no sweep tries: what it is, and the options for it, in which
            `MODEL` stands for the model.
        is_idempotent: whether doing it again to what it made changes nothing.
        in_memory: further sets of SRC fields, where the aligned model is in memory.
        whole_ways: further sets of SRC fields, for full fine-tunes; they may be another method's
            for adapters, and then this one has to be named.
        host: the aligned model, if it is in memory: `lm.adapters.Host`, or `lm.live.Live` where it
            has adapters on it.

    Raises:
        SafeprojError: what is given does not go together, or a value is out of range.
    """

    name: ClassVar[str]
    words: ClassVar[Words]
    detail: ClassVar[type[Detail]] = Detail
    ways: ClassVar[tuple[frozenset[str], ...]]
    give: ClassVar[tuple[str, ...]]
    needs: ClassVar[str]
    mark: ClassVar[str]
    advice: ClassVar[str] = ""
    selects_all: ClassVar[bool] = False
    side: ClassVar[Literal["output", "input", "both"]] = "output"
    axes: ClassVar[tuple[str, ...]] = ("layers", "threshold")
    unswept: ClassVar[tuple[str, tuple[str, ...]] | None] = None
    is_idempotent: ClassVar[bool] = False
    in_memory: ClassVar[tuple[frozenset[str], ...]] = ()
    whole_ways: ClassVar[tuple[frozenset[str], ...]] = ()

    host: Any = dataclasses.field(default=None, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        for name, option in self.options().items():
            if option.is_source and (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, src(given))  # paths are text from here on
        if frozenset(self.sources) not in (*self.ways, *self.in_memory, *self.whole_ways):
            raise self.lacking()

    def lacking(self) -> SafeprojError:
        """Return the error where a SRC is missing."""
        return SafeprojError(f"{self.words.name} needs {self.needs}")

    @classmethod
    def options(cls) -> dict[str, Option]:
        """Return how its fields are given, by name."""
        return {
            field.name: field.metadata["option"]
            for field in dataclasses.fields(cls)
            if "option" in field.metadata
        }

    @property
    def given(self) -> dict[str, Any]:
        """The options that have a value, by field."""
        return having_value({name: getattr(self, name) for name in self.options()})

    @property
    def sources(self) -> dict[str, str]:
        """Those of them that are a SRC."""
        options = self.options()
        return {name: value for name, value in self.given.items() if options[name].is_source}

    @property
    def settings(self) -> dict[str, Any]:
        """Those of them that are none: how it is done."""
        return {name: value for name, value in self.given.items() if name not in self.sources}

    def inputs(self, adapters: Sequence[str]) -> list[tuple[str, str]]:
        """Return all that a run on these adapters is given: option names, each with its SRC."""
        options = self.options()
        given = [(options[name].flag, source) for name, source in self.sources.items()]
        return [*given, *(("--adapter", adapter) for adapter in adapters)]

    def local_paths(self, adapters: Sequence[str]) -> list[tuple[str, Path | None]]:
        """Return the same with the local paths in place of the SRCs, None for the Hub."""
        return [(option, local_path(source)) for option, source in self.inputs(adapters)]

    def selecting(self, selection: Selection) -> Selection:
        """Return how modules are chosen for it, where the selection leaves that open.

        Raises:
            SafeprojError: they cannot be chosen so.
        """
        return selection.or_all() if self.selects_all else selection

    @property
    def formulas(self) -> Any:
        """What it computes, on tensors; None where that is not apart from `kernel`."""
        return None

    @property
    def is_wide(self) -> bool:
        """Whether it computes in float64."""
        return False

    @property
    def weighs_directions(self) -> bool:
        """Whether `C` weighs every output direction by how far alignment moved it."""
        return False

    def scorer(self, *, hashes: Collection[Hash] = (), formulas: Any = None) -> Scorer:
        """Return what scores all updates of one weight; imports torch.

        Args:
            hashes: by which what is read is hashed.
            formulas: in the place of its own.
        """
        kernel, own = self.kernel(), self.formulas if formulas is None else formulas
        return lambda buffers, task: kernel(task, own, buffers, hashes=hashes)

    @abstractmethod
    def kernel(self) -> Callable[..., tuple[Score | SafeprojError, ...]]:
        """Return what makes the scores of a task, given formulas, buffers and `hashes`."""

    def whole(self) -> WholeKernel:
        """Return what remakes whole changes of weights, as full fine-tunes have them.

        Raises:
            SafeprojError: it is for adapters alone.
        """
        raise SafeprojError(f"{self.words.name} is for adapters; leave out --model")

    @abstractmethod
    def describe(self, scores: Iterable[Score]) -> dict[str, Any]:
        """Return what a record says of it under `projector`; `recorded` is the inverse.

        Args:
            scores: all that there are.
        """

    @abstractmethod
    def open(self, maps: Sequence[str] = ()) -> Reference:
        """Open what is read.

        Args:
            maps: `--map` rules.

        Raises:
            SafeprojError: it cannot be used, or is still to be prepared.
        """

    @property
    def runs_model(self) -> bool:
        """Whether a model has to be run on data for it."""
        return False

    @property
    def checking(self: Self) -> Self:
        """What a gate scores by that looks at what it wrote."""
        return self

    def prepared(
        self, adapters: Sequence[str | Adapter], options: Options
    ) -> AbstractContextManager[Method]:
        """Yield what can be opened; what was made for it is gone afterwards.

        Args:
            adapters: of each the SRC, where it is not read yet; one that cannot be read is left to
                those who use it.
            options: how.

        Raises:
            SafeprojError: it cannot be made.
        """
        del adapters, options
        return nullcontext(self)

    @abstractmethod
    def recorded(self: Self, source: str, projector: Mapping[str, Any]) -> Self:
        """Return this method with the settings that a record says; `describe` is the inverse.

        Args:
            source: whose record it is.
            projector: what `safeproj.json` says under that name.

        Raises:
            SafeprojError: it says none that there is, or another method's.
        """

    @classmethod
    def unrepeatable(cls, projector: Mapping[str, Any]) -> str | None:
        """Return why what a record says was done is not computed again, None where it is."""
        del projector
        return None

    def with_recorded(self: Self, source: str, **settings: Any) -> Self:
        """Return this method with settings of a record, for `recorded`.

        Raises:
            SafeprojError: they do not go together.
        """
        try:
            return dataclasses.replace(self, **settings)
        except SafeprojError:
            raise unrecorded(source) from None


def having_value(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those that are given: neither None nor, of a switch, False. Zero is given."""
    return {
        name: value for name, value in values.items() if value is not None and value is not False
    }


def local_path(source: str) -> Path | None:
    """Return the place of a SRC on this machine, None where it is on the Hub."""
    path = Path(source).expanduser()
    return path if path.exists() else None


def unrecorded(source: str) -> SafeprojError:
    """Return the error of a record without a projector."""
    return SafeprojError(
        f"{source}: safeproj.json names no projector that there is; give --projector"
    )


def not_repeated(why: str) -> str:
    """Return what can be done about an adapter that is not made again to compare, and why."""
    return f"{why}, which is not done again to compare; give --public-key to verify a signature"


def require_all_as_they_are(options: Options, who: str) -> None:
    """Refuse what does not go with running an adapter, where each module makes up for others.

    Args:
        options: how a run is done.
        who: does so, for messages.

    Raises:
        SafeprojError: there is something.
    """
    if options.portable:
        raise SafeprojError(
            f"--portable does not go with {who}, which runs the adapter as it is; make it portable "
            "before"
        )
    selection = options.selection
    if selection.threshold is not None or selection.layers is not None:
        raise SafeprojError(
            f"--threshold and --layers do not go with {who}, where each module makes up for "
            "others; leave them out, or choose modules with --include and --exclude"
        )


def require_rank(rank: int | None) -> None:
    """Refuse a rank that is none.

    Raises:
        SafeprojError: it is less than 1.
    """
    if rank is not None and rank < 1:
        raise SafeprojError(f"--rank must be at least 1, found {rank}")


def is_count(value: object) -> bool:
    """Tell whether a value of a record is a whole number, or none."""
    return value is None or type(value) is int


def is_number(value: object) -> bool:
    """Tell whether a value of a record is a number, or none."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))

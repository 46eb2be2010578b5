"""What several `--adapter` mean: one SRC each, directories that hold adapters, lists of SRC."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from safeproj.adapter import FORMATS, stands_for_folder
from safeproj.adapter.interface import CONFIG
from safeproj.errors import SafeprojError
from safeproj.storage.nearby import read_given_text
from safeproj.storage.publish import is_leftover
from safeproj.storage.source import Src, expanded, hub_place, require_no_root, src
from safeproj.text import natural_order

LIST = ".txt"
"""How the name of a list ends: one SRC per line; blank lines and those that begin with # are
left out."""


MAX_ENTRIES = 1_000_000
"""Files and directories that are looked at in a directory of adapters."""


@dataclass(frozen=True)
class Member:
    """One of many adapters.

    Attributes:
        source: its SRC.
        name: where its patched copy goes below `--out`, with `/` between parts.
        linked: whether a link leads to it out of the directory that holds it among others.
    """

    source: str
    name: str
    linked: bool = False


@dataclass(frozen=True)
class Collection:
    """The adapters of one run.

    Attributes:
        members: in the order in which they were given; those of a directory in natural order.
        many: whether they are treated as many, even if there happens to be only one.
        given: the SRC that named them, as they were given.
    """

    members: tuple[Member, ...]
    many: bool
    given: tuple[str, ...] = field(default=(), compare=False)

    def __iter__(self) -> Iterator[str]:
        """Yield the SRC that named them, so that a collection goes wherever those do."""
        yield from self.given


def _all_of(sources: Iterable[Src]) -> list[str]:
    """Return the SRC of several adapters as text.

    Raises:
        TypeError: it is one SRC, whose letters would be taken for several.
    """
    if isinstance(sources, str | os.PathLike):
        raise TypeError(f"expected the SRC of several adapters, found one: {sources!r}")
    return [src(each) for each in sources]


def collect(sources: Iterable[Src], *, written: bool = True) -> Collection:
    """Return the adapters that the values of `--adapter` name, without reading any.

    Args:
        sources: the values; a collection of them is returned as it is.
        written: whether each gets a place of its name below `--out`. If not, what is named twice
            counts once, adapters of the same name are told apart by their SRC, and nothing is
            passed over: no hidden directory, no name in another case.

    Raises:
        SafeprojError: a list cannot be read, names nothing, or two adapters would get one place.
    """
    if isinstance(sources, Collection):
        return sources
    sources = _all_of(sources)
    members: list[Member] = []
    many = len(sources) > 1
    for source in sources:
        for each in _listed(source):
            found = list(_below(each, hidden=not written))
            many = many or each != source or bool(found)
            members += found or [Member(each, _name(each))]
    if not written:
        members = _told_apart(members)
    elif many:
        _require_apart(members)
    return Collection(tuple(members), many, tuple(sources))


def _told_apart(members: Sequence[Member]) -> list[Member]:
    """Return each adapter once, under a name that no other has."""
    places = {_place(member.source): member for member in reversed(members)}
    found = [member for member in members if places[_place(member.source)] is member]
    counts = Counter(member.name for member in found)
    return [m if counts[m.name] == 1 else replace(m, name=m.source) for m in found]


def _place(source: str) -> str:
    """Return what two SRC of the same adapter have in common."""
    path = Path(source).expanduser()
    if not path.exists():
        return source
    stands_in = path.is_file() and stands_for_folder(path.name)
    return os.path.realpath(path.parent if stands_in else path)


def _require_apart(members: Sequence[Member]) -> None:
    """Refuse names that are equal, also where case does not count, or lie inside one another."""
    taken: dict[str, Member] = {}
    for member in members:
        if member.name.casefold() in taken:
            other = taken[member.name.casefold()]
            raise SafeprojError(
                f"--adapter: {other.source} and {member.source} would both be written as "
                f"{member.name}; rename one, or give it in a run of its own"
            )
        taken[member.name.casefold()] = member
    for member in members:
        for parent in PurePosixPath(member.name.casefold()).parents:
            if str(parent) in taken:
                raise SafeprojError(
                    f"--adapter: {member.source} would be written inside the place of "
                    f"{taken[str(parent)].source}; rename one, or give it in a run of its own"
                )


def _listed(source: str) -> Iterator[str]:
    """Yield the lines of a list, or the SRC itself."""
    path = Path(source).expanduser()
    if path.suffix != LIST or not path.is_file():
        yield source
        return
    text = read_given_text(path, source, "a list of adapters, text in UTF-8")
    lines = [line.strip() for line in text.splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise SafeprojError(f"{source}: an empty list; expected the SRC of an adapter per line")
    for line in found:
        if not line.isprintable():
            raise SafeprojError(f"{source}: {line!a} has characters that are not printable")
    yield from found


def _below(source: str, *, hidden: bool) -> Iterator[Member]:
    """Yield the adapters below a directory that is none itself."""
    root = expanded(source)
    if not source.strip() or not root.is_dir():
        return
    require_no_root(source, root)
    found: list[tuple[str, Path]] = []
    seen: set[str] = set()
    count = 0
    for directory, subdirectories, files in os.walk(root, followlinks=True, onerror=_refuse):
        place = Path(directory)
        if os.path.realpath(place) in seen:  # links may lead in circles
            subdirectories.clear()
            continue
        seen.add(os.path.realpath(place))
        count += len(files) + len(subdirectories)
        if count > MAX_ENTRIES:
            raise SafeprojError(
                f"{source}: has more than {MAX_ENTRIES} files and directories; expected one that "
                "holds adapters"
            )
        # What killed runs left behind is no adapter; but a gate does not believe names.
        files = [name for name in files if hidden or not is_leftover(name)]
        single = [name for name in files if name.endswith(".gguf")]
        named = [name.casefold() for name in files] if hidden else files
        if _is_adapter(named) and not (len(single) > 1 and CONFIG not in files):
            if place == root:
                return
            subdirectories.clear()  # such as checkpoints of its training
            found.append((place.relative_to(root).as_posix(), place))
            continue
        if not hidden:
            subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
        for name in single:
            path = place / name
            found.append((path.relative_to(root).with_suffix("").as_posix(), path))
    for name, path in sorted(found, key=lambda item: natural_order(item[0])):
        linked = hidden and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))
        yield Member(str(path), name, linked)


def _refuse(error: OSError) -> None:
    raise SafeprojError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _is_adapter(files: Sequence[str]) -> bool:
    """Tell whether a directory of these files is meant to be an adapter, damaged or not."""
    return CONFIG in files or any(kind.is_weights(name) for kind in FORMATS for name in files)


def _name(source: str) -> str:
    """Return the last part of a SRC: of a directory, a file's directory, or a repository.

    A link has its own name, not that of what it leads to.
    """
    path = Path(source).expanduser()
    on_hub = hub_place(source)
    given = PurePosixPath(source.partition("@")[0] if on_hub is None else on_hub.name)
    if path.exists():
        given = PurePosixPath(Path(os.path.normpath(path.absolute())).as_posix())
        if path.is_file():
            given = given.parent if stands_for_folder(path.name) else given.with_suffix("")
    return given.name if given.name not in ("", ".", "..") else "adapter"

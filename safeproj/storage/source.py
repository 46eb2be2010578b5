"""What a SRC argument names: a local directory, a local file, or a Hugging Face Hub repository."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from safeproj.errors import SafeprojError
from safeproj.storage.documents import MAX_BYTES, parse
from safeproj.storage.mistaken import reason, require_finished, require_real, unfinished
from safeproj.storage.nearby import near_names, nearby
from safeproj.storage.origins import HttpOrigin, hub_errors
from safeproj.storage.ranges import Fetching, RangeFile, fetching
from safeproj.storage.tensorfile import Header, read_header
from safeproj.storage.wholefile import read_whole
from safeproj.text import first_line, is_text, printable

StrPath = str | os.PathLike[str]
"""What names a file or directory of this machine."""

Src = StrPath
"""A SRC: text, which may name a repository of the Hub as well, or a path, which never does."""

MAX_FILES = 200_000
"""Files below a directory that is given as a SRC; far more than a training run leaves there."""

_HUB_ID = re.compile(
    r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?P<subfolder>(/\w[\w.+-]*)*)(@(?P<revision>[^@\s]+))?",
    re.ASCII,
)

_ADDRESS = re.compile(r"https?://", re.IGNORECASE)

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)

_HOSTS = frozenset({"huggingface.co", "www.huggingface.co", "hf.co"})
"""Hosts of the Hub, beside that of HF_ENDPOINT."""

_FILES = frozenset(
    {".safetensors", ".bin", ".gguf", ".pt", ".pth", ".ckpt", ".npz", ".json", ".jsonl", ".csv"}
    | {".tsv", ".txt", ".toml", ".yaml", ".yml", ".parquet", ".zip"}
)
"""Ends of names that are of files and not of repositories."""

_WHOLE = ("config.json", ".index.json")
"""Ends of names of files of a model that stand for its directory."""

_FORMS = "org/name, org/name/subfolder, org/name@revision or the address of a model on the Hub"


class Identified(Protocol):
    """What came from a SRC."""

    @property
    def source(self) -> str:
        """The SRC as the user gave it."""

    @property
    def revision(self) -> str | None:
        """The commit of a Hub repository, None for local files."""


class Folder(Identified, Protocol):
    """A flat view of one directory of files, wherever it is."""

    @property
    def files(self) -> frozenset[str]:
        """Names of all files below the folder, with `/` between their parts."""

    @property
    def advice(self) -> str:
        """What to do about a file that is not there."""

    def path(self, name: str) -> Path:
        """Return the local path of a file, downloading it first if it is on the Hub."""

    def place(self, name: str) -> Path | RangeFile:
        """Return a file whose bytes are read here and there, downloading none that need not be."""

    def header(self, name: str) -> Header:
        """Return the header of a safetensors file without fetching its tensors."""

    @property
    def held(self) -> dict[str, bytearray]:
        """The bytes of the files that were read whole, by name; see `contents`."""


@dataclass(frozen=True)
class LocalFolder:
    """A directory on this machine.

    Attributes:
        root: the directory.
        source: the SRC as the user gave it.
        only: the one file to see, where SRC names a file; a `config.json` beside it is seen too.
        revision: the commit, where the directory is a snapshot in the Hub's cache.
    """

    root: Path
    source: str
    only: str | None = None
    revision: str | None = None
    held: dict[str, bytearray] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def files(self) -> frozenset[str]:
        if self.only is not None:
            beside = {"config.json"} if (self.root / "config.json").is_file() else set()
            return frozenset({self.only} | beside)
        found: set[str] = set()
        for directory, subdirectories, names in os.walk(self.root):
            # A link to a directory is not entered: it counts as a file that is none.
            links = [name for name in subdirectories if (Path(directory) / name).is_symlink()]
            skipped = {".git", ".cache", *links}
            subdirectories[:] = [name for name in subdirectories if name not in skipped]
            below = Path(directory).relative_to(self.root)
            start = "" if below == Path() else f"{below.as_posix()}/"
            found.update(start + name for name in (*names, *links))
            if len(found) > MAX_FILES:
                raise SafeprojError(
                    f"{self.source}: has more than {MAX_FILES} files; expected the directory of "
                    "one model or adapter"
                )
        return frozenset(found)

    @property
    def advice(self) -> str:
        if self.revision is not None:
            return "it is not in the local Hub cache, unset HF_HUB_OFFLINE to download it"
        begun = unfinished(self.root)
        if begun is not None:
            return f"its download was not finished ({printable(begun)}), run it again"
        return "fetch it again"

    def path(self, name: str) -> Path:
        path = self.root / name
        if path.exists() and not path.is_file():  # a pipe or a device would be read for ever
            raise SafeprojError(
                f"{self.source}: {printable(name)} is no regular file, or a link that leads to "
                "none; remove it"
            )
        return path

    def place(self, name: str) -> Path:
        return self.path(name)

    def header(self, name: str) -> Header:
        return read_header(self.path(name))


@dataclass(frozen=True)
class HubFolder:
    """A model repository on the Hugging Face Hub, read at one commit.

    Files are downloaded one by one, when they are asked for, into the standard cache; those of
    which little is needed are read in ranges.

    Attributes:
        repo: its id.
        revision: the commit.
        asked: the revision that was asked for.
        source: the SRC as the user gave it.
        files: names of the files below the subfolder.
        subfolder: which part of the repository is meant, empty for all.
        how: how files are read.
    """

    repo: str
    revision: str
    asked: str
    source: str
    files: frozenset[str] = field(repr=False)
    subfolder: str = ""
    how: Fetching = field(default_factory=fetching)
    held: dict[str, bytearray] = field(default_factory=dict, repr=False, compare=False)
    _paths: dict[str, Path] = field(default_factory=dict, repr=False)
    _places: dict[str, Path | RangeFile] = field(default_factory=dict, repr=False)

    @property
    def advice(self) -> str:
        return "the repository is incomplete"

    def path(self, name: str) -> Path:
        # One file holds many weights, and the client asks the Hub again on each call.
        if name not in self._paths:
            self._paths[name] = self._download(name)
        return self._paths[name]

    def _download(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        # By the revision that was asked for, so that the cache can serve it offline later.
        with hub_errors(self.source):
            path = Path(hf_hub_download(self.repo, self._inside(name), revision=self.asked))
        if self.revision not in path.parts:
            raise SafeprojError(
                f"{self.source}: {self.asked} moved away from commit {self.revision} while it was "
                "read; run again"
            )
        return path

    def head(self, name: str, count: int) -> tuple[bytes, int]:
        """Return the first bytes of a file, and its size, without downloading all of it."""
        from huggingface_hub import hf_hub_url, utils

        url = hf_hub_url(self.repo, self._inside(name), revision=self.revision)
        client: Any = utils  # which lists what it exports otherwise than type checkers read it
        headers = {**client.build_hf_headers(), "range": f"bytes=0-{count - 1}"}
        with hub_errors(self.source):
            response = client.get_session().get(url, headers=headers)
            size = response.headers.get("Content-Range", "").rpartition("/")[2]
            if response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return b"", 0  # there is no first byte
            client.hf_raise_for_status(response)
        content = response.content
        return content[:count], int(size) if size.isdecimal() else len(content)

    def place(self, name: str) -> Path | RangeFile:
        if name not in self._places:
            self._places[name] = self._place(name)
        return self._places[name]

    def _place(self, name: str) -> Path | RangeFile:
        from huggingface_hub import hf_hub_url, try_to_load_from_cache

        inside = self._inside(name)
        cached = try_to_load_from_cache(self.repo, inside, revision=self.revision)
        if isinstance(cached, str):
            return Path(cached)
        if self.how.download == "always":
            return self.path(name)
        url = hf_hub_url(self.repo, inside, revision=self.revision)
        origin = HttpOrigin(self.source, name, url, self.revision)
        return RangeFile(origin, f"{self.repo}/{inside}", lambda: self.path(name), self.how)

    def header(self, name: str) -> Header:
        place = self.place(name)
        return read_header(place) if isinstance(place, Path) else place.header()

    def _inside(self, name: str) -> str:
        return f"{self.subfolder}/{name}" if self.subfolder else name


def contents(folder: Folder, name: str, limit: int = MAX_BYTES) -> bytearray:
    """Return the bytes of a file, which is read once: what it became later does not count.

    Raises:
        OSError, ValueError: it cannot be read, or has more than `limit` bytes.
        SafeprojError: it cannot be had, is no regular file, or is something else than its name
            says.
    """
    if name not in folder.held:
        path = folder.path(name)
        content = read_whole(path, limit)
        require_real(printable(str(path)), content)
        folder.held[name] = content
    return folder.held[name]


def content_sha256(folder: Folder, name: str) -> str:
    """Return the SHA-256 of a file: of the bytes that were read, if it was read whole before.

    Raises:
        SafeprojError: it cannot be read.
    """
    if name in folder.held:
        return hashlib.sha256(folder.held[name]).hexdigest()
    return file_sha256(folder.path(name))


def read_json(folder: Folder, name: str) -> dict[str, Any]:
    """Return the JSON object that a file of the folder holds.

    Raises:
        SafeprojError: the file cannot be read, or holds something else.
    """
    try:
        found = parse(contents(folder, name))
    except (OSError, ValueError, RecursionError) as error:
        raise SafeprojError(
            f"{folder.source}: {name} is not JSON ({first_line(error)}); {folder.advice}"
        ) from error
    if not isinstance(found, dict):
        raise SafeprojError(
            f"{folder.source}: {name} holds a {type(found).__name__}, expected a JSON object"
        )
    return found


def identity(found: Identified) -> dict[str, Any]:
    """Return the SRC of a folder or checkpoint, and its revision if it has one."""
    if found.revision is None:
        return {"source": found.source}
    return {"source": found.source, "revision": found.revision}


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        SafeprojError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise SafeprojError(
            f"{printable(str(path))}: cannot be read ({error.strerror or error})"
        ) from error
    return digest.hexdigest()


def expanded(source: str) -> Path:
    """Return the path that a SRC may be.

    Raises:
        SafeprojError: no system has such a path.
    """
    try:
        path = Path(source).expanduser()
        path.stat()
    except FileNotFoundError:
        pass
    except NotADirectoryError:
        pass
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~ of an unknown user
        raise SafeprojError(f"{source}: cannot be looked at ({reason(error)})") from error
    return path


def require_no_root(source: str, path: Path) -> None:
    """Refuse the root of a file system, in which everything would be looked at.

    Raises:
        SafeprojError: it is one.
    """
    place = path.resolve()
    if place == Path(place.anchor):
        raise SafeprojError(
            f"{source}: the root of the file system; expected the directory of one model or adapter"
        )


@dataclass(frozen=True)
class HubPlace:
    """What a SRC names on the Hub.

    Attributes:
        repo: the repository's id.
        subfolder: the directory in it, empty for all of it.
        revision: a branch, tag or commit, None for the default.
    """

    repo: str
    subfolder: str
    revision: str | None

    @property
    def name(self) -> str:
        """`org/name`, with the subfolder, without the revision."""
        return f"{self.repo}/{self.subfolder}" if self.subfolder else self.repo


def hub_place(source: str) -> HubPlace | None:
    """Return what a SRC that is no local path names on the Hub, None if it has no such form.

    >>> hub_place("https://huggingface.co/org/name/tree/v1/sub")
    HubPlace(repo='org/name', subfolder='sub', revision='v1')
    >>> hub_place("org/name/sub@v1").name
    'org/name/sub'
    """
    if _ADDRESS.match(source):
        return _place_of_address(source)
    match = _HUB_ID.fullmatch(source)
    if match is None:
        return None
    return HubPlace(match["repo"], match["subfolder"].removeprefix("/"), match["revision"])


def _is_hub(source: str) -> bool:
    """Tell whether an address is one of the Hub, or cannot be taken apart."""
    from huggingface_hub import constants

    hosts = _HOSTS | {urlsplit(constants.ENDPOINT).netloc.casefold()}
    try:
        return urlsplit(source).netloc.casefold() in hosts
    except ValueError:  # no address at all
        return True


def _place_of_address(source: str) -> HubPlace | None:
    """Return what the address of a page of the Hub names: a model, a directory, a file's one."""
    try:
        address = urlsplit(source)
    except ValueError:  # no address at all
        return None
    repo, name, *rest = [unquote(part) for part in address.path.split("/") if part] + ["", ""]
    rest = rest[:-2] if name else []
    if not _is_hub(source) or (
        rest and (rest[0] not in ("tree", "blob", "resolve") or len(rest) < 2)
    ):
        return None
    inside = rest[2:] if not rest or rest[0] == "tree" else rest[2:-1]
    match = _HUB_ID.fullmatch("/".join([repo, name, *inside]))
    if match is None or match["revision"]:
        return None
    return HubPlace(match["repo"], "/".join(inside), rest[1] if rest else None)


def src(given: Src) -> str:
    """Return a SRC as text.

    A relative path that is not there gets `./` in front: as text it might be an id of the Hub.
    """
    text = os.fspath(given)
    if isinstance(given, str) or hub_place(text) is None or expanded(text).exists():
        return text
    return os.path.join(os.curdir, text)  # noqa: PTH118 - pathlib drops the dot


def is_whole(name: str) -> bool:
    """Tell whether a file of a model, given as a SRC, stands for the directory that it is in."""
    return name == _WHOLE[0] or name.endswith(_WHOLE[1])


def is_address(source: str) -> bool:
    """Tell whether a SRC has the form of an address, such as https://… or s3://…."""
    return _SCHEME.match(source) is not None


def open_folder(source: str) -> Folder:
    """Return the folder that SRC names: an existing path, else a place on the Hub, or an address.

    That is `org/name`, `org/name/subfolder`, either with `@revision`, or the address of the page;
    or the address of a directory or file of a web server, or of whatever fsspec reads.

    Raises:
        SafeprojError: there is no such path, and no such repository either.
    """
    if not source.strip():
        raise SafeprojError("an empty SRC; expected a path, or org/name of a Hub repository")
    if not is_text(source):
        raise SafeprojError(f"{printable(source)}: its name is not UTF-8; rename it")
    path = expanded(source)
    if path.is_dir():
        require_no_root(source, path)
        return LocalFolder(path, source)
    if path.is_file():
        require_finished(source, path)
        return LocalFolder(path.parent, source, only=None if is_whole(path.name) else path.name)
    place = hub_place(source)
    if place is None and is_address(source) and not _is_hub(source):
        from safeproj.storage.addresses import open_address

        return open_address(source)
    if place is None or (local := _why_local(place, source)):
        why = local if place else _why_no_hub_id(source)
        raise SafeprojError(
            f"{source}: no such file or directory{near_names(path) or why or nearby(path)}"
        )
    try:
        return _open_hub(place, source)
    except SafeprojError as error:
        raise SafeprojError(f"{error.message}{nearby(path)}") from error.__cause__


def _why_local(place: HubPlace, source: str) -> str:
    """Return why a SRC that could be a place on the Hub is a path nevertheless, empty if it is not.

    With a revision, or as an address, it is never one.
    """
    if place.revision is not None or _ADDRESS.match(source):
        return ""
    first, end = source.partition("/")[0], Path(source).suffix.lower()
    if end in _FILES:
        return f"; the Hub is not asked for what ends in {end} without a revision, such as @main"
    if place.subfolder and Path(first).is_dir():
        return f"; {first} is a directory here, so the Hub is not asked without a revision"
    return ""


def _why_no_hub_id(source: str) -> str:
    """Return that a SRC is no Hub id, where nobody sees that; empty for what looks like a path."""
    if re.match(r"[.~/\\]|[A-Za-z]:[/\\]", source) or "\\" in source:
        return ""
    return f", and not a Hub id either (expected {_FORMS})"


def _open_hub(place: HubPlace, source: str) -> Folder:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo, revision = place.repo, place.revision
    if constants.HF_HUB_OFFLINE:
        try:
            with hub_errors(source):
                snapshot = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        except SafeprojError as error:
            if not isinstance(error.__cause__, LocalEntryNotFoundError):
                raise
            raise SafeprojError(
                f"{source}: not in the local Hub cache, and HF_HUB_OFFLINE is set; "
                "unset it to download the files"
            ) from error
        root = snapshot / place.subfolder
        if not root.is_dir():
            raise _no_subfolder(place, source)
        return LocalFolder(root, source, revision=snapshot.name)
    with hub_errors(source):
        info = HfApi().model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    if info.sha is None:
        raise SafeprojError(f"{source}: the Hub names no commit for this repository")
    inside = f"{place.subfolder}/" if place.subfolder else ""
    names = [sibling.rfilename for sibling in info.siblings or ()]
    files = frozenset(each.removeprefix(inside) for each in names if each.startswith(inside))
    if inside and not files:
        raise _no_subfolder(place, source)
    asked = revision or constants.DEFAULT_REVISION
    return HubFolder(repo, info.sha, asked, source, files, place.subfolder)


def _no_subfolder(place: HubPlace, source: str) -> SafeprojError:
    return SafeprojError(
        f"{source}: no such local path, and the repository {place.repo} has no directory "
        f"{place.subfolder}; expected one with files in it"
    )

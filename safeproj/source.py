"""What a SRC argument names: a local directory, a local file, or a Hugging Face Hub repository."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

from safeproj.errors import SafeprojError, first_line
from safeproj.tensorfile import Header, TensorEntry, read_header

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^@\s]+))?", re.ASCII)
_CACHED_PROBES = (
    "adapter_config.json",
    "config.json",
    "model.safetensors.index.json",
    "model.safetensors",
)


class Folder(Protocol):
    """A flat view of one directory of files, wherever it is."""

    @property
    def source(self) -> str:
        """The SRC as the user gave it."""

    @property
    def revision(self) -> str | None:
        """The commit of a Hub repository, None for local files."""

    @property
    def files(self) -> frozenset[str]:
        """Names of all files below the folder, with `/` between their parts."""

    def path(self, name: str) -> Path:
        """Return the local path of a file, downloading it first if it is on the Hub."""

    def header(self, name: str) -> Header:
        """Return the header of a safetensors file without fetching its tensors."""


@dataclass(frozen=True)
class LocalFolder:
    """A directory on this machine.

    Attributes:
        root: the directory.
        source: the SRC as the user gave it.
        only: the one file to see, where SRC names a file.
        revision: the commit, where the directory is a snapshot in the Hub's cache.
    """

    root: Path
    source: str
    only: str | None = None
    revision: str | None = None

    @cached_property
    def files(self) -> frozenset[str]:
        if self.only is not None:
            return frozenset({self.only})
        found: set[Path] = set()
        for directory, subdirectories, names in os.walk(self.root):
            subdirectories[:] = [name for name in subdirectories if name not in (".git", ".cache")]
            found.update((Path(directory) / name).relative_to(self.root) for name in names)
        return frozenset(path.as_posix() for path in found)

    def path(self, name: str) -> Path:
        return self.root / name

    def header(self, name: str) -> Header:
        return read_header(self.path(name))


@dataclass(frozen=True)
class HubFolder:
    """A model repository on the Hugging Face Hub, read at one commit.

    Files are downloaded one by one, when they are asked for, into the standard cache.
    """

    repo: str
    revision: str
    source: str
    files: frozenset[str] = field(repr=False)

    def path(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        with _hub_errors(self.source):
            return Path(hf_hub_download(self.repo, name, revision=self.revision))

    def header(self, name: str) -> Header:
        from huggingface_hub import HfApi, try_to_load_from_cache

        cached = try_to_load_from_cache(self.repo, name, revision=self.revision)
        if isinstance(cached, str):
            return read_header(Path(cached))
        with _hub_errors(self.source):
            remote = HfApi().parse_safetensors_file_metadata(
                self.repo, name, revision=self.revision
            )
        tensors = {}
        for tensor, info in remote.tensors.items():
            begin, end = info.data_offsets
            tensors[tensor] = TensorEntry(info.dtype, tuple(info.shape), begin, end - begin)
        return Header(remote.metadata, tensors)


def open_folder(source: str) -> Folder:
    """Return the folder that SRC names: an existing path, else a Hub id `org/name[@revision]`.

    Raises:
        SafeprojError: there is no such path, and no such repository either.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return LocalFolder(path, source)
    if path.is_file():
        return LocalFolder(path.parent, source, only=path.name)
    match = _HUB_ID.fullmatch(source)
    if match is None:
        raise SafeprojError(
            f"{source}: no such file or directory, and not a Hub id either (expected org/name or "
            "org/name@revision)"
        )
    return _open_hub(match["repo"], match["revision"], source)


def _open_hub(repo: str, revision: str | None, source: str) -> Folder:
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE:
        for name in _CACHED_PROBES:
            cached = try_to_load_from_cache(repo, name, revision=revision)
            if isinstance(cached, str):
                snapshot = Path(cached).parent
                return LocalFolder(snapshot, source, revision=snapshot.name)
        raise SafeprojError(
            f"{source}: not in the local Hub cache, and HF_HUB_OFFLINE is set; "
            "unset it to download the files"
        )
    with _hub_errors(source):
        info = HfApi().model_info(repo, revision=revision)
    if info.sha is None:
        raise SafeprojError(f"{source}: the Hub names no commit for this repository")
    return HubFolder(
        repo, info.sha, source, frozenset(sibling.rfilename for sibling in info.siblings or ())
    )


@contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    """Turn what the Hub client raises into one line that says what to do."""
    from huggingface_hub import errors

    advice: tuple[tuple[type[Exception], Callable[[], str]], ...] = (
        (
            errors.GatedRepoError,
            lambda: "access is gated: accept its licence on the Hub and set HF_TOKEN",
        ),
        (
            errors.RevisionNotFoundError,
            lambda: "the repository has no such revision",
        ),
        (
            errors.RepositoryNotFoundError,
            lambda: (
                "no such local path, and no such repository on the Hub (or it is private: "
                "set HF_TOKEN)"
            ),
        ),
    )
    try:
        yield
    except (KeyboardInterrupt, SafeprojError):
        raise
    except Exception as error:
        for kind, text in advice:
            if isinstance(error, kind):
                raise SafeprojError(f"{source}: {text()}") from error
        raise SafeprojError(
            f"{source}: the Hub could not be read ({type(error).__name__}: {first_line(error)}); "
            "try again, or set HF_HUB_OFFLINE=1 to use what is in the cache"
        ) from error

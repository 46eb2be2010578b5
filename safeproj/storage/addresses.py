"""Folders that are at an address: of a web server, or of an object store and all that fsspec reads.

A web server does not say what it has: it is asked for the files that models and adapters have.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from safeproj.errors import SafeprojError, install
from safeproj.storage.origins import HttpOrigin, Origin, StoreOrigin
from safeproj.storage.ranges import CONNECTIONS, Fetching, RangeFile, fetching
from safeproj.storage.source import MAX_FILES, Folder, is_whole, read_json
from safeproj.storage.tensorfile import Header, read_header
from safeproj.text import first_line

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

ASKED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "pytorch_model.bin",
    *INDEXES,
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""Files that a web server is asked for."""

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
"""The extras that read the addresses of object stores."""


@dataclass(frozen=True)
class RemoteFolder:
    """A directory at an address.

    Attributes:
        source: the address.
        origins: name of each file to where its bytes come from.
        how: how files are read.
    """

    source: str
    origins: Mapping[str, Origin] = field(repr=False)
    how: Fetching = field(default_factory=fetching)
    held: dict[str, bytearray] = field(default_factory=dict, repr=False, compare=False)
    _paths: dict[str, Path] = field(default_factory=dict, repr=False)
    _places: dict[str, RangeFile] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was downloaded to this machine."""
        return {**vars(self), "_paths": {}, "_places": {}}

    @property
    def revision(self) -> None:
        """None: there are no commits."""

    @property
    def files(self) -> frozenset[str]:
        return frozenset(self.origins)

    @property
    def advice(self) -> str:
        return "what is at this address is incomplete"

    def path(self, name: str) -> Path:
        if name not in self._paths:
            place = Path(tempfile.mkdtemp(dir=_directory())) / name
            place.parent.mkdir(parents=True, exist_ok=True)
            self.origins[name].download(place)
            self._paths[name] = place
        return self._paths[name]

    def place(self, name: str) -> Path | RangeFile:
        if self.how.download == "always" or name in self._paths:
            return self.path(name)
        if name not in self._places:
            label = f"{self.source.rstrip('/')}/{name}"
            made = RangeFile(self.origins[name], label, lambda: self.path(name), self.how)
            self._places[name] = made
        return self._places[name]

    def header(self, name: str) -> Header:
        place = self.place(name)
        return read_header(place) if isinstance(place, Path) else place.header()


def open_address(source: str) -> Folder:
    """Return the folder at an address, or of the file that is there.

    Raises:
        SafeprojError: there is none, or it cannot be read.
    """
    address = urlsplit(source)
    try:
        is_whole_address = bool(re.fullmatch(r"[!-~]+", source)) and address.port != 0
    except ValueError:  # a port that is none
        is_whole_address = False
    if not is_whole_address:
        raise SafeprojError(
            f"{source}: no address; expected one without spaces, as a browser takes it"
        )
    if address.query or address.fragment or "@" in address.netloc:
        raise SafeprojError(
            f"{address.scheme}://{address.hostname}{address.path}: an address with a query, a "
            "fragment or a name may hold a secret, which records would show; expected the "
            "address of a directory or a file alone"
        )
    if address.scheme.lower() in ("http", "https"):
        return _open_web(source)
    return _open_store(source)


def _open_web(source: str) -> RemoteFolder:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise SafeprojError(f"{source}: HF_HUB_OFFLINE is set; unset it to read this address")
    root, only = _parted(source)
    names = ASKED if only is None else (only, "config.json")
    found = _there(source, root, names)
    if only is not None and only not in found:
        found = {}
    if not found:
        raise SafeprojError(
            f"{source}: the server has none of the files of a model or an adapter there, such as "
            f"{(only or 'config.json')!a}; expected the address of their directory"
        )
    folder = RemoteFolder(source, found)
    for index in INDEXES:
        if index in found and index.partition(".index")[0] not in found:
            location = read_json(folder, index).get("weight_map")
            shards = set(location.values()) if isinstance(location, dict) else set()
            found |= _origins(source, root, (s for s in shards if _is_plain(s)))
    return folder


def _there(source: str, root: str, names: Iterable[str]) -> dict[str, Origin]:
    """Return where those of some files are that a web server has."""
    asked = _origins(source, root, names)
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        looks = list(pool.map(lambda origin: origin.look(), asked.values()))
    return {
        name: origin
        for (name, origin), look in zip(asked.items(), looks, strict=True)
        if look is not None
    }


def _origins(source: str, root: str, names: Iterable[str]) -> dict[str, Origin]:
    return {name: HttpOrigin(source, name, f"{root}/{quote(name)}") for name in sorted(names)}


def _is_plain(name: object) -> bool:
    """Tell whether an index names a file that is beside it."""
    return isinstance(name, str) and re.fullmatch(r"[\w.-]*\w", name) is not None


def _open_store(source: str) -> RemoteFolder:
    scheme = urlsplit(source).scheme.lower()
    try:
        files, path = import_module("fsspec.core").url_to_fs(source)
        found = files.find(path, detail=True, withdirs=False)
    except ImportError as error:
        how = install(_EXTRAS[scheme]) if scheme in _EXTRAS else "install it"
        raise SafeprojError(f"{source}: {first_line(error)}; {how}") from error
    except Exception as error:
        raise SafeprojError(
            f"{source}: could not be looked at ({type(error).__name__}: {first_line(error)}); "
            "check the address and who may read it"
        ) from error
    if set(found) == {path}:
        return _beside(source, files, path, found[path])
    if len(found) > MAX_FILES:
        raise SafeprojError(
            f"{source}: has more than {MAX_FILES} files; expected the directory of one model or "
            "adapter"
        )
    origins = {
        name.removeprefix(f"{path.rstrip('/')}/"): (name, info) for name, info in found.items()
    }
    if not origins:
        raise SafeprojError(f"{source}: there is nothing at this address")
    return RemoteFolder(source, dict(_stored(source, files, origins)))


def _beside(source: str, files: Any, path: str, info: Mapping[str, Any]) -> RemoteFolder:
    """Return the folder of a file, which shows it alone unless it stands for the folder."""
    root, _, name = path.rpartition("/")
    if is_whole(name):
        return _open_store(source[: -len(name) - 1])
    origins = {name: (path, info)}
    config = f"{root}/config.json"
    if files.exists(config):
        origins["config.json"] = (config, files.info(config))
    return RemoteFolder(source, dict(_stored(source, files, origins)))


def _stored(
    source: str, files: Any, origins: Mapping[str, tuple[str, Mapping[str, Any]]]
) -> Iterator[tuple[str, Origin]]:
    for name, (path, info) in origins.items():
        yield name, StoreOrigin(source, name, files, path, info)


def _parted(source: str) -> tuple[str, str | None]:
    """Return the address of a directory, and the one file of it that is meant, None for all.

    >>> _parted("https://host/m/model.safetensors"), _parted("https://host/m/config.json")
    (('https://host/m', 'model.safetensors'), ('https://host/m', None))
    """
    root, _, name = source.rstrip("/").rpartition("/")
    if is_whole(name):
        return root, None
    if Path(name).suffix in (".safetensors", ".bin", ".gguf"):
        return root, name
    return source.rstrip("/"), None


@cache
def _directory() -> str:
    """Return a directory for what is downloaded, which is gone with the process."""
    _LATER.append(tempfile.TemporaryDirectory(prefix="safeproj-"))
    return _LATER[0].name


_LATER: list[tempfile.TemporaryDirectory[str]] = []

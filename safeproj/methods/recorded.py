"""Safetensors files that stand for a model: what is kept of its weights, with a JSON record.

The record is JSON text under `safeproj` in the file's metadata. It names the running model's
weights, so that an adapter can be matched without a checkpoint. `FileKind` says what is special
about one kind of such files: alignment files, safety modules.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Generic, TypeVar

import numpy

from safeproj.adapter.files import bytes_of
from safeproj.checkpoint import Reader, Weight
from safeproj.checkpoint.expression import Expression, Head, Swapped, stored_names
from safeproj.checkpoint.interface import TensorInfo, as_matrix
from safeproj.checkpoint.safetensors import SafetensorsWeight
from safeproj.errors import SafeprojError
from safeproj.names import Layout, Names
from safeproj.storage.documents import parse
from safeproj.storage.publish import AppearedError, appearing
from safeproj.storage.source import LocalFolder, open_folder
from safeproj.storage.tensorfile import Header, read_header, require_printable, write
from safeproj.text import first_line, is_plain, shorten

if TYPE_CHECKING:
    from torch import Tensor

METADATA = "safeproj"
"""Key of the JSON text in the file's metadata."""

CHUNK = 1 << 20
"""Bytes that are copied at a time."""

Parameters = dict[str, tuple[tuple[int, ...], Layout]]
"""The running model's weights: name to the shape there and how it is stored."""

W = TypeVar("W")


@dataclass(frozen=True)
class Content:
    """What a file says of itself, before it is checked.

    Attributes:
        document: the JSON object in its metadata.
        header: where its tensors are.
        parameters: the running model's weights.
    """

    document: Mapping[str, Any]
    header: Header
    parameters: Parameters


@dataclass(frozen=True)
class FileKind(Generic[W]):
    """One kind of files that stand for a model.

    Attributes:
        name: what it is called in messages.
        schema: of the JSON.
        suffix: of a file's name, by which it is found in a folder.
        command: that writes it.
        remedy: what to do about a weight that a file does not hold.
        read: checks a file's content and returns what it records of each weight that it holds;
            raises one of `DAMAGES` where the content is not as it should be.
    """

    name: str
    schema: str
    suffix: str
    command: str
    remedy: str
    read: Callable[[Content], dict[str, W]]


DAMAGES = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError)
"""What reading JSON of another form than expected raises."""


@dataclass(frozen=True)
class RecordedFile(Generic[W]):
    """A file that stands for a model.

    It is a checkpoint whose weights are those of the running model, as far as names and shapes go.

    Attributes:
        kind: what kind of file it is.
        source: the SRC as the user gave it.
        revision: the commit, if it is on the Hub.
        path: the local file.
        content: what it says of itself.
        weights: what is kept: key to record.
        maps: `--map` rules.
    """

    kind: FileKind[W]
    source: str
    revision: str | None
    path: Path
    content: Content = field(repr=False)
    weights: dict[str, W] = field(repr=False)
    maps: tuple[str, ...] = ()
    _vectors: dict[str, bytes] = field(default_factory=dict, repr=False, compare=False)

    @property
    def document(self) -> Mapping[str, Any]:
        """The JSON object in its metadata."""
        return self.content.document

    @property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = self.document["config"]
        return found

    @property
    def names(self) -> KeysView[str]:
        return self.content.parameters.keys()

    @property
    def documents(self) -> tuple[Path, ...]:
        return ()

    @property
    def document_digests(self) -> Mapping[str, str]:
        return {}

    def describe(self, name: str) -> TensorInfo:
        return TensorInfo("F32", self.content.parameters[name][0])

    def weight(self, name: str, columns: int | None = None) -> Weight:  # noqa: ARG002
        raise SafeprojError(f"{self.source}: {self.kind.name}, which does not hold {name} itself")

    @cached_property
    def running(self) -> Names:
        """The weights of the running model."""
        return _RecordedNames(self)

    def is_whole(self, expression: Expression) -> bool:
        """Tell whether an expression over one weight is about all of its rows."""
        rows = _rows(expression)
        name = next(stored_names(expression))
        return rows is None or rows == self.content.parameters[name][0][0]

    def matrix(self, name: str) -> SafetensorsWeight:
        """Return a tensor of the file, to be read by rows."""
        entry = self.content.header.tensors[name]
        return SafetensorsWeight(name, self.path, entry, as_matrix(entry.shape, None))

    def vector(self, name: str) -> tuple[float, ...]:
        """Return the positive numbers of a small tensor.

        Raises:
            SafeprojError: they are not positive, or not finite.
        """
        found = numpy.frombuffer(self._bytes(name), "<f4")
        if not bool(numpy.isfinite(found).all()):
            raise SafeprojError(f"{self.path}: {name} has NaN or Inf; the file is damaged")
        if bool((found <= 0.0).any()):
            raise SafeprojError(
                f"{self.path}: {name} has values that are not positive; the file is damaged"
            )
        return tuple(found.tolist())

    def digests(self, read: Mapping[str, str], beside: Mapping[str, str]) -> dict[str, Any]:
        """Return the SHA-256 of what was read of the file.

        Args:
            read: tensor to digest, of the matrices.
            beside: last part of a matrix's name to that of the vector that was read with it.
        """
        tensors = dict(read)
        for name in read:
            key, _, last = name.rpartition(".")
            if last in beside:
                vector = f"{key}.{beside[last]}"
                tensors[vector] = hashlib.sha256(self._bytes(vector)).hexdigest()
        text = (self.content.header.metadata or {})[METADATA]
        return {"tensors": tensors, "metadata": hashlib.sha256(text.encode()).hexdigest()}

    def _bytes(self, name: str) -> bytes:
        """Return the bytes of a small tensor, which is read once: its digest is of what was used.

        Raises:
            SafeprojError: the file has become shorter, or cannot be read.
        """
        if name not in self._vectors:
            entry, reader = self.content.header.tensors[name], Reader()
            found = bytearray(entry.nbytes)
            try:
                reader.fill(self.path, entry.start, memoryview(found))
            finally:
                reader.close()
            self._vectors[name] = bytes(found)
        return self._vectors[name]


class _RecordedNames(Names):
    """Names that are the running model's own: nothing has to be asked but the file."""

    def __init__(self, file: RecordedFile[Any]) -> None:
        super().__init__(file, file.maps, architecture=False)
        self._types = frozenset()  # nothing is turned on disk or called something else
        self._file = file

    def _not_found(self, parameter: str) -> SafeprojError:
        return SafeprojError(
            f"{self._file.source}: holds nothing for {parameter}{self._closest(parameter)}; "
            f"{self._file.kind.remedy}; if it is only named otherwise there, say how with --map "
            "RUNTIME=CHECKPOINT"
        )

    def layout(self, parameter: str) -> Layout | None:
        try:
            names = tuple(stored_names(self.find(parameter, lambda _: True)))
        except SafeprojError:
            return None
        return self._file.content.parameters[names[0]][1] if len(names) == 1 else None


def _rows(expression: Expression) -> int | None:
    """Return how many rows of a weight an expression is about, None for all."""
    if isinstance(expression, Head):
        return expression.rows
    return _rows(expression.part) if isinstance(expression, Swapped) else None


def open_recorded(source: str, kind: FileKind[W], maps: Sequence[str] = ()) -> RecordedFile[W]:
    """Return the file that SRC names: a file, or a folder or repository that holds one.

    Raises:
        SafeprojError: there is none, or it is damaged.
    """
    folder = open_folder(source)
    if isinstance(folder, LocalFolder) and folder.only is not None:
        name = folder.only
    else:
        files = sorted(file for file in folder.files if file.endswith(kind.suffix))
        if len(files) != 1:
            raise SafeprojError(
                f"{source}: {shorten(files) or 'no file'} ends in {kind.suffix}, expected one; "
                f"pass the file itself, as `{kind.command}` wrote it"
            )
        name = files[0]
    path = folder.path(name)
    header = read_header(path)
    text = (header.metadata or {}).get(METADATA)
    if text is None:
        raise SafeprojError(
            f"{source}: no {kind.name}, its metadata has no {METADATA!r}; expected a file that "
            f"`{kind.command}` wrote"
        )
    try:
        content = _content(source, kind, header, text)
        weights = kind.read(content)
    except DAMAGES as error:
        raise SafeprojError(
            f"{source}: damaged {kind.name} ({type(error).__name__}: {first_line(error)}); "
            f"fetch it again, or make it again with `{kind.command}`"
        ) from error
    require_printable(source, [*content.parameters, *weights])
    return RecordedFile(kind, source, folder.revision, path, content, weights, tuple(maps))


def _content(source: str, kind: FileKind[W], header: Header, text: str) -> Content:
    """Parse the JSON of a file as far as all kinds have it in common.

    Raises:
        SafeprojError: it is of another schema.
        LookupError, TypeError, ValueError: it is damaged.
    """
    document = parse(text.encode())
    json.dumps(document, allow_nan=False, ensure_ascii=False).encode()  # as it will be repeated
    schema = document["schema"]
    if schema != kind.schema:
        family = kind.schema.partition("/")[0]
        other_version = isinstance(schema, str) and schema.partition("/")[0] == family
        advice = f"pass a file that `{kind.command}` wrote"
        if other_version:
            advice = "use the version of safeproj that wrote it"
        raise SafeprojError(
            f"{source}: {kind.name} of schema {str(schema)[:40]!a}, expected {kind.schema}; "
            f"{advice}"
        )
    parameters = {name: _parameter(item) for name, item in document["parameters"].items()}
    if not isinstance(document["config"], dict):
        raise TypeError("config")
    return Content(document, header, parameters)


def _parameter(item: Mapping[str, Any]) -> tuple[tuple[int, ...], Layout]:
    shape = tuple(int(size) for size in item["shape"])
    layout = Layout(item["kind"], item["out_first"], bool(item["marked_transposed"]))
    return shape, layout


def require_plain(role: str, *texts: Any) -> None:
    """Refuse what is no text, or could steer a report that shows it.

    Raises:
        ValueError: something does.
    """
    if not all(isinstance(text, str) and is_plain(text) for text in texts):
        raise ValueError(role)


def require_run_inputs(*, aligned: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Refuse what no report can show in the identities of a model and the data it was run on.

    Raises:
        LookupError, TypeError, ValueError: something in them.
    """
    require_plain("identity of aligned", aligned["source"], aligned.get("revision", ""))
    require_plain("identity of data", data["source"])
    files = aligned["sha256"]["files"]
    require_plain("digests of aligned", *files.keys(), *files.values())
    require_plain("digest of data", data["sha256"])
    require_plain("date of data", data.get("date", ""))
    for name in ("rows", "positions"):
        if type(data[name]) is not int or data[name] < 0:
            raise ValueError(f"{name} of data")


def recorded_parameters(
    parameters: Iterable[tuple[str, Sequence[int], Layout]],
) -> dict[str, dict[str, Any]]:
    """Return the `parameters` of a file's JSON from names, shapes and layouts."""
    return {
        name: {
            "shape": list(shape),
            "kind": layout.kind,
            "out_first": layout.out_first,
            "marked_transposed": layout.marked_transposed,
        }
        for name, shape, layout in parameters
    }


def check_file(out: Path, overwrite: bool, kind: FileKind[Any]) -> None:
    """Refuse an `--out` that cannot be written, before any weight is read.

    Raises:
        SafeprojError: it exists and is not to be replaced, or is in no directory.
    """
    if not out.name.endswith(".safetensors"):
        raise SafeprojError(f"--out {out}: expected a name such as model{kind.suffix} for the file")
    if not out.resolve().parent.is_dir():
        raise SafeprojError(f"--out {out}: {out.resolve().parent} is no directory; create it")
    if os.path.lexists(out):
        if not overwrite:
            raise SafeprojError(f"--out {out}: exists; give --overwrite to replace it")
        if out.is_symlink() or not out.is_file():
            raise SafeprojError(f"--out {out}: is no file; choose a name that does not exist")
        open_recorded(str(out), kind)  # nothing else is replaced


def write_recorded(
    out: Path,
    kind: FileKind[Any],
    tensors: Iterable[tuple[str, Tensor]],
    document: Callable[[], Mapping[str, Any]],
    *,
    overwrite: bool = False,
) -> int:
    """Write a file; it appears complete or not at all.

    The tensors go to a nameless file beside it first, since its header comes before them and says
    how large they are: for a moment the disk holds them twice.

    Args:
        out: the file to create or to replace; see `check_file`.
        kind: what kind of file it is: what is written must be readable as that.
        tensors: name and float32 tensor, each asked for when the one before is on the disk.
        document: returns the JSON of the metadata; called after the last tensor.
        overwrite: whether a file of the same kind that is there may be replaced. It is looked at
            again directly before.

    Returns:
        The size of the file in bytes.

    Raises:
        SafeprojError: it cannot be written; nothing is left behind.
    """
    place = out.resolve()
    layout: dict[str, tuple[str, tuple[int, ...], int]] = {}
    try:
        with tempfile.TemporaryFile(dir=place.parent) as spool, appearing(place) as found:
            for name, tensor in tensors:
                layout[name] = ("F32", tuple(tensor.shape), tensor.nbytes)
                spool.write(bytes_of(tensor))
            text = json.dumps(document(), ensure_ascii=False, separators=(",", ":"))
            spool.seek(0)
            write(found.path, {"format": "pt", METADATA: text}, layout, _chunks(spool))
            open_recorded(str(found.path), kind)
            size = found.path.stat().st_size
            found.appear((lambda: check_file(out, overwrite, kind)) if overwrite else None)
    except AppearedError as error:
        raise SafeprojError(
            f"--out {out}: has appeared while this run went on; it is left as it is, and nothing "
            "was written: choose another name, or give --overwrite"
        ) from error
    except OSError as error:
        raise SafeprojError(
            f"--out {out}: cannot be written ({error.strerror or error}); nothing was written"
        ) from error
    return size


def _chunks(file: IO[bytes]) -> Iterator[memoryview]:
    while chunk := file.read(CHUNK):
        yield memoryview(chunk)

"""Safetensors files that stand for a model: what is kept of its weights, with a JSON record.

The record is JSON text under `safeproj` in the file's metadata. It names the running model's
weights, so that an adapter can be matched without a checkpoint. `FileKind` says what is special
about one kind of such files: alignment files, safety modules, statistics. What a file says can be
anything, so all of it is checked here, for all kinds alike, before it is used or shown.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Generic, TypeVar, get_args

import numpy

from safeproj import __version__
from safeproj.checkpoint import Reader, Weight
from safeproj.checkpoint.expression import Expression, Head, Swapped, stored_names
from safeproj.checkpoint.hashes import Digests, Hash, digest, merged, record
from safeproj.checkpoint.interface import TensorInfo, as_matrix
from safeproj.checkpoint.safetensors import SafetensorsWeight
from safeproj.errors import SafeprojError
from safeproj.names import Layout, Names
from safeproj.names.layout import Kind
from safeproj.storage.arrays import Array, bytes_of
from safeproj.storage.documents import parse
from safeproj.storage.publish import appearing, refused_in_one_line
from safeproj.storage.published import without_paths
from safeproj.storage.source import LocalFolder, open_folder
from safeproj.storage.tensorfile import Header, read_header, require_printable, write
from safeproj.text import first_line, is_plain, shorten
from safeproj.versions import versions

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
        inputs: what it is made of: role to what checks the identity of it.
        options: how it is made, beside `targets`: name to what tells whether a value is one.
        weight: checks what a file holds of a weight, and returns what it records of it: given the
            content, the weight's key and its record.

    What checks something raises one of `DAMAGES` where it is not as it should be.
    """

    name: str
    schema: str
    suffix: str
    command: str
    remedy: str
    inputs: Mapping[str, Callable[[Mapping[str, Any]], None]]
    options: Mapping[str, Callable[[Any], bool]]
    weight: Callable[[Content, str, Mapping[str, Any]], W]


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
    def folder(self) -> None:
        return None

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

    def digests(self, read: Digests, beside: Mapping[str, str], **others: str) -> dict[str, Any]:
        """Return what a record says of what was read of the file.

        Args:
            read: of the matrices.
            beside: last part of a matrix's name to that of the vector that was read with it.
            others: further SHA-256 to record.
        """
        vectors: dict[Hash, dict[str, str]] = {name: {} for name in read}
        for name, matrices in read.items():
            for matrix in matrices:
                key, _, last = matrix.rpartition(".")
                if last in beside:
                    vector = f"{key}.{beside[last]}"
                    vectors[name][vector] = digest(name, self._bytes(vector))
        text = (self.content.header.metadata or {})[METADATA]
        metadata = digest("sha256", text.encode())
        return record(merged((read, vectors)), metadata=metadata, **others)

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
        weights = _weights(kind, content)
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
    if not isinstance(document["config"], dict):
        raise TypeError("config")
    parameters = {name: _parameter(name, item) for name, item in document["parameters"].items()}
    return Content(document, header, parameters)


def _parameter(name: str, item: Mapping[str, Any]) -> tuple[tuple[int, ...], Layout]:
    sizes, out_first, marked = item["shape"], item["out_first"], item["marked_transposed"]
    if not isinstance(sizes, list) or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"{name} has the shape {sizes!a}")
    if item["kind"] not in get_args(Kind):
        raise ValueError(f"{name} is of kind {item['kind']!a}")
    if not (out_first is None or type(out_first) is bool) or type(marked) is not bool:
        raise TypeError(f"{name} is stored in no way that there is")
    return tuple(sizes), Layout(item["kind"], out_first, marked)


def _weights(kind: FileKind[W], content: Content) -> dict[str, W]:
    """Return the records of a file that fits together and cannot steer a report that shows it.

    Raises:
        LookupError, TypeError, ValueError: it does not, or could.
    """
    inputs, options = content.document["inputs"], content.document["options"]
    if set(inputs) != set(kind.inputs):
        raise ValueError(f"inputs are {sorted(inputs)}, expected {sorted(kind.inputs)}")
    for role, check in kind.inputs.items():
        try:
            check(inputs[role])
        except DAMAGES as error:
            raise ValueError(f"identity of {role}: {first_line(error)}") from error
    if not isinstance(options["targets"], list):
        raise TypeError("targets")
    require_plain("targets", *options["targets"])
    for name, value in options.items():
        if name != "targets" and not (name in kind.options and kind.options[name](value)):
            raise ValueError(f"options: {name!a} is {value!a}")
    weights = content.document["weights"]
    if not weights:
        raise ValueError("no weights")
    return {name: kind.weight(content, name, item) for name, item in weights.items()}


def require_plain(role: str, *texts: Any) -> None:
    """Refuse what is no text, or could steer a report that shows it.

    Raises:
        ValueError: something does.
    """
    if not all(isinstance(text, str) and is_plain(text) for text in texts):
        raise ValueError(role)


def require_digests(digests: Mapping[str, Any]) -> None:
    """Refuse digests that are none, or names that a report cannot show.

    Raises:
        LookupError, TypeError, ValueError: there are some.
    """
    require_plain("digests", *digests.keys(), *digests.values())


def require_model(recorded: Mapping[str, Any]) -> None:
    """Refuse the identity of a model that no report can show.

    Raises:
        LookupError, TypeError, ValueError: it is one.
    """
    require_plain("source", recorded["source"])
    require_plain("revision", recorded.get("revision", ""))
    require_digests(recorded["sha256"]["files"])


def require_data(recorded: Mapping[str, Any]) -> None:
    """Refuse the identity of data that no report can show.

    Raises:
        LookupError, TypeError, ValueError: it is one.
    """
    require_plain("source", recorded["source"])
    require_plain("date", recorded.get("date", ""))
    require_plain("digest", recorded["sha256"])
    for name in ("rows", "positions"):
        if type(recorded[name]) is not int or recorded[name] < 0:
            raise ValueError(name)


MADE_BY_RUNNING: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
    "aligned": require_model,
    "data": require_data,
}
"""The inputs of what is made by running a model on data."""


def recorded_shape(item: Mapping[str, Any]) -> tuple[int, int]:
    """Return the (m, n) of a weight's record.

    Raises:
        LookupError, TypeError, ValueError: there is none.
    """
    m, n = item["shape"]
    if type(m) is not int or type(n) is not int:
        raise TypeError(f"shape {item['shape']!a}")
    return m, n


def recorded_amount(item: Mapping[str, Any], name: str) -> float:
    """Return a number of a weight's record that is finite and not negative.

    Raises:
        LookupError, TypeError, ValueError, OverflowError: there is none.
    """
    value = item[name]
    if type(value) not in (int, float) or not math.isfinite(float(value)) or value < 0:
        raise ValueError(f"{name} {value!a}")
    return float(value)


def require_linear(content: Content, name: str, shape: tuple[int, int]) -> None:
    """Refuse a weight that is no linear layer's, or of another shape than in the model.

    Raises:
        LookupError, ValueError: it is.
    """
    stored, layout = content.parameters[name]
    if layout.kind not in ("linear", "conv1d") or layout.out_first is not (layout.kind == "linear"):
        raise ValueError(f"{name} is of kind {layout.kind!a}")
    if shape != (stored if layout.out_first else stored[::-1]):
        raise ValueError(f"{name} has the shape {shape}")


def require_tensor(content: Content, name: str, shape: tuple[int | None, ...]) -> None:
    """Refuse a tensor that is not there, not float32, empty, or of another shape.

    Args:
        content: of the file.
        name: of the tensor.
        shape: what it must be; None for any size.

    Raises:
        LookupError, ValueError: it is.
    """
    entry = content.header.tensors[name]
    fits = len(entry.shape) == len(shape) and all(
        size > 0 and expected in (None, size)
        for size, expected in zip(entry.shape, shape, strict=True)
    )
    if entry.dtype != "F32" or not fits:
        raise ValueError(f"{name} is {entry.dtype} {list(entry.shape)}")


def recorded_document(
    kind: FileKind[Any],
    options: Mapping[str, Any],
    inputs: Mapping[str, Any],
    config: Mapping[str, Any],
    parameters: Iterable[tuple[str, Sequence[int], Layout]],
    weights: Mapping[str, Any],
    *,
    by_torch: bool,
) -> dict[str, Any]:
    """Return the JSON of a file: no time and no host, so that the same run gives the same file.

    Args:
        kind: what kind of file it is.
        options: how it was made.
        inputs: the identities of what it was made of, by role.
        config: of the model.
        parameters: name, shape and layout of each of the model's weights that it is about.
        weights: what is recorded of each, by key.
        by_torch: whether torch computed it.
    """
    return {
        "schema": kind.schema,
        "tool": {"name": "safeproj", "version": __version__},
        "versions": versions(by_torch=by_torch),
        "options": dict(options),
        "inputs": dict(inputs),
        "config": without_paths(config),
        "parameters": recorded_parameters(parameters),
        "weights": dict(weights),
    }


def linear_parameters(
    shapes: Mapping[str, tuple[int, int]], layouts: Mapping[str, Layout]
) -> Iterator[tuple[str, Sequence[int], Layout]]:
    """Yield name, shape and layout of the weights of linear layers.

    Args:
        shapes: path of a layer to its (m, n).
        layouts: path to how the model stores the layer's weight.
    """
    for name, shape in shapes.items():
        layout = layouts[name]
        yield f"{name}.weight", shape if layout.out_first else shape[::-1], layout


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


@dataclass(frozen=True)
class Made:
    """A file that stands for a model, and was written.

    Attributes:
        nbytes: its size.
        holds: what is in it, in words.
        warnings: what the user should know about what it was made of.
    """

    nbytes: int
    holds: str
    warnings: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return what it holds, in words."""
        return self.holds


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
    tensors: Iterable[tuple[str, Array]],
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
    told = refused_in_one_line(out)
    with told, tempfile.TemporaryFile(dir=place.parent) as spool, appearing(place) as found:
        for name, tensor in tensors:
            layout[name] = ("F32", tuple(tensor.shape), tensor.nbytes)
            spool.write(bytes_of(tensor))
        text = json.dumps(document(), ensure_ascii=False, separators=(",", ":"))
        spool.seek(0)
        write(found.path, {"format": "pt", METADATA: text}, layout, _chunks(spool))
        open_recorded(str(found.path), kind)
        size = found.path.stat().st_size
        found.appear((lambda: check_file(out, overwrite, kind)) if overwrite else None)
    return size


def _chunks(file: IO[bytes]) -> Iterator[memoryview]:
    while chunk := file.read(CHUNK):
        yield memoryview(chunk)

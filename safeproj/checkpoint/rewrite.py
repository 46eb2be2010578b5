"""A checkpoint's weights written again, in files like its own, with some weights put in place.

What is not put in place is what it was, byte for byte. Numbers that are stored as FP8 codes are
written as bfloat16, and their scales left out: what is put beside them has none.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy

from safeproj.checkpoint.interface import STORED_DTYPES, Checkpoint, Reader, as_matrix, stored_dtype
from safeproj.checkpoint.pickled import PickledCheckpoint
from safeproj.checkpoint.places import Place
from safeproj.checkpoint.quantised import QuantisedCheckpoint
from safeproj.checkpoint.safetensors import SafetensorsCheckpoint
from safeproj.errors import SafeprojError
from safeproj.storage import tensorfile
from safeproj.storage.arrays import Array, bytes_of, cast, is_finite
from safeproj.storage.picklefile import seal
from safeproj.storage.publish import flush
from safeproj.storage.source import Folder, read_json

DECODED = "BF16"
"""What FP8 codes are written as."""

CONFIG = "config.json"

QUANTISATION = ("quantization_config", "compression_config")
"""What a config says of codes, which are no more."""

BLOCK = 8 << 20
"""Bytes of numbers that are decoded at a time."""


@dataclass(frozen=True)
class Spot:
    """Where a tensor lies in what is written.

    Attributes:
        file: its name.
        start: its first byte.
        dtype: the safetensors name.
        width: columns of it as a matrix.
        nbytes: how many bytes it has.
    """

    file: str
    start: int
    dtype: str
    width: int
    nbytes: int

    def content(self, folder: Folder) -> bytes:
        """Return its bytes, in a folder with such files."""
        with folder.path(self.file).open("rb") as file:
            file.seek(self.start)
            return file.read(self.nbytes)


class Rewriting:
    """The files of a checkpoint, to be written again.

    Args:
        checkpoint: as it was opened; its files are in one folder.

    Raises:
        SafeprojError: what it is quantised with cannot be written.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        assert isinstance(checkpoint, QuantisedCheckpoint)
        assert isinstance(checkpoint.stored, SafetensorsCheckpoint | PickledCheckpoint)
        self._checkpoint = checkpoint
        self._stored: SafetensorsCheckpoint | PickledCheckpoint = checkpoint.stored
        self._lock = threading.Lock()
        self._open: FileIO | None = None
        self._written: set[int] = set()
        self._file, self._path = "", Path()
        self.codes = checkpoint.codes
        if self.codes and not isinstance(self._stored, SafetensorsCheckpoint):
            raise SafeprojError(
                f"{checkpoint.source}: FP8 codes in a .bin file are not written again; save the "
                "model as safetensors first"
            )
        self._layouts: dict[str, dict[str, tuple[str, tuple[int, ...], int]]] = {}
        self.spots: dict[str, Spot] = {}
        for file in self.files:
            self._lay(file)

    @property
    def files(self) -> list[str]:
        """The files with weights."""
        scales = set(self.codes.values())  # a file of scales alone is not written
        return sorted({self._stored.file_of(n) for n in self._stored.names if n not in scales})

    @property
    def index(self) -> str | None:
        """The file that says which of them holds what, if there is one."""
        name = self._stored.index
        is_sharded = self._stored.single not in self._stored.folder.files
        return name if is_sharded and name in self._stored.folder.files else None

    @property
    def nbytes(self) -> int:
        """Bytes of all files with weights, about."""
        folder = self._stored.folder
        return sum(
            sum(nbytes for _, _, nbytes in self._layouts[file].values())
            if file in self._layouts
            else folder.path(file).stat().st_size
            for file in self.files
        )

    @property
    def documents(self) -> dict[str, bytes]:
        """The index and the config as they are to be."""
        folder, found = self._stored.folder, {}
        for name in filter(None, (self.index, CONFIG)):
            if name not in folder.files:
                continue
            found[name] = folder.path(name).read_bytes()
            if self.codes:
                found[name] = _text(self._plain(name, read_json(folder, name)))
        return found

    def begin(self, directory: Path, file: str) -> None:
        """Write one of the files, with everything as it is, under a name that is not its own yet.

        Raises:
            OSError: it cannot be written.
            SafeprojError: it cannot be read.
        """
        self._file, self._path = file, directory / f"{file}.part"
        source, target = self._stored.folder.path(file), self._path
        target.parent.mkdir(parents=True, exist_ok=True)
        if file not in self._layouts:
            shutil.copyfile(source, target)
            return
        assert isinstance(self._stored, SafetensorsCheckpoint)
        metadata = tensorfile.read_header(source).metadata
        tensorfile.write(target, metadata, self._layouts[file], self._bytes(self._layouts[file]))

    def put(self, place: Place, rows: range, values: Array) -> None:
        """Write the numbers of some rows of a matrix, as far as they lie in a place of this file.

        Args:
            place: where a part of the matrix lies.
            rows: which rows.
            values: (rows, n), of any dtype.

        Raises:
            SafeprojError: they are too large for the dtype.
            OSError: they cannot be written.
        """
        cut = place.cut(rows)
        if cut is None:
            return
        spot = self.spots[place.name]
        if spot.file != self._file:
            return
        within = slice(cut.rows.start - rows.start, cut.rows.stop - rows.start)
        part = values[within, cut.columns.start : cut.columns.stop]
        found = cast(part, stored_dtype(spot.dtype))
        if not is_finite(found):
            raise SafeprojError(
                f"{place.name}: what takes its place does not fit into {found.dtype}; save the "
                "fine-tune in float32"
            )
        if cut.turned:
            found = found.T
        found = numpy.ascontiguousarray(found)
        size = found.dtype.itemsize
        first = spot.start + (cut.first_row * spot.width + cut.first_column) * size
        whole = found.shape[1] == spot.width
        pieces = [found] if whole else list(found)
        with self._lock:
            if self._open is None:
                self._open = FileIO(self._path, "r+b")
            file = self._open
            self._written.add(spot.start)
            for number, piece in enumerate(pieces):
                file.seek(first + number * spot.width * size)
                data = bytes_of(piece)
                while data:
                    data = data[file.write(data) or 0 :]

    def complete(self) -> None:
        """Give the file its name; if its format has sums of its bytes, they are set anew.

        Raises:
            OSError: it cannot be written.
        """
        self.close()
        if isinstance(self._stored, PickledCheckpoint):
            seal(self._path, self._written)
        else:
            tensorfile.read_header(self._path)
        self._written = set()
        flush(self._path)
        self._path.replace(self._path.with_name(self._path.name.removesuffix(".part")))

    def close(self) -> None:
        """Close the file."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _lay(self, file: str) -> None:
        """Find where the tensors of a file will lie."""
        stored = self._stored
        names = [name for name in stored.names if stored.location[name] == file]
        if isinstance(stored, PickledCheckpoint):
            for name in names:
                self._spot_of_pickled(stored, file, name)
            return
        scales = set(self.codes.values())
        if scales.isdisjoint(names) and self.codes.keys().isdisjoint(names):
            for name in names:
                entry, _ = stored.locate(name)
                width = as_matrix(entry.shape, None)[1]
                self.spots[name] = Spot(file, entry.start, entry.dtype, width, entry.nbytes)
            return
        entries = {name: stored.locate(name)[0] for name in names if name not in scales}
        layout, start = {}, 0
        for name, entry in sorted(entries.items(), key=lambda each: each[1].start):
            dtype, nbytes = entry.dtype, entry.nbytes
            if name in self.codes:
                dtype, nbytes = DECODED, entry.nbytes * STORED_DTYPES[DECODED][1]
            layout[name] = (dtype, entry.shape, nbytes)
        metadata = tensorfile.read_header(stored.folder.path(file)).metadata
        start = tensorfile.data_start(metadata, layout)
        for name, (dtype, shape, nbytes) in layout.items():
            self.spots[name] = Spot(file, start, dtype, as_matrix(shape, None)[1], nbytes)
            start += nbytes
        self._layouts[file] = layout

    def _spot_of_pickled(self, stored: PickledCheckpoint, file: str, name: str) -> None:
        weight = stored.weight(name)
        where = weight.stored
        if not where.is_contiguous:
            raise SafeprojError(
                f"{stored.source}: the values of {name} lie in another order than its rows, in "
                "which none are put in their place; save the model again with save_pretrained"
            )
        self.spots[name] = Spot(file, where.start, weight.dtype, weight.shape[1], where.nbytes)

    def _bytes(self, layout: Mapping[str, Any]) -> Iterator[memoryview]:
        """Yield the bytes of the tensors of a file that is laid anew."""
        reader = Reader()
        try:
            for name in layout:
                decoded = name in self.codes
                weight = (self._checkpoint if decoded else self._stored).weight(name)
                step = max(1, BLOCK // max(1, weight.row_bytes))
                buffer = numpy.empty(step * weight.row_bytes, numpy.uint8)
                reader.start()
                for start in range(0, weight.shape[0], step):
                    stop = min(start + step, weight.shape[0])
                    rows = weight.read_rows(reader, start, stop, buffer)
                    yield bytes_of(cast(rows, stored_dtype(DECODED)) if decoded else rows)
        finally:
            reader.close()

    def _plain(self, name: str, document: Any) -> Any:
        """Return the index or the config without codes."""
        if name == CONFIG:
            return _unquantised(document)
        scales = set(self.codes.values())
        where = {k: v for k, v in document["weight_map"].items() if k not in scales}
        metadata = {**document.get("metadata", {}), "total_size": self.nbytes}
        return {**document, "metadata": metadata, "weight_map": where}


def _unquantised(config: Mapping[str, Any]) -> dict[str, Any]:
    found = {k: v for k, v in config.items() if k not in QUANTISATION}
    for key in ("dtype", "torch_dtype"):
        if key in found:
            found[key] = "bfloat16"
    if isinstance(found.get("text_config"), dict):
        found["text_config"] = _unquantised(found["text_config"])
    return found


def _text(document: Any) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()

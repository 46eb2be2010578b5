"""Files that `torch.save` wrote, read as plain tensors and nothing else.

Such a file is a zip of a pickle and the tensors' bytes. The pickle is followed here, operation by
operation, and only what describes tensors is understood: nothing in it is called, and what it can
allocate is bounded by its size. So it is known where each tensor lies in the file, as of a
safetensors file.
"""

from __future__ import annotations

import math
import os
import pickletools
import struct
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple
from zipfile import ZipFile, ZipInfo

import numpy

from safeproj.errors import SafeprojError
from safeproj.storage.arrays import Array, dtype_of
from safeproj.storage.mistaken import HEAD, reason, require_real
from safeproj.storage.source import Folder, contents
from safeproj.storage.tensorfile import MAX_DIMENSIONS, require_printable
from safeproj.storage.wholefile import MAX_WEIGHTS
from safeproj.text import printable, shorten

MAX_SERIAL = 1 << 16
"""Bytes of the number that torch gives a file."""

MAX_PICKLE = 64 << 20
"""Bytes of the pickle: it takes about 300 for each tensor."""

MAX_DIRECTORY = 32 << 20
"""Bytes of the zip's directory: about 100 for each tensor."""

MAX_OPERATIONS = 6_000_000
"""Operations of the pickle, about 35 for each tensor: each may make an object of 100 bytes."""

_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How a file starts that torch before 1.6 wrote: its magic number, pickled."""

_RECORD = b"PK\x03\x04"
"""How a record of a zip starts, and so the file."""

_END = struct.Struct("<4s4H2LH")
"""The last record of a zip: where its directory lies."""

_WIDE_END = struct.Struct("<4sQ2H2L4Q")
"""The same where 32 bits might not do; torch writes both."""

_LOCATOR = struct.Struct("<4sLQL")
"""Where that record lies, between the two."""

_WIDER = b"PK\x06\x07"
"""How the locator starts."""

_ENTRY = struct.Struct("<4s2x2x2H2x2x4x2L3HH2x2L")
"""An entry of the directory, before the name."""

_SUMS = struct.Struct("<28x3H12x")
"""The same, for the lengths of what follows it: the name, more fields and a comment."""

_SUM_LISTED, _SUM_LOCAL = 16, 14
"""Where the sum of a record's bytes lies in its entry, and in its own header."""

_LOCAL, _LOCAL_NAMES = 30, 26
"""Bytes of a record's own header, and where it says how long its name and more fields are."""

_SUMS_BEHIND, _BEHIND = 8, b"PK\x07\x08"
"""The flag of a record whose sum lies behind its bytes, and how what is there starts."""

_PIECE = 16 << 20
"""Bytes that are summed at a time."""

_FLAGS = 0x80E
"""Flags that say nothing of bytes as they are stored: sizes behind them, names in UTF-8."""

_IS_DIRECTORY = 0x10
"""The attribute of a directory."""

_VERSIONS = range(1, 11)
"""Versions of the format that torch loads."""

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}
"""What storages are called that torch writes: class to dtype."""

_SIZES = {"float64": 8, "int64": 8, "uint64": 8, "complex64": 8, "complex128": 16}
_SIZES |= dict.fromkeys(("float32", "int32", "uint32"), 4)
_SIZES |= dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2)
_SIZES |= dict.fromkeys(("int8", "uint8", "bool"), 1)
_SIZES |= dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"), 1)
_SIZES |= dict.fromkeys(("float8_e4m3fnuz", "float8_e5m2fnuz"), 1)
"""Bytes of a value, by dtype."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file.

    Attributes:
        dtype: torch's name.
        shape: its sizes.
        stride: of each dimension, in values.
        start: where its first value lies, in bytes from the beginning of the file.
        nbytes: from there to its last value.
    """

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def is_contiguous(self) -> bool:
        """Its values lie one after another, row by row."""
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != expected:
                return False
            expected *= size
        return True

    def lay(self, content: bytearray | memoryview) -> Array:
        """Return the tensor, a view of `nbytes` bytes from `start` on."""
        dtype = dtype_of(self.dtype)
        assert dtype is not None
        if not self.nbytes:
            return numpy.empty(self.shape, dtype)
        flat = numpy.frombuffer(content, dtype)
        strides = [step * dtype.itemsize for step in self.stride]
        return numpy.lib.stride_tricks.as_strided(flat, self.shape, strides)


def read_pickle(folder: Folder, name: str) -> dict[str, Array]:
    """Return the tensors of a file that `torch.save` wrote, which is read once, whole.

    Raises:
        SafeprojError: as for `find_tensors`.
    """
    return read_nested_pickle(folder, name, None)[0]


def read_nested_pickle(
    folder: Folder, name: str, inside: str | None
) -> tuple[dict[str, Array], bool]:
    """Return the same of a file that may have its tensors, alone, below one name, and whether so.

    Raises:
        SafeprojError: as for `find_tensors`.
    """
    path = folder.path(name)
    try:
        content = contents(folder, name, MAX_WEIGHTS)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    view = memoryview(content)

    def read(start: int, count: int) -> bytes:
        return bytes(view[start : start + count])

    found = {}
    tensors, nested = _tensors(path, read, len(content), inside)
    for key, stored in tensors.items():
        part = view[stored.start : stored.start + stored.nbytes]
        whole = stored.lay(bytearray(part) if stored.start % _SIZES[stored.dtype] else part)
        found[key] = numpy.require(whole, requirements="C")
    return found, nested


def find_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return where the tensors lie in a file that `torch.save` wrote.

    Raises:
        SafeprojError: it cannot be read, is in the format before torch 1.6, or holds anything but
            a mapping of names to ordinary tensors.
    """
    try:
        with path.open("rb") as file:

            def read(start: int, count: int) -> bytes:
                file.seek(start)
                return file.read(count)

            return _tensors(path, read, os.fstat(file.fileno()).st_size)[0]
    except OSError as error:
        raise _unreadable(path, error) from error


def seal(path: Path, starts: Collection[int]) -> None:
    """Set the sums of bytes (CRC-32) anew of records in which tensors were overwritten.

    Args:
        path: a file that `find_tensors` has read.
        starts: bytes of the file that lie in these records.

    Raises:
        OSError: it cannot be read or written.
    """
    with ZipFile(path) as archive:
        members, directory = archive.infolist(), archive.start_dir
    with path.open("r+b") as file:
        for member in members:
            file.seek(directory)
            name, extra, comment = _SUMS.unpack(file.read(_SUMS.size))
            file.seek(member.header_offset + _LOCAL_NAMES)
            begin = member.header_offset + _LOCAL + sum(struct.unpack("<2H", file.read(4)))
            end = begin + member.file_size
            if any(begin <= start < end for start in starts):
                _reseal(file, begin, end, (directory + _SUM_LISTED, member))
            directory += _SUMS.size + name + extra + comment


def _reseal(file: IO[bytes], begin: int, end: int, where: tuple[int, ZipInfo]) -> None:
    file.seek(begin)
    crc = 0
    for start in range(begin, end, _PIECE):
        crc = zlib.crc32(file.read(min(_PIECE, end - start)), crc)
    listed, member = where
    places = [listed]
    if member.flag_bits & _SUMS_BEHIND:
        file.seek(end)
        places.append(end + 4 if file.read(4) == _BEHIND else end)
    else:
        places.append(member.header_offset + _SUM_LOCAL)
    for place in places:
        file.seek(place)
        file.write(struct.pack("<L", crc))


def _unreadable(path: Path, error: Exception) -> SafeprojError:
    return SafeprojError(f"{printable(str(path))}: cannot be read ({reason(error)})")


Read = Callable[[int, int], bytes]
"""Returns so many bytes from there on."""


def _tensors(
    path: Path, read: Read, size: int, inside: str | None = None
) -> tuple[dict[str, StoredTensor], bool]:
    """Return where the tensors lie, and whether they are below the name `inside`."""
    head = read(0, HEAD)
    require_real(str(path), head, empty=False)
    if head.startswith(_LEGACY):
        raise SafeprojError(
            f"{path}: in the format that torch had before 1.6, which cannot be read in parts; load "
            "it with a current torch and save it again, best as safetensors"
        )
    try:
        archive = _Archive(read, size)
        found = _followed(archive)
    except Exception as error:  # damaged zips and pickles raise errors of nearly every type
        raise SafeprojError(
            f"{path}: cannot be loaded as plain tensors ({type(error).__name__}): truncated or "
            "damaged, or it needs code to run, which is refused; fetch it again, or save it as "
            "safetensors"
        ) from error
    nested = isinstance(found, dict) and found.keys() == {inside}
    nested = nested and isinstance(found[inside], dict)
    found = found[inside] if nested else found
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(each, _Tensor) for name, each in found.items()
    ):
        raise SafeprojError(
            f"{path}: expected a mapping of names to tensors and nothing else; save it as "
            "safetensors"
        )
    require_printable(str(path), found)
    try:
        places = {name: _located(archive, each, path, name) for name, each in found.items()}
    except (LookupError, TypeError, ValueError, struct.error) as error:
        raise SafeprojError(
            f"{path}: cannot be loaded as plain tensors ({type(error).__name__}): truncated or "
            "damaged; fetch it again, or save it as safetensors"
        ) from error
    return places, nested


class _Entry(NamedTuple):
    """The numbers of `_ENTRY`; those named for a part are its length."""

    mark: bytes
    flags: int
    method: int
    packed: int
    nbytes: int
    name: int
    extra: int
    note: int
    disk: int
    attributes: int
    place: int


@dataclass(frozen=True)
class _Member:
    """A record of the zip, stored as it is: where its bytes lie."""

    name: str
    start: int
    nbytes: int


class _Archive:
    """The zip: where the bytes of its members lie, which are never compressed.

    What torch does not load is refused: a directory whose place or length is not clear, a record
    outside the first one's directory, one whose name two have, no version of the format that is
    known, a program.
    """

    def __init__(self, read: Read, size: int) -> None:
        self._read = read
        if read(0, 4) != _RECORD:
            raise ValueError("no record at the beginning")
        members = _listed(read, *_directory(read, size))
        self._members = {each.name: each for each in members}
        root, mark, _ = members[0].name.partition("/")
        self._root = root + mark
        if not mark or not all(name.startswith(self._root) for name in self._members):
            raise ValueError("records outside one directory")
        if len(self._members) != len(members):
            raise ValueError("two records of one name")
        if f"{self._root}constants.pkl" in self._members:
            raise ValueError("a program")
        version = self._members.get(f"{self._root}version")
        version = version or self._members[f"{self._root}.data/version"]
        if int(self._content(version, 16)) not in _VERSIONS:
            raise ValueError("another version of the format")
        alignment = self._members.get(f"{self._root}.storage_alignment")
        if alignment is not None:
            int(self._content(alignment, 16))
        serial = self._members.get(f"{self._root}.data/serialization_id")
        if serial is not None:
            self._content(serial, MAX_SERIAL).decode("utf-8")
        order = self._members.get(f"{self._root}byteorder")
        if order is not None and self._content(order, 16) != b"little":
            raise ValueError("a big-endian file")

    @property
    def pickle(self) -> bytes:
        """The pickle."""
        return self._content(self._members[f"{self._root}data.pkl"], MAX_PICKLE)

    def storage(self, key: str) -> tuple[int, int]:
        """Return where a storage begins, and how many bytes it has."""
        member = self._members[f"{self._root}data/{key}"]
        return member.start, member.nbytes

    def _content(self, member: _Member, limit: int) -> bytes:
        if member.nbytes > limit:
            raise ValueError(f"{member.name} has {member.nbytes} bytes")
        return self._read(member.start, member.nbytes)


def _directory(read: Read, size: int) -> tuple[int, int, int]:
    """Return where the zip's directory begins and ends, and how many entries it has.

    The file ends with it: whoever looks for its place, in the record of 32 bits or the other,
    finds it there.
    """
    at = size - _END.size
    end = _END.unpack(read(at, _END.size))
    stop, (_, _, _, _, count, length, start, _) = at, end
    if read(at - _LOCATOR.size, 4) == _WIDER:
        stop = at - _LOCATOR.size - _WIDE_END.size
        wide = _WIDE_END.unpack(read(stop, _WIDE_END.size))
        count, length, start = wide[-3:]
        located = _LOCATOR.unpack(read(at - _LOCATOR.size, _LOCATOR.size))
        expected = (b"PK\x06\x06", 44, *wide[2:4], 0, 0, count, count, length, start)
        if wide != expected or located != (_WIDER, 0, stop, 1):
            raise ValueError("a directory whose place is not clear")
    counts = min(count, 0xFFFF)
    places = (min(length, 0xFFFFFFFF), min(start, 0xFFFFFFFF))
    if end != (b"PK\x05\x06", 0, 0, counts, counts, *places, 0) or start + length != stop:
        raise ValueError("a directory whose place is not clear")
    if length > MAX_DIRECTORY:
        raise ValueError(f"the zip's directory has {length} bytes")
    return start, stop, count


def _listed(read: Read, start: int, stop: int, count: int) -> list[_Member]:
    """Return the records in the directory, each of which is there, whole, before it."""
    directory, at, found = read(start, stop - start), 0, []
    for _ in range(count):
        entry = _Entry(*_ENTRY.unpack_from(directory, at))
        at += _ENTRY.size
        name = directory[at : at + entry.name].decode("utf-8")
        at += entry.name
        packed, nbytes, place = _wide_numbers(entry, directory[at : at + entry.extra])
        at += entry.extra + entry.note
        if entry.mark != b"PK\x01\x02" or at > len(directory):
            raise ValueError("a damaged entry of the zip's directory")
        if entry.method or packed != nbytes:
            raise ValueError(f"{name} is compressed")
        if entry.flags & ~_FLAGS or entry.disk or entry.attributes & _IS_DIRECTORY:
            raise ValueError(f"{name} is encrypted, in parts, or no file")
        mark, *lengths = struct.unpack("<4s22xHH", read(place, 30))
        begin = place + 30 + sum(lengths)
        if mark != _RECORD or begin + nbytes > start:
            raise ValueError(f"{name} is not there")
        found.append(_Member(name, begin, nbytes))
    if at != len(directory):
        raise ValueError("more than the entries of the zip's directory")
    return found


def _wide_numbers(entry: _Entry, extra: bytes) -> list[int]:
    """Return an entry's numbers, those that do not fit into 32 bits from its extra field."""
    numbers = [entry.packed, entry.nbytes, entry.place]
    wide = {}
    while extra:
        kind, length = struct.unpack_from("<HH", extra)
        wide[kind], extra = extra[4 : 4 + length], extra[4 + length :]
    at = 0
    for index in (1, 0, 2):  # as they are stored there
        if numbers[index] == 0xFFFFFFFF:
            (numbers[index],) = struct.unpack_from("<Q", wide[1], at)
            at += 8
    return numbers


@dataclass(frozen=True)
class _Global:
    """A name that the pickle refers to; nothing is imported."""

    module: str
    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str
    count: int


@dataclass(frozen=True)
class _Tensor:
    """A tensor as the pickle describes it; without a storage one that is of another kind."""

    storage: _Storage | None
    offset: int = 0
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    kind: str = "of an unknown kind"


class _Mark:
    """Where a tuple, or what is put into a container, begins."""


def _followed(archive: _Archive) -> Any:
    """Return what the pickle makes, without calling anything.

    Raises:
        ValueError: it makes something else than tensors are described by.
        IndexError, KeyError, TypeError: it is damaged.
    """
    machine = _Machine()
    for number, (operation, argument, _) in enumerate(pickletools.genops(archive.pickle)):
        if number > MAX_OPERATIONS:
            raise ValueError("too many operations")
        if operation.name == "STOP":
            return machine.stack[-1]
        machine.step(operation.name, argument)
    raise ValueError("it has no end")


class _Machine:
    """A stack, a memory, and the operations that torch uses."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Do one operation."""
        stack = self.stack
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _VALUES:
            stack.append(argument)
        elif name in _MADE:
            stack.append(_MADE[name]())
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            words = argument.split(" ") if name == "GLOBAL" else self._taken(2)
            stack.append(_Global(*words))
        elif name == "TUPLE":
            stack.append(tuple(self._since_mark()))
        elif name in _TUPLES:
            stack.append(tuple(self._taken(_TUPLES[name])))
        elif name in ("SETITEM", "SETITEMS"):
            _put(self._taken(2) if name == "SETITEM" else self._since_mark(), stack[-1])
        elif name in ("APPEND", "APPENDS"):
            _add(self._taken(1) if name == "APPEND" else self._since_mark(), stack[-1])
        elif name == "BINPERSID":
            stack.append(_storage(*self._taken(1)[0]))
        elif name == "REDUCE":
            stack.append(_reduced(*self._taken(2)))
        elif name == "BUILD":  # attributes, such as the versions of modules in a state dict
            self._taken(1)
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"the operation {name}")

    def _taken(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("an empty stack")
        found = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return found

    def _since_mark(self) -> list[Any]:
        found = []
        while not isinstance(each := self.stack.pop(), _Mark):
            found.append(each)
        return found[::-1]


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"}
_VALUES |= {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_MADE: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "MARK": _Mark}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _put(items: list[Any], target: Any) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise TypeError("no dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int):  # the hash of nested tuples may take for ever
            raise TypeError("a key that is no text")
        target[key] = value


def _add(items: list[Any], target: Any) -> None:
    if not isinstance(target, list):
        raise TypeError("no list")
    target += items


def _storage(kind: str, cls: _Global, key: str, location: str, count: int) -> _Storage:
    del location  # of the device that it was saved from
    if kind != "storage" or cls.module not in ("torch", "torch.cuda", "torch.storage"):
        raise ValueError("no storage")
    if type(count) is not int or not isinstance(key, str) or not 0 <= count < 1 << 63:
        raise TypeError("no storage")
    return _Storage(_STORAGES.get(cls.name, cls.name), key, count)


_KINDS = {
    "_rebuild_sparse_tensor": "sparse",
    "_rebuild_meta_tensor_no_storage": "on the device meta, without numbers",
    "_rebuild_qtensor": "quantised",
    "_rebuild_nested_tensor": "nested",
}
"""What the tensors are that torch's functions make, where not dense ones of numbers."""


def _reduced(function: _Global, arguments: tuple[Any, ...]) -> Any:
    """Return what torch's own functions would make."""
    place = (function.module, function.name)
    if place == ("collections", "OrderedDict") and arguments == ():
        return {}
    if place == ("torch", "Size"):
        return tuple(*arguments)
    if place == ("torch._tensor", "_rebuild_from_type_v2"):  # a tensor that has attributes
        made, kind, given, _ = arguments
        if kind in (_Global("torch", "Tensor"), _Global("torch.nn.parameter", "Parameter")):
            return _reduced(made, given)
    if function.module == "torch._utils":
        if function.name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return arguments[0]
        if function.name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return _tensor(*arguments[:4])
        if function.name == "_rebuild_tensor_v3":
            found, dtype = _tensor(*arguments[:4]), arguments[6]
            if found.storage is None or dtype.module != "torch":
                raise TypeError("no dtype")
            count = found.storage.count // _SIZES[dtype.name]
            return replace(found, storage=replace(found.storage, dtype=dtype.name, count=count))
        if function.name in _KINDS:
            return _Tensor(None, kind=_KINDS[function.name])
        if function.name.startswith("_rebuild_"):
            return _Tensor(None)
    if place == ("torch.serialization", "_get_layout"):
        return None
    raise ValueError(f"the call of {function.module}.{function.name}")


def _tensor(
    storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> _Tensor:
    numbers = (offset, *shape, *stride)
    fits = isinstance(storage, _Storage) and len(shape) == len(stride) <= MAX_DIMENSIONS
    if not fits or not all(type(each) is int and 0 <= each < 1 << 63 for each in numbers):
        raise TypeError("no tensor")
    return _Tensor(storage, offset, shape, stride)


def _located(archive: _Archive, tensor: _Tensor, path: Path, name: str) -> StoredTensor:
    """Return where a tensor lies.

    Raises:
        SafeprojError: it is of an unusual kind, or larger than the file.
        LookupError, ValueError: its storage is not there, or not as long as it says.
    """
    storage = tensor.storage
    size = 0 if storage is None else _SIZES.get(storage.dtype, 0)
    if storage is None or not size:
        raise _unusual(path, name, tensor)
    start, nbytes = archive.storage(storage.key)
    if nbytes != storage.count * size:
        raise ValueError(f"the storage {storage.key} has {nbytes} bytes")
    if math.prod(tensor.shape) * size > path.stat().st_size:
        raise _unusual(path, name, tensor)  # a few bytes can describe what no memory holds
    last = tensor.offset + sum(
        (count - 1) * step for count, step in zip(tensor.shape, tensor.stride, strict=True)
    )
    empty = 0 in tensor.shape
    if not empty and last >= storage.count:
        raise ValueError(f"it ends beyond its storage {storage.key}")
    return StoredTensor(
        storage.dtype,
        tensor.shape,
        tensor.stride,
        start + tensor.offset * size,
        0 if empty else (last - tensor.offset + 1) * size,
    )


def _unusual(path: Path, name: str, tensor: _Tensor) -> SafeprojError:
    shape = f"shape {shorten(map(str, tensor.shape), MAX_DIMENSIONS)}"
    return SafeprojError(
        f"{path}: {name} is no ordinary tensor that the file holds "
        f"({shape if tensor.storage else tensor.kind}); expected dense tensors on the CPU"
    )

"""What kind of file something is, by its bytes: names of files say what their author wants.

Loaders look at the bytes too, or open any name that a config gives them.
"""

from __future__ import annotations

import pickletools
import struct
import tarfile
import zipfile
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from safeproj.errors import SafeprojError
from safeproj.storage.source import Folder, HubFolder
from safeproj.text import first_line

HEAD = 64 << 10
"""Bytes from the start that are looked at."""

WEIGHT_ENDINGS = (
    *(".safetensors", ".bin", ".gguf", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"),
    *(".npz", ".npy", ".h5", ".msgpack", ".onnx"),
)
"""Ends of names of files that hold weights in some loader's eyes, whatever is in them now."""


class Group(str, Enum):
    """What may be done with a file of such a kind."""

    empty = "empty"
    text = "text"
    weights = "weights"
    archive = "archive"
    program = "program"
    media = "media"
    log = "log"
    vocabulary = "vocabulary"
    unknown = "unknown"


@dataclass(frozen=True)
class FileKind:
    """What a file is.

    Attributes:
        group: what may be done with it.
        name: in words, after "is".
    """

    group: Group
    name: str

    @property
    def may_hold_weights(self) -> bool:
        """Whether a loader may find weights in it, or nobody can tell."""
        return self.group in (Group.weights, Group.archive, Group.unknown)


EMPTY = FileKind(Group.empty, "empty")
SCRIPT = FileKind(Group.program, "a script")
TEXT = FileKind(Group.text, "text")
UNKNOWN = FileKind(Group.unknown, "data of no known kind")
ZIP = FileKind(Group.archive, "a zip archive, such as torch.save and numpy.savez write")
TAR = FileKind(Group.archive, "a tar archive")
HDF5 = FileKind(Group.weights, "an HDF5 file")
PICKLE = FileKind(Group.weights, "a pickle")
SAFETENSORS = FileKind(Group.weights, "a safetensors file")
TFRECORD = FileKind(Group.log, "a TensorBoard log")
SENTENCEPIECE = FileKind(Group.vocabulary, "a SentencePiece vocabulary")

_STARTS: tuple[tuple[Group, str, tuple[bytes, ...]], ...] = (
    (Group.weights, "a GGUF file", (b"GGUF", b"FUGG")),
    (Group.weights, "a GGML file", (b"lmgg", b"fmgg", b"tjgg", b"algg")),
    (Group.weights, "a NumPy array", (b"\x93NUMPY",)),
    (Group.archive, ZIP.name, (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")),
    (Group.archive, "gzip data", (b"\x1f\x8b",)),
    (Group.archive, "compressed data", (b"\x1f\x9d", b"\x1f\xa0", b"\x89LZO", b"LZIP", b"LRZI")),
    (Group.archive, "bzip2 data", (b"BZh",)),
    (Group.archive, "xz data", (b"\xfd7zXZ\0", b"\x5d\0\0")),
    (Group.archive, "Zstandard data", (b"\x28\xb5\x2f\xfd",)),
    (Group.archive, "Zstandard data", tuple(bytes([n]) + b"\x2a\x4d\x18" for n in range(80, 96))),
    (Group.archive, "LZ4 data", (b"\x04\x22\x4d\x18", b"\x02\x21\x4c\x18")),
    (Group.archive, "Snappy data", (b"\xff\x06\x00\x00sNaPpY",)),
    (Group.archive, "zlib data", (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")),
    (Group.archive, "a 7z archive", (b"7z\xbc\xaf\x27\x1c",)),
    (Group.archive, "a RAR archive", (b"Rar!\x1a\x07",)),
    (Group.archive, "an archive", (b"!<arch>\n", b"MSCF\0", b"xar!", b"hsqs", b"sqsh", b"MSWIM")),
    (Group.archive, "an archive", (b"070701", b"070702", b"070707", b"\xc7\x71", b"\x71\xc7")),
    (Group.archive, "a database", (b"SQLite format 3\0",)),
    (Group.archive, "a table of data", (b"PAR1", b"ARROW1", b"Obj\x01", b"ORC")),
    (Group.program, "a program", (b"\x7fELF", b"MZ", b"\0asm", b"dex\n", b"BC\xc0\xde")),
    (Group.program, "a program", (b"\xfe\xed\xfa\xce", b"\xfe\xed\xfa\xcf", b"\xca\xfe\xba\xbe")),
    (Group.program, "a program", (b"\xce\xfa\xed\xfe", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbf")),
    (Group.program, "a program", (b"\x1bLua", b"\x1bLJ")),
    (Group.media, "an image", (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a")),
    (Group.media, "a document", (b"%PDF-",)),
    (Group.media, "a sound", (b"OggS", b"fLaC", b"ID3")),
    (Group.log, "a log of Weights & Biases", (b":W&B",)),
    (Group.log, "a folder's view settings", (b"\0\0\0\x01Bud1",)),
)
"""Kinds by how they start, the first that fits."""

_TEXT = bytes({7, 8, 9, 10, 12, 13, 27} | set(range(32, 256)))
"""Bytes of text in ASCII, UTF-8 and its older neighbours; tensors have others in every line."""


def kind_of(path: Path) -> FileKind:
    """Return what a regular file is.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEAD)
        found = kind_of_head(head, size)
        if found.group is Group.weights or found.group is Group.archive:
            return found
        # What follows may have any start before it: a user block, a script, an image.
        offset = 512
        while offset < size:
            file.seek(offset)
            if file.read(8) == b"\x89HDF\r\n\x1a\n":
                return HDF5
            offset *= 2
    if zipfile.is_zipfile(path):
        return ZIP
    if found in (TEXT, SCRIPT) and not _is_all_text(path):
        return UNKNOWN
    return TFRECORD if found is UNKNOWN and _is_records(path, size) else found


def kind_in(folder: Folder, name: str) -> tuple[FileKind, int]:
    """Return what a file of a folder is, and its size, without downloading all of it.

    Raises:
        SafeprojError: it cannot be read.
    """
    if isinstance(folder, HubFolder):
        head, size = folder.head(name, HEAD)
        return kind_of_head(head, size), size
    path = folder.path(name)
    try:
        return kind_of(path), path.stat().st_size
    except OSError as error:
        raise SafeprojError(f"{name}: cannot be read ({first_line(error)})") from error


def kind_of_head(head: bytes, size: int) -> FileKind:
    """Return what a file seems to be from its first `HEAD` bytes and its size."""
    if not head:
        return EMPTY
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return HDF5
    if len(head) > 8 and head[8:9] == b"{" and _length(head) <= size - 8:
        return SAFETENSORS
    if len(head) > 1 and head[0] == 0x80 and head[1] <= 5:
        return PICKLE
    is_text = not head.translate(None, _TEXT)
    for group, name, starts in _STARTS:
        if head.startswith(starts) and not is_text:  # text may start with MZ or ORC as well
            return FileKind(group, name)
    if head[2:4] == b"\r\n" and b"\0" in head[:16]:
        return FileKind(Group.program, "compiled Python code")
    if head[4:8] == b"ftyp" or (head[:4] == b"RIFF" and head[8:12] in (b"WEBP", b"WAVE", b"AVI ")):
        return FileKind(Group.media, "an image, a sound or a film")
    if head[4:8] in (b"TFL3", b"ET12", b"PTMF"):
        return FileKind(Group.weights, "a compiled model")
    if _is_tar(head):
        return TAR
    if is_text:
        if head.startswith((b"#!", b"\xef\xbb\xbf#!")):
            return SCRIPT
        return PICKLE if len(head) == size and _is_pickle_in_text(head) else TEXT
    return SENTENCEPIECE if _is_sentencepiece(head) else UNKNOWN


def _length(head: bytes) -> int:
    (found,) = struct.unpack("<Q", head[:8])
    return int(found)


def _is_tar(head: bytes) -> bool:
    """Tell whether there is a header of a tar archive: old ones have a checksum and no name."""
    try:
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return head[257:262] == b"ustar"
    return True


def _is_pickle_in_text(text: bytes) -> bool:
    """Tell whether all of a text is a pickle of protocol 0, and not letters that happen to be."""
    try:
        arguments = [argument for _, argument, _ in pickletools.genops(text)]
    except (ValueError, IndexError, OverflowError):
        return False
    return any(each is not None for each in arguments) and text.rstrip().endswith(b".")


def _is_all_text(path: Path) -> bool:
    with path.open("rb") as file:
        return not any(
            chunk.translate(None, _TEXT) for chunk in iter(lambda: file.read(1 << 20), b"")
        )


def _is_records(path: Path, size: int) -> bool:
    """Tell whether a file is a row of TFRecords, each with its length, as TensorBoard writes."""
    offset = records = 0
    with path.open("rb") as file:
        while offset < size and records < 1 << 16:
            file.seek(offset)
            head = file.read(12)
            if len(head) < 12 or _length(head) > size - offset - 16:
                return False
            # The first says which version of events follows.
            if not records and b"brain.Event:" not in file.read(64):
                return False
            offset += 16 + _length(head)
            records += 1
    return records > 0


def _is_sentencepiece(head: bytes) -> bool:
    """Tell whether a file starts with pieces of a vocabulary: a text with a score, length first."""
    offset, pieces = 0, 0
    for _ in range(3):
        if len(head) < offset + 4 or head[offset] != 0x0A or head[offset + 2] != 0x0A:
            break
        text = head[offset + 3]
        if head[offset + 4 + text : offset + 5 + text] != b"\x15":
            break
        offset += 2 + head[offset + 1]
        pieces += 1
    return pieces == 3

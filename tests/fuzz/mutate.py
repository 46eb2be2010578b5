"""Mutators that know what a file is made of: bytes, JSON, safetensors, pickles in zips, GGUF, text.

Each takes the content of a valid file and a source of random numbers and returns another content;
most of what it returns is still well formed somewhere, so that it gets past the first check.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

Mutator = Callable[[bytes, Random], bytes]

NUMBERS: Sequence[Any] = (
    0, 1, -1, 2, 3, 7, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64,
    10**40, -(2**31), -(2**63), 0.5, -0.0, 1e-320, 1e308, 1e-7, 3.0, float("nan"), float("inf"),
    float("-inf"),
)  # fmt: skip

TEXTS: Sequence[str] = (
    "", " ", "a", "0", "None", "null", "true", "NaN", "../../x", "/", "/dev/zero", "C:\\x", ".",
    "..", "x" * 300, "x" * 20_000, "\0", "\x1b[31m", "\u202e", "\ud800", "é", "e\u0301",
    "𝔮_proj", "q_proj", ".*", "(a+)+$", "(", "[", "^" * 50, "(.*.*.*.*)*x",
    "model.layers.0.self_attn.q_proj", "lm_head", "base_model.model.", "weight", "LORA",
    "ADALORA", "lora", "all-linear", "pissa", "olora", "gaussian", "F32", "BF16", "F16", "F64",
    "I8", "U8", "F8_E4M3", "BOOL", "C64", "sha256:" + "0" * 64, "org/name", "org/name@main",
    "https://example.invalid/x", "# Heading", "<script>", "%s%n", "{}", "{{ messages }}",
    "::error::x", "|", "\r\n", "\t",
)  # fmt: skip


def value(random: Random, depth: int = 0) -> Any:
    """Return any JSON value, odd ones above all."""
    kind = random.randrange(8)
    if kind < 2:
        return random.choice(NUMBERS)
    if kind < 4:
        return random.choice(TEXTS)
    if kind == 4:
        return random.choice((None, True, False))
    if depth > 2 or kind == 5:
        return random.choice(([], {}, [[]], [{}], {"": None}, {"a": {"b": {}}}))
    if kind == 6:
        return [value(random, depth + 1) for _ in range(random.randrange(5))]
    return {random.choice(TEXTS): value(random, depth + 1) for _ in range(random.randrange(4))}


# --- bytes


def flip(data: bytes, random: Random) -> bytes:
    """Change a few bytes, cut, repeat or insert some."""
    found = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
        at = random.randrange(len(found) + 1)
        way = random.randrange(7)
        if way < 3 and at < len(found):
            found[at] = random.choice((0, 255, 1, 128, found[at] ^ (1 << random.randrange(8))))
        elif way == 3:
            del found[at:]
        elif way == 4:
            del found[at : at + random.choice((1, 2, 8, 64))]
        elif way == 5:
            found[at:at] = bytes(random.randrange(256) for _ in range(random.choice((1, 2, 8))))
        else:
            found[at:at] = found[at : at + random.choice((1, 8, 64))]
    return bytes(found)


def replace_all(data: bytes, random: Random) -> bytes:
    """Put something else in the place of the file."""
    return random.choice(
        (b"", b"\0", b"{}", b"[]", b"null", b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}", b"[" * 100_000,
         b'{"a":' * 50_000, b"PK\x05\x06" + bytes(18), b"GGUF", b"\x80\x02.", b"\x89HDF", data * 3,
         b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html>", data[::-1])
    )  # fmt: skip


# --- JSON


def places(document: Any) -> list[tuple[Any, Any]]:
    """Return every place in a document, as a container and what it is indexed with."""
    found: list[tuple[Any, Any]] = []
    todo = [document]
    while todo:
        each = todo.pop()
        keys = each if isinstance(each, dict) else range(len(each))
        for key in keys:
            found.append((each, key))
            if isinstance(each[key], (dict, list)) and each[key]:
                todo.append(each[key])
    return found


def change_document(document: Any, random: Random) -> Any:
    """Change a few values, keys or members of a JSON document in place; return it."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        all_places = places(document) if isinstance(document, (dict, list)) and document else []
        if not all_places:
            return value(random)
        inside, key = random.choice(all_places)
        way = random.randrange(10)
        if way < 5:
            inside[key] = value(random)
        elif way == 5:
            del inside[key]
        elif way == 6 and isinstance(inside, dict):
            inside[random.choice(TEXTS)] = inside.pop(key)
        elif way == 7 and isinstance(inside, dict):
            inside[random.choice(TEXTS)] = value(random)
        elif way == 8:
            other, at = random.choice(all_places)
            if isinstance(other, dict) or at < len(other):
                inside[key] = json.loads(
                    json.dumps(other.get(at) if isinstance(other, dict) else other[at])
                )
        elif isinstance(inside, list):
            inside.extend([inside[key]] * random.choice((1, 2, 500)))
        else:
            inside[key] = [inside[key]] * random.choice((1, 2, 500))
    return document


def dump(document: Any, random: Random) -> bytes:
    """Return the document as text, now and then as other programs would not write it."""
    text = json.dumps(document, ensure_ascii=random.random() < 0.8)
    way = random.randrange(30)
    if way == 0 and isinstance(document, dict) and document:  # a key that comes twice
        key = random.choice(list(document))
        text = text[:-1] + f", {json.dumps(key)}: {json.dumps(value(random))}}}"
    if way == 1:
        text = "\ufeff" + text
    if way == 2:
        text += random.choice(("}", " ", "\n", "\0", "//", "{}"))
    return text.encode("utf-8", "surrogatepass")


def json_file(data: bytes, random: Random) -> bytes:
    """Mutate a JSON document."""
    return dump(change_document(json.loads(data), random), random)


def json_lines(data: bytes, random: Random) -> bytes:
    """Mutate one line of JSON lines, or repeat, drop or break some."""
    lines = data.splitlines()
    at = random.randrange(len(lines))
    way = random.randrange(6)
    if way < 4:
        lines[at] = json_file(lines[at], random)
    elif way == 4:
        lines[at] = flip(lines[at], random)
    else:
        lines[at:at] = random.choice(([b""], [lines[at]] * 3, [b"\xff"], [b"{}"], [b"null"]))
    return b"\n".join(lines) + b"\n"


def lines_of_text(data: bytes, random: Random) -> bytes:
    """Mutate a line of a text file such as TOML, Markdown or a list: its words, or all of it."""
    lines = data.decode().splitlines()
    at = random.randrange(len(lines))
    way = random.randrange(6)
    if way < 3 and "=" in lines[at]:
        name = lines[at].partition("=")[0]
        text = json.dumps(value(random), ensure_ascii=False)
        lines[at] = f"{name}= {text}"
    elif way == 3:
        del lines[at]
    elif way == 4:
        lines.insert(
            at, random.choice((lines[at], random.choice(TEXTS), "[x]", "a = 1", "---", "```"))
        )
    else:
        lines[at] = lines[at].replace(random.choice(lines[at] or "x"), random.choice(TEXTS), 1)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


# --- safetensors


def safetensors(data: bytes, random: Random) -> bytes:
    """Mutate the header as JSON, its length, the offsets, or the values."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    way = random.randrange(9)
    if way < 3:
        header = change_document(header, random)
    elif way < 6:
        tensors = [name for name in header if name != "__metadata__"]
        entry = header[random.choice(tensors)]
        edit = random.randrange(6)
        if edit == 0:
            entry["dtype"] = random.choice(
                ("F64", "F32", "F16", "BF16", "I32", "U8", "F8_E4M3", "F4")
            )
        elif edit == 1:
            entry["shape"] = entry["shape"][::-1]
        elif edit == 2:
            entry["shape"] = [*entry["shape"], random.choice((1, 0, 2))]
        elif edit == 3:
            shift = random.choice((-4, 4, 8, 1))
            entry["data_offsets"] = [each + shift for each in entry["data_offsets"]]
        elif edit == 4:
            entry["data_offsets"] = header[random.choice(tensors)]["data_offsets"]
        else:
            count = random.choice((2**31, 2**62, 10**12))
            entry["shape"] = [count, *entry["shape"][1:]]
    elif way == 6:
        odd = random.choice(
            (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", b"\1\0\0\0", b"\0" * 4)
        )
        at = random.randrange(max(len(body) // 4, 1)) * 4
        body = body[:at] + odd + body[at + 4 :]
    elif way == 7:
        body = (
            body[: random.randrange(len(body) + 1)] if random.random() < 0.5 else body + b"\0" * 8
        )
    else:
        length = random.choice((0, 1, length - 1, length + 8, 2**31, 2**63, 2**64 - 1))
        return struct.pack("<Q", length) + data[8:]
    text = dump(header, random)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def safetensors_metadata(data: bytes, random: Random) -> bytes:
    """Mutate the JSON document that a file that stands for a model carries in its metadata."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header["__metadata__"]
    key = random.choice(list(metadata))
    try:
        document = json.loads(metadata[key])
    except ValueError:
        document = metadata[key]
    metadata[key] = dump(change_document(document, random), random).decode("utf-8", "replace")
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


# --- files of torch.save


def torch_file(data: bytes, random: Random) -> bytes:
    """Mutate the pickle, the records or the directory of a zip of torch.save."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at = random.randrange(len(records))
    pickle = next(i for i, (name, _) in enumerate(records) if name.endswith("data.pkl"))
    way = random.randrange(8)
    compression = zipfile.ZIP_STORED
    if way < 4:
        records[pickle] = (records[pickle][0], pickled(records[pickle][1], random))
    elif way == 4:
        records[at] = (records[at][0], flip(records[at][1], random))
    elif way == 5:
        records.pop(at)
    elif way == 6:
        name = random.choice(("x", "../x", records[at][0] + "x", records[at - 1][0]))
        records[at] = (name, records[at][1])
    else:
        compression = zipfile.ZIP_DEFLATED
        records[at] = (records[at][0], bytes(random.choice((0, 10, 1_000_000))))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in records:
            archive.writestr(zipfile.ZipInfo(name), content, compression)  # also without a name
    return out.getvalue()


def pickled(data: bytes, random: Random) -> bytes:
    """Mutate a pickle: bytes of it, its numbers, or the names that it imports."""
    way = random.randrange(5)
    if way < 2:
        return flip(data, random)
    if way == 2:
        old = random.choice(
            (b"torch._utils", b"_rebuild_tensor_v2", b"FloatStorage", b"collections")
        )
        new = random.choice(
            (b"math", b"torch", b"Storage", b"numpy", b"_rebuild_parameter", b"IntStorage")
        )
        return data.replace(old, new)
    numbers = [i for i, byte in enumerate(data[:-5]) if byte in b"KMJ"]
    if not numbers:
        return flip(data, random)
    at = random.choice(numbers)
    if way == 3:
        return data[: at + 1] + bytes([random.choice((0, 1, 2, 127, 255))]) + data[at + 2 :]
    large = b"\x8a\x08" + struct.pack("<q", random.choice((2**40, 2**62, -1, -(2**40))))
    width = {ord("K"): 2, ord("M"): 3, ord("J"): 5}[data[at]]
    return data[:at] + large + data[at + width :]


# --- GGUF


def gguf(data: bytes, random: Random) -> bytes:
    """Mutate counts, types, lengths and names of a GGUF file, which are in front of the values."""
    found = bytearray(data)
    way = random.randrange(4)
    if way == 0:  # version, and the numbers of tensors and of entries
        at, code = random.choice(((4, "<I"), (8, "<Q"), (16, "<Q")))
        number = random.choice((0, 1, 2, 3, 4, 1000, 2**31, 2**32 - 1))
        struct.pack_into(code, found, at, number)
        return bytes(found)
    head = min(len(found), 3000)
    if way == 1:
        at = random.randrange(24, head - 8)
        struct.pack_into("<Q", found, at, random.choice((0, 1, 2**20, 2**40, 2**63, 2**64 - 1)))
        return bytes(found)
    if way == 2:
        old = random.choice(
            (b"lora_a", b"lora_b", b"blk.0", b"adapter", b"llama", b"alpha", b"attn_q")
        )
        new = random.choice(
            (b"lora_b", b"lora_a", b"blk.9", b"control", b"bert\0", b"ALPHA", b"attn_k")
        )
        return data.replace(old, (new + old)[: len(old)])
    at = random.randrange(head)
    found[at] = random.choice((0, 1, 2, 4, 6, 8, 9, 12, 30, 255, found[at] ^ 1))
    return bytes(found)

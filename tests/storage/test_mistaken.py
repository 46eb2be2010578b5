"""Files that are something else than their names say, told by how they start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from safeproj.errors import SafeprojError
from safeproj.storage.mistaken import (
    HEAD,
    mistaken,
    mistaken_file,
    require_finished,
    unfinished,
)

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
PAGE = b"\n<!DOCTYPE html>\n<html class=''><head><title>Sign in</title></head></html>\n"


def known(content: bytes, *words: str) -> tuple[bytes, tuple[str, ...]]:
    """Return what a file begins with, and words that it is told by."""
    return content, words


KNOWN = {
    "pointer": known(POINTER, "Git LFS pointer", "git lfs pull", "hf download"),
    "old pointer": known(POINTER.replace(b"git-lfs", b"hawser"), "Git LFS pointer"),
    "pointer of Windows": known(POINTER.replace(b"\n", b"\r\n"), "Git LFS pointer"),
    "pointer with a mark": known(b"\xef\xbb\xbf" + POINTER, "Git LFS pointer"),
    "annex": known(b"/annex/objects/SHA256E-s5--abc.safetensors\n", "git-annex", "git annex get"),
    "linked annex": known(b"../../.git/annex/objects/x/y/SHA256E-s5--abc\n", "git-annex"),
    "page": known(PAGE, "a web page", "/resolve/", "hf download"),
    "page without a type": known(b"<HTML><body>404</body></HTML>", "a web page"),
    "page of XHTML": known(b'<?xml version="1.0"?><!DOCTYPE html PUBLIC "-">', "a web page"),
    "page after a comment": known(b"<!-- saved -->\n<html>", "a web page"),
    "long page": known(PAGE + b"x" * 2 * HEAD, "a web page"),
    "error": known(b'{"error":"Repository not found"}', "a server said", "Repository not found"),
    "error of GitHub": known(
        json.dumps(
            {"message": "Not Found", "documentation_url": "https://…", "status": "404"}
        ).encode(),
        "a server said",
    ),
    "error of a service": known(b'{"detail": "Not authenticated"}', "a server said"),
    "error in XML": known(
        b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>',
        "a server said",
        "AccessDenied",
    ),
    "entry": known(b"Entry not found", "a server said", "Entry not found"),
    "404": known(b"404: Not Found\n", "a server said"),
    "password": known(b"Invalid username or password.", "a server said"),
    "gated": known(
        b"Access to model org/name is restricted. You must be authenticated to access it.",
        "a server said",
        "authenticated",
    ),
    "zeros": known(bytes(HEAD), "nothing but zeros", "unfinished download"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_what_stands_for_a_file_is_told(name: str) -> None:
    content, words = KNOWN[name]
    found = mistaken(content)
    assert found is not None
    assert found.isprintable()
    for word in words:
        assert word in found


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b'{"error_rate": 0.5}',
        b'{"error": "x", "r": 8}',
        b'{"messages": [{"role": "user", "content": "hi"}]}',
        b'{"prompt": "What is <html>?"}\n',
        b"What does 404: Not Found mean?\n",
        b"How do I write a git-lfs pointer such as version https://git-lfs.github.com/spec/v1?",
        b"PK\x03\x04" + bytes(100),
        (120).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"\0" * 15,
        b"[" * HEAD,
        b'{"error": ' + b"[" * 2000,
    ],
)
def test_other_content_is_left_to_its_reader(content: bytes) -> None:
    assert mistaken(content) is None


def test_an_error_cannot_steer_a_terminal() -> None:
    found = mistaken(b'{"error": "\x1b[31mred\xe2\x80\xae"}'.replace(b"\x1b", b"\\u001b"))
    assert found is not None
    assert found.isprintable()


def test_a_file_is_told_as_its_bytes_are_and_an_empty_one_is_said_to_be(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    assert mistaken_file(path) is None  # others say that it is not there
    path.write_bytes(b"")
    assert mistaken_file(path) is None
    assert "is empty" in str(mistaken_file(path, empty=False))
    path.write_bytes(POINTER)
    assert mistaken_file(path) == mistaken(POINTER)
    path.write_bytes(b"weights")
    assert mistaken_file(path) is None


@pytest.mark.parametrize("name", ["model.safetensors.incomplete", "a.jsonl.part", "b.crdownload"])
def test_the_name_of_an_unfinished_download_is_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(SafeprojError, match="download was not finished"):
        require_finished("x", Path(name))
    require_finished("x", Path("model.safetensors"))

    assert unfinished(tmp_path) is None
    place = tmp_path / ".cache" / "huggingface" / "download"
    place.mkdir(parents=True)
    assert unfinished(tmp_path) is None
    (place / name).touch()
    assert unfinished(tmp_path) == name

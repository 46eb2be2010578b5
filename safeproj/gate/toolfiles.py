"""What git and the Hub's client keep at the top of a directory, which no upload publishes.

They are told by name and content together: whatever else lies there is a file like any other.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Container
from pathlib import Path

from safeproj.storage.filekind import EMPTY, SCRIPT, TEXT, kind_of
from safeproj.storage.source import file_sha256

_TEXTS = re.compile(
    r"\.git"
    r"|\.git/(HEAD|(ORIG|FETCH|MERGE|CHERRY_PICK)_HEAD|config|description|packed-refs|shallow)"
    r"|\.git/(COMMIT_EDITMSG|gc\.log|(index|config|HEAD)\.lock)"
    r"|\.git/(info|objects/info)/(exclude|attributes|refs|packs|alternates|sparse-checkout)"
    r"|\.git/hooks/[a-z-]+\.sample"
    r"|\.git/logs/(HEAD|refs/[^:]+)"
    r"|\.cache/huggingface/(\.gitignore|CACHEDIR\.TAG)"
    r"|\.cache/huggingface/(download|upload)/.+\.(metadata|lock)"
)
_REF = re.compile(r"\.git/refs/[^:]+")
_REF_TEXT = re.compile(r"([0-9a-f]{40}|[0-9a-f]{64}|ref: [^\s{]+)\n?")
GIT_CONFIG = ".git/config"
_PROGRAMS = re.compile(
    r"^\s*(fsmonitor|sshcommand|pager|editor|hookspath|askpass|gitproxy|textconv|external|clean|"
    r"smudge|process|program|helper|command|driver|cmd|path|templatedir|uploadpack|receivepack)"
    r"\s*=|^\s*\[\s*(include|includeif|alias|filter|diff|merge|credential|url)\b",
    re.IGNORECASE | re.MULTILINE,
)
"""Settings by which git runs programs, or reads further settings."""

_LFS_HOOK = re.compile(
    r"#!/bin/sh\n"
    r"command -v git-lfs >/dev/null 2>&1 \|\| "
    r"\{ (echo|printf) >&2 (\"[^\"$`]*\" ?)+; exit 2; \}\n"
    r'git lfs (pre-push|post-checkout|post-commit|post-merge) "\$@"\n*'
)
_BINARIES = {
    re.compile(r"\.git/index"): b"DIRC",
    re.compile(r"\.git/objects/pack/pack-[0-9a-f]{40,64}\.pack"): b"PACK",
    re.compile(r"\.git/objects/pack/pack-[0-9a-f]{40,64}\.idx"): b"\xfftOc",
    re.compile(r"\.git/objects/pack/pack-[0-9a-f]{40,64}\.rev"): b"RIDX",
    re.compile(r"\.git/objects/pack/pack-[0-9a-f]{40,64}\.bitmap"): b"BITM",
    re.compile(r"\.git/objects/pack/multi-pack-index"): b"MIDX",
    re.compile(r"\.git/objects/info/commit-graph"): b"CGPH",
}
_LOOSE = re.compile(r"\.git/objects/[0-9a-f]{2}/[0-9a-f]{38,62}")
_OBJECTS = (b"blob ", b"tree ", b"commit ", b"tag ")
_LFS = re.compile(r"\.git/lfs/objects/[0-9a-f]{2}/[0-9a-f]{2}/([0-9a-f]{64})")


def runs_programs(path: Path) -> bool:
    """Tell whether a config of git makes it run programs."""
    return bool(_PROGRAMS.search(path.read_text("utf-8", errors="replace")))


def is_left_by_a_tool(root: Path, name: str, digests: Container[str]) -> bool:
    """Tell whether a file is one that git or the Hub's client made, as it makes them.

    Args:
        root: of the adapter.
        name: of the file, with `/` between its parts.
        digests: the SHA-256 of each file of the adapter: LFS keeps the same content again.
    """
    if not name.startswith((".git", ".cache/huggingface/")):
        return False
    path = root / name
    if path.is_symlink() or not path.is_file():
        return False
    try:
        return _is_left(path, name, digests)
    except (OSError, ValueError):  # such as text that is no UTF-8
        return False


def _is_left(path: Path, name: str, digests: Container[str]) -> bool:
    lfs = _LFS.fullmatch(name)
    if lfs is not None:
        return lfs[1] in digests and file_sha256(path) == lfs[1]
    if name.startswith(".git/hooks/") and not name.endswith(".sample"):
        return _LFS_HOOK.fullmatch(path.read_text("utf-8", errors="replace")) is not None
    if _LOOSE.fullmatch(name):
        with path.open("rb") as file:
            try:
                return zlib.decompressobj().decompress(file.read(256), 16).startswith(_OBJECTS)
            except zlib.error:
                return False
    if _REF.fullmatch(name):
        return path.stat().st_size < 1000 and bool(_REF_TEXT.fullmatch(path.read_text("utf-8")))
    if _TEXTS.fullmatch(name):
        plain = kind_of(path) in (EMPTY, TEXT, SCRIPT)
        with path.open("rb") as file:
            plain = plain and not file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
        if name == GIT_CONFIG and runs_programs(path):
            return False
        return plain and (name != ".git" or path.read_bytes().startswith(b"gitdir: "))
    start = next((start for form, start in _BINARIES.items() if form.fullmatch(name)), None)
    if start is None:
        return False
    with path.open("rb") as file:
        return file.read(len(start)) == start

"""What the adapter's directory and the names in it say."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from safeproj.adapter import Adapter
from safeproj.adapter.interface import MANIFEST
from safeproj.adapter.write import leads_out
from safeproj.gate.policy import Policy
from safeproj.gate.weights import found
from safeproj.report.check import Finding
from safeproj.source import Folder, LocalFolder

WEIGHTS = (
    *(".safetensors", ".bin", ".gguf", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"),
    *(".npz", ".npy", ".h5", ".msgpack", ".onnx"),
)
"""Ends of names of files that hold weights in some loader's eyes."""

TRAINING_STATE = re.compile(
    r"training_args\.bin|(optimizer|scheduler|scaler)\.(pt|bin)|rng_state(_\d+)?\.pth"
)
"""What trainers leave beside an adapter, which no loader takes for weights."""

UNSEEN = (".git", ".cache/huggingface")
"""Directories at the top that are not published: those of git, and of the Hub's client."""

STEERING = (".py", ".jinja", ".so", ".dll", ".dylib", ".sh")
STEERING_NAMES = ("tokenizer", "chat_template", "special_tokens_map", "added_tokens", "vocab")
"""Ends and beginnings of names of files that steer what a model is given, or that are run."""


def about_files(adapter: Adapter, policy: Policy) -> Iterator[Finding]:
    """Yield what there is to say about the files and the names of the tensors."""
    yield from about_paths(adapter)
    for name in _names(adapter.folder):
        leaf = name.rpartition("/")[2].lower().rstrip(". ")  # which some systems drop
        if name in (adapter.weights_file, MANIFEST):
            continue
        if leaf.endswith(WEIGHTS) and not TRAINING_STATE.fullmatch(leaf):
            text = f"{name} holds weights that were not checked"
            yield found("SP014", text, policy=policy, file=name)
        elif leaf.endswith(STEERING) or leaf.startswith(STEERING_NAMES):
            yield found("SP017", f"{name} can change what a model is given or runs", file=name)
    yield from _about_names(adapter)


def about_paths(adapter: Adapter) -> Iterator[Finding]:
    """Yield files that are links, or whose names lead elsewhere."""
    names = _names(adapter.folder)
    for name in names:
        yield from _about_path(adapter, name)
    for name, other in _alike(names):
        yield found("SP016", f"the file {name!a} differs from {other!a} in looks alone", file=name)


def _names(folder: Folder) -> list[str]:
    """Return the names of all files that would be published, hidden ones too."""
    if not isinstance(folder, LocalFolder) or folder.only is not None:
        return sorted(folder.files)
    names = []
    for directory, below, files in os.walk(folder.root):
        place = Path(directory).relative_to(folder.root)
        links = [name for name in below if (folder.root / place / name).is_symlink()]
        below[:] = [n for n in below if n not in links and (place / n).as_posix() not in UNSEEN]
        names += [(place / name).as_posix() for name in (*files, *links)]
    return sorted(names)


def _about_path(adapter: Adapter, name: str) -> Iterator[Finding]:
    drive = name[1:2] == ":"
    if leads_out(name) or drive:
        yield found("SP015", f"the file name {name!a} can lead out of the adapter", file=name)
        return
    # In the Hub's cache every file is a link to a blob of the same repository.
    if not isinstance(adapter.folder, LocalFolder) or adapter.folder.revision is not None:
        return
    path = adapter.folder.root / name
    if path.is_symlink():
        yield found("SP015", f"{name} is a link; expected the file itself", file=name)
    elif not path.is_file():
        yield found("SP015", f"{name} is no regular file", file=name)


def _about_names(adapter: Adapter) -> Iterator[Finding]:
    """Yield names of tensors that are made to be taken for others."""
    for key in adapter.tensors:
        if not key.isascii():
            yield found("SP016", f"{key!a} has characters outside ASCII", tensor=key)
    for key, other in _alike(adapter.tensors):
        yield found("SP016", f"{key!a} differs from {other!a} in looks alone", tensor=key)


def _alike(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield each name that differs from an earlier one in case or compatible characters alone."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)
        if other != name:
            yield name, other

"""Writing a patched adapter directory: complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from safeproj.adapter import FORMATS, card, stands_for_folder
from safeproj.adapter.interface import CONFIG, MANIFEST, SIGNATURE
from safeproj.adapter.record import Adapter
from safeproj.adapter.weightfiles import other_weights, training_state
from safeproj.errors import SafeprojError
from safeproj.storage.arrays import Array
from safeproj.storage.documents import json_document
from safeproj.storage.publish import Appearance, appearing, refused_in_one_line, unremovable
from safeproj.storage.source import LocalFolder
from safeproj.text import is_text, printable

CARD = "README.md"
"""The model card."""

Complete = Callable[[Path], Mapping[str, Any]]
"""Looks at a directory that is complete, and returns what else is to be recorded of it."""


What = Literal["adapter", "model"]
"""What a directory is: an adapter's, or a whole model's."""

_NAMED: dict[What, str] = {"adapter": "an adapter", "model": "a model"}


def check_out(
    out: Path,
    overwrite: bool,
    inputs: Sequence[tuple[str, Path | None]],
    what: What = "adapter",
) -> None:
    """Refuse an `--out` that cannot be written, before any weight is read.

    Args:
        out: the directory to create.
        overwrite: whether an adapter that is already there may be replaced.
        inputs: option names and the local directories that are read, None for the Hub.
        what: is written.

    Raises:
        SafeprojError: it exists, its parent does not, or it would touch an input.
    """
    check_apart(out, inputs)
    check_place(out, overwrite, what)


def check_apart(out: Path, inputs: Sequence[tuple[str, Path | None]]) -> None:
    """Refuse an `--out` that overlaps with an input.

    Raises:
        SafeprojError: it does.
    """
    place = out.resolve()
    for option, path in inputs:
        if path is None:
            continue
        given = path.resolve()
        if option == "--adapter" and stands_for_folder(given.name):
            given = given.parent if given.is_file() else given
        if place == given or place in given.parents or given in place.parents:
            raise SafeprojError(
                f"--out {out}: overlaps with {option} {path}; inputs are never changed, choose "
                "another directory"
            )


def check_place(out: Path, overwrite: bool, what: What = "adapter") -> None:
    """Refuse an `--out` where no directory can be created, or none that is there replaced.

    Raises:
        SafeprojError: it exists, or its parent does not or is not writable.
    """
    if os.path.lexists(out):
        if out.is_symlink() or not out.is_dir():
            kind = "a link" if out.is_symlink() else "a file"
            raise SafeprojError(f"--out {out}: is {kind}; choose a directory that does not exist")
        if not overwrite:
            raise SafeprojError(f"--out {out}: exists; give --overwrite to replace {_NAMED[what]}")
        files = [path.name for path in out.iterdir() if path.is_file()]
        if what == "model" and any(out.iterdir()) and MANIFEST not in files:
            raise SafeprojError(
                f"--out {out}: exists and is no model that was patched (it has no {MANIFEST}); "
                "only such a model is replaced, choose another directory"
            )
        is_adapter = any(kind.is_adapter(files) for kind in FORMATS)
        if what == "adapter" and any(out.iterdir()) and not is_adapter:
            raise SafeprojError(
                f"--out {out}: exists and is no adapter (it has no {CONFIG}); only an adapter is "
                "replaced, choose another directory"
            )
        if (out / ".git").exists():
            raise SafeprojError(
                f"--out {out}: is a git repository, whose history --overwrite would delete; write "
                "to another directory and copy the files"
            )
        stays = unremovable(out)
        if stays is not None:
            raise SafeprojError(
                f"--out {out}: --overwrite would have to remove {stays}, which is not permitted; "
                "remove the directory yourself, or choose another one"
            )
    parent = out.resolve().parent
    if not parent.is_dir():
        raise SafeprojError(f"--out {out}: {parent} is not an existing directory; create it")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise SafeprojError(f"--out {out}: the directory {parent} is not writable")


def check_parent(out: Path) -> None:
    """Refuse an `--out` in which no directories for many adapters can be created.

    Raises:
        SafeprojError: it is no writable directory, or its parent is none.
    """
    place = out if os.path.lexists(out) else out.resolve().parent
    if not place.is_dir():
        raise SafeprojError(
            f"--out {out}: {place} is not an existing directory; with many adapters it is the "
            "directory that gets one directory for each"
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise SafeprojError(f"--out {out}: the directory {place} is not writable")


def check_inside(out: Path, name: str, overwrite: bool) -> None:
    """Refuse a place below `out` for one of many adapters.

    Raises:
        SafeprojError: it is taken, or leads through a link or into an adapter.
    """
    place = out / name
    for parent in place.parents:
        if parent == out:
            break
        if not os.path.lexists(parent):
            continue
        if parent.is_symlink() or not parent.is_dir():
            raise SafeprojError(f"--out {out}: {parent} is no directory of its own; remove it")
        if any(kind.is_adapter([each.name for each in parent.iterdir()]) for kind in FORMATS):
            raise SafeprojError(
                f"--out {out}: {name} would be written inside the adapter {parent}; choose another "
                "directory"
            )
    if os.path.lexists(place):
        check_place(place, overwrite)


def made_inside(out: Path, name: str) -> Path:
    """Create the directory below `out` that one of many adapters goes to, and return its place.

    Raises:
        SafeprojError: it cannot be created.
    """
    place = out / name
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SafeprojError(f"--out {place}: cannot be written ({error.strerror})") from error
    return place


def write_adapter(
    adapter: Adapter,
    replaced: Mapping[str, Array],
    manifest: Mapping[str, Any],
    section: str,
    out: Path,
    documents: Mapping[str, bytes | None] | None = None,
    *,
    overwrite: bool = False,
    copy_weights: bool = False,
    keep_training_state: bool = False,
    converted: Collection[str] = (),
    complete: Complete | None = None,
) -> None:
    """Write the patched adapter to `out`.

    Args:
        adapter: the input.
        replaced: the tensors that differ from the input's, or that it does not have.
        manifest: what goes to `safeproj.json`; digests of the written tensors are added.
        section: Markdown for the model card, which is left as it is where there is none.
        out: the directory.
        documents: name to content of further files, or of files in place of the input's; None for a
            file of the input that is left out.
        overwrite: whether an adapter that is there may be replaced.
        copy_weights: copy other weights in the folder too, as they are.
        keep_training_state: copy what trainers kept in it too.
        converted: those of `replaced` that have another dtype, and are not projected.
        complete: looks at the adapter where it is complete but for `safeproj.json`, and returns
            what that says besides. What it raises leaves nothing behind.

    Raises:
        SafeprojError: it cannot be written; nothing is left behind.
    """

    def weights(appearance: Appearance) -> dict[str, Any]:
        directory = appearance.path
        tensors = {**adapter.tensors, **replaced}
        digests = adapter.format.write(directory / adapter.format.output_file, tensors)
        output: dict[str, Any] = {
            "projected": sorted(replaced.keys() - set(converted)),
            "tensors": digests,
        }
        return {**output, "converted": sorted(converted)} if converted else output

    write_directory(
        adapter,
        weights,
        lambda: (manifest, section),
        out,
        documents,
        overwrite=overwrite,
        copy_weights=copy_weights,
        keep_training_state=keep_training_state,
        complete=complete,
    )


Said = Callable[[], tuple[Mapping[str, Any], str]]
"""Returns what `safeproj.json` and the model card say, when the weights are written."""


def write_directory(
    adapter: Adapter,
    weights: Callable[[Appearance], dict[str, Any]],
    said: Said,
    out: Path,
    documents: Mapping[str, bytes | None] | None = None,
    *,
    overwrite: bool = False,
    copy_weights: bool = False,
    keep_training_state: bool = False,
    complete: Complete | None = None,
    what: What = "adapter",
    run: str | None = None,
) -> None:
    """Write a directory with new weights and all else that is in a folder.

    Args:
        adapter: what is in the folder; its tensors do not matter.
        weights: writes them, and returns what is recorded of them.
        said: what is said of it.
        out: the directory.
        documents: as for `write_adapter`.
        overwrite: as for `write_adapter`.
        copy_weights: as for `write_adapter`.
        keep_training_state: as for `write_adapter`.
        complete: as for `write_adapter`.
        what: is written.
        run: as for `appearing`.

    Raises:
        SafeprojError: it cannot be written; nothing is left behind, but with `run`.
    """
    given = {**adapter.documents, **(documents or {})}
    copied, left_out = copied_beside(
        adapter, given, copy_weights=copy_weights, keep_training_state=keep_training_state
    )
    with appears_at(out, overwrite, what, run) as appearance:
        directory = appearance.path
        for name in copied:
            target = directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(_safe_path(adapter, name), target)
        for name, content in given.items():
            if content is None:
                continue
            _require_inside(adapter, name)
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)
        output = weights(appearance)
        manifest, section = said()
        if section:
            card_path = directory / CARD
            old_card = card_path.read_bytes() if card_path.exists() else card.new(adapter)
            card_path.write_bytes(card.with_section(old_card, section))
        if adapter.documents:
            output["documents"] = {n: sha256(c).hexdigest() for n, c in adapter.documents.items()}
        if left_out:
            output["left_out"] = left_out
        further = {} if complete is None else complete(directory)
        found = {**manifest, "output": output, **further}
        (directory / MANIFEST).write_bytes(json_document(found))


def unpatched_beside(adapter: Adapter, given: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """Return what is left out of the folder: other weights, and what trainers kept to go on.

    Other weights are checkpoints, converted copies, and a whole model that the adapter was merged
    into, with what belongs to them alone: they hold the updates as they were.

    Args:
        adapter: the adapter.
        given: names of files that are dealt with otherwise.

    Raises:
        SafeprojError: a file is a link that leads out of the folder, or to none.
    """
    files = {name for name in _files_beside(adapter) if name not in given}
    state = training_state(adapter, files)
    return other_weights(adapter, files.difference(state)), state


def copied_beside(
    adapter: Adapter, given: Collection[str], *, copy_weights: bool, keep_training_state: bool
) -> tuple[list[str], list[str]]:
    """Return the files of the folder that are copied, and those that are left out.

    Args:
        adapter: the adapter.
        given: names of files that are dealt with otherwise.
        copy_weights: whether other weights are copied.
        keep_training_state: whether what trainers kept is copied.

    Raises:
        SafeprojError: as for `unpatched_beside`.
    """
    others, state = unpatched_beside(adapter, given)
    left_out = [] if copy_weights else others
    left_out = left_out if keep_training_state else sorted([*left_out, *state])
    files = _files_beside(adapter)
    return [name for name in files if name not in given and name not in left_out], left_out


def adapters_below(adapter: Adapter) -> tuple[str, ...]:
    """Return the weights of other adapters in the folder, such as checkpoints, by their names."""
    if isinstance(adapter.folder, LocalFolder) and adapter.folder.only is not None:
        return ()
    return tuple(
        name
        for name in sorted(adapter.folder.files - adapter.format.replaced_files)
        if any(kind.is_weights(name.rpartition("/")[2]) for kind in FORMATS)
    )


def _files_beside(adapter: Adapter) -> list[str]:
    """Return every file but those that are written; none where SRC names one file.

    Raises:
        SafeprojError: one is a link that leads out of the folder, or to none, or its name no text.
    """
    if isinstance(adapter.folder, LocalFolder) and adapter.folder.only is not None:
        return []
    names = adapter.folder.files - adapter.format.replaced_files - {MANIFEST, SIGNATURE}
    for name in names if isinstance(adapter.folder, LocalFolder) else ():
        _safe_path(adapter, name)
        if not is_text(name):
            raise SafeprojError(
                f"{adapter.source}: the file name {printable(name)} is not UTF-8; rename it"
            )
    return sorted(names)


def leads_out(name: str) -> bool:
    """Tell whether a file name, with `/` between its parts, leads out of a directory somewhere."""
    return ".." in name.split("/") or name.startswith("/") or "\\" in name


def _require_inside(adapter: Adapter, name: str) -> None:
    """Refuse a file name that leads out of the adapter's directory."""
    if leads_out(name):
        raise SafeprojError(f"{adapter.source}: the file name {name!a} leads out of the adapter")


def _safe_path(adapter: Adapter, name: str) -> Path:
    """Return the path of a file to copy; a link must not bring in a file from elsewhere."""
    _require_inside(adapter, name)
    path = adapter.path(name)
    if isinstance(adapter.folder, LocalFolder):
        root = adapter.folder.root.resolve()
        # In the Hub's cache a snapshot's files are links to the blobs of the same repository.
        home = root.parents[1] if root.parent.name == "snapshots" else root
        if home not in path.resolve().parents:
            raise SafeprojError(
                f"{adapter.source}: {printable(name)} is a link to {path.resolve()}, outside the "
                "adapter; replace it by the file it should be"
            )
        if not path.is_file():
            raise SafeprojError(
                f"{adapter.source}: {printable(name)} is no regular file, or a link that leads to "
                "none; remove it"
            )
    return path


@contextmanager
def appears_at(
    out: Path, overwrite: bool = False, what: What = "adapter", run: str | None = None
) -> Iterator[Appearance]:
    """Yield a hidden directory beside `out` that becomes `out` in one step at the end.

    Whatever happens, `out` is complete or as it was, and the hidden directory is gone.

    Args:
        out: the directory.
        overwrite: whether an adapter that is there may be replaced. It is looked at again directly
            before.
        what: is written, and may be replaced.
        run: as for `appearing`.

    Raises:
        SafeprojError: a file cannot be written, or what is copied to it not be read; or something
            is there that may not be replaced.
    """
    told = refused_in_one_line(out, "directory")
    with told, appearing(out.resolve(), directory=True, run=run) as found:
        yield found
        found.appear((lambda: check_place(out, overwrite, what)) if overwrite else None)

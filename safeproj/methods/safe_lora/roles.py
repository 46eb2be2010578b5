"""Whether the two checkpoints look as if one were given in the place of the other."""

from __future__ import annotations

from safeproj.adapter import Adapter
from safeproj.checkpoint import Checkpoint
from safeproj.errors import SafeprojError
from safeproj.storage.modelname import is_same_model, name_of
from safeproj.storage.source import Folder, read_json

TOKENIZER = "tokenizer_config.json"
TEMPLATES = ("chat_template.jinja", "chat_template.json")
"""Files that hold a chat template, beside `TOKENIZER`."""


def swapped(base: Checkpoint, aligned: Checkpoint, adapter: Adapter | None = None) -> str | None:
    """Return what tells that base and aligned are exchanged, None where nothing clear does.

    What the adapter was trained on is the aligned model, and which that is its config names. If it
    names neither, a chat template tells: aligned models have one. `C` is the same for `V` and `-V`,
    so that no score does.
    """
    if base.folder is None or aligned.folder is None:
        return None
    look = "--base and --aligned look swapped: "
    named = _named(adapter)
    if named is not None:
        is_base, is_aligned = _is_called(named, base, aligned), _is_called(named, aligned, base)
        if is_base and not is_aligned:
            return (
                f"{look}the adapter's config names {named[:200]!r} as its model, which is --base "
                f"{base.source}; expected --aligned {aligned.source}, on which it is trained"
            )
        if is_aligned:
            return None
    if _has_template(base.folder) is True and _has_template(aligned.folder) is False:
        return (
            f"{look}--base {base.source} has a chat template and --aligned {aligned.source} has a "
            "tokenizer without one; expected one in the aligned model"
        )
    return None


def _named(adapter: Adapter | None) -> str | None:
    """Return what the adapter's config calls the model that it was trained on."""
    if adapter is None or adapter.format.base_model_key is None:
        return None
    found = adapter.config.get(adapter.format.base_model_key)
    return found if isinstance(found, str) and found else None


def _is_called(named: str, checkpoint: Checkpoint, other: Checkpoint) -> bool:
    """Tell whether a name is that of a checkpoint: where it lies, or what its config says.

    The config says where the weights were loaded from before they were saved. That is another model
    where they were trained then, so it counts only if both configs say something.
    """
    assert checkpoint.folder is not None
    names = [name_of(checkpoint.folder)]
    own, others = (each.config.get("_name_or_path") for each in (checkpoint, other))
    if isinstance(own, str) and own and others:
        names.append(own)
    return any(is_same_model(named, name) for name in names)


def _has_template(folder: Folder) -> bool | None:
    """Tell whether a model has a chat template; None where its tokenizer is not there."""
    if TOKENIZER not in folder.files:
        return None
    if any(name in folder.files for name in TEMPLATES):
        return True
    try:
        return bool(read_json(folder, TOKENIZER).get("chat_template"))
    except SafeprojError:  # it is nothing that is needed
        return None

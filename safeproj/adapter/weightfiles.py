"""Which files beside an adapter are left out: other weights, and what trainers kept."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from safeproj.adapter.interface import CONFIG
from safeproj.adapter.record import Adapter
from safeproj.storage.filekind import WEIGHT_ENDINGS, kind_in, kind_of
from safeproj.storage.trainingstate import is_named_as_state, is_state, may_be_state

ENDINGS = (*WEIGHT_ENDINGS, ".index.json")
"""Ends of names of files that hold weights in some loader's eyes, or say where weights are."""

NAMED = 100
"""Files that a message names."""

MODEL_CONFIG = "config.json"
"""What makes loaders take a directory for a whole model."""


def is_weights_file(path: Path) -> bool:
    """Tell whether a loader may take a file for weights, by its name or by its bytes.

    Raises:
        OSError: it cannot be read.
    """
    if is_named_as_state(path.name):
        return not is_state(path.name, kind_of(path))
    return _is_named_so(path.name) or kind_of(path).may_hold_weights


def _is_named_so(name: str) -> bool:
    leaf = name.rpartition("/")[2].lower()
    return leaf.endswith(ENDINGS) and not is_named_as_state(name)


def training_state(adapter: Adapter, files: Collection[str]) -> list[str]:
    """Return which of the files beside an adapter trainers kept to go on, and other pickles.

    They are not served with it, and whoever loads one runs the code in it.

    Raises:
        SafeprojError: a file cannot be read.
    """
    named = (name for name in files if may_be_state(name))
    return sorted(name for name in named if is_state(name, kind_in(adapter.folder, name)[0]))


def other_weights(adapter: Adapter, files: Collection[str]) -> list[str]:
    """Return which of the files beside an adapter are other weights, or mean nothing without them.

    That is an index, the config of an adapter below, and the `config.json` of a whole model whose
    weights lie beside it: where they are left out, no loader must take the directory for a model.

    Args:
        adapter: the adapter.
        files: names of files of its folder, without those that are written anew or kept for
            training.
    """
    # By name first: a model on the Hub need not be downloaded to be left out.
    weights = {n for n in files if _is_named_so(n) or is_weights_file(adapter.path(n))}
    places = {name.rpartition("/")[0] for name in weights}
    found = set(weights)
    for name in files:
        place, _, leaf = name.rpartition("/")
        if (leaf == CONFIG and place) or (leaf == MODEL_CONFIG and place in places):
            found.add(name)
    return sorted(found)

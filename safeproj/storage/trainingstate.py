"""What trainers keep beside an adapter to go on later: pickles, which run code when loaded."""

from __future__ import annotations

import re

from safeproj.storage.filekind import EMPTY, PICKLE, ZIP, FileKind, Group

_NAMES = re.compile(
    r"(.+/)?("
    r"training_args\.bin|(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth"  # transformers
    r"|(optimizer|scheduler|sampler|scaler|dl_state_dict)(_\d+)?\.bin"  # accelerate
    r"|(random_states|custom_checkpoint)_\d+\.pkl"
    r"|\w*zero_pp_rank_\d+_\w+\.pt|mp_rank_\d+_model_states\.pt"  # DeepSpeed
    r"|global_step\d+/.+\.pt"
    r"|recipe_state\.pt"  # torchtune
    r")"
)
"""Names that trainers give, in lower case, with the directories before them."""

PICKLES = (".pkl", ".pickle", ".joblib")
"""Ends of names of files that are loaded by unpickling, whoever wrote them."""


def is_named_as_state(name: str) -> bool:
    """Tell whether a trainer calls what it keeps for itself so.

    >>> is_named_as_state("checkpoint-10/rng_state_0.pth"), is_named_as_state("trainer_state.json")
    (True, False)
    """
    return _NAMES.fullmatch(name.casefold()) is not None


def may_be_state(name: str) -> bool:
    """Tell whether a file is kept for training, or a pickle, as far as its name says."""
    return is_named_as_state(name) or name.casefold().endswith(PICKLES)


def is_state(name: str, kind: FileKind) -> bool:
    """Tell whether a file is kept for training, or a pickle, by its name and its bytes.

    What has such a name and other bytes may be weights, which any loader finds by their bytes.
    """
    if is_named_as_state(name):
        return kind in (EMPTY, PICKLE, ZIP)  # as torch.save writes it
    return may_be_state(name) and (kind in (EMPTY, PICKLE) or kind.group is Group.archive)

"""The model that is measured: loaded once, with one variant of the adapter after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safeproj.adapter import Adapter
from safeproj.errors import SafeprojError
from safeproj.lm.adapters import attach_read, is_strange, moves
from safeproj.lm.models import quietly
from safeproj.lm.places import renamed
from safeproj.storage.arrays import Array, to_torch


class Subject:
    """A model with an adapter, whose tensors can be exchanged.

    Args:
        model: a causal language model of transformers; the adapter is put into it.
        adapter: a PEFT adapter.

    Raises:
        SafeprojError: PEFT does not load the adapter.
    """

    def __init__(self, model: Any, adapter: Adapter) -> None:
        self._moved = moves(model, adapter.folder)
        self.model = attach_read(model, adapter)
        self._tensors = adapter.tensors

    def put(self, replaced: Mapping[str, Array]) -> None:
        """Give the model the adapter with these tensors in place of its own.

        It is what PEFT does when it loads the directory that `patch` writes.
        """
        from peft import set_peft_model_state_dict

        tensors = {
            renamed(key, self._moved): to_torch(array)
            for key, array in {**self._tensors, **replaced}.items()
        }
        with quietly():
            found: Any = set_peft_model_state_dict(self.model, tensors)
        strange = [key for key in found.unexpected_keys if is_strange(key)]
        if strange:
            raise SafeprojError(f"PEFT has no place for {strange[0]} of the adapter; update PEFT")

"""The updates of a plan as the engine has them."""

from __future__ import annotations

from safeproj.adapter import Adapter
from safeproj.engine import Update
from safeproj.plan.match import PlannedModule


def update_of(adapter: Adapter, item: PlannedModule) -> Update:
    """Return the factors of one update, as views where they are stored so."""
    module, tensors = item.module, adapter.tensors
    return Update(
        module.input.view(tensors),
        module.output.view(tensors),
        bias=None if module.bias is None else module.bias.view(tensors),
        gain=None if module.gain is None else module.gain.view(tensors),
        scaling=item.scaling,
    )

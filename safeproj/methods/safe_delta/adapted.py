"""An adapter is run layer by layer, and each update corrected as its inputs are known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from safeproj.adapter import Adapter
from safeproj.adapter.low_rank import padded
from safeproj.engine import Replacement
from safeproj.errors import SafeprojError
from safeproj.lm import models
from safeproj.lm.adapters import LoraLayer, lora_layer, require_peft, wide_host
from safeproj.lm.layers import plain_weight
from safeproj.lm.passes import walking
from safeproj.methods.leading import leading
from safeproj.methods.safe_delta.formulas import corrected
from safeproj.methods.safe_delta.inputs import root_of, safety_batches
from safeproj.methods.safe_delta.method import SafeDelta
from safeproj.plan.match import Plan
from safeproj.storage.arrays import from_torch, single, to_torch
from safeproj.storage.source import open_folder

if TYPE_CHECKING:
    from safeproj.run.options import Options


def adapted(
    method: SafeDelta, adapter: Adapter, plan: Plan, options: Options
) -> dict[str, Replacement]:
    """Return what takes the place of each update, by module.

    The weight that an update makes is corrected, and what is left of its change approximated by the
    best update of a rank; that is what the model runs with from there on.

    Args:
        method: what is done.
        adapter: as it was matched.
        plan: its updates.
        options: how the model is run.

    Raises:
        SafeprojError: the model cannot be run, or an update not be corrected.
    """
    require_peft(adapter.folder)
    batches = safety_batches(method, options.chat)
    host = wide_host(method.host, open_folder(method.sources["aligned"]), options.device)
    found: dict[str, Replacement] = {}
    with host.adapted(adapter) as (load, moved):
        model = load()
        names = {
            moved.get(each.module.name, each.module.name): each.module for each in plan.modules
        }
        layers = {place: lora_layer(model, place, method.words.name) for place in names}
        before = [(each, each.A.data, each.B.data) for each in layers.values()]
        try:
            bases = {place: each.base for place, each in layers.items()}
            with models.quietly(), walking(model, bases, batches, options.on_batch) as walk:
                line = walk.line(batches)
                for group in walk.groups:
                    R = root_of(line, group[0])
                    for place in group:
                        module = names[place]
                        rank = method.delta_rank or module.rank
                        found[module.name] = _replaced(method, layers[place], R, rank)
        finally:
            for each, A, B in before:
                each.A.data, each.B.data = A, B
    return found


def _replaced(method: SafeDelta, layer: LoraLayer, R: Tensor, rank: int) -> Replacement:
    """Correct an update in the running model, as it will be written."""
    if not layer.scaling:
        raise SafeprojError(f"{layer.name}: is scaled by 0; leave it out with --exclude")
    W = plain_weight(layer.base)
    assert W is not None
    W = W.to(R)
    change = (layer.scaled_B @ layer.A.detach().double()).to(R)
    if not bool(change.any()):
        return Replacement(single(from_torch(layer.A)), single(from_torch(layer.B)))
    made = corrected(W, W + change, R, method.s)
    wanted = ((made.weight - W) / layer.scaling).float()
    if not bool(wanted.isfinite().all()):
        raise SafeprojError(f"{layer.name}: the corrected update has a value that is not finite")
    best = leading(from_torch(wanted), rank)
    if best is None:  # nothing is left of it
        A, B = single(from_torch(layer.A)), single(from_torch(layer.B))
        A, B, error = A[:rank], 0.0 * B[:, :rank], 0.0
    else:
        A, B, error = best.A, best.B, best.error
    A, B = map(single, padded(A, B, rank))
    with torch.no_grad():
        layer.A.data, layer.B.data = _like(A, layer.A), _like(B, layer.B)
    return Replacement(A, B, {"kept": made.kept, "error": error})


def _like(factor: Any, there: Tensor) -> Tensor:
    """Return a factor in the dtype, and on the device, of another one."""
    found: Tensor = to_torch(factor).to(there)
    return found

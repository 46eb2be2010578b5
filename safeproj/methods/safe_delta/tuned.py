"""A full fine-tune is run layer by layer, and each weight corrected as its inputs are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from safeproj.checkpoint.expression import Matrix, matrix, stored_names
from safeproj.checkpoint.interface import stored_dtype
from safeproj.errors import SafeprojError
from safeproj.lm import models
from safeproj.lm.layers import plain_weight
from safeproj.lm.live import LiveWeight, code_of
from safeproj.lm.passes import walking
from safeproj.methods.differences import Rows
from safeproj.methods.safe_delta.formulas import corrected
from safeproj.methods.safe_delta.inputs import root_of, safety_batches
from safeproj.methods.safe_delta.method import SafeDelta
from safeproj.methods.safe_delta.sources import Delta
from safeproj.plan.full import PlannedWeight, Tuned
from safeproj.storage.arrays import Array, cast, from_torch, single, to_torch

if TYPE_CHECKING:
    from safeproj.run.options import Options


def rewritten(
    method: SafeDelta,
    tuned: Tuned,
    weights: Sequence[PlannedWeight],
    options: Options,
) -> dict[str, Delta]:
    """Return what takes the place of each change, by module.

    The fine-tune is loaded, run on the safety data, and its weights are replaced as the data comes
    to them, by what is written: each layer reads what the corrected ones before it make. One
    statistic is held at a time. The corrected weights stay in the model's memory.

    Args:
        method: what is done.
        tuned: the fine-tune.
        weights: those that are corrected.
        options: how the model is run.

    Raises:
        SafeprojError: the model cannot be run, or a weight not be corrected.
    """
    batches = safety_batches(method, options.chat)
    model = models.load_model(tuned.folder, models.wide_device(options.device))
    planned = {each.name: each for each in weights}
    layers = {name: _layer(model, name) for name in planned}
    found: dict[str, Delta] = {}
    with models.quietly(), walking(model, layers, batches, options.on_batch) as walk:
        line = walk.line(batches)
        for group in walk.groups:
            R = root_of(line, group[0])
            for name in group:
                found[name] = _replaced(method, tuned, planned[name], layers[name], R)
    return found


def _layer(model: nn.Module, name: str) -> nn.Module:
    """Return a layer of the running model.

    Raises:
        SafeprojError: its weight is not there as numbers.
    """
    layer = model.get_submodule(name)
    if plain_weight(layer) is None:
        raise SafeprojError(
            f"{name}: its weight is stored as codes; Safe Delta needs the checkpoint before "
            "quantisation, or leave it out with --exclude"
        )
    return layer


def _replaced(
    method: SafeDelta, tuned: Tuned, weight: PlannedWeight, layer: nn.Module, R: Tensor
) -> Delta:
    """Correct a weight in the running model, as it will be written."""
    before = matrix(weight.before, tuned.aligned.checkpoint)
    aligned, own = _read(before), _read(matrix(weight.tuned, tuned.checkpoint))
    made = corrected(to_torch(aligned).to(R), to_torch(own).to(R.device), R, method.s)
    if not bool(made.weight.isfinite().all()):
        raise SafeprojError(f"{weight.name}: the corrected weight has a value that is not finite")
    (stored, *_) = stored_names(weight.tuned)
    dtype = stored_dtype(tuned.files.spots[stored].dtype)
    new = to_torch(cast(single(from_torch(made.weight)), dtype))
    there = layer.weight
    assert isinstance(there, Tensor)
    is_turned = not isinstance(layer, nn.Linear)  # as a Conv1D has it
    with torch.no_grad():
        there.copy_(new.T if is_turned else new)
    held = LiveWeight(weight.name, "the corrected model", code_of(there), there.detach())
    return Delta(Matrix(held, is_turned), before, made.kept)


def _read(weight: Matrix) -> Array:
    """Return all of a weight, (m, n)."""
    rows = Rows(weight)
    try:
        return rows(range(rows.height))
    finally:
        rows.close()

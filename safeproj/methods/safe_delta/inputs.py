"""What layers read on the safety data, as the correction of a layer needs it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from safeproj.errors import SafeprojError
from safeproj.lm import models
from safeproj.lm.chat import ChatOptions
from safeproj.lm.data import Batch, read_data
from safeproj.lm.layers import add_squares, mirrored
from safeproj.lm.passes import Line, batch_size
from safeproj.methods.safe_delta.formulas import UnreachedError, inverse_root
from safeproj.methods.safe_delta.method import SafeDelta
from safeproj.storage.source import open_folder


def safety_batches(method: SafeDelta, chat: ChatOptions) -> Sequence[Batch]:
    """Return the safety data, as the aligned model's tokenizer reads it.

    Raises:
        SafeprojError: it cannot be used.
    """
    models.require_extra()
    tokenizer = models.load_tokenizer(open_folder(method.sources["aligned"]))
    source = method.sources["safety_data"]
    data = read_data(source, tokenizer, option="--safety-data", chat=chat)
    return data.batches(batch_size(len(data.samples)))


def root_of(line: Line, name: str) -> Tensor:
    """Return `R` (n, n) of what a layer reads: of `H = (2/N) Σ x xᵀ` with damping.

    Raises:
        SafeprojError: an input is not finite.
    """
    total: Tensor | None = None
    count = 0
    for found in line.each(name):
        x = found.double()
        if total is None:
            total = x.new_zeros(x.shape[1], x.shape[1])
        add_squares(total, x)
        count += len(x)
    assert total is not None  # data has at least one sample
    try:
        return inverse_root(mirrored(total).mul_(2.0 / count))
    except UnreachedError as error:
        raise SafeprojError(f"{name}: {error}; expected a model that runs on it") from error

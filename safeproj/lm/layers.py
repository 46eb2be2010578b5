"""The linear layers of a model, which of them read one input, and what they see as it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from safeproj.errors import SafeprojError
from safeproj.lm.data import Batch
from safeproj.lm.places import require_tokens
from safeproj.text import natural_order, shorten

ALL_LINEAR = "all-linear"
"""Every linear layer but the output head, as PEFT means it."""

MEMORY = 4 << 30
"""Default bound on the bytes of the sums that are held at a time."""

OnBatch = Callable[[int, int], None]
"""Called with the number of batches that are done and that there are."""


def find_layers(model: Any, targets: Sequence[str]) -> dict[str, nn.Module]:
    """Return the linear layers of a model that are meant, in natural order.

    Raises:
        SafeprojError: one of `targets` names none.
    """
    head = model.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if is_linear(module)}
    found: dict[str, nn.Module] = {}
    for wanted in targets:
        chosen = {
            name: module
            for name, module in linear.items()
            if (wanted == ALL_LINEAR and module is not head)
            or name == wanted
            or name.endswith(f".{wanted}")
        }
        if not chosen:
            kinds = sorted({name.rpartition(".")[2] for name in linear})
            raise SafeprojError(
                f"--targets {wanted}: the model has no such linear layer; it has {shorten(kinds)}"
            )
        found |= chosen
    if not found:
        raise SafeprojError(f"--targets: names nothing; expected layers, or {ALL_LINEAR}")
    return {name: found[name] for name in sorted(found, key=natural_order)}


def out_features(layer: nn.Module) -> int:
    """Return m of an `nn.Linear` or `Conv1D`."""
    found = layer.nf if _is_conv1d(layer) else layer.out_features
    return int(found)  # type: ignore[arg-type]


def in_features(layer: nn.Module) -> int:
    """Return n of an `nn.Linear` or `Conv1D`."""
    found = layer.nx if _is_conv1d(layer) else layer.in_features
    return int(found)  # type: ignore[arg-type]


def plain_weight(layer: nn.Module) -> Tensor | None:
    """Return `W` (m, n), None where it is stored as codes or is not in memory."""
    weight = layer.weight
    m, n = out_features(layer), in_features(layer)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.is_meta:
        return None
    turned = weight.detach().T if _is_conv1d(layer) else weight.detach()
    return turned if turned.shape == (m, n) and weight.element_size() > 1 else None


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer whose inputs and outputs are looked at."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


@contextmanager
def running(model: Any, layers: Mapping[str, nn.Module]) -> Iterator[Callable[[Batch], None]]:
    """Yield what runs the model over a batch, without dropout and without its head if it can."""
    backbone = getattr(model, "base_model", model)
    inside = {id(module) for module in backbone.modules()}
    part = backbone if all(id(layer) in inside for layer in layers.values()) else model
    options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}

    @torch.no_grad()
    def run(batch: Batch) -> None:
        require_tokens(model, (int(batch["input_ids"].max()),))
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        part(**inputs, **options)

    training = model.training
    model.eval()
    try:
        yield run
    finally:
        model.train(training)


def sharing_inputs(
    layers: Mapping[str, nn.Module], run: Callable[[Batch], None], batch: Batch
) -> list[list[str]]:
    """Return the names of layers in groups that read the same input, as a batch shows it.

    Args:
        layers: name to layer.
        run: what `running` yields.
        batch: its first sample is run.

    Raises:
        SafeprojError: a layer does not run once in a forward pass.
    """
    sharing: list[list[str]] = []
    last: list[Tensor] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if sharing and inputs[0] is last[0]:
                sharing[-1].append(name)
            else:
                sharing.append([name])
                last[:] = [inputs[0]]

        return see

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(hook(name)).remove)
        run({name: tensor[:1] for name, tensor in batch.items()})
    seen = [name for names in sharing for name in names]
    missing, repeated = layers.keys() - seen, [name for name in layers if seen.count(name) > 1]
    if missing or repeated:
        raise SafeprojError(
            f"{shorten(sorted(missing) or repeated)}: expected to run once in a forward pass, runs "
            f"{'never' if missing else 'more often'}; leave it out of --targets"
        )
    return sharing


class Sized(Protocol):
    """Something that takes memory."""

    @property
    def nbytes(self) -> int:
        """How much."""


S = TypeVar("S", bound=Sized)


def fitting(sums: Sequence[S], memory: int) -> list[list[S]]:
    """Return what takes memory in groups that fit into so many bytes, in order.

    A single one may be larger.
    """
    groups: list[list[S]] = []
    room = 0
    for each in sums:
        if not groups or each.nbytes > room:
            groups.append([])
            room = memory
        groups[-1].append(each)
        room -= each.nbytes
    return groups


def rows_at(name: str, tensor: Tensor, mask: Tensor) -> Tensor:
    """Return the rows at the positions of a mask (batch, positions), (N, features)."""
    if tensor.shape[:-1] not in (mask.shape, (mask.numel(),)):
        raise SafeprojError(
            f"{name}: sees {list(tensor.shape[:-1])} rows where the batch has {list(mask.shape)} "
            "positions, so nothing tells which is which (an expert?); leave it out of "
            "--targets"
        )
    return tensor.detach().reshape(-1, tensor.shape[-1])[mask.flatten().to(tensor.device)]


COLUMNS = 256
"""Rows of a product of which nothing below the diagonal is needed that are computed at a time."""

ROWS = 1024
"""Rows whose products are summed in their own precision."""


def add_squares(total: Tensor, rows: Tensor) -> None:
    """Add `rowsᵀ rows` (n, n) to a total in float64: what is above its diagonal, see `mirrored`.

    Of `ROWS` rows at a time the products are summed in the rows' precision, and those sums in that
    of the total.

    Args:
        total: (n, n), changed in place.
        rows: (N, n), float32 or float64.
    """
    for begin in range(0, len(rows), ROWS):
        some = rows[begin : begin + ROWS]
        for first in range(0, len(total), COLUMNS):
            part = some[:, first : first + COLUMNS]
            total[first : first + COLUMNS, first:] += part.T @ some[:, first:]


def mirrored(total: Tensor) -> Tensor:
    """Return a symmetric matrix of which only what is above the diagonal is given."""
    return total.triu() + total.triu(1).T

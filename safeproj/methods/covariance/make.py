"""Statistics of a model on data, written to a file moment by moment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from safeproj.lm.data import Batch
from safeproj.lm.layers import MEMORY, OnBatch, find_layers, in_features, out_features
from safeproj.methods.covariance.file import KIND, MOMENT, ROWS
from safeproj.methods.covariance.moments import InputMoment, input_moments
from safeproj.methods.recorded import linear_parameters, recorded_document, write_recorded
from safeproj.names.layout import CONV1D, LINEAR
from safeproj.storage.arrays import Array, from_torch


def make_statistics(
    model: Any,
    batches: Sequence[Batch],
    out: Path,
    targets: Sequence[str],
    inputs: Mapping[str, Mapping[str, Any]],
    *,
    positions: str = "all",
    memory: int = MEMORY,
    on_batch: OnBatch | None = None,
    overwrite: bool = False,
) -> int:
    """Write the second moments of what layers read to a file, and return its size in bytes.

    Of the moments only as many are in memory at a time as fit into `memory`.

    Args:
        model: the aligned model.
        batches: the data.
        out: the file; it appears complete or not at all. See `recorded.check_file`.
        targets: names of layers or their last parts, or `all-linear`.
        inputs: the identities of `aligned` and `data`, as `lm.models.recorded_inputs` returns them.
        positions: one of `moments.POSITIONS`.
        memory: bytes of sums that are held at a time.
        on_batch: told about the progress.
        overwrite: whether statistics that are at `out` may be replaced.

    Raises:
        SafeprojError: a target names nothing or cannot be used, or the file cannot be written.
    """
    layers = find_layers(model, targets)
    weights: dict[str, dict[str, Any]] = {}
    counts: set[int] = set()

    def tensors() -> Iterator[tuple[str, Array]]:
        for each in input_moments(
            model, layers, batches, positions=positions, memory=memory, on_batch=on_batch
        ):
            name = f"{each.layers[0]}.weight.{MOMENT if each.whole else ROWS}"
            weights.update(_weights(layers, each, name))
            counts.add(each.positions)
            yield name, from_torch(each.matrix)

    def document() -> dict[str, Any]:
        shapes = {name: _shape(layer) for name, layer in layers.items()}
        layouts = {
            name: LINEAR if isinstance(layer, nn.Linear) else CONV1D
            for name, layer in layers.items()
        }
        data = {**inputs["data"], "positions": max(counts)}
        return recorded_document(
            KIND,
            options={"targets": list(targets), "positions": positions},
            inputs={"aligned": dict(inputs["aligned"]), "data": data},
            config=model.config.to_dict(),
            parameters=linear_parameters(shapes, layouts),
            weights={f"{name}.weight": weights[name] for name in layers},
            by_torch=True,
        )

    return write_recorded(out, KIND, tensors(), document, overwrite=overwrite)


def _shape(layer: nn.Module) -> tuple[int, int]:
    return out_features(layer), in_features(layer)


def _weights(
    layers: Mapping[str, nn.Module], moment: InputMoment, tensor: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what is recorded of the layers that read an input."""
    for name in moment.layers:
        shape = list(_shape(layers[name]))
        yield name, {"shape": shape, "tensor": tensor, "trace": moment.trace}

"""The safety module of a model: for each layer the directions that updates are kept out of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from safeproj.adapter.files import check_values, read_safetensors
from safeproj.errors import SafeprojError
from safeproj.lm.data import IGNORED, Batch
from safeproj.lm.layers import ALL_LINEAR, MEMORY, OnBatch, find_layers, in_features
from safeproj.methods.recorded import (
    check_file,
    linear_parameters,
    recorded_document,
    write_recorded,
)
from safeproj.methods.salora.directions import Directions, output_directions
from safeproj.methods.salora.file import BASIS, KIND, VALUES, open_safety_module
from safeproj.methods.salora.formulas import NotOrthonormalError, require_orthonormal
from safeproj.names.layout import CONV1D, LINEAR, Layout
from safeproj.storage.arrays import Array, from_torch, to_torch
from safeproj.storage.published import published
from safeproj.storage.source import LocalFolder, Src, StrPath, src
from safeproj.text import shorten

RANK = 32
"""Default `r_s` and `d_s`, the authors' own."""


@dataclass(frozen=True)
class SafetyModule:
    """The fixed safety module `C_S = I - U_C U_Cᵀ` of each layer (SaLoRA, section 3.1).

    Attributes:
        directions: path of a layer in the model to its `U_C`, in natural order.
        layouts: path to how the model stores the layer's weight.
        in_features: path to n.
        inputs: what it was made from, for its file: `aligned` and `data`.
        options: how it was made.
        config: `config.json` of the model.
    """

    directions: dict[str, Directions]
    layouts: dict[str, Layout] = field(repr=False)
    in_features: dict[str, int] = field(repr=False)
    inputs: dict[str, dict[str, Any]] = field(repr=False)
    options: dict[str, Any]
    config: dict[str, Any] = field(repr=False)

    @property
    def rank(self) -> int:
        """The number of directions of a layer; some may have fewer, as many as there are."""
        return max(each.rank for each in self.directions.values())

    def cut(self, rank: int | None) -> SafetyModule:
        """Return it with the first `rank` directions of each layer; all for None.

        Raises:
            SafeprojError: it holds fewer.
        """
        if rank is None:
            return self
        if not 1 <= rank <= self.rank:
            raise SafeprojError(
                f"rank {rank}: the safety module holds {self.rank} directions, expected 1 to "
                f"{self.rank}"
            )
        found = {name: each.cut(rank) for name, each in self.directions.items()}
        return replace(self, directions=found, options={**self.options, "rank": rank})

    def shape(self, name: str) -> tuple[int, int]:
        """Return the (m, n) of a layer."""
        return self.directions[name].U.shape[0], self.in_features[name]

    def require(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Refuse layers that it does not hold, or not in the same shape.

        Args:
            shapes: path of a layer to its (m, n).

        Raises:
            SafeprojError: there are some.
        """
        missing = [name for name in shapes if name not in self.directions]
        if missing:
            raise SafeprojError(
                f"the safety module holds nothing for {shorten(missing)}; make one with these "
                "layers among its targets"
            )
        for name, shape in shapes.items():
            if self.shape(name) != shape:
                found, own = (" × ".join(map(str, each)) for each in (shape, self.shape(name)))
                raise SafeprojError(
                    f"{name}: is {found} (out, in), and {own} in the safety module; is that of "
                    "another model?"
                )

    def captured(self) -> dict[str, float]:
        """Return for each layer the share of its outputs' energy that the directions hold."""
        return {
            name: float(each.singular_values.double().square().sum()) / each.energy
            for name, each in self.directions.items()
        }

    def save(self, path: StrPath, *, overwrite: bool = False) -> int:
        """Write it to a file, which appears complete or not at all, and return its size.

        Raises:
            SafeprojError: it cannot be written.
        """
        check_file(Path(path), overwrite, KIND)
        return write_recorded(
            Path(path), KIND, self._tensors(), self._document, overwrite=overwrite
        )

    def _tensors(self) -> Iterator[tuple[str, Array]]:
        for name, each in self.directions.items():
            yield f"{name}.weight.{BASIS}", from_torch(each.U)
            yield f"{name}.weight.{VALUES}", from_torch(each.singular_values)

    def _document(self) -> dict[str, Any]:
        shapes = {name: self.shape(name) for name in self.directions}
        weights = {
            f"{name}.weight": {
                "shape": list(shapes[name]),
                "rank": each.rank,
                "energy": each.energy,
            }
            for name, each in self.directions.items()
        }
        parameters = linear_parameters(shapes, self.layouts)
        return recorded_document(
            KIND,
            self.options,
            self.inputs,
            self.config,
            parameters,
            weights,
            by_torch=True,
        )

    @staticmethod
    def load(source: Src) -> SafetyModule:
        """Return the safety module of a file, or of a directory or Hub repository that holds one.

        Raises:
            SafeprojError: there is none, or it is damaged.
        """
        source = src(source)
        file = open_safety_module(source).file
        _, tensors = read_safetensors(LocalFolder(file.path.parent, source), file.path.name)
        check_values(source, tensors)
        positions = int(file.document["inputs"]["data"]["positions"])
        directions, layouts, columns = {}, {}, {}
        for key, recorded in file.weights.items():
            name, U = key.removesuffix(".weight"), tensors[f"{key}.{BASIS}"]
            try:
                require_orthonormal(U.T @ U)
            except NotOrthonormalError as error:
                raise SafeprojError(f"{file.path}: {key}.{BASIS}: {error}") from error
            values = tensors[f"{key}.{VALUES}"]
            directions[name] = Directions(to_torch(U), to_torch(values), recorded.energy, positions)
            layouts[name] = file.content.parameters[key][1]
            columns[name] = recorded.shape[1]
        document = file.document
        inputs, options = dict(document["inputs"]), dict(document["options"])
        return SafetyModule(directions, layouts, columns, inputs, options, file.config)


def safety_module(
    model: Any,
    batches: Iterable[Batch],
    targets: Sequence[str] = (ALL_LINEAR,),
    rank: int = RANK,
    *,
    memory: int = MEMORY,
    on_batch: OnBatch | None = None,
    inputs: Mapping[str, Mapping[str, Any]] | None = None,
) -> SafetyModule:
    """Find the safety module of an aligned model from safety data (SaLoRA, section 3.1).

    `U_C` (m, r_s) are the top right singular vectors of `Y_h = X_h Wᵀ` (N, m), where `X_h` (N, n)
    are the inputs of a layer at the N response positions of harmful prompts with safe responses.

    Args:
        model: the aligned model, of transformers; it may be spread over devices.
        batches: the safety data, each batch with `input_ids`, `attention_mask` and `labels` that
            are -100 outside of the responses; `read_data(...).batches()` makes them of a file.
        targets: names of layers or their last parts, as PEFT's `target_modules`; or `all-linear`.
        rank: r_s; fewer directions are kept where the others are rounding noise.
        memory: bytes of sums that are held at a time: the model runs over the data once for each
            group of layers that fits.
        on_batch: told the number of batches that are done and that there are.
        inputs: identities of `aligned` and `data` for the file.

    Returns:
        `U_C` of each layer, which `save` writes to a file.

    Raises:
        SafeprojError: a target names nothing or cannot be used, or the data has no responses.
    """
    layers = find_layers(model, targets)
    data = list(batches)
    found = output_directions(model, layers, data, rank, memory=memory, on_batch=on_batch)
    return SafetyModule(
        directions=found,
        layouts={
            name: LINEAR if isinstance(layer, nn.Linear) else CONV1D
            for name, layer in layers.items()
        },
        in_features={name: in_features(layer) for name, layer in layers.items()},
        inputs=_inputs(model, data, inputs or {}),
        options={"targets": list(targets), "rank": rank},
        config=model.config.to_dict(),
    )


def _inputs(
    model: Any, data: Sequence[Batch], given: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return what the module was made from, as far as it is known."""
    digest = hashlib.sha256()
    for batch in data:
        for name in ("input_ids", "attention_mask", "labels"):
            digest.update(batch[name].cpu().contiguous().numpy().tobytes())
    name = str(model.config.name_or_path or "model")
    inputs: dict[str, dict[str, Any]] = {
        "aligned": {**published({"source": name}), "sha256": {"files": {}}},
        "data": {
            "source": "batches",
            "sha256": digest.hexdigest(),
            "rows": sum(len(batch["input_ids"]) for batch in data),
            "positions": sum(int((batch["labels"] != IGNORED).sum()) for batch in data),
        },
    }
    return {role: {**each, **given.get(role, {})} for role, each in inputs.items()}

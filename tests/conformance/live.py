"""What `project` leaves in memory, beside what `patch` has written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import safeproj
from tests.conformance import oracle
from tests.conformance.architectures import Built
from tests.support import FACTORS, MANIFEST, read_json


def assert_same_in_memory(pair: Built, model: Any, out: Path, *, own: bool = True) -> None:
    """Project the adapter of a model, and compare it with the patched one bit by bit.

    Args:
        pair: the checkpoints.
        model: with the adapter that was patched; it is changed.
        out: the patched adapter.
        own: whether the adapter is on the aligned weights: they are taken from memory then, unless
            their biases were trained.
    """
    manifest = read_json(out / MANIFEST)
    recorded = manifest["selection"].items()
    wanted: dict[str, Any] = {
        name: tuple(each) if isinstance(each, list) else each for name, each in recorded
    }
    given: dict[str, Any] = {wanted.pop("mode"): True, **wanted}
    own &= model.peft_config["default"].bias == "none"
    method = safeproj.SafeLora(pair.base, None if own else pair.aligned)

    report = safeproj.project(model, method, safeproj.Options(safeproj.Selection(**given)))

    oracle.written(model, out.parent / "in memory")
    before, after = (load_file(path / FACTORS) for path in (out, out.parent / "in memory"))
    assert before.keys() == after.keys()
    assert [key for key, tensor in before.items() if not torch.equal(tensor, after[key])] == []
    found = report.to_dict()
    assert found["modules"] == manifest["modules"]
    assert found["unprojected"] == manifest["unprojected"]
    if own:
        assert found["inputs"]["aligned"]["source"].endswith("in memory")

"""What the tests of other formats share: updates before and after, against the float64 oracle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.conftest import Trio
from tests.support import oracle_C, oracle_cosine, safeproj


def scores(base: Path, aligned: Path, adapter: Path) -> dict[str, float]:
    """Return the cosine and the scale of each module, as the command reports them."""
    result = safeproj(
        "inspect", "--base", base, "--aligned", aligned, "--adapter", adapter, "--format", "json"
    )
    assert result.returncode == 0, result.stderr
    modules = json.loads(result.stdout)["modules"]
    return {f"{m['name']} {what}": m[what] for m in modules for what in ("cosine", "scale")}


def patch(trio: Trio, adapter: Path, out: Path, *options: str) -> dict[str, Any]:
    """Patch an adapter of the trio's models, and return the manifest."""
    result = safeproj(
        "patch", "--base", trio.base, "--aligned", trio.aligned, "--adapter", adapter,
        "--out", out, *options,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    manifest: dict[str, Any] = json.loads((out / "safeproj.json").read_text("utf-8"))
    return manifest


def check(
    manifest: Mapping[str, Any],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    weights: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    """Compare every module with the oracle.

    Args:
        manifest: of the patched adapter.
        before: name of each module to its `ΔW`, the output first.
        after: the same of the patched adapter.
        weights: name to the aligned and the base weight, the output first.
    """
    assert {module["name"] for module in manifest["modules"]} == set(before) == set(after)
    for module in manifest["modules"]:
        name = module["name"]
        C = oracle_C(*weights[name])
        assert module["cosine"] == pytest.approx(oracle_cosine(before[name], C), abs=2e-6), name
        expected = C @ before[name].double() if module["projected"] else before[name].double()
        found = after[name].double()
        assert float((found - expected).norm() / expected.norm()) < 1e-5, name


def trio_weights(trio: Trio, names: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the weights of modules, the output first."""
    found = {}
    for name in names:
        pair = [
            model.get_submodule(name).weight.detach()
            for model in (trio.aligned_model, trio.base_model)
        ]
        turned = name.endswith("embed_tokens")
        found[name] = (pair[0].T, pair[1].T) if turned else (pair[0], pair[1])
    return found

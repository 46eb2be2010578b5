"""Adapters that old versions of PEFT wrote, against the updates that those versions computed.

`lab/old_peft.py` made the files: `expected.safetensors` holds `ΔW` as that version returned it.
What a patched adapter means is decoded here by a rule that first has to reproduce `expected`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.support import FACTORS, MANIFEST, oracle_C, oracle_cosine, read_json, safeproj

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = sorted(FIXTURES.glob("peft-*/*"))
PREFIX = "base_model.model."

OUT_FIRST = {"tiny-gpt-oss": False, "tiny-llama4": False}
"""Models whose expert stacks are (E, in, out), from their source; the others are (E, out, in)."""

PARTS = {
    "tiny-mixtral": {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)},
    "tiny-qwen3-moe": {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
}
"""Models whose files hold one tensor per expert."""


def test_there_are_cases_of_every_version() -> None:
    versions = {case.parent.name for case in CASES}
    assert {"peft-0.7.1", "peft-0.13.2", "peft-0.17.1", "peft-0.18.1", "peft-0.19.0"} <= versions


def weight(tensors: dict[str, Tensor], model: str, name: str) -> Tensor:
    """Return a weight by the name that `expected` gives it, as the running model stores it."""
    for key in (name, f"{name}.weight"):
        if key in tensors:
            return tensors[key]
    if model == "tiny-gpt2":
        return tensors[f"{name.removeprefix('transformer.')}.weight"]
    module, _, leaf = name.rpartition(".")
    if model == "tiny-mixtral":
        module = module.replace("mlp.experts", "block_sparse_moe.experts")
    return torch.stack(
        [
            torch.cat([tensors[f"{module}.{e}.{part}.weight"] for part in PARTS[model][leaf]])
            for e in range(3)
        ]
    )


def decode(tensors: dict[str, Tensor], name: str, expected: Tensor) -> dict[str, Tensor]:
    """Return the readings of a module's factors as an unscaled `ΔW`, of which one is right."""
    found = {}
    embedding = f"{PREFIX}{name}.lora_embedding_A"
    if embedding in tensors:
        return {"embedding": (tensors[embedding[:-1] + "B"] @ tensors[embedding]).T.double()}
    module = name if expected.dim() == 2 else name.removesuffix(".weight")
    places = (module, f"{module.rpartition('.')[0]}.base_layer", module.rpartition(".")[0])
    for place in places:
        if f"{PREFIX}{place}.lora_A.weight" not in tensors:
            continue
        A = tensors[f"{PREFIX}{place}.lora_A.weight"].double()
        B = tensors[f"{PREFIX}{place}.lora_B.weight"].double()
        if expected.dim() == 2:
            found[f"{place}, direct"], found[f"{place}, turned"] = B @ A, (B @ A).T
        else:
            r = len(A) // len(expected)
            stack = torch.stack([B[:, e :: len(expected)] @ A[e * r : e * r + r] for e in range(3)])
            found[f"{place}, direct"], found[f"{place}, turned"] = stack, stack.mT
    return found


def reading(tensors: dict[str, Tensor], name: str, expected: Tensor) -> tuple[str, float]:
    """Return the reading that reproduces what PEFT computed, and its scale."""
    for how, delta in decode(tensors, name, expected).items():
        if delta.shape == expected.shape:
            scale = float((delta * expected).sum() / delta.square().sum())
            if float((scale * delta - expected).norm() / expected.norm()) < 1e-5:
                return how, scale
    raise AssertionError(f"no reading of {name} gives what PEFT computed")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}-{case.name}")
def test_what_an_old_version_meant_is_projected(case: Path, tmp_path: Path) -> None:
    adapter, out = case / "adapter", tmp_path / "out"
    model = read_json(adapter / "adapter_config.json")["base_model_name_or_path"]
    result = safeproj(
        "patch", "--base", FIXTURES / "models" / model / "base",
        "--aligned", FIXTURES / "models" / model / "aligned",
        "--adapter", adapter, "--out", out, "--all",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr

    expected = load_file(case / "expected.safetensors")
    before, after = load_file(adapter / FACTORS), load_file(out / FACTORS)
    files = {
        side: load_file(FIXTURES / "models" / model / side / "model.safetensors")
        for side in ("base", "aligned")
    }
    modules = {module["name"]: module for module in read_json(out / MANIFEST)["modules"]}
    family, seen = model.removesuffix("-square"), set()
    for name, delta in expected.items():
        how, scale = reading(before, name, delta)
        patched = scale * decode(after, name, delta)[how]
        pair = [weight(files[side], family, name).double() for side in ("aligned", "base")]
        stacked = delta.dim() == 3
        turned = "embed" in name or family == "tiny-gpt2"
        if stacked:
            turned = not OUT_FIRST.get(family, True)
        for e in range(len(delta)) if stacked else [None]:
            matrices = [t if e is None else t[e] for t in (*pair, delta.double(), patched)]
            W_aligned, W_base, old, new = (t.T if turned else t for t in matrices)
            C = oracle_C(W_aligned, W_base)
            shown = name if e is None else f"{name.removesuffix('.weight')}[{e}]"
            seen.add(shown)
            assert modules[shown]["cosine"] == pytest.approx(oracle_cosine(old, C), abs=2e-6)
            assert modules[shown]["shape"] == list(old.shape)
            assert float((new - C @ old).norm() / (C @ old).norm()) < 1e-5, shown
    assert seen == set(modules)
    stacks = any(delta.dim() == 3 for delta in expected.values())
    assert ("serve the adapter" in result.stderr) is stacks

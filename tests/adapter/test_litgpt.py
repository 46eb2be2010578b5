"""Adapters of litgpt, as litgpt itself wrote them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from safeproj.adapter import read_adapter
from safeproj.errors import SafeprojError
from tests.adapter.oracle import check
from tests.support import read_json, safeproj, snapshot

WEIGHTS = "lit_model.pth.lora"
FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = sorted(FIXTURES.glob("litgpt-*/*"))
Q, KV, R, SCALE = 16, 8, 2, 3.0
"""Rows of q, and of k and of v, in both models; the rank; alpha / r."""

ENABLED = {"llama-qv": "qv", "llama-key": "k", "llama-all": "qkv", "mixtral-all": "qkv"}
LLAMA = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
    "mlp.gate": "block_sparse_moe.gate",
}
EXPERT = {"fc_1": "w1", "fc_2": "w3", "proj": "w2"}


def updates(path: Path, enabled: str) -> dict[str, Tensor]:
    """Return `ΔW` of each module from the factors, by litgpt's definition."""
    tensors = torch.load(path, weights_only=True)["model"]
    found = {}
    for key in tensors:
        if not key.endswith(".lora_A"):
            continue
        stem = key.removesuffix(".lora_A")
        A, B = (tensors[f"{stem}.lora_{side}"].double() for side in "AB")
        if not stem.endswith(".attn.qkv"):
            found[renamed(stem)] = SCALE * B @ A
            continue
        prefix = f"model.layers.{stem.split('.')[2]}.self_attn"
        rows = [Q if part == "q" else KV for part in enabled]
        parts = zip(enabled, A.split(R), B.split(rows), strict=True)
        found |= {f"{prefix}.{part}_proj": SCALE * b @ a for part, a, b in parts}
    return found


def renamed(stem: str) -> str:
    if stem == "lm_head":
        return stem
    _, _, layer, leaf = stem.split(".", 3)
    if leaf.startswith("mlp.experts."):
        _, _, expert, part = leaf.split(".")
        return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{EXPERT[part]}"
    return f"model.layers.{layer}.{LLAMA[leaf]}"


def model_of(case: Path) -> Path:
    with safe_open(case / "expected.safetensors", framework="pt") as file:
        return FIXTURES / "models" / str(file.metadata()["model"])


def patch(case: Path, out: Path, *options: str, adapter: Path | None = None) -> Any:
    model = model_of(case)
    return safeproj(
        "patch", "--base", model / "base", "--aligned", model / "aligned",
        "--adapter", adapter or case / "adapter", "--out", out, *options,
    )  # fmt: skip


def test_there_are_cases() -> None:
    assert {case.name for case in CASES} == set(ENABLED)


@pytest.mark.parametrize("options", [["--all"], ["--layers", "3"]], ids=" ".join)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_litgpt_wrote(case: Path, tmp_path: Path, options: list[str]) -> None:
    expected = load_file(case / "expected.safetensors")
    before = updates(case / "adapter" / WEIGHTS, ENABLED[case.name])
    assert before.keys() == expected.keys()
    for name, delta in expected.items():  # the definition used here is litgpt's own
        assert torch.allclose(before[name], delta.double(), atol=1e-6), name

    result = patch(case, tmp_path / "out", *options)

    assert result.returncode == 0, result.stderr
    model = model_of(case)
    aligned, base = (load_file(model / side / "model.safetensors") for side in ("aligned", "base"))
    weights = {name: (aligned[f"{name}.weight"], base[f"{name}.weight"]) for name in expected}
    manifest = read_json(tmp_path / "out" / "safeproj.json")
    check(manifest, before, updates(tmp_path / "out" / WEIGHTS, ENABLED[case.name]), weights)
    given, found = snapshot(case / "adapter"), snapshot(tmp_path / "out")
    assert set(found) == {*given, "README.md", "safeproj.json"}
    assert {name for name in given if found[name] != given[name]} == {WEIGHTS}
    old, new = (
        torch.load(path / WEIGHTS, weights_only=True)
        for path in (case / "adapter", tmp_path / "out")
    )
    assert old.keys() == new.keys() == {"model"}
    assert list(old["model"]) == list(new["model"])
    assert all(tensor.shape == old["model"][name].shape for name, tensor in new["model"].items())


def test_the_part_of_a_weight_that_is_not_projected_is_kept(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "llama-all")
    result = patch(case, tmp_path / "out", "--all", "--include", r"0\.self_attn\.k_proj")
    assert result.returncode == 0, result.stderr
    old, new = (
        torch.load(path / WEIGHTS, weights_only=True)["model"]
        for path in (case / "adapter", tmp_path / "out")
    )
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    assert changed == ["transformer.h.0.attn.qkv.lora_B"]
    different = (old[changed[0]] != new[changed[0]]).any(1)
    assert different.tolist() == [False] * Q + [True] * KV + [False] * KV


def test_the_gate_takes_what_was_patched(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "llama-all")
    assert patch(case, tmp_path / "out", "--all").returncode == 0
    model = model_of(case)
    result = safeproj(
        "verify", "--base", model / "base", "--aligned", model / "aligned",
        "--original", case / "adapter", tmp_path / "out",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr


def test_scalings() -> None:
    adapter = read_adapter(str(CASES[0] / "adapter"))
    assert set(adapter.format.scalings(adapter, adapter.modules).values()) == {SCALE}


def test_the_file_stands_for_its_folder() -> None:
    one, other = (read_adapter(str(CASES[0] / "adapter" / name)) for name in ("", WEIGHTS))
    assert one.modules == other.modules


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    found = torch.load(folder / WEIGHTS, weights_only=True)
    change(found["model"])
    torch.save(found, folder / WEIGHTS)


def settings(folder: Path, name: str, **values: object) -> None:
    import yaml

    found = yaml.safe_load((folder / name).read_text("utf-8"))
    (folder / name).write_text(yaml.dump({**found, **values}), "utf-8")


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code ran",))


QKV = "transformer.h.0.attn.qkv"
FAULTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no settings": (lambda p: (p / "hyperparameters.yaml").unlink(), ("hyperparameters.yaml",)),
    "no model": (lambda p: (p / "model_config.yaml").unlink(), ("model_config.yaml",)),
    "no yaml": (
        lambda p: (p / "model_config.yaml").write_text("a: [", "utf-8"),
        ("model_config.yaml cannot be read",),
    ),
    "yaml that runs code": (
        lambda p: (p / "hyperparameters.yaml").write_text("!!python/object/apply:print [x]"),
        ("hyperparameters.yaml cannot be read",),
    ),
    "another rank": (
        lambda p: settings(p, "hyperparameters.yaml", lora_r=4),
        (QKV, "rank 4", "[8, in] and [24, 4]"),
    ),
    "a rank that is none": (
        lambda p: settings(p, "hyperparameters.yaml", lora_r=True),
        ("lora_r", "whole number"),
    ),
    "other layers": (
        lambda p: settings(p, "hyperparameters.yaml", lora_key=True),
        (QKV, "q_proj, k_proj, v_proj"),
    ),
    "other heads": (lambda p: settings(p, "model_config.yaml", n_head=3), (QKV, "[32, 2]")),
    "half a pair": (lambda p: edit(p, lambda t: t.pop(f"{QKV}.lora_B")), ("has no", "lora_B")),
    "another tensor": (
        lambda p: edit(p, lambda t: t.update({"lm_head.weight": torch.ones(20, 16)})),
        ("lm_head.weight", "nothing else"),
    ),
    "an unknown layer": (
        lambda p: edit(
            p,
            lambda t: t.update(
                {f"transformer.h.0.x.lora_{s}": torch.ones(2, 2) for s in "AB"}
            ),
        ),
        ("transformer.h.0.x", "not known"),
    ),
    "not finite": (
        lambda p: edit(p, lambda t: t.update({f"{QKV}.lora_B": torch.full((24, 2), torch.nan)})),
        ("NaN",),
    ),
    "code": (
        lambda p: torch.save({"model": {"x": _Runs()}}, p / WEIGHTS),
        ("cannot be loaded as plain tensors",),
    ),
    "nothing": (lambda p: torch.save({"model": {}}, p / WEIGHTS), ("holds no tensor",)),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), FAULTS.values(), ids=FAULTS)
def test_refused(tmp_path: Path, damage: Callable[[Path], object], words: tuple[str, ...]) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(FIXTURES / "litgpt-0.5.13" / "llama-qv" / "adapter", folder)
    damage(folder)
    with pytest.raises(SafeprojError) as error:
        read_adapter(str(folder))
    assert str(error.value).isprintable()
    for word in words:
        assert word in str(error.value)

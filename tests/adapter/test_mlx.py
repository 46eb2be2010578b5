"""Adapters of mlx-lm: as mlx-lm itself wrote them, and as its source lays them out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from safeproj.adapter import read_adapter
from safeproj.errors import SafeprojError
from tests.adapter.oracle import check, patch, scores, trio_weights
from tests.conftest import Trio
from tests.support import (
    CONFIG,
    FACTORS,
    assert_refused,
    change_json,
    deltas,
    read_json,
    safeproj,
    save_adapter,
    snapshot,
)

WEIGHTS = "adapters.safetensors"
FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = sorted(FIXTURES.glob("mlx-lm-*/*"))

SCALE = 2.0
"""Of the adapters made here: alpha / r of PEFT's."""


def mlx_updates(folder: Path, scale: float) -> dict[str, Tensor]:
    """Return `ΔW` of each module from the factors, the output first, by mlx-lm's definition."""
    tensors = load_file(folder / WEIGHTS)
    found = {}
    for key in tensors:
        if not key.endswith(".lora_a"):
            continue
        path = key.removesuffix(".lora_a")
        a, b = tensors[key].double(), tensors[f"{path}.lora_b"].double()
        if b.dim() == 2:  # a layer of one weight: y + scale · (x a) b
            found[path] = scale * (a @ b).T
            continue
        leaf = path.rpartition(".")[2]
        parent = path.removesuffix(f".switch_mlp.{leaf}")
        for e in range(len(b)):
            found[f"{parent}.experts.{e}.{leaf}"] = (
                scale * b[e] @ a.reshape(len(b), -1, a.shape[-1])[e]
            )
    return found


def as_mlx(peft: Path, out: Path, **settings: Any) -> Path:
    """Write a PEFT adapter as mlx-lm does."""
    out.mkdir()
    tensors = {}
    for key, tensor in load_file(peft / FACTORS).items():
        name = key.removeprefix("base_model.model.").removesuffix(".weight")
        name = name.replace(".lora_A", ".lora_a").replace(".lora_B", ".lora_b")
        name = name.replace(".lora_magnitude_vector", ".m")
        name = name.replace(".lora_embedding_A", ".lora_a").replace(".lora_embedding_B", ".lora_b")
        tensors[name] = tensor.T.contiguous() if "lora_" in name else tensor
    save_file(tensors, out / WEIGHTS, metadata={"format": "mlx", "by": "a test"})
    config = {
        "fine_tune_type": "lora",
        "lora_parameters": {"rank": 4, "scale": SCALE, "dropout": 0.0},
        "num_layers": 2,
    }
    (out / CONFIG).write_text(json.dumps({**config, **settings}, indent=4), "utf-8")
    return out


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_mlx_lm_wrote(case: Path, tmp_path: Path) -> None:
    expected = load_file(case / "expected.safetensors")
    with safe_open(case / "expected.safetensors", framework="pt") as file:
        model = FIXTURES / "models" / file.metadata()["model"]
    # The definition used below is mlx-lm's own.
    before = mlx_updates(case / "adapter", 3.0)
    ours = stacked(before, expected)
    for name, delta in expected.items():
        assert torch.allclose(ours[name], delta.double(), atol=1e-6), name

    out = tmp_path / "out"
    result = safeproj(
        "patch", "--base", model / "base", "--aligned", model / "aligned",
        "--adapter", case / "adapter", "--out", out, "--all",
    )  # fmt: skip

    assert result.returncode == 0, result.stderr
    assert (out / CONFIG).read_bytes() == (case / "adapter" / CONFIG).read_bytes()
    aligned, base = (load_file(model / side / "model.safetensors") for side in ("aligned", "base"))
    manifest = read_json(out / "safeproj.json")
    names = {module["name"] for module in manifest["modules"]}
    after = mlx_updates(out, 3.0)
    if "mixtral" in case.name:  # what Mixtral's own files call them
        before, after = ({mixtral(n): d for n, d in found.items()} for found in (before, after))
    weights = {
        n: (turned(n, aligned[f"{n}.weight"]), turned(n, base[f"{n}.weight"])) for n in names
    }
    check(manifest, before, after, weights)
    assert all(module["projected"] for module in manifest["modules"])


def stacked(found: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return updates as mlx-lm's `fuse` gives them: (vocabulary, d), (E, out, in)."""
    result = {}
    for name, delta in like.items():
        if delta.dim() == 3:
            result[name] = torch.stack(
                [found[name.replace("switch_mlp", f"experts.{e}")] for e in range(len(delta))]
            )
        else:
            result[name] = turned(name, found[name])
    return result


def mixtral(name: str) -> str:
    for ours, theirs in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
        name = name.replace(ours, theirs)
    return name


def turned(name: str, weight: Tensor) -> Tensor:
    return weight.T if name.endswith("embed_tokens") else weight


def test_there_are_cases() -> None:
    assert len(CASES) >= 5


@pytest.mark.parametrize("options", [["--all"], ["--layers", "3"]], ids=" ".join)
def test_the_same_adapter_in_both_forms(trio: Trio, tmp_path: Path, options: list[str]) -> None:
    peft = save_adapter(trio.aligned_model, tmp_path / "peft", target_modules="all-linear")
    adapter = as_mlx(peft, tmp_path / "mlx")
    before = mlx_updates(adapter, SCALE)
    for name, delta in deltas(trio.aligned_model, peft).items():
        assert torch.allclose(before[name], delta, atol=1e-6)

    manifest = patch(trio, adapter, tmp_path / "out", *options)

    check(manifest, before, mlx_updates(tmp_path / "out", SCALE), trio_weights(trio, before))
    in_peft, in_mlx = (scores(trio.base, trio.aligned, path) for path in (peft, adapter))
    assert in_mlx == pytest.approx(in_peft, rel=1e-6)


def test_what_is_not_projected_is_kept(trio: Trio, tmp_path: Path) -> None:
    adapter = as_mlx(trio.adapter, tmp_path / "mlx")
    (adapter / "0000100_adapters.safetensors").write_bytes((adapter / WEIGHTS).read_bytes())
    (adapter / "notes.txt").write_text("mine")
    out = tmp_path / "out"
    result = safeproj(
        "patch", "--base", trio.base, "--aligned", trio.aligned, "--adapter", adapter,
        "--out", out, "--layers", "1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "left out: 0000100_adapters.safetensors" in result.stderr
    (adapter / "0000100_adapters.safetensors").unlink()
    given, found = snapshot(adapter), snapshot(out)
    assert set(found) == {*given, "README.md", "safeproj.json"}
    assert {name for name in given if found[name] != given[name]} == {WEIGHTS}
    assert b"library_name: mlx" in (out / "README.md").read_bytes()
    before, after = load_file(adapter / WEIGHTS), load_file(out / WEIGHTS)
    with safe_open(out / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "mlx", "by": "a test"}
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == set(read_json(out / "safeproj.json")["output"]["projected"])
    assert len(changed) == 1
    assert header_order(out / WEIGHTS) == header_order(adapter / WEIGHTS)


def header_order(path: Path) -> list[str]:
    data = path.read_bytes()
    return list(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]))


def test_a_patched_adapter_can_be_replaced(trio: Trio, tmp_path: Path) -> None:
    adapter = as_mlx(trio.adapter, tmp_path / "mlx")
    patch(trio, adapter, tmp_path / "out", "--layers", "1")
    once = (tmp_path / "out" / WEIGHTS).read_bytes()
    patch(trio, adapter, tmp_path / "out", "--all", "--overwrite")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() != once


def test_the_weights_file_stands_for_its_folder(trio: Trio, tmp_path: Path) -> None:
    adapter = as_mlx(trio.adapter, tmp_path / "mlx")
    assert scores(trio.base, trio.aligned, adapter / WEIGHTS) == scores(
        trio.base, trio.aligned, adapter
    )


def test_an_embedding_and_a_head(trio: Trio, tmp_path: Path) -> None:
    peft = save_adapter(
        trio.aligned_model, tmp_path / "peft", target_modules=["embed_tokens", "lm_head"]
    )
    tensors = {k: t for k, t in load_file(peft / FACTORS).items() if "base_layer" not in k}
    save_file(tensors, peft / FACTORS, metadata={"format": "pt"})
    adapter = as_mlx(peft, tmp_path / "mlx")
    before = mlx_updates(adapter, SCALE)
    assert before["model.embed_tokens"].shape == (32, 50)
    manifest = patch(trio, adapter, tmp_path / "out", "--all")
    check(manifest, before, mlx_updates(tmp_path / "out", SCALE), trio_weights(trio, before))
    assert scores(trio.base, trio.aligned, adapter) == pytest.approx(
        scores(trio.base, trio.aligned, peft), rel=1e-6
    )


def test_a_head_with_more_rows_than_the_base_has(trio: Trio, tmp_path: Path) -> None:
    """The rows that both checkpoints have are projected, the others kept."""
    peft = save_adapter(trio.aligned_model, tmp_path / "peft", target_modules=["lm_head"])
    tensors = {k: t for k, t in load_file(peft / FACTORS).items() if "base_layer" not in k}
    save_file(tensors, peft / FACTORS, metadata={"format": "pt"})
    adapter = as_mlx(peft, tmp_path / "mlx")
    base = tmp_path / "base"
    trio.base_model.save_pretrained(base)
    stored = load_file(base / "model.safetensors")
    stored["lm_head.weight"] = stored["lm_head.weight"][:46].contiguous()
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    result = safeproj(
        "patch", "--base", base, "--aligned", trio.aligned, "--adapter", adapter,
        "--out", tmp_path / "out", "--all",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    before, after = (
        load_file(path / WEIGHTS)["lm_head.lora_b"] for path in (adapter, tmp_path / "out")
    )
    assert torch.equal(before[:, 46:], after[:, 46:])
    assert not torch.equal(before[:, :46], after[:, :46])


def as_old_vlm(peft: Path, out: Path) -> Path:
    """Write a PEFT adapter as mlx-vlm did before it took over mlx-lm's names."""
    as_mlx(peft, out)
    tensors = {
        "language_model." + key.replace(".lora_a", ".A").replace(".lora_b", ".B"): tensor
        for key, tensor in load_file(out / WEIGHTS).items()
    }
    save_file(tensors, out / WEIGHTS, metadata={"format": "mlx"})
    (out / CONFIG).write_text(json.dumps({"rank": 4, "alpha": 0.1, "dropout": 0.1}), "utf-8")
    return out


def test_older_names_of_mlx_vlm(trio: Trio, tmp_path: Path) -> None:
    adapter = as_old_vlm(trio.adapter, tmp_path / "vlm")
    manifest = patch(trio, adapter, tmp_path / "out", "--all")
    before, after = (
        {
            key.removeprefix("language_model.").removesuffix(".A"): (tensor @ tensors[b]).T
            for key, tensor in tensors.items()
            if key.endswith(".A")
            for b in [key.removesuffix("A") + "B"]
        }
        for tensors in (load_file(path / WEIGHTS) for path in (adapter, tmp_path / "out"))
    )
    for module in manifest["modules"]:
        module["name"] = module["name"].removeprefix("language_model.")
    check(manifest, before, after, trio_weights(trio, before))
    given, found = (load_file(path / WEIGHTS) for path in (adapter, tmp_path / "out"))
    assert {key[-2:] for key in given if not torch.equal(given[key], found[key])} == {".B"}
    assert (tmp_path / "out" / CONFIG).read_bytes() == (adapter / CONFIG).read_bytes()
    read = read_adapter(str(adapter))
    assert set(read.format.scalings(read, read.modules).values()) == {0.1}


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop("language_model.model.layers.0.self_attn.q_proj.B"), ("has no", ".B")),
        (lambda t: t.update({"x.lora_a": torch.ones(2, 2)}), ("x.lora_a is no tensor",)),
        (lambda t: t.update({"x.m": torch.ones(2)}), ("x.m is no tensor",)),
    ],
)
def test_older_names_that_do_not_fit(
    trio: Trio, tmp_path: Path, edit: Callable[[dict[str, Tensor]], object], words: tuple[str, ...]
) -> None:
    adapter = as_old_vlm(trio.adapter, tmp_path / "vlm")
    change(adapter, edit)
    with pytest.raises(SafeprojError) as error:
        read_adapter(str(adapter))
    for word in words:
        assert word in str(error.value)


def test_magnitudes_are_kept(trio: Trio, tmp_path: Path) -> None:
    peft = save_adapter(trio.aligned_model, tmp_path / "peft", use_dora=True)
    adapter = as_mlx(peft, tmp_path / "mlx", fine_tune_type="dora")
    manifest = patch(trio, adapter, tmp_path / "out", "--all")
    assert "DoRA" in manifest["warnings"][0]
    before, after = load_file(adapter / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    magnitudes = [key for key in before if key.endswith(".m")]
    assert len(magnitudes) == 4
    assert all(torch.equal(before[key], after[key]) for key in magnitudes)


def test_experts_of_a_checkpoint_that_stores_them_in_one_stack(tmp_path: Path) -> None:
    """As transformers 5 may save it: gate and up in one tensor, cut in halves."""
    case = next(case for case in CASES if case.name == "qwen3-moe-experts")
    model = FIXTURES / "models" / "tiny-qwen3-moe-square"
    for side in ("base", "aligned"):
        shutil.copytree(model / side, tmp_path / side)
        stored = load_file(tmp_path / side / "model.safetensors")
        fuse(stored, "model.layers.0.mlp.experts")
        save_file(stored, tmp_path / side / "model.safetensors", metadata={"format": "pt"})
    one = scores(model / "base", model / "aligned", case / "adapter")
    other = scores(tmp_path / "base", tmp_path / "aligned", case / "adapter")
    assert len(one) == 2 * 9
    assert other == pytest.approx(one)


def fuse(stored: dict[str, Tensor], experts: str) -> None:
    parts = {
        part: torch.stack([stored.pop(f"{experts}.{e}.{part}.weight") for e in range(3)])
        for part in ("gate_proj", "up_proj", "down_proj")
    }
    stored[f"{experts}.gate_up_proj"] = torch.cat([parts["gate_proj"], parts["up_proj"]], 1)
    stored[f"{experts}.down_proj"] = parts["down_proj"]


def test_older_stacks_have_the_experts_input_factors_below_one_another(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "mixtral-experts")
    model = FIXTURES / "models" / "tiny-mixtral"
    old = tmp_path / "old"
    shutil.copytree(case / "adapter", old)
    tensors = load_file(old / WEIGHTS)
    flat = {k: t.flatten(0, 1) if k.endswith("lora_a") else t for k, t in tensors.items()}
    save_file(flat, old / WEIGHTS)
    expected = scores(model / "base", model / "aligned", case / "adapter")
    assert scores(model / "base", model / "aligned", old) == pytest.approx(expected)


def _full(adapter: Path) -> tuple[str, ...]:
    change_json(adapter / CONFIG, fine_tune_type="full", lora_parameters=None)
    return "fine_tune_type 'full'", "whole weights", "supported are"


def _unknown_kind(adapter: Path) -> tuple[str, ...]:
    change_json(adapter / CONFIG, fine_tune_type="vera")
    return "fine_tune_type 'vera'", "supported are"


def _no_config(adapter: Path) -> tuple[str, ...]:
    (adapter / CONFIG).unlink()
    return f"{CONFIG} not found", WEIGHTS


def _old_file(adapter: Path) -> tuple[str, ...]:
    (adapter / WEIGHTS).rename(adapter / "adapters.npz")
    return "adapters.npz", "save_safetensors"


def _half_a_pair(adapter: Path) -> tuple[str, ...]:
    change(adapter, lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.lora_b"))
    return "model.layers.0.self_attn.q_proj has no", "lora_b"


def _other_tensor(adapter: Path) -> tuple[str, ...]:
    change(adapter, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32)}))
    return "model.norm.weight", "no tensor of an mlx-lm adapter"


def _other_rank(adapter: Path) -> tuple[str, ...]:
    change_json(adapter / CONFIG, lora_parameters={"rank": 8, "scale": 1.0})
    return "has rank 4", "says 8"


def _misfit(adapter: Path) -> tuple[str, ...]:
    key = "model.layers.0.self_attn.q_proj.lora_b"
    change(adapter, lambda tensors: tensors.update({key: torch.ones(5, 32)}))
    return "do not fit", "[32, 4]", "[5, 32]", "(r, out)"


def _not_finite(adapter: Path) -> tuple[str, ...]:
    key = "model.layers.0.self_attn.q_proj.lora_b"
    change(adapter, lambda tensors: tensors.update({key: torch.full((4, 32), torch.nan)}))
    return key, "NaN"


def _no_dora(adapter: Path) -> tuple[str, ...]:
    change_json(adapter / CONFIG, fine_tune_type="dora")
    return "says dora", "have no .m"


def _stack_of_something(adapter: Path) -> tuple[str, ...]:
    stack = {
        "m.switch.fc1.lora_a": torch.ones(3, 4, 32),
        "m.switch.fc1.lora_b": torch.ones(3, 8, 4),
    }
    change(adapter, lambda tensors: tensors.update(stack))
    return "m.switch.fc1", "gate_proj, down_proj, up_proj"


def _stack_that_does_not_fit(adapter: Path) -> tuple[str, ...]:
    stack = {"m.s.up_proj.lora_a": torch.ones(2, 4, 32), "m.s.up_proj.lora_b": torch.ones(3, 8, 4)}
    change(adapter, lambda tensors: tensors.update(stack))
    return "m.s.up_proj.lora_a [2, 4, 32]", "(experts, out, r)"


def _truncated(adapter: Path) -> tuple[str, ...]:
    data = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(data[:-10])
    return WEIGHTS, "not a complete safetensors file"


def change(adapter: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(adapter / WEIGHTS)
    edit(tensors)
    save_file(tensors, adapter / WEIGHTS)


REFUSED = [
    _full, _unknown_kind, _no_config, _old_file, _half_a_pair, _other_tensor, _other_rank, _misfit,
    _not_finite, _no_dora, _stack_of_something, _stack_that_does_not_fit, _truncated,
]  # fmt: skip


@pytest.mark.parametrize("damage", REFUSED, ids=lambda damage: damage.__name__[1:])
def test_refused(trio: Trio, tmp_path: Path, damage: Callable[[Path], tuple[str, ...]]) -> None:
    adapter = as_mlx(trio.adapter, tmp_path / "mlx")
    words = damage(adapter)
    result = safeproj(
        "inspect", "--base", trio.base, "--aligned", trio.aligned, "--adapter", adapter
    )
    assert_refused(result, str(adapter), *words)

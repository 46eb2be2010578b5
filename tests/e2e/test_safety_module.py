"""`--safety-module`: `B ← C_S B` without a checkpoint, through the installed command.

The oracle forms `C_S = I - U Uᵀ` (m, m) and `ΔW` (m, n) in float64, from the tensors of the file
and from PEFT's own updates.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import Trio
from tests.support import (
    CONFIG,
    FACTORS,
    MANIFEST,
    assert_complete,
    assert_refused,
    blake3_of,
    deltas,
    read_json,
    safeproj,
    save_adapter,
    save_safety_module,
    snapshot,
    tiny_llama,
)

OFFLINE = {"HF_HUB_OFFLINE": "1"}
RANK = 6
COSINE_ERROR = 2e-6
"""The products are summed in float32."""

DELTA_ERROR = 1e-5
"""Relative to `‖ΔW‖`: `C_S B` is summed and stored in float32."""

Q0 = "model.layers.0.self_attn.q_proj"
V1 = "model.layers.1.self_attn.v_proj"

Result = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def file(trio: Trio, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A safety module for the q and v projections of the trio; tests must not change it."""
    path = tmp_path_factory.mktemp("module") / "llama.safety.safetensors"
    return save_safety_module(trio.aligned_model, path, rank=RANK)


def using(command: str, file: Path | str, adapter: Path, *options: str | Path) -> Result:
    """Run `inspect` or `patch` with a safety module."""
    return safeproj(command, "--safety-module", file, "--adapter", adapter, *options, env=OFFLINE)


def patch(file: Path, adapter: Path, out: Path, *options: str) -> Any:
    """Patch and return the manifest."""
    result = using("patch", file, adapter, "--out", out, *options)
    assert result.returncode == 0, result.stderr
    return read_json(out / MANIFEST)


def inspect(file: Path, adapter: Path, *options: str) -> Any:
    result = using("inspect", file, adapter, "--format", "json", *options)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def directions(file: Path, rank: int | None = None) -> dict[str, Tensor]:
    """Return `U` (m, k) of each module."""
    suffix = ".weight.U"
    return {
        key.removesuffix(suffix): tensor.double()[:, :rank]
        for key, tensor in load_file(file).items()
        if key.endswith(suffix)
    }


def without(U: Tensor, X: Tensor) -> Tensor:
    """Return `(I - U Uᵀ) X`."""
    return (torch.eye(len(U), dtype=torch.float64) - U @ U.T) @ X.double()


def distance(found: Tensor, expected: Tensor, size: Tensor) -> float:
    return float((found.double() - expected).norm() / size.double().norm())


# What is written


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_patch_removes_from_every_update_what_lies_in_the_subspace(
    trio: Trio, file: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    adapter = save_adapter(trio.aligned_model, tmp_path / "adapter", **settings)
    manifest = patch(file, adapter, tmp_path / "out")

    assert manifest["selection"] == {"mode": "all"}
    assert_complete(tmp_path / "out", adapter)
    before, after = (deltas(trio.aligned_model, tmp_path / d) for d in ("adapter", "out"))
    assert len(before) == 4
    for name, U in directions(file).items():
        assert distance(after[name], without(U, before[name]), before[name]) < DELTA_ERROR, name
        assert distance(U.T @ after[name], torch.zeros(1), before[name]) < DELTA_ERROR, name
    given, found = load_file(adapter / FACTORS), load_file(tmp_path / "out" / FACTORS)
    for key in given:
        assert torch.equal(given[key], found[key]) is (".lora_A." in key), key


def test_the_bias_of_lora_B_is_projected_too(trio: Trio, file: Path, tmp_path: Path) -> None:
    adapter = save_adapter(trio.aligned_model, tmp_path / "adapter", lora_bias=True)
    patch(file, adapter, tmp_path / "out")
    given, found = load_file(adapter / FACTORS), load_file(tmp_path / "out" / FACTORS)
    for name, U in directions(file).items():
        for part in ("weight", "bias"):
            key = f"base_model.model.{name}.lora_B.{part}"
            expected = without(U, given[key])
            assert distance(found[key], expected, given[key]) < DELTA_ERROR, key


@pytest.mark.parametrize("rank", [1, 4])
def test_a_lower_rank_uses_the_first_directions(
    trio: Trio, file: Path, tmp_path: Path, rank: int
) -> None:
    manifest = patch(file, trio.adapter, tmp_path / "out", "--rank", str(rank))
    assert manifest["projector"] == {"kind": "safety-module", "rank": rank}
    assert {module["projector_rank"] for module in manifest["modules"]} == {rank}
    before = deltas(trio.aligned_model, trio.adapter)
    after = deltas(trio.aligned_model, tmp_path / "out")
    for name, U in directions(file, rank).items():
        assert distance(after[name], without(U, before[name]), before[name]) < DELTA_ERROR, name


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=41))


def test_conv1d_weights_are_stored_the_other_way_round(tmp_path: Path) -> None:
    model, targets = gpt2(), ("c_attn", "c_proj", "c_fc")
    file = save_safety_module(model, tmp_path / "gpt2.safety.safetensors", targets)
    settings: dict[str, Any] = {"target_modules": list(targets), "fan_in_fan_out": True}
    adapter = save_adapter(model, tmp_path / "adapter", **settings)
    manifest = patch(file, adapter, tmp_path / "out")
    shapes = {tuple(module["shape"]) for module in manifest["modules"]}
    assert shapes == {(72, 24), (24, 24), (96, 24), (24, 96)}
    before, after = (deltas(model, tmp_path / each) for each in ("adapter", "out"))
    for name, U in directions(file).items():
        expected = without(U, before[name].T)
        assert distance(after[name].T, expected, before[name]) < DELTA_ERROR, name


def test_patching_again_changes_nothing_but_by_rounding(
    trio: Trio, file: Path, tmp_path: Path
) -> None:
    patch(file, trio.adapter, tmp_path / "once")
    result = using("patch", file, tmp_path / "once", "--out", tmp_path / "twice")
    assert result.returncode == 0, result.stderr
    assert "patched before" not in result.stderr  # nothing is wrong with it
    once, twice = (load_file(tmp_path / each / FACTORS) for each in ("once", "twice"))
    for key, tensor in once.items():
        assert distance(twice[key], tensor.double(), tensor) < 1e-6, key
    for module in read_json(tmp_path / "twice" / MANIFEST)["modules"]:
        assert module["cosine"] == pytest.approx(1.0, abs=COSINE_ERROR)
        assert module["safety_share"] == pytest.approx(0.0, abs=1e-12)


def test_only_safe_lora_shrinks_what_safe_lora_has_shrunk(
    trio: Trio, file: Path, tmp_path: Path
) -> None:
    pair = ("--base", trio.base, "--aligned", trio.aligned, "--all")
    one, two, three = (tmp_path / each for each in ("one", "two", "three"))
    patch(file, trio.adapter, one)
    after_salora = safeproj("patch", *pair, "--adapter", one, "--out", two)
    after_both = safeproj("patch", *pair, "--adapter", two, "--out", three)
    assert (after_salora.returncode, after_both.returncode) == (0, 0)
    assert "patched before" not in after_salora.stderr
    assert "patched before" in after_both.stderr


def inside(file: Path, trio: Trio, path: Path) -> Path:
    """Save an adapter whose updates lie in the subspace altogether."""
    save_adapter(trio.aligned_model, path)
    tensors = load_file(path / FACTORS)
    for name, U in directions(file).items():
        key = f"base_model.model.{name}.lora_B.weight"
        tensors[key] = (U @ (U.T @ tensors[key].double())).float()
    save_file(tensors, path / FACTORS, metadata={"format": "pt"})
    return path


def test_an_update_inside_the_subspace_is_removed(trio: Trio, file: Path, tmp_path: Path) -> None:
    adapter = inside(file, trio, tmp_path / "adapter")
    manifest = patch(file, adapter, tmp_path / "out", "--threshold", "0.01")
    for module in manifest["modules"]:
        assert module["projected"] is True
        assert 0.0 <= module["cosine"] < 1e-5
        assert module["safety_share"] == pytest.approx(1.0, abs=1e-6)
    before, after = (deltas(trio.aligned_model, tmp_path / d) for d in ("adapter", "out"))
    for name in before:
        assert distance(after[name], torch.zeros(1), before[name]) < DELTA_ERROR, name


# Which modules


def cosines(trio: Trio, file: Path, rank: int | None = None) -> dict[str, float]:
    """Return the cosine of each update and its projection, by its definition."""
    found = {}
    before = deltas(trio.aligned_model, trio.adapter)
    for name, U in directions(file, rank).items():
        projected = without(U, before[name])
        inner = float((before[name] * projected).sum())
        found[name] = inner / float(before[name].norm() * projected.norm())
    return found


@pytest.mark.parametrize("mode", ["threshold", "layers", "include", "exclude"])
def test_other_selections_apply_where_they_are_given(
    trio: Trio, file: Path, tmp_path: Path, mode: str
) -> None:
    truth = cosines(trio, file)
    ranked = sorted(truth, key=lambda name: truth[name])
    tau = (truth[ranked[1]] + truth[ranked[2]]) / 2
    options, chosen = {
        "threshold": (("--threshold", str(tau)), set(ranked[:2])),
        "layers": (("--layers", "3"), set(ranked[:3])),
        "include": (("--include", r"layers\.0\."), {n for n in ranked if "layers.0." in n}),
        "exclude": (("--exclude", "q_proj"), {n for n in ranked if "q_proj" not in n}),
    }[mode]
    manifest = patch(file, trio.adapter, tmp_path / "out", *options)
    assert {m["name"] for m in manifest["modules"] if m["projected"]} == chosen
    expected_mode = mode if mode in ("threshold", "layers") else "all"
    assert manifest["selection"]["mode"] == expected_mode
    changed = {f"base_model.model.{name}.lora_B.weight" for name in chosen}
    assert set(manifest["output"]["projected"]) == changed
    given, found = load_file(trio.adapter / FACTORS), load_file(tmp_path / "out" / FACTORS)
    for key in given:
        assert torch.equal(given[key], found[key]) is (key not in changed), key


def test_a_module_that_the_file_lacks_may_be_left_out(
    trio: Trio, file: Path, tmp_path: Path
) -> None:
    targets = ["q_proj", "v_proj", "up_proj"]
    adapter = save_adapter(trio.aligned_model, tmp_path / "adapter", target_modules=targets)
    refused = using("patch", file, adapter, "--out", tmp_path / "out")
    words = "model.layers.0.mlp.up_proj", "--targets", "--exclude", str(file)
    assert_refused(refused, *words)
    assert not (tmp_path / "out").exists()
    manifest = patch(file, adapter, tmp_path / "out", "--exclude", "up_proj")
    modules = {module["name"]: module for module in manifest["modules"]}
    assert sum(module["projected"] for module in modules.values()) == 4
    left_out = modules["model.layers.0.mlp.up_proj"]
    assert (left_out["safety_share"], left_out["safety_energy"]) == (None, None)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=["embedding", "head"],
)
def test_what_is_no_linear_layer_of_the_file_is_refused_by_name(
    trio: Trio, file: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    adapter = save_adapter(trio.aligned_model, tmp_path / "adapter", **settings)
    result = using("inspect", file, adapter)
    assert_refused(result, settings["target_modules"][1], "--exclude")


# What is said


def test_the_report_is_what_the_oracle_says(trio: Trio, file: Path) -> None:
    rank = 3
    found = inspect(file, trio.adapter, "--rank", str(rank))
    assert found["schema"] == "safeproj.report/1"
    assert found["method"] == "salora"
    assert found["projector"] == {"kind": "safety-module", "rank": rank}
    assert list(found["inputs"]) == ["aligned", "data", "safety_module", "adapter"]
    assert found["inputs"]["aligned"] == {"source": "org/aligned", "revision": "abc"}
    assert found["inputs"]["data"] == {"source": "safety.jsonl"}
    assert found["inputs"]["safety_module"]["source"] == str(file)
    truth, before = cosines(trio, file, rank), deltas(trio.aligned_model, trio.adapter)
    U, tensors = directions(file, rank), load_file(file)
    with safe_open(file, framework="pt") as opened:
        weights = json.loads(opened.metadata()["safeproj"])["weights"]
    energies: dict[str, Tensor] = {}
    assert {module["name"] for module in found["modules"]} == set(truth)
    for module in found["modules"]:
        name = module["name"]
        delta = before[name]
        squares = tensors[f"{name}.weight.singular_values"].double().square()
        energies[name] = squares.cumsum(0) / weights[f"{name}.weight"]["energy"]
        share = float((U[name].T @ delta).square().sum() / delta.square().sum())
        assert module["cosine"] == pytest.approx(truth[name], abs=COSINE_ERROR)
        assert module["safety_share"] == pytest.approx(share, abs=COSINE_ERROR)
        assert module["cosine"] == pytest.approx(math.sqrt(1 - share), abs=COSINE_ERROR)
        assert module["safety_energy"] == pytest.approx(float(energies[name][rank - 1]))
        assert module["alignment_norm"] is None
        assert module["projector_rank"] == rank
        assert module["projected"] is True
    summary, shares = found["summary"], [m["safety_share"] for m in found["modules"]]
    assert summary["safety_share"]["max"] == max(shares)
    assert summary["safety_share"]["mean"] == pytest.approx(sum(shares) / 4)
    assert list(summary["safety_energy"]) == ["1", "2", "4", "6"]
    for key, value in summary["safety_energy"].items():
        mean = sum(float(each[int(key) - 1]) for each in energies.values()) / 4
        assert value == pytest.approx(mean)


def test_the_table_explains_its_numbers(trio: Trio, file: Path) -> None:
    result = using("inspect", file, trio.adapter)
    assert (result.returncode, result.stderr) == (0, "")
    module = inspect(file, trio.adapter)["modules"][0]
    assert f"{module['cosine']:.3f} {module['safety_share']:.3f}*" in result.stdout
    assert "then share = ‖UᵀΔW‖²/‖ΔW‖²" in result.stdout
    assert re.search(r"energy by rank +1:0\.\d\d  2:0\.\d\d  4:0\.\d\d  6:0\.80", result.stdout)
    assert "energy by rank = how much of the safety data's output energy" in result.stdout
    assert "safety-module, rank 6" in result.stdout
    assert "scale" not in result.stdout


def test_markdown_says_the_same(trio: Trio, file: Path) -> None:
    result = using("inspect", file, trio.adapter, "--format", "markdown")
    assert result.returncode == 0, result.stderr
    assert "## SaLoRA report" in result.stdout
    assert "| cosine | share | energy | would project |" in result.stdout
    assert f"- safety module: `{file}`" in result.stdout
    assert "- data: `safety.jsonl`" in result.stdout
    assert "by rank, mean over modules: 1: 0." in result.stdout


def test_the_manifest_and_the_card_record_the_run(trio: Trio, file: Path, tmp_path: Path) -> None:
    inputs = patch(file, trio.adapter, tmp_path / "out")["inputs"]
    assert inputs["aligned"]["sha256"] == {"files": {}}
    assert inputs["data"] == {"source": "safety.jsonl", "sha256": "0" * 64}
    found = inputs["safety_module"]
    digests = {name: blake3_of(tensor) for name, tensor in load_file(file).items()}
    assert found["blake3"] == {"tensors": digests}
    with safe_open(file, framework="pt") as opened:
        text = opened.metadata()["safeproj"]
    assert found["sha256"] == {"metadata": hashlib.sha256(text.encode()).hexdigest()}
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    section = " ".join(card.partition("<!-- safeproj:begin -->")[2].split())
    assert "removed from the updates of 4 of 4 adapted modules" in section
    assert "the safety subspace of `org/aligned@abc`" in section
    assert "safety data `safety.jsonl` (SaLoRA, arXiv 2501.01765)" in section
    assert str(file.parent) not in section


def test_the_same_run_writes_the_same_files(trio: Trio, file: Path, tmp_path: Path) -> None:
    for workers in ("1", "3"):
        patch(file, trio.adapter, tmp_path / workers, "--workers", workers)
    assert snapshot(tmp_path / "1") == snapshot(tmp_path / "3")


def test_an_untrained_module_is_an_empty_update(trio: Trio, file: Path, tmp_path: Path) -> None:
    adapter = save_adapter(trio.aligned_model, tmp_path / "adapter", init_lora_weights=True)
    found = inspect(file, adapter)
    assert not any(module["projected"] for module in found["modules"])
    assert all("empty update" in module["note"] for module in found["modules"])
    assert all(module["safety_share"] is None for module in found["modules"])
    assert using("inspect", file, adapter).returncode == 0


# Many adapters


def test_many_adapters_in_one_run(trio: Trio, file: Path, tmp_path: Path) -> None:
    runs, out = tmp_path / "runs", tmp_path / "out"
    for seed, name in enumerate(("one", "two"), start=7):
        save_adapter(trio.aligned_model, runs / name, seed=seed, r=seed)
    save_adapter(trio.aligned_model, runs / "other", target_modules=["up_proj"])
    result = using("patch", file, runs, "--out", out)
    assert result.returncode == 1
    assert "other: " in result.stderr and "up_proj" in result.stderr
    assert "share mean" in result.stdout
    assert {path.name for path in out.iterdir()} == {"one", "two"}
    for name in ("one", "two"):
        patch(file, runs / name, tmp_path / name)
        ours, theirs = (load_file(each / name / FACTORS) for each in (out, tmp_path))
        for key, tensor in theirs.items():
            assert distance(ours[key], tensor.double(), tensor) < 1e-6, key
    markdown = using("inspect", file, runs, "--format", "markdown")
    assert "## SaLoRA reports" in markdown.stdout


# Refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("--base", "x"),
            ("--base and --aligned, --alignment, --safety-module, --safety-data with",),
        ),
        (("--base", "x", "--aligned", "y"), ("--alignment, --safety-module, --safety-data with",)),
        (("--alignment", "x"), ("--alignment, --safety-module, --safety-data with",)),
        (("--projector", "approx"), ("--projector", "--safety-module")),
        (("--projector", "exact", "--rank", "2"), ("--projector", "--safety-module")),
        (("--energy", "0.9"), ("--energy", "--safety-module")),
        (("--rank", "0"), ("--rank must be at least 1", "0")),
        (("--rank", "7"), ("--rank 7", "holds 6 directions")),
        (("--layers", "1", "--all"), ("--layers and --all",)),
    ],
    ids=lambda value: " ".join(value),
)
def test_options_that_do_not_go_together(
    trio: Trio, file: Path, tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    result = using("patch", file, trio.adapter, "--out", tmp_path / "out", *options)
    assert_refused(result, *words)
    assert list(tmp_path.iterdir()) == []


def spoil(file: Path, path: Path, name: str, change: Any) -> Path:
    """Copy a module with one tensor changed."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata=metadata)
    return path


def nan_at_the_end(tensor: Tensor) -> Tensor:
    tensor[-1, -1] = math.nan
    return tensor


def longer_by_two_thousandths(tensor: Tensor) -> Tensor:
    return tensor * 1.002


def twice_the_same_column(tensor: Tensor) -> Tensor:
    tensor[:, 1] = tensor[:, 0]
    return tensor


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (nan_at_the_end, "has NaN or Inf"),
        (longer_by_two_thousandths, "not orthonormal"),
        (twice_the_same_column, "not orthonormal"),
    ],
)
def test_directions_that_are_none_are_refused(
    trio: Trio, file: Path, tmp_path: Path, change: Any, words: str
) -> None:
    name = f"{V1}.weight.U"
    broken = spoil(file, tmp_path / "broken.safetensors", name, change)
    result = using("patch", broken, trio.adapter, "--out", tmp_path / "out")
    assert_refused(result, name, str(broken), words)
    assert list(tmp_path.iterdir()) == [broken]


def test_shapes_of_another_model_are_refused(file: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tiny_llama(hidden_size=48), tmp_path / "adapter")
    result = using("patch", file, adapter, "--out", tmp_path / "out")
    words = Q0, "[32, 32]", "[48, 48]", str(file), str(adapter), "are both of the same model?"
    assert_refused(result, *words)
    assert result.stderr.count(str(file)) == 1
    assert not (tmp_path / "out").exists()


def test_a_file_of_another_kind_is_refused(trio: Trio, file: Path, tmp_path: Path) -> None:
    alignment = tmp_path / "model.safealign.safetensors"
    pair = ("--base", trio.base, "--aligned", trio.aligned)
    made = safeproj("align", *pair, "--out", alignment, "--rank", "2", "--targets", "q_proj")
    assert made.returncode == 0, made.stderr
    refused = using("inspect", alignment, trio.adapter)
    assert_refused(refused, "safeproj.alignment/1", "safeproj.safety-module/1", "safeproj salora")
    swapped = safeproj("inspect", "--alignment", file, "--adapter", trio.adapter)
    assert_refused(swapped, "safeproj.safety-module/1", "safeproj.alignment/1", "safeproj align")
    kept = file.read_bytes()
    over = safeproj("align", *pair, "--out", file, "--overwrite")
    assert_refused(over, str(file), "safeproj.safety-module/1")
    assert file.read_bytes() == kept


def test_a_folder_may_hold_the_file(trio: Trio, file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / CONFIG).write_text("{}")
    assert_refused(using("inspect", folder, trio.adapter), "no file ends in .safety.safetensors")
    shutil.copy(file, folder / "one.safety.safetensors")
    assert inspect(folder, trio.adapter)["modules"] == inspect(file, trio.adapter)["modules"]
    shutil.copy(file, folder / "two.safety.safetensors")
    assert_refused(using("inspect", folder, trio.adapter), "one.safety", "two.safety")


def test_the_output_must_not_touch_the_module(trio: Trio, file: Path, tmp_path: Path) -> None:
    own = shutil.copy(file, tmp_path / "own.safety.safetensors")
    result = using("patch", own, trio.adapter, "--out", tmp_path)
    assert_refused(result, "overlaps with --safety-module")
    assert_refused(using("inspect", own, trio.adapter, "--output", own), "--safety-module")

"""`safeproj patch`, from real files through PEFT, against the float64 oracle."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.conftest import Trio
from tests.support import (
    assert_refused,
    deltas,
    installed,
    moved,
    oracle_C,
    oracle_cosine,
    read_json,
    safeproj,
    save_adapter,
    tiny_llama,
)

WEIGHTS = "adapter_model.safetensors"


def weight_of(model: Any, name: str) -> torch.Tensor:
    """Return the weight of a module as (out, in), however it is stored."""
    weight: torch.Tensor = model.get_submodule(name).weight.detach()
    return weight if type(model.get_submodule(name)).__name__ != "Conv1D" else weight.T


def run_patch(
    trio: Trio, adapter: Path, out: Path, *options: str
) -> subprocess.CompletedProcess[str]:
    """Patch another adapter of the trio's models, which must succeed."""
    result = safeproj(
        "patch", "--base", trio.base, "--aligned", trio.aligned, "--adapter", adapter,
        "--out", out, *options,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result


def check_patched(
    base_model: Any, aligned_model: Any, adapter: Path, out: Path, *, rank: int | None = None
) -> dict[str, Any]:
    """Compare every module of a patched adapter with the oracle, through PEFT's own ΔW.

    Returns:
        The manifest.
    """
    manifest: dict[str, Any] = read_json(out / "safeproj.json")
    before, after = deltas(aligned_model, adapter), deltas(aligned_model, out)
    assert {module["name"] for module in manifest["modules"]} == set(before) == set(after)
    for module in manifest["modules"]:
        name, delta = module["name"], before[module["name"]]
        transposed = type(aligned_model.get_submodule(name)).__name__ == "Conv1D"
        if transposed:
            delta = delta.T
        C = oracle_C(
            weight_of(aligned_model, name),
            weight_of(base_model, name),
            rank,
        )
        assert module["cosine"] == pytest.approx(oracle_cosine(delta, C), abs=2e-6), name
        expected = C @ delta if module["projected"] else delta
        found = after[name].T if transposed else after[name]
        assert float((found - expected).norm() / expected.norm()) < 1e-5, name
    return manifest


@pytest.mark.parametrize(
    "selection", [["--all"], ["--layers", "2"], ["--threshold", "0.75"], []], ids=" ".join
)
@pytest.mark.parametrize("projector", [[], ["--projector", "exact", "--rank", "3"]], ids=" ".join)
@pytest.mark.parametrize("device", ["cpu", "torch"])
def test_patched_deltas_are_what_the_formula_says(
    trio: Trio, tmp_path: Path, selection: list[str], projector: list[str], device: str
) -> None:
    result = safeproj(
        "patch", *trio.arguments, "--out", tmp_path / "out", *selection, *projector,
        "--device", device,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr

    manifest = check_patched(
        trio.base_model,
        trio.aligned_model,
        trio.adapter,
        tmp_path / "out",
        rank=3 if projector else None,
    )
    if selection == ["--layers", "2"]:
        assert manifest["summary"]["projected"] == 2
    if selection == ["--all"]:
        assert manifest["summary"]["projected"] == len(manifest["modules"]) == 4


def test_base_and_aligned_may_differ_in_dtype_and_sharding(tmp_path: Path) -> None:
    base, aligned = tiny_llama(seed=3), moved(tiny_llama(seed=3))
    base, aligned = base.to(torch.float16), aligned.to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    aligned.save_pretrained(tmp_path / "aligned", max_shard_size="20KB")
    adapter = save_adapter(aligned.float(), tmp_path / "adapter", target_modules="all-linear")

    result = safeproj(
        "patch", "--base", tmp_path / "base", "--aligned", tmp_path / "aligned",
        "--adapter", adapter, "--out", tmp_path / "out", "--all",
    )  # fmt: skip

    assert result.returncode == 0, result.stderr
    manifest = check_patched(base.float(), aligned.float(), adapter, tmp_path / "out")
    assert len(manifest["modules"]) == 14


ADAPTERS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "regex targets": {"target_modules": r".*\.mlp\.(up|down)_proj"},
    "rank and alpha patterns": {
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {"k_proj": 2},
        "alpha_pattern": {"k_proj": 16},
    },
    "rsLoRA": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "DoRA": {"use_dora": True},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
}


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_kinds_of_lora_adapters(trio: Trio, tmp_path: Path, settings: dict[str, Any]) -> None:
    adapter = save_adapter(trio.aligned_model, tmp_path / "adapter", **settings)
    for device in ("cpu", "torch"):
        run_patch(trio, adapter, tmp_path / device, "--all", "--device", device)
        check_patched(trio.base_model, trio.aligned_model, adapter, tmp_path / device)


@pytest.mark.parametrize(
    "projector", [[], ["--projector", "exact", "--energy", "0.5"]], ids=["approx", "exact"]
)
def test_factors_by_numpy_are_those_by_torch(
    trio: Trio, tmp_path: Path, projector: list[str]
) -> None:
    adapter = save_adapter(trio.aligned_model, tmp_path / "adapter", target_modules="all-linear")
    found = {}
    for device in ("cpu", "torch"):
        run_patch(trio, adapter, tmp_path / device, "--all", *projector, "--device", device)
        found[device] = load_file(tmp_path / device / WEIGHTS)
        options = read_json(tmp_path / device / "safeproj.json")["options"]
        engine = "numpy" if device == "cpu" else "torch"
        assert (options["device"], options["engine"]) == ("cpu", engine)
    for name, factor in found["cpu"].items():
        assert float((found["torch"][name] - factor).norm() / factor.norm()) < 1e-5, name


def test_the_bias_of_lora_B_is_projected_with_it(trio: Trio, tmp_path: Path) -> None:
    adapter = save_adapter(trio.aligned_model, tmp_path / "adapter", lora_bias=True)
    run_patch(trio, adapter, tmp_path / "out", "--all")
    before, after = load_file(adapter / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    biases = [key for key in before if key.endswith(".lora_B.bias")]
    assert len(biases) == 4
    for key in biases:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_B.bias")
        C = oracle_C(
            trio.aligned_model.get_submodule(name).weight.detach(),
            trio.base_model.get_submodule(name).weight.detach(),
        )
        expected = C @ before[key].double()
        assert float((after[key].double() - expected).norm() / expected.norm()) < 1e-5


def test_dora_magnitudes_are_kept_and_the_report_says_so(trio: Trio, tmp_path: Path) -> None:
    adapter = save_adapter(trio.aligned_model, tmp_path / "adapter", use_dora=True)
    result = run_patch(trio, adapter, tmp_path / "out", "--all")
    assert "DoRA" in result.stderr
    before, after = load_file(adapter / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    magnitudes = [key for key in before if "magnitude" in key]
    assert len(magnitudes) == 4
    assert all(torch.equal(before[key], after[key]) for key in magnitudes)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A GPT-2 pair; its attn.c_proj is square, stored (in, out) like the others."""
    from transformers import GPT2Config, GPT2LMHeadModel

    root = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40))
    aligned = moved(base)
    base.save_pretrained(root / "base")
    aligned.save_pretrained(root / "aligned", max_shard_size="30KB")
    return root, base, aligned


def test_conv1d_weights_are_stored_transposed(gpt2: tuple[Path, Any, Any], tmp_path: Path) -> None:
    root, base, aligned = gpt2
    adapter = save_adapter(
        aligned, tmp_path / "adapter", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True
    )
    result = safeproj(
        "patch", "--base", root / "base", "--aligned", root / "aligned",
        "--adapter", adapter, "--out", tmp_path / "out", "--all",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    manifest = check_patched(base, aligned, adapter, tmp_path / "out")
    assert [32, 32] in [module["shape"] for module in manifest["modules"]]


def run_gpt2(root: Path, adapter: Path, out: Path, *, config: dict[str, str] | None) -> Any:
    """Patch with another config.json beside the checkpoints, or none."""
    for name in ("base", "aligned"):
        shutil.copytree(root / name, out.parent / name)
        (out.parent / name / "config.json").unlink()
        if config is not None:
            (out.parent / name / "config.json").write_text(json.dumps(config))
    return safeproj(
        "patch", "--base", out.parent / "base", "--aligned", out.parent / "aligned",
        "--adapter", adapter, "--out", out, "--all",
    )  # fmt: skip


def test_without_a_config_the_other_weights_tell_how_square_ones_are_stored(
    gpt2: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    root, base, aligned = gpt2
    adapter = save_adapter(
        aligned, tmp_path / "adapter", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True
    )
    config = read_json(adapter / "adapter_config.json")
    config["fan_in_fan_out"] = False  # as PEFT writes it for a mix of layers
    (adapter / "adapter_config.json").write_text(json.dumps(config))

    result = run_gpt2(root, adapter, tmp_path / "out", config=None)

    assert result.returncode == 0, result.stderr
    manifest = read_json(tmp_path / "out" / "safeproj.json")
    square = [module for module in manifest["modules"] if module["shape"] == [32, 32]]
    assert len(square) == 2
    for module in square:
        delta = deltas(aligned, adapter)[module["name"]].T
        C = oracle_C(weight_of(aligned, module["name"]), weight_of(base, module["name"]))
        assert module["cosine"] == pytest.approx(oracle_cosine(delta, C), abs=2e-6)


def test_square_weights_of_an_unknown_architecture_are_refused(
    gpt2: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    root, _, aligned = gpt2
    adapter = save_adapter(
        aligned, tmp_path / "adapter", target_modules=["attn.c_proj"], fan_in_fan_out=True
    )
    result = run_gpt2(root, adapter, tmp_path / "out", config={"model_type": "mine"})
    assert_refused(result, "attn.c_proj", "fan_in_fan_out", "'mine'")


@pytest.mark.parametrize("dtype", ["keep", "float32", "bfloat16", "float16"])
def test_dtype_applies_to_both_factors_of_projected_modules(
    trio: Trio, tmp_path: Path, dtype: str
) -> None:
    adapter = save_adapter(trio.aligned_model, tmp_path / "adapter")
    stored = {key: t.bfloat16() for key, t in load_file(adapter / WEIGHTS).items()}
    save_file(stored, adapter / WEIGHTS, metadata={"format": "pt"})

    run_patch(trio, adapter, tmp_path / "out", "--layers", "2", "--dtype", dtype)
    manifest = read_json(tmp_path / "out" / "safeproj.json")
    projected = set(manifest["output"]["projected"])
    assert len(projected) == 2
    wanted = {"keep": torch.bfloat16}.get(dtype) or getattr(torch, dtype)
    others = {key.replace("lora_B", "lora_A") for key in projected}
    assert manifest["output"].get("converted", []) == sorted(
        others if wanted != torch.bfloat16 else []
    )
    for key, tensor in load_file(tmp_path / "out" / WEIGHTS).items():
        if key in projected:
            assert tensor.dtype == wanted
        elif key in others:
            assert tensor.dtype == wanted
            assert torch.equal(tensor, stored[key].to(wanted))
        else:
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, stored[key])
    result = safeproj(
        "verify", "--base", trio.base, "--aligned", trio.aligned, "--original", adapter,
        tmp_path / "out",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_bin_adapter_is_written_as_safetensors(trio: Trio, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    save_adapter(trio.aligned_model, adapter)
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()
    run_patch(trio, adapter, tmp_path / "out", "--all")
    assert not (tmp_path / "out" / "adapter_model.bin").exists()
    check_patched(trio.base_model, trio.aligned_model, adapter, tmp_path / "out")


def test_an_unpatched_bin_beside_the_safetensors_is_not_copied(trio: Trio, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    save_adapter(trio.aligned_model, adapter)
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    run_patch(trio, adapter, tmp_path / "out", "--all")
    assert not (tmp_path / "out" / "adapter_model.bin").exists()


@pytest.mark.parametrize("layout", ["one file", "file as SRC", "shards without an index"])
def test_layouts_of_a_checkpoint(trio: Trio, tmp_path: Path, layout: str) -> None:
    aligned = tmp_path / "aligned"
    if layout == "shards without an index":
        trio.aligned_model.save_pretrained(aligned, max_shard_size="35KB")
        (aligned / "model.safetensors.index.json").unlink()
        assert len(list(aligned.glob("*.safetensors"))) > 1
    else:
        trio.aligned_model.save_pretrained(aligned)
    source = aligned / "model.safetensors" if layout == "file as SRC" else aligned
    result = safeproj(
        "patch", "--base", trio.base, "--aligned", source, "--adapter", trio.adapter,
        "--out", tmp_path / "out", "--all",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    check_patched(trio.base_model, trio.aligned_model, trio.adapter, tmp_path / "out")


def test_everything_else_is_kept(trio: Trio, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    save_adapter(trio.aligned_model, adapter)
    tensors = load_file(adapter / WEIGHTS)
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt", "z": "1", "a": "ü"})
    (adapter / "notes").mkdir()
    image = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
    for name in ("run.png", "run.bin"):  # the latter is a name of weights
        (adapter / "notes" / name).write_bytes(image)

    run_patch(trio, adapter, tmp_path / "out", "--layers", "1")
    out = tmp_path / "out"
    assert (out / "adapter_config.json").read_bytes() == (
        adapter / "adapter_config.json"
    ).read_bytes()
    assert (out / "notes" / "run.png").read_bytes() == image
    assert not (out / "notes" / "run.bin").exists()
    assert read_json(out / "safeproj.json")["output"]["left_out"] == ["notes/run.bin"]
    assert (out / "README.md").read_bytes().startswith((adapter / "README.md").read_bytes())
    assert "safeproj:begin" in (out / "README.md").read_text("utf-8")
    with safe_open(out / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "z": "1", "a": "ü"}
    changed = {
        key
        for key, tensor in load_file(out / WEIGHTS).items()
        if not torch.equal(tensor, tensors[key])
    }
    assert changed == set(read_json(out / "safeproj.json")["output"]["projected"])
    assert len(changed) == 1


def test_patching_twice_keeps_one_section_in_the_card(trio: Trio, tmp_path: Path) -> None:
    source = trio.adapter
    for out in ("one", "two"):
        result = safeproj(
            "patch", "--base", trio.base, "--aligned", trio.aligned, "--adapter", source,
            "--out", tmp_path / out, "--layers", "1",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        source = tmp_path / out
    assert (tmp_path / "two" / "README.md").read_text("utf-8").count("safeproj:begin") == 1


@pytest.mark.parametrize("projector", [[], ["--projector", "exact", "--energy", "0.5"]], ids=str)
def test_the_output_does_not_depend_on_workers_or_threads(
    trio: Trio, tmp_path: Path, projector: list[str]
) -> None:
    written = set()
    for workers, threads in ((1, 1), (2, 2), (5, 1), (3, 4)):
        out = tmp_path / f"{workers}-{threads}"
        run = safeproj if str(threads) == os.environ.get("OMP_NUM_THREADS") else installed
        result = run(
            "patch", *trio.arguments, "--out", out, "--all", "--workers", str(workers), *projector,
            env={"OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        written.add((out / WEIGHTS).read_bytes())
    assert len(written) == 1

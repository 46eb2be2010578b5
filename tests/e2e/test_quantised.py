"""Checkpoints in other encodings through the installed command: the same scores, or a refusal."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests import hub_server
from tests.conftest import Trio
from tests.support import (
    FACTORS,
    MANIFEST,
    assert_refused,
    blake3_of,
    change_json,
    deltas,
    moved,
    oracle_C,
    oracle_cosine,
    read_json,
    safeproj,
    save_adapter,
    snapshot,
)

OFFLINE = {"HF_HUB_OFFLINE": "1"}
MODULE = "model.layers.0.self_attn.q_proj"
WEIGHT = f"{MODULE}.weight"
BLOCK = 16


def inspect(base: Path, aligned: Path, adapter: Path) -> list[dict[str, Any]]:
    """Return the modules of the report."""
    result = safeproj(
        "inspect", "--base", base, "--aligned", aligned, "--adapter", adapter, "--format", "json",
        env=OFFLINE,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    modules: list[dict[str, Any]] = json.loads(result.stdout)["modules"]
    return modules


def pickled(model: Any, folder: Path, shard: str = "5GB") -> Path:
    """Save a model as `.bin` files, as transformers did before it knew safetensors."""
    model.config.save_pretrained(folder)
    save_torch_state_dict(
        model.state_dict(), folder, max_shard_size=shard, safe_serialization=False
    )
    return folder


def fp8(model: Any, folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Save a model as DeepSeek and Qwen publish theirs; return what its weights then mean."""
    stored, meant = dict(model.state_dict()), {}
    for name in [n for n in stored if n.endswith("proj.weight")]:
        W = stored[name]
        blocks = W.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))  # (a, BLOCK, b, BLOCK)
        scales = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        stored |= {name: codes.reshape(W.shape), f"{name}_scale_inv": scales}
        meant[name] = (codes.double() * scales[:, None, :, None].double()).reshape(W.shape)
    model.config.save_pretrained(folder)
    quantisation = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    change_json(folder / "config.json", quantization_config=quantisation)
    save_file({n: t.contiguous() for n, t in stored.items()}, folder / "model.safetensors")
    return folder, meant


# --- .bin


def test_bin_files_give_the_scores_of_safetensors(trio: Trio, tmp_path: Path) -> None:
    base = pickled(trio.base_model, tmp_path / "base")
    aligned = pickled(trio.aligned_model, tmp_path / "aligned", "20KB")
    assert [path.name for path in base.glob("*.bin*")] == ["pytorch_model.bin"]
    assert (aligned / "pytorch_model.bin.index.json").exists()

    found = inspect(base, aligned, trio.adapter)

    assert found == inspect(trio.base, trio.aligned, trio.adapter)


def test_patching_from_bin_files_writes_the_same_adapter(trio: Trio, tmp_path: Path) -> None:
    base = pickled(trio.base_model, tmp_path / "base", "20KB")
    aligned = pickled(trio.aligned_model, tmp_path / "aligned")
    manifests = []
    for out, sources in (
        (tmp_path / "out", ("--base", base, "--aligned", aligned)),
        (tmp_path / "expected", ("--base", trio.base, "--aligned", trio.aligned)),
    ):
        result = safeproj("patch", *sources, "--adapter", trio.adapter, "--out", out, "--all")
        assert result.returncode == 0, result.stderr
        manifests.append(read_json(out / MANIFEST))

    assert (tmp_path / "out" / FACTORS).read_bytes() == (
        tmp_path / "expected" / FACTORS
    ).read_bytes()
    found, expected = (m["inputs"]["base"] for m in manifests)
    assert found["blake3"] == expected["blake3"]
    assert set(found["sha256"]["files"]) == {"config.json", "pytorch_model.bin.index.json"}


def test_only_the_bin_shards_with_needed_weights_are_downloaded(trio: Trio, tmp_path: Path) -> None:
    checkpoint = pickled(trio.base_model, tmp_path / "base", "20KB")
    index = read_json(checkpoint / "pytorch_model.bin.index.json")["weight_map"]
    names = ("q_proj.weight", "v_proj.weight")
    needed = {file for name, file in index.items() if name.endswith(names)}
    assert needed < set(index.values())
    with hub_server.running() as hub:
        hub.publish("org/base", checkpoint)
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        (tmp_path / "empty").mkdir()
        result = safeproj(
            "inspect", "--base", "org/base", "--aligned", trio.aligned, "--adapter", trio.adapter,
            "--format", "json", env={**environment, "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0"},
            cwd=tmp_path / "empty",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        downloaded = {file for file in hub.downloads("org/base") if file.endswith(".bin")}
    assert downloaded == needed
    expected = inspect(trio.base, trio.aligned, trio.adapter)
    assert json.loads(result.stdout)["modules"] == expected


# --- FP8 and MXFP4


def test_fp8_against_bfloat16_is_scored_by_what_the_numbers_mean(
    trio: Trio, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base_model = copy.deepcopy(trio.base_model).bfloat16()
    base_model.save_pretrained(base)
    aligned, meant = fp8(trio.aligned_model, tmp_path / "aligned")
    adapter = save_adapter(
        trio.aligned_model, tmp_path / "adapter", target_modules=["q_proj", "down_proj"]
    )

    found = inspect(base, aligned, adapter)

    delta = deltas(trio.aligned_model, adapter)
    assert {module["name"] for module in found} == set(delta)
    for module in found:
        name = f"{module['name']}.weight"
        C = oracle_C(meant[name], base_model.get_parameter(name))
        expected = oracle_cosine(delta[module["name"]], C)
        assert module["cosine"] == pytest.approx(expected, abs=2e-6)


def test_patching_with_fp8_records_codes_and_scales(trio: Trio, tmp_path: Path) -> None:
    aligned, meant = fp8(trio.aligned_model, tmp_path / "aligned")
    out = tmp_path / "out"

    result = safeproj(
        "patch", "--base", trio.base, "--aligned", aligned, "--adapter", trio.adapter,
        "--out", out, "--all", env=OFFLINE,
    )  # fmt: skip

    assert result.returncode == 0, result.stderr
    before, after = deltas(trio.aligned_model, trio.adapter), deltas(trio.aligned_model, out)
    W_base = trio.base_model.state_dict()
    for name, delta in before.items():
        expected = oracle_C(meant[f"{name}.weight"], W_base[f"{name}.weight"]) @ delta
        assert float((after[name] - expected).norm() / expected.norm()) < 1e-5, name
    stored = load_file(aligned / "model.safetensors")
    assert "the aligned checkpoint stores weights as F8_E4M3" in result.stderr
    assert "the base checkpoint stores" not in result.stderr
    assert str(tmp_path) not in (out / "README.md").read_text("utf-8")
    recorded = read_json(out / MANIFEST)["inputs"]["aligned"]["blake3"]["tensors"]
    for name in (WEIGHT, f"{WEIGHT}_scale_inv"):
        assert recorded[name] == blake3_of(stored[name])


def gpt_oss() -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        num_hidden_layers=1,
        hidden_size=64,
        intermediate_size=32,
        vocab_size=50,
        head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    return GptOssForCausalLM(config)


def mxfp4(model: Any, folder: Path) -> Path:
    """Save a model as gpt-oss is published, and change it to what its experts then mean."""
    generator = torch.Generator().manual_seed(1)
    stored = {name: t.clone() for name, t in model.state_dict().items()}
    for name in [n for n in stored if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        parameter = model.get_parameter(name)
        experts, rows, columns = parameter.shape
        shape = (experts, columns, rows // 32)  # of the model that runs, turned
        blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 123, shape, generator=generator, dtype=torch.uint8)
        del stored[name]
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        parameter.data = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    model.config.save_pretrained(folder)
    change_json(folder / "config.json", quantization_config={"quant_method": "mxfp4"})
    save_file(stored, folder / "model.safetensors")
    return folder


def test_mxfp4_is_scored_by_what_the_numbers_mean(tmp_path: Path) -> None:
    base_model = gpt_oss()
    base_model.save_pretrained(tmp_path / "base")
    aligned_model = moved(base_model)
    aligned = mxfp4(aligned_model, tmp_path / "aligned")
    aligned_model.save_pretrained(tmp_path / "meant")
    adapter = save_adapter(
        aligned_model,
        tmp_path / "adapter",
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )

    found = inspect(tmp_path / "base", aligned, adapter)

    expected = inspect(tmp_path / "base", tmp_path / "meant", adapter)
    assert [module["name"] for module in found] == [module["name"] for module in expected]
    assert any("experts" in module["name"] for module in found)
    for one, other in zip(found, expected, strict=True):
        assert one["cosine"] == pytest.approx(other["cosine"], abs=1e-6)
        assert one["alignment_norm"] == pytest.approx(other["alignment_norm"], rel=1e-6)


# --- what cannot be used


def assert_patch_refused(trio: Trio, tmp_path: Path, aligned: Path, *words: str) -> None:
    """Check that nothing is written, and that the one line has the facts."""
    before = snapshot(tmp_path)
    result = safeproj(
        "patch", "--base", trio.base, "--aligned", aligned, "--adapter", trio.adapter,
        "--out", tmp_path / "out", env=OFFLINE,
    )  # fmt: skip
    assert_refused(result, *words)
    assert result.stdout == ""
    assert snapshot(tmp_path) == before


def marked(trio: Trio, folder: Path, method: str, tensors: dict[str, Tensor]) -> Path:
    """Write the aligned checkpoint with these tensors, and a method named in its config."""
    folder.mkdir()
    shutil.copyfile(trio.aligned / "config.json", folder / "config.json")
    save_file(tensors, folder / "model.safetensors")
    change_json(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    return folder


CODES: dict[str, dict[str, tuple[Any, ...]]] = {
    "bitsandbytes": {"weight": (torch.uint8, 512, 1), "weight.absmax": (torch.float32, 16)},
    "gptq": {"qweight": (torch.int32, 4, 32), "scales": (torch.float16, 1, 32)},
    "awq": {"qweight": (torch.int32, 32, 4), "scales": (torch.float16, 1, 32)},
    "aqlm": {"codes": (torch.int8, 32, 4, 1), "codebooks": (torch.float16, 1, 256, 1, 8)},
}
"""What stands for a weight of 32 × 32, by method: the names' ends, dtypes and shapes."""


@pytest.mark.parametrize("method", CODES)
def test_other_quantisations_are_refused_with_advice(
    trio: Trio, tmp_path: Path, method: str
) -> None:
    tensors = dict(trio.aligned_model.state_dict())
    del tensors[WEIGHT]
    for end, (dtype, *shape) in CODES[method].items():
        tensors[f"{WEIGHT.removesuffix('weight')}{end}"] = torch.zeros(shape, dtype=dtype)
    aligned = marked(trio, tmp_path / "aligned", method, tensors)

    words = (str(aligned), f"quantised with {method}", "before quantisation", "QLoRA")
    assert_patch_refused(trio, tmp_path, aligned, *words)


def test_a_method_named_over_plain_numbers_is_a_warning(trio: Trio, tmp_path: Path) -> None:
    tensors = dict(trio.aligned_model.state_dict())
    aligned = marked(trio, tmp_path / "aligned", "gptq", tensors)

    found = safeproj(
        "inspect", "--base", trio.base, "--aligned", aligned, "--adapter", trio.adapter,
        "--format", "json", env=OFFLINE,
    )  # fmt: skip

    assert found.returncode == 0, found.stderr
    assert "config.json says it is quantised with gptq, but its tensors are plain" in found.stderr
    expected = inspect(trio.base, trio.aligned, trio.adapter)
    assert json.loads(found.stdout)["modules"] == expected


def test_damaged_scales_are_refused(trio: Trio, tmp_path: Path) -> None:
    aligned, _ = fp8(trio.aligned_model, tmp_path / "aligned")
    weights = aligned / "model.safetensors"
    good, scales = load_file(weights), f"{WEIGHT}_scale_inv"

    def assert_damage_refused(damaged: dict[str, Tensor], *words: str) -> None:
        save_file(damaged, weights)
        assert_patch_refused(trio, tmp_path, aligned, *words)

    missing = {name: t for name, t in good.items() if name != scales}
    refused = f"{WEIGHT} is stored as F8_E4M3 with no scales"
    assert_damage_refused(missing, str(aligned), refused, "before quantisation")

    misshapen = {**good, scales: torch.ones(3, 2)}
    refused = f"{scales} has shape [3, 2], which does not fit {WEIGHT} [32, 32]"
    assert_damage_refused(misshapen, str(aligned), refused, "16×16")

    not_numbers = {**good, scales: torch.full((2, 2), float("nan"))}
    assert_damage_refused(not_numbers, str(weights), f"{scales} has NaN or Inf")


def test_a_bin_file_that_is_damaged_or_old_is_refused(trio: Trio, tmp_path: Path) -> None:
    aligned = pickled(trio.aligned_model, tmp_path / "aligned")
    weights = aligned / "pytorch_model.bin"
    good = weights.read_bytes()

    weights.write_bytes(good[:-100])
    assert_patch_refused(trio, tmp_path, aligned, str(weights), "cannot be loaded", "truncated")

    torch.save(trio.aligned_model.state_dict(), weights, _use_new_zipfile_serialization=False)
    assert_patch_refused(trio, tmp_path, aligned, str(weights), "before 1.6", "save it again")


def test_another_format_is_refused_with_advice(trio: Trio, tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")

    assert_patch_refused(trio, tmp_path, gguf, str(gguf), "pass the checkpoint that it was")


def test_an_adapter_in_fp8_is_refused(trio: Trio, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(trio.adapter, adapter)
    factors = {n: t.to(torch.float8_e4m3fn) for n, t in load_file(adapter / FACTORS).items()}
    save_file(factors, adapter / FACTORS)

    result = safeproj("inspect", *trio.arguments[:4], "--adapter", adapter)

    assert_refused(result, str(adapter), "float8_e4m3fn", "expected float64, float32, float16")

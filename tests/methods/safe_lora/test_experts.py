"""Adapters of single experts, as models had them before stacks, and as items of one by `--map`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support import assert_refused, oracle_C, oracle_cosine, safeproj

MODELS = Path(__file__).parents[2] / "fixtures" / "models"
LEAVES = {
    "tiny-qwen3-moe-square": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    "tiny-mixtral": ("block_sparse_moe.experts", "w1", "w3", "w2"),
}
"""What the experts' weights are called in the file: the path, and gate, up and down."""

P = "base_model.model."


def write(path: Path, tensors: dict[str, Tensor], targets: list[str]) -> Path:
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": targets}
    (path / "adapter_config.json").write_text(json.dumps({**config, "peft_version": "0.17.0"}))
    return path


def factors(name: str, weight: Tensor) -> dict[str, Tensor]:
    m, n = weight.shape
    return {
        f"{P}{name}.lora_A.weight": torch.randn(2, n),
        f"{P}{name}.lora_B.weight": torch.randn(m, 2),
    }


def cosines(*arguments: str | Path) -> dict[str, float]:
    result = safeproj("inspect", *arguments, "--format", "json")
    assert result.returncode == 0, result.stderr
    return {m["name"]: m["cosine"] for m in json.loads(result.stdout)["modules"]}


def oracle(tensors: dict[str, Tensor], weights: dict[str, tuple[Tensor, Tensor]]) -> Any:
    found = {}
    for name, pair in weights.items():
        delta = tensors[f"{P}{name}.lora_B.weight"] @ tensors[f"{P}{name}.lora_A.weight"]
        found[name] = pytest.approx(oracle_cosine(delta, oracle_C(*pair)), abs=2e-6)
    return found


@pytest.mark.parametrize("fused", [False, True], ids=["one by one", "in stacks"])
@pytest.mark.parametrize("model", LEAVES)
def test_an_alignment_file_for_single_experts(tmp_path: Path, model: str, fused: bool) -> None:
    path, *leaves = LEAVES[model]
    torch.manual_seed(0)
    experts = f"model.layers.0.{path}"
    files = {s: load_file(MODELS / model / s / "model.safetensors") for s in ("aligned", "base")}
    names = [f"{experts}.{e}.{leaf}" for e in range(3) for leaf in leaves]
    pairs = {n: (files["aligned"][f"{n}.weight"], files["base"][f"{n}.weight"]) for n in names}
    for side, stored in files.items():
        (tmp_path / side).mkdir()
        config = (MODELS / model / side / "config.json").read_bytes()
        (tmp_path / side / "config.json").write_bytes(config)
        if fused:  # as transformers 5 may save it
            gate, up, down = (
                torch.stack([stored.pop(f"{experts}.{e}.{leaf}.weight") for e in range(3)])
                for leaf in leaves
            )
            stored["model.layers.0.mlp.experts.gate_up_proj"] = torch.cat([gate, up], 1)
            stored["model.layers.0.mlp.experts.down_proj"] = down
        save_file(stored, tmp_path / side / "model.safetensors", metadata={"format": "pt"})
    # What models of today cut out of a stack has its usual name in the file.
    if fused and model == "tiny-mixtral":
        renamed = dict(zip(leaves, ("gate_proj", "up_proj", "down_proj"), strict=True))
        pairs = {
            ".".join((*n.split(".")[:-1], renamed[n.rpartition(".")[2]])).replace(
                "block_sparse_moe", "mlp"
            ): pair
            for n, pair in pairs.items()
        }
        leaves = list(renamed.values())
    tensors: dict[str, Tensor] = {}
    for name, (weight, _) in pairs.items():
        tensors |= factors(name, weight)
    adapter = write(tmp_path / "adapter", tensors, leaves)
    file = tmp_path / "model.safealign.safetensors"
    made = safeproj(
        "align", "--base", tmp_path / "base", "--aligned", tmp_path / "aligned",
        "--targets", ",".join(leaves), "--exact", "--out", file,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    found = cosines("--alignment", file, "--adapter", adapter)
    assert found == oracle(tensors, pairs)


GPT_OSS = MODELS / "tiny-gpt-oss-square"
"""Its stacks are (E, in, out), so that a single expert's (out, in) is an item, turned."""

RULES = {
    "down_projs": "*.experts.down_projs.*=*.experts.down_proj[*]",
    "gate_up_projs": "*.experts.gate_up_projs.*=*.experts.gate_up_proj[*]",
}


def gpt_oss(path: Path) -> tuple[Path, dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """Write an adapter of single experts of gpt-oss, as Unsloth names them."""
    torch.manual_seed(0)
    aligned, base = (load_file(GPT_OSS / s / "model.safetensors") for s in ("aligned", "base"))
    experts = "model.layers.0.mlp.experts"
    pairs, tensors = {}, dict[str, Tensor]()
    for leaf in ("down_proj", "gate_up_proj"):
        stacks = aligned[f"{experts}.{leaf}"], base[f"{experts}.{leaf}"]
        for e in range(len(stacks[0])):
            name = f"{experts}.{leaf}s.{e}"
            pairs[name] = (stacks[0][e].T, stacks[1][e].T)
            tensors |= factors(name, pairs[name][0])
    targets = [name.split("experts.")[1] for name in pairs]
    return write(path, tensors, targets), tensors, pairs


@pytest.mark.parametrize("flag", [False, True])
def test_experts_of_gpt_oss_as_items_of_its_stacks(tmp_path: Path, flag: bool) -> None:
    adapter, tensors, pairs = gpt_oss(tmp_path / "adapter")
    if flag:  # what PEFT writes there says nothing of a stack
        config = json.loads((adapter / "adapter_config.json").read_text())
        config["fan_in_fan_out"] = True
        (adapter / "adapter_config.json").write_text(json.dumps(config))
    maps = [text for rule in RULES.values() for text in ("--map", rule)]
    models = ("--base", GPT_OSS / "base", "--aligned", GPT_OSS / "aligned")
    result = safeproj("inspect", *models, "--adapter", adapter, *maps)
    if flag:  # square weights cannot tell, so the flag is not overruled in silence
        assert_refused(result, "fan_in_fan_out")
        return
    assert cosines(*models, "--adapter", adapter, *maps) == oracle(tensors, pairs)


@pytest.mark.parametrize("item", ["down_proj[9]", "down_proj[x]", "down_proj_bias[0]", "other[0]"])
def test_items_that_are_none(tmp_path: Path, item: str) -> None:
    adapter, *_ = gpt_oss(tmp_path / "adapter")
    result = safeproj(
        "inspect", "--base", GPT_OSS / "base", "--aligned", GPT_OSS / "aligned",
        "--adapter", adapter,
        "--map", f"*.experts.down_projs.0=*.experts.{item}", "--map", RULES["gate_up_projs"],
    )  # fmt: skip
    assert_refused(result, "the checkpoint has no such tensor", item)

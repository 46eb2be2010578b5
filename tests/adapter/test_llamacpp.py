"""Patched GGUF adapters in llama.cpp: it must compute what transformers does with PEFT's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.adapter.llamacpp import expected, log_probabilities, permute, write_adapter, write_model
from tests.adapter.oracle import patch
from tests.adapter.test_gguf import converted, read_gguf
from tests.conftest import Trio
from tests.support import FACTORS, moved, oracle_C, safeproj, save_adapter

TOLERANCE = 1e-5
"""Of logarithms of probabilities, where all is float32."""

HALF_TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""llama.cpp rounds what it multiplies with factors of these types to the same type."""


def difference(model: Any, tmp_path: Path, adapter: Path, reference: Any) -> float:
    """Return the largest difference between llama.cpp with an adapter, and transformers."""
    path = write_model(model, tmp_path / "model.gguf")
    found = log_probabilities(path, model.config.vocab_size, adapter)
    return float((found - expected(reference)).abs().max())


def with_peft(model: Any, adapter: Path) -> Any:
    return PeftModel.from_pretrained(copy.deepcopy(model), str(adapter)).eval()


def gguf_of(peft: Path, path: Path, dtype: torch.dtype = torch.float32, alpha: float = 8.0) -> Path:
    path.parent.mkdir(exist_ok=True)
    tensors = {key: tensor.to(dtype) for key, tensor in converted(peft).items()}
    return write_adapter(path, tensors, alpha)


@pytest.fixture(scope="module")
def everything(trio: Trio, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT adapter on all linear layers, the embedding and the head, without copies of these."""
    path = save_adapter(
        trio.aligned_model,
        tmp_path_factory.mktemp("llamacpp") / "peft",
        target_modules=[
            *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
            *("embed_tokens", "lm_head"),
        ],
    )
    tensors = {k: t for k, t in load_file(path / FACTORS).items() if "base_layer" not in k}
    save_file(tensors, path / FACTORS, metadata={"format": "pt"})
    return path


def test_what_patch_writes(trio: Trio, everything: Path, tmp_path: Path) -> None:
    """Grouped queries, the embedding and the head: patched as GGUF, and patched as PEFT."""
    given = gguf_of(everything, tmp_path / "in" / "lora.gguf")
    patch(trio, given, tmp_path / "gguf", "--layers", "9")
    patch(trio, everything, tmp_path / "peft", "--layers", "9")
    model = trio.aligned_model
    reference = with_peft(model, tmp_path / "peft")
    assert difference(model, tmp_path, tmp_path / "gguf" / given.name, reference) < TOLERANCE
    # What would not be noticed if neither adapter did anything, or patching nothing:
    before = expected(with_peft(model, everything))
    assert float((expected(reference) - before).abs().max()) > 100 * TOLERANCE
    assert difference(model, tmp_path, given, with_peft(model, everything)) < TOLERANCE


@pytest.mark.parametrize("dtype", HALF_TOLERANCE, ids=str)
def test_half_precision(trio: Trio, everything: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    given = gguf_of(everything, tmp_path / "in" / "lora.gguf", dtype)
    patch(trio, given, tmp_path / "gguf", "--all")
    patch(trio, everything, tmp_path / "peft", "--all")
    reference = with_peft(trio.aligned_model, tmp_path / "peft")
    patched = tmp_path / "gguf" / given.name
    assert {tensor.dtype for tensor in read_gguf(patched).values()} == {dtype}
    found = difference(trio.aligned_model, tmp_path, patched, reference)
    assert found < HALF_TOLERANCE[dtype]


@pytest.mark.parametrize("alpha", [0.0, None])
def test_no_alpha_means_a_scale_of_1(
    trio: Trio, everything: Path, tmp_path: Path, alpha: float | None
) -> None:
    tensors = converted(everything)
    given = write_adapter(tmp_path / "lora.gguf", tensors, alpha)
    same = write_adapter(tmp_path / "same.gguf", tensors, 4.0)  # the rank
    path = write_model(trio.aligned_model, tmp_path / "model.gguf")
    found, other = (log_probabilities(path, 50, each) for each in (given, same))
    assert torch.equal(found, other)
    assert float((found - log_probabilities(path, 50)).abs().max()) > 1e-2


def test_expert_stacks(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    base = MixtralForCausalLM(config).eval()
    aligned = moved(base)
    for model, name in ((base, "base"), (aligned, "aligned")):
        model.save_pretrained(tmp_path / name)
    stacks = {"ffn_gate_exps": (64, 32), "ffn_up_exps": (64, 32), "ffn_down_exps": (32, 64)}
    tensors: dict[str, Tensor] = {}
    for name, (out, inner) in stacks.items():
        tensors[f"blk.0.{name}.weight.lora_a"] = 0.3 * torch.randn(4, 2, inner)
        tensors[f"blk.0.{name}.weight.lora_b"] = 0.3 * torch.randn(4, out, 2)
    tensors["blk.0.attn_q.weight.lora_a"] = 0.3 * torch.randn(2, 32)
    q = 0.3 * torch.randn(32, 2)
    tensors["blk.0.attn_q.weight.lora_b"] = permute(q, 4)
    given = write_adapter(tmp_path / "lora.gguf", tensors, 4.0)

    result = safeproj(
        "patch", "--base", tmp_path / "base", "--aligned", tmp_path / "aligned",
        "--adapter", given, "--out", tmp_path / "out", "--all",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr

    reference = copy.deepcopy(aligned)
    weights, before = reference.state_dict(), base.state_dict()
    with torch.no_grad():
        key = "model.layers.0.self_attn.q_proj.weight"
        delta = 2.0 * q @ tensors["blk.0.attn_q.weight.lora_a"]
        weights[key] += (oracle_C(weights[key], before[key]) @ delta.double()).float()
        for name in stacks:
            A, B = (tensors[f"blk.0.{name}.weight.lora_{side}"] for side in "ab")
            leaf = "down_proj" if "down" in name else "gate_up_proj"
            key = f"model.layers.0.mlp.experts.{leaf}"
            rows = slice(64, 128) if "up_exps" in name else slice(0, 64)
            for e in range(4):
                new, old = weights[key][e][rows], before[key][e][rows]
                new += (oracle_C(new, old) @ (2.0 * B[e] @ A[e]).double()).float()
    assert float((expected(reference) - expected(aligned)).abs().max()) > 100 * TOLERANCE
    assert difference(aligned, tmp_path, tmp_path / "out" / given.name, reference) < TOLERANCE

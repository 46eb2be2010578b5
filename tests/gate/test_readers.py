"""What other programs make of adapters, entry by entry of the table."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import safeproj as package
from safeproj.gate.policy import READERS, TEMPLATE, Policy
from safeproj.gate.readers import TABLE
from safeproj.report import Outcome
from tests.conftest import Trio
from tests.support import CONFIG, FACTORS, change_json, read_json, safeproj, save_adapter

V = "model.layers.0.self_attn.v_proj"

EARLY = frozenset(
    {
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out"),
        *("inference_mode", "init_lora_weights", "layer_replication", "layers_pattern"),
        *("layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "megatron_config"),
        *("megatron_core", "modules_to_save", "peft_type", "r", "rank_pattern", "revision"),
        *("target_modules", "task_type", "use_dora", "use_rslora"),
    }
)
"""The fields of `LoraConfig` in PEFT 0.11.1."""


def differences(trio: Trio, adapter: Path, reader: str) -> list[str]:
    policy = Policy(threshold=0.0, readers=(reader,), max_size=1e9, max_scaling=1e9)
    found = package.check(trio.method, [str(adapter)], policy)
    (check,) = found.checks
    said = [each.message for each in check.findings if each.id == "SP042"]
    assert all(each.startswith(f"{reader}: {TABLE[reader].title} ") for each in said)
    assert (check.outcome is Outcome.failed) or not said
    return said


def made(trio: Trio, path: Path, **settings: Any) -> Path:
    """Save an adapter that PEFT trained with these settings."""
    return save_adapter(trio.aligned_model, path, **{"lora_alpha": 4, **settings})


def changed(adapter: Path, change: Callable[[str, Tensor], tuple[str, Tensor]]) -> None:
    found = dict(change(key, tensor) for key, tensor in load_file(adapter / FACTORS).items())
    save_file({k: t.contiguous() for k, t in found.items()}, adapter / FACTORS)


def rewrite(adapter: Path, keep: frozenset[str]) -> None:
    config = read_json(adapter / CONFIG)
    (adapter / CONFIG).unlink()
    (adapter / CONFIG).write_text("{}", "utf-8")
    change_json(adapter / CONFIG, **{k: v for k, v in config.items() if k in keep})


def test_policy_table_and_page_name_the_same_programs() -> None:
    assert tuple(TABLE) == READERS
    page = (Path(__file__).parents[2] / "docs" / "readers.md").read_text("utf-8")
    for name, reader in TABLE.items():
        assert f"`{name}`" in page
        assert reader.title in page
        assert f'"{name}"' in TEMPLATE


@pytest.mark.parametrize("reader", READERS)
def test_a_plain_adapter_is_read_as_it_was_scored(trio: Trio, tmp_path: Path, reader: str) -> None:
    """With alpha equal to r, and where a program knows less, no more than it knows."""
    targets = ["v_proj", "o_proj"] if reader == "ollama" else ["q_proj", "v_proj", "down_proj"]
    adapter = made(trio, tmp_path / "a", target_modules=targets, init_lora_weights=True)
    changed(adapter, lambda key, tensor: (key, tensor + 0.01))
    if reader == "peft-0.11":
        rewrite(adapter, EARLY)
    assert differences(trio, adapter, reader) == []


CASES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "scaled": ({"lora_alpha": 8}, {"openvino": "by 1, and PEFT by 2"}),
    "rslora": (
        {"use_rslora": True},
        {
            "sglang": "by 1, and PEFT by 2",
            "llama.cpp": "by 1, and PEFT by 2",
            "ollama": "by 1, and PEFT by 2",
            "openvino": "by 1, and PEFT by 2",
        },
    ),
    "alpha by pattern": (
        {"alpha_pattern": {"v_proj": 12}},
        {
            "sglang": "by 1, and PEFT by 3",
            "llama.cpp": "by 1, and PEFT by 3",
            "ollama": "by 1, and PEFT by 3",
            "openvino": "by 1, and PEFT by 3",
        },
    ),
    "rank by pattern": (
        {"rank_pattern": {"v_proj": 2}},
        {
            "sglang": "refuses ranks other than r, which is 4",
            "openvino": "by 1, and PEFT by 2",
        },
    ),
    "dora": (
        {"use_dora": True},
        {
            "vllm": "refuses DoRA",
            "sglang": "refuses DoRA",
            "llama.cpp": "refuses DoRA",
            "ollama": "refuses DoRA",
            "openvino": "ignores DoRA",
        },
    ),
    "lora_bias": (
        {"lora_bias": True},
        {
            "vllm": "refuses lora_bias",
            "sglang": "takes for lora_B the tensors of lora_bias",
            "llama.cpp": "refuses lora_bias",
            "ollama": "refuses lora_bias",
            "openvino": "ignores lora_bias",
            "peft-0.11": "ignores lora_bias",
        },
    ),
    "embeddings": (
        {"target_modules": ["q_proj", "v_proj", "embed_tokens"]},
        {
            "ollama": "refuses LoRA of embeddings: model.embed_tokens",
            "openvino": "ignores LoRA of embeddings: model.embed_tokens",
        },
    ),
    "head": ({"target_modules": ["v_proj", "lm_head"]}, {"ollama": "refuses lm_head"}),
    "saved": (
        {"modules_to_save": ["lm_head"]},
        {
            "vllm": "refuses modules_to_save",
            "llama.cpp": "refuses (or, if they are norms, ignores) modules_to_save",
            "ollama": "refuses modules_to_save",
        },
    ),
    "tokens": (
        {"trainable_token_indices": [3, 4]},
        {"vllm": "refuses trainable tokens", "llama.cpp": "refuses trainable tokens"},
    ),
    "trigger": (
        {"alora_invocation_tokens": [3, 4]},
        {
            "vllm": "refuses alora_invocation_tokens",
            "sglang": "ignores alora_invocation_tokens",
            "ollama": "ignores alora_invocation_tokens",
            "openvino": "ignores alora_invocation_tokens",
        },
    ),
    "pattern of targets": (
        {"target_modules": r".*\.(q|v)_proj"},
        {"sglang": "refuses target_modules that are a regular expression"},
    ),
    "query alone": (
        {"target_modules": ["q_proj"]},
        {"sglang": "wants q_proj and v_proj together: model.layers.0.self_attn"},
    ),
    "query": ({}, {"ollama": "rearranges lora_A of model.layers.0.self_attn.q_proj"}),
    "pissa": (
        {"init_lora_weights": "pissa"},
        {
            "vllm": "refuses init_lora_weights 'pissa'",
            "sglang": "ignores init_lora_weights: pissa",
            "llama.cpp": "ignores init_lora_weights: pissa",
            "ollama": "ignores init_lora_weights: pissa",
            "openvino": "ignores init_lora_weights: pissa",
        },
    ),
    "later settings": ({}, {"peft-0.11": "refuses a config with settings that it does not know"}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_otherwise_is_named(trio: Trio, tmp_path: Path, case: str) -> None:
    settings, expected = CASES[case]
    adapter = made(trio, tmp_path / "a", **settings)
    for reader in READERS:
        said = differences(trio, adapter, reader)
        if reader in expected:
            assert any(expected[reader] in each for each in said), (reader, said)
        elif reader in ("vllm", "llama.cpp"):  # which read the rest as PEFT does
            assert not said, (reader, said)


def test_alpha_is_parsed_as_a_whole_number(trio: Trio, tmp_path: Path) -> None:
    adapter = made(trio, tmp_path / "a", target_modules=["v_proj"])
    assert not differences(trio, adapter, "ollama")
    change_json(adapter / CONFIG, lora_alpha=4.0)
    assert "whole number" in "".join(differences(trio, adapter, "ollama"))
    assert not differences(trio, adapter, "vllm")


def test_factors_of_two_types_are_refused(trio: Trio, tmp_path: Path) -> None:
    adapter = made(trio, tmp_path / "a")
    changed(adapter, lambda k, t: (k, t.bfloat16() if f"{V}.lora_A" in k else t))
    (said,) = differences(trio, adapter, "openvino")
    assert f"two factors of different types: {V} (bfloat16, float32)" in said
    changed(adapter, lambda k, t: (k, t.double()))
    assert "32 or 16 bits" in "".join(differences(trio, adapter, "openvino"))


def test_names_with_the_adapters_name_are_refused(trio: Trio, tmp_path: Path) -> None:
    adapter = made(trio, tmp_path / "a")
    changed(adapter, lambda key, tensor: (key.replace(".weight", ".default.weight"), tensor))
    for reader in ("vllm", "llama.cpp", "ollama", "openvino", "peft-0.11"):
        assert "adapter's name" in "".join(differences(trio, adapter, reader)), reader
    assert not differences(trio, adapter, "sglang")


def test_pickled_weights(trio: Trio, tmp_path: Path) -> None:
    adapter = made(trio, tmp_path / "a")
    torch.save(load_file(adapter / FACTORS), adapter / "adapter_model.bin")
    (adapter / FACTORS).unlink()
    for reader in READERS:
        said = "".join(differences(trio, adapter, reader))
        assert ("adapter_model.bin" in said) is (reader in ("ollama", "openvino"))


def test_an_early_peft_takes_one_key_for_both_patterns(trio: Trio, tmp_path: Path) -> None:
    """Run with PEFT 0.11.1: q_proj is scaled by 1 here, by PEFT 0.21 by 25."""
    patterns: dict[str, Any] = {
        "rank_pattern": {"q_proj": 4},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 100},
    }
    adapter = made(trio, tmp_path / "a", **patterns)
    rewrite(adapter, EARLY)
    (said,) = differences(trio, adapter, "peft-0.11")
    assert "scales model.layers.0.self_attn.q_proj by 1, and PEFT by 25" in said


@pytest.mark.parametrize(
    ("pattern", "scaled"),
    [
        ("q_proj|v_proj", ["v_proj"]),  # an alternative that is not at the end of a path
        ("model.layers.0.self_attn.q_proj", []),  # the whole path is found without matching
        ("layers.0.self_attn.(q|v)_proj", []),
    ],
)
def test_an_early_peft_matches_patterns_otherwise(
    trio: Trio, tmp_path: Path, pattern: str, scaled: list[str]
) -> None:
    """Run with PEFT 0.11.1: those that it does not match keep the default."""
    adapter = made(trio, tmp_path / "a", alpha_pattern={pattern: 100})
    rewrite(adapter, EARLY)
    said = "".join(differences(trio, adapter, "peft-0.11"))
    assert set(re.findall(r"[qv]_proj", said)) == set(scaled)


def test_changes_that_change_nothing_may_be_ignored(trio: Trio, tmp_path: Path) -> None:
    """PEFT saves a copy of an embedding that it adapts."""
    adapter = made(trio, tmp_path / "a", target_modules=["v_proj", "q_proj", "embed_tokens"])
    assert any("base_layer" in key for key in load_file(adapter / FACTORS))
    assert not differences(trio, adapter, "llama.cpp")
    assert not differences(trio, adapter, "vllm")


def test_another_format_is_named(trio: Trio, tmp_path: Path) -> None:
    mlx = tmp_path / "mlx"
    mlx.mkdir()
    tensors = load_file(trio.adapter / FACTORS)
    named = {
        key.removeprefix("base_model.model.")
        .replace("lora_A.weight", "lora_a")
        .replace("lora_B.weight", "lora_b"): tensor.T.contiguous()
        for key, tensor in tensors.items()
    }
    save_file(named, mlx / "adapters.safetensors")
    change = {"fine_tune_type": "lora", "num_layers": 2}
    (mlx / CONFIG).write_text("{}", "utf-8")
    change_json(mlx / CONFIG, **change, lora_parameters={"rank": 4, "scale": 2.0, "dropout": 0.0})
    (said,) = differences(trio, mlx, "vllm")
    assert "reads adapters of PEFT, and this is one of MLX" in said


def test_the_option_may_be_repeated_and_adds_to_the_policy(trio: Trio, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(trio.adapter, tmp_path / "a"))
    change_json(adapter / CONFIG, alpha_pattern={"q_proj": 16})
    (tmp_path / "safeproj.toml").write_text('readers = ["openvino"]\nthreshold = 0\n', "utf-8")
    models: list[str | Path] = ["--base", trio.base, "--aligned", trio.aligned]
    done = safeproj(
        *("check", adapter, *models, "--policy", tmp_path / "safeproj.toml"),
        *("--reader", "sglang", "--reader", "vllm", "--verbose"),
    )
    assert done.returncode == 1
    for name in ("sglang: SGLang", "openvino: OpenVINO"):
        assert name in done.stdout
    assert "vllm: " not in done.stdout
    refused = safeproj("check", adapter, *models, "--reader", "vlm")
    assert refused.returncode == 2
    assert "did you mean vllm" in refused.stderr

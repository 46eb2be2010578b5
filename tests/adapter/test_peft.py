"""PEFT adapters as other programs write them, and what looks like one."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import safeproj
from safeproj.adapter import AdaptedModule, read_adapter
from safeproj.adapter.peft_config import allowed_ranks, scalings, with_ranks
from safeproj.adapter.record import Factor, Kind
from safeproj.errors import SafeprojError
from safeproj.gate.policy import Policy
from tests.adapter.oracle import patch
from tests.conftest import Trio
from tests.support import CONFIG, FACTORS, change_json, moved, save_adapter, tiny_llama


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair whose head is its embedding, and an adapter of both that PEFT ties."""
    root = tmp_path_factory.mktemp("tied")
    base = tiny_llama(tie_word_embeddings=True)
    aligned = moved(base)
    base.save_pretrained(root / "base")
    aligned.save_pretrained(root / "aligned")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_adapter(
            aligned,
            root / "adapter",
            target_modules=["lm_head", "q_proj"],
            ensure_weight_tying=True,
        )
    return root


def findings(root: Path, adapter: Path) -> list[tuple[str, str]]:
    policy = Policy(threshold=0.0, max_size=1e9)
    method = safeproj.SafeLora(str(root / "base"), str(root / "aligned"))
    (found,) = safeproj.check(method, [str(adapter)], policy).checks
    return [(finding.id, finding.message) for finding in found.findings]


def test_a_head_that_peft_ties_is_no_stranger(tied: Path) -> None:
    """PEFT takes it out of the targets when it saves."""
    config = json.loads((tied / "adapter" / CONFIG).read_text())
    assert sorted(config["target_modules"]) == ["model.embed_tokens", "q_proj"]
    assert any("lm_head" in key for key in load_file(tied / "adapter" / FACTORS))
    assert "SP011" not in [rule for rule, _ in findings(tied, tied / "adapter")]
    assert any("0.18" in text for text in read_adapter(str(tied / "adapter")).warnings)


def test_a_head_with_factors_of_its_own_is_one(tied: Path, tmp_path: Path) -> None:
    """On loading, PEFT would give them to the embedding too: the head's come last."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / CONFIG).write_bytes((tied / "adapter" / CONFIG).read_bytes())
    tensors = load_file(tied / "adapter" / FACTORS)
    key = next(key for key in tensors if "lm_head.lora_B" in key)
    tensors[key] = 2 * tensors[key]
    save_file(tensors, adapter / FACTORS, metadata={"format": "pt"})
    found = findings(tied, adapter)
    assert any(rule == "SP011" and "lm_head" in text for rule, text in found)
    assert not any("0.18" in text for text in read_adapter(str(adapter)).warnings)


def test_magnitudes_that_peft_drops_are_said_to_be(trio: Trio, tmp_path: Path) -> None:
    """As torchtune writes DoRA: without use_dora."""
    adapter = save_adapter(trio.aligned_model, tmp_path / "adapter", use_dora=True)
    change_json(adapter / CONFIG, use_dora=False)
    manifest = patch(trio, adapter, tmp_path / "out", "--all")
    (text,) = (text for text in manifest["warnings"] if "magnitude" in text)
    assert "does not set use_dora" in text
    assert "torchtune" in text
    before, after = (load_file(path / FACTORS) for path in (adapter, tmp_path / "out"))
    kept = [key for key in before if "magnitude" in key]
    assert kept
    assert all(torch.equal(before[key], after[key]) for key in kept)


@pytest.mark.parametrize("weights", ["pytorch_adapter.bin", "adapter.safetensors", None])
def test_an_adapter_of_adapterhub_is_named(tmp_path: Path, weights: str | None) -> None:
    config: dict[str, Any] = {
        "config": {"architecture": "lora", "r": 8},
        "model_type": "llama",
        "name": "mine",
        "version": "adapters.1.3.0",
    }
    if weights is None:
        config["model_class"] = "LlamaAdapterModel"
    else:
        (tmp_path / weights).write_bytes(b"x")
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(SafeprojError, match="AdapterHub's library"):
        read_adapter(str(tmp_path))


def module(name: str, rank: int) -> AdaptedModule:
    key = f"base_model.model.{name}.lora"
    return AdaptedModule(
        name, f"{name}.weight", Kind.linear, Factor(f"{key}_B"), Factor(f"{key}_A"), rank, 9, 8
    )


@pytest.mark.parametrize("root", [False, True], ids=["LoRA", "rsLoRA"])
def test_other_ranks_keep_every_scaling(root: bool) -> None:
    names = [f"model.layers.{i}.{kind}" for i in range(12) for kind in ("q_proj", "up_proj")]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": root,
        "rank_pattern": {"up_proj": 2},
        "alpha_pattern": {r"layers\.1.*q_proj": 16, "up_proj": 3},
    }
    modules = [module(name, 2 if "up_proj" in name else 4) for name in names]
    before = scalings(config, modules)
    ranks = {name: 7 for name in names if "q_proj" in name}
    found = with_ranks(config, modules, ranks)
    after = [replace(each, rank=ranks.get(each.name, each.rank)) for each in modules]
    assert scalings(found, after) == pytest.approx(before, rel=1e-15)
    assert allowed_ranks(found)[0] in (2, 7)
    assert found["rank_pattern"].keys() | found["alpha_pattern"].keys() <= set(names)
    turned = {
        key: dict(sorted(found[key].items(), reverse=True))
        for key in ("rank_pattern", "alpha_pattern")
    }
    assert scalings({**found, **turned}, after) == pytest.approx(before, rel=1e-15)


def test_names_that_patterns_cannot_tell_apart_are_refused() -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
    modules = [module(name, 4) for name in ("inner.q", "outer.inner.q", "k")]
    with pytest.raises(SafeprojError, match=r"the end of outer\.inner\.q"):
        with_ranks(config, modules, {"inner.q": 6})
    assert with_ranks(config, modules, {"outer.inner.q": 6})["rank_pattern"] == {"outer.inner.q": 6}

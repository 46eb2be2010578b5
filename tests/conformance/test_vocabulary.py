"""Adapters that bring tokens of their own: PEFT saves embedding and head by itself."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from safeproj.lm.adapters import Host
from safeproj.storage.source import open_folder
from tests.conformance import oracle
from tests.conformance.architectures import GROUPED, Architecture, Built, save_pair
from tests.support import (
    CONFIG,
    FACTORS,
    MANIFEST,
    arrays_of,
    assert_refused,
    change_json,
    moved,
    oracle_C,
    read_json,
    safeproj,
)

P = oracle.PREFIX
OLD, NEW = 41, 45
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
IDS = torch.arange(NEW)[None]

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "saved-embedding": {"modules_to_save": ["embed_tokens"]},
    "saved-and-tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "both-adapted": {"target_modules": ["q_proj", "v_proj", "embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": [3, 41, 44]},
    "tokens-of-both": {"trainable_token_indices": {"embed_tokens": [41, 42], "lm_head": [42]}},
    "tokens-of-one": {"trainable_token_indices": {"embed_tokens": [2, 44]}},
}
"""What is trained beside the attention of a model whose vocabulary was resized."""


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    settings = {**GROUPED, "tie_word_embeddings": request.param}
    base = Architecture("LlamaForCausalLM", "LlamaConfig", settings).build()
    return save_pair(tmp_path_factory.mktemp("pair"), base, moved(base))


def grown(pair: Built) -> Any:
    """Return the aligned model as its users load it before they put on an adapter with tokens."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(pair.aligned)
    torch.manual_seed(7)
    model.resize_token_embeddings(NEW, mean_resizing=False)
    return model


def trained(pair: Built, name: str, path: Path) -> Path:
    from peft import LoraConfig

    settings = {"target_modules": ["q_proj", "v_proj"], **SETTINGS[name]}
    config = LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **settings)
    return oracle.save(grown(pair), config, path)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def by_peft(pair: Built, adapter: Path) -> torch.Tensor:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(PeftModel.from_pretrained(grown(pair), str(adapter)))


@pytest.mark.parametrize("name", SETTINGS)
def test_they_are_patched_with_what_is_new_listed(pair: Built, tmp_path: Path, name: str) -> None:
    adapter, out = trained(pair, name, tmp_path / "adapter"), tmp_path / "out"
    oracle.patch(pair, adapter, out, "--all")
    before, after = load_file(adapter / FACTORS), load_file(out / FACTORS)
    manifest = read_json(out / MANIFEST)

    listed = {item["tensor"]: item for item in manifest["unprojected"]}
    assert listed.keys() == {key for key in before if ".lora_" not in key}
    assert {item["parameter"] for item in listed.values()} <= {
        f"{EMBEDDING}.weight", f"{HEAD}.weight"
    }  # fmt: skip
    for key, item in listed.items():
        rows = manifest_rows(adapter, key)
        own = before[key].double()
        weight = pair.aligned_model.state_dict()[item["parameter"]].double()
        common = [(i, row) for i, row in enumerate(rows) if row < OLD]
        assert item["added_rows"] == len(rows) - len(common)
        if not common:
            assert item["relative_change"] is None
            continue
        mine, theirs = (torch.stack([w[at[side]] for at in common])
                        for side, w in enumerate((own, weight)))  # fmt: skip
        size = float((mine - theirs).norm() / theirs.norm())
        assert item["relative_change"] == pytest.approx(size, rel=1e-6)
        assert torch.equal(after[key], before[key])

    for leaf in ("q_proj", "v_proj"):
        B = f"{P}model.layers.1.self_attn.{leaf}.lora_B.weight"
        weights = (m.get_submodule(f"model.layers.1.self_attn.{leaf}").weight
                   for m in (pair.aligned_model, pair.base_model))  # fmt: skip
        C = oracle_C(*(each.detach() for each in weights))
        assert torch.allclose(after[B].double(), C @ before[B].double(), atol=1e-6)
    assert not torch.equal(by_peft(pair, out), by_peft(pair, adapter))


def manifest_rows(adapter: Path, key: str) -> list[int]:
    """Return the rows of the vocabulary that a tensor is for."""
    if not key.endswith("trainable_tokens_delta"):
        return list(range(NEW))
    given = read_json(adapter / CONFIG)["trainable_token_indices"]
    if isinstance(given, list):
        return list(given)
    own = "lm_head" if "lm_head" in key and "lm_head" in given else "embed_tokens"
    return list(given[own])


@pytest.mark.parametrize("name", SETTINGS)
def test_the_model_that_is_run_is_resized(pair: Built, tmp_path: Path, name: str) -> None:
    adapter = trained(pair, name, tmp_path / "adapter")
    wanted = by_peft(pair, adapter)
    host = Host(open_folder(str(pair.aligned)), "cpu")
    with host.lazily(open_folder(str(adapter))) as load:
        assert torch.equal(logits(load()), wanted)
    assert host.model.get_input_embeddings().weight.shape[0] == OLD


def test_a_gate_fails_on_new_rows_and_says_so(pair: Built, tmp_path: Path) -> None:
    adapter = trained(pair, "plain", tmp_path / "adapter")
    models = ("--base", pair.base, "--aligned", pair.aligned)
    done = safeproj("check", adapter, *models, "--verbose")
    assert done.returncode == 1
    rules = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("fail")]
    assert "SP004" in rules
    assert "SP005" not in rules
    assert done.stdout.count("is the aligned model's, and has 4 new rows") == 2
    assert "lm_head.weight (saved vocabulary) is the aligned model's, and has 4 new rows" in (
        done.stdout
    )
    assert "safeproj eval" in done.stdout


def test_fewer_rows_are_no_copy(pair: Built, tmp_path: Path) -> None:
    """Special tokens are the last rows: without them a model cannot end its turn."""
    model = copy.deepcopy(grown(pair))
    model.resize_token_embeddings(OLD - 2)
    from peft import LoraConfig

    adapter = oracle.save(model, LoraConfig(target_modules=["q_proj"], r=3), tmp_path / "adapter")
    oracle.patch(pair, adapter, tmp_path / "out", "--all")
    items = read_json(tmp_path / "out" / MANIFEST)["unprojected"]
    assert [(i["added_rows"], i["relative_change"]) for i in items] == [(-2, 0.0)] * 2
    done = safeproj("check", adapter, "--base", pair.base, "--aligned", pair.aligned)
    assert "2 rows fewer" in done.stdout
    assert done.returncode == 1


def test_sizes_that_contradict_are_refused(pair: Built, tmp_path: Path) -> None:
    adapter = trained(pair, "plain", tmp_path / "adapter")
    tensors = load_file(adapter / FACTORS)
    tensors[f"{P}lm_head.weight"] = tensors[f"{P}lm_head.weight"][:43].contiguous()
    save_file(tensors, adapter / FACTORS)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n', "utf-8")
    from tests.evaluate.support import tokenizer

    tokenizer(()).save_pretrained(pair.aligned)
    done = safeproj("eval", "--model", pair.aligned, "--adapter", adapter, "--harmful", prompts)
    assert_refused(done, "several sizes", "43", "45")


def test_an_index_far_beyond_the_vocabulary_does_not_fill_the_memory(
    pair: Built, tmp_path: Path
) -> None:
    from safeproj.errors import SafeprojError

    adapter = trained(pair, "tokens", tmp_path / "adapter")
    tensors = load_file(adapter / FACTORS)
    kept = {k: v for k, v in tensors.items() if ".lora_" in k or "delta" in k}
    save_file(kept, adapter / FACTORS)
    change_json(adapter / CONFIG, trainable_token_indices=[3, 41, 10**12])
    host = Host(open_folder(str(pair.aligned)), "cpu")
    with (
        pytest.raises(SafeprojError, match="1000000000000"),
        host.lazily(open_folder(str(adapter))) as load,
    ):
        load()


@pytest.mark.parametrize("name", ["plain", "saved", "tokens"])
def test_a_sweep_exchanges_factors_of_a_resized_model(
    pair: Built, tmp_path: Path, name: str
) -> None:
    from safeproj.adapter import read_adapter
    from safeproj.lm.models import load_model
    from safeproj.sweeping.subject import Subject

    adapter = trained(pair, name, tmp_path / "adapter")
    oracle.patch(pair, adapter, tmp_path / "out", "--all")
    subject = Subject(load_model(open_folder(str(pair.aligned)), "cpu"), read_adapter(str(adapter)))
    assert torch.equal(logits(subject.model), by_peft(pair, adapter))
    factors = {k: v for k, v in load_file(tmp_path / "out" / FACTORS).items() if ".lora_" in k}
    subject.put(arrays_of(factors))
    assert torch.equal(logits(subject.model), by_peft(pair, tmp_path / "out"))


def test_a_correction_layer_by_layer_resizes_the_model(pair: Built, tmp_path: Path) -> None:
    from tests.evaluate.support import tokenizer, write_lines

    words = [f"w{i}" for i in range(OLD - 6)]
    tokenizer(words).save_pretrained(pair.aligned)
    rows = [{"prompt": f"w{i} w{i + 1}", "response": "w9 w8"} for i in range(8)]
    data = write_lines(tmp_path / "data.jsonl", rows)
    adapter = trained(pair, "plain", tmp_path / "adapter")
    done = safeproj("patch", "--method", "covariance", "--aligned", pair.aligned,
                  "--safety-data", data, "--task-data", data, "--adapter", adapter,
                  "--out", tmp_path / "out", "--reconstruct", "--device", "cpu")  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, after = load_file(adapter / FACTORS), load_file(tmp_path / "out" / FACTORS)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if "lora_A" in key}

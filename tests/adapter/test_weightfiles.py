"""Weights that lie beside an adapter are not patched, and so not copied unless asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from safeproj.adapter.weightfiles import is_weights_file
from tests.conftest import Trio
from tests.support import CONFIG, MANIFEST, change_json, read_json, safeproj, save_adapter

MODEL = {
    "config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
}
OTHERS = {
    *MODEL,
    "adapter_model.pt",
    "notes.txt",
    "checkpoint-10/adapter_config.json",
    "checkpoint-10/adapter_model.safetensors",
    "checkpoint-10/optimizer.pt",
}
STATE = {"training_args.bin", "checkpoint-20/optimizer.pt"}
KEPT = {
    "generation_config.json",
    "special_tokens_map.json",
    "checkpoint-20/trainer_state.json",
}


@pytest.fixture
def epoch(trio: Trio, tmp_path: Path) -> Path:
    """A directory as trainers leave it: with the merged model, and copies under other names."""
    adapter = save_adapter(trio.aligned_model, tmp_path / "epoch_0")
    change_json(adapter / CONFIG, base_model_name_or_path=str(trio.aligned))
    merged: Any = trio.base_model
    state = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    shards = MODEL - {"config.json", "model.safetensors.index.json"}
    names = sorted(state)
    where: dict[str, str] = {}
    for number, shard in enumerate(sorted(shards)):
        part = {name: state[name] for name in names[number::2]}
        save_file(part, adapter / shard, metadata={"format": "pt"})
        where |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": where}
    (adapter / "model.safetensors.index.json").write_text(json.dumps(index))
    merged.config.save_pretrained(adapter)
    torch.save({"a": torch.ones(2)}, adapter / "adapter_model.pt")
    save_file({"a": torch.ones(2)}, adapter / "notes.txt")
    (adapter / "generation_config.json").write_text("{}")
    (adapter / "special_tokens_map.json").write_text("{}")
    torch.save({"lr": 1.0}, adapter / "training_args.bin")
    for step in ("checkpoint-10", "checkpoint-20"):
        (adapter / step).mkdir()
    save_file({"a": torch.ones(2)}, adapter / "checkpoint-10" / "adapter_model.safetensors")
    (adapter / "checkpoint-10" / CONFIG).write_text("{}")
    save_file({"a": torch.ones(2)}, adapter / "checkpoint-10" / "optimizer.pt")  # it is none
    torch.save({"state": {}}, adapter / "checkpoint-20" / "optimizer.pt")
    (adapter / "checkpoint-20" / "trainer_state.json").write_text("{}")
    return adapter


def patch(trio: Trio, adapter: Path, out: Path, *options: str) -> Any:
    result = safeproj(
        "patch", "--base", trio.base, "--aligned", trio.aligned, "--adapter", adapter,
        "--out", out, "--all", *options,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result


def files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_other_weights_are_left_out_and_named(trio: Trio, epoch: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = files(epoch)
    dry = patch(trio, epoch, out, "--dry-run")
    result = patch(trio, epoch, out)
    assert files(out) == (before - OTHERS - STATE) | {MANIFEST}
    assert files(out) >= KEPT
    (told,) = [line for line in result.stderr.splitlines() if "--copy-weights" in line]
    assert "left out" in told
    assert told in dry.stderr
    # As it is read: Markdown takes a backslash before punctuation away.
    card = re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", (out / "README.md").read_text("utf-8"))
    for name in OTHERS:
        assert name in told
        assert name in card
    manifest = read_json(out / MANIFEST)
    assert set(manifest["output"]["left_out"]) == OTHERS | STATE
    assert "copy_weights" not in manifest["options"]
    models = ("--base", trio.base, "--aligned", trio.aligned)
    verified = safeproj("verify", out, "--original", epoch, *models)
    assert verified.returncode == 0, verified.stdout
    gate = safeproj("check", out, "--original", epoch, *models)
    assert "SP014" not in gate.stdout
    assert "SP025" not in gate.stdout


def test_loaders_take_the_result_for_an_adapter(trio: Trio, epoch: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    patch(trio, epoch, out)
    ids = torch.tensor([[1, 5, 9, 4]])
    host: Any = AutoModelForCausalLM.from_pretrained(trio.aligned)
    wanted = PeftModel.from_pretrained(host, str(out)).eval()(ids).logits
    found: Any = AutoModelForCausalLM.from_pretrained(out).eval()
    assert torch.allclose(found(ids).logits, wanted, atol=1e-5)


def test_they_are_copied_where_that_is_wanted(trio: Trio, epoch: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = patch(trio, epoch, out, "--copy-weights", "--keep-training-state")
    assert files(out) == files(epoch) | {MANIFEST}
    (told,) = [line for line in result.stderr.splitlines() if "unpatched" in line]
    assert all(name in told for name in OTHERS)
    manifest = read_json(out / MANIFEST)
    assert manifest["options"]["copy_weights"] is True
    assert "left_out" not in manifest["output"]
    assert "unpatched" in (out / "README.md").read_text("utf-8")


def test_the_config_of_a_model_without_weights_is_kept(trio: Trio, tmp_path: Path) -> None:
    """Some trainers put it beside the adapter: there is nothing that it could be taken for."""
    adapter = save_adapter(trio.aligned_model, tmp_path / "adapter")
    trio.aligned_model.config.save_pretrained(adapter)
    result = patch(trio, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()
    assert "left out" not in result.stderr


NAMES = {
    "model.safetensors": True,
    "MODEL.SAFETENSORS": True,
    "pytorch_model.bin.index.json": True,
    "consolidated.00.pth": True,
    "lora.gguf": True,
    "config.json": False,
    "README.md": False,
    "training_args.bin": False,
    "optimizer.pt": False,
    "rng_state_0.pth": False,
    "random_states_0.pkl": False,
}


@pytest.mark.parametrize(("name", "wanted"), NAMES.items(), ids=NAMES)
def test_names(tmp_path: Path, name: str, wanted: bool) -> None:
    (tmp_path / name).write_bytes(b"")
    assert is_weights_file(tmp_path / name) is wanted


@pytest.mark.parametrize("name", ["weights", "tokenizer.json", "optimizer.pt", "training_args.bin"])
def test_bytes_tell_what_a_name_does_not(tmp_path: Path, name: str) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / name)
    assert is_weights_file(tmp_path / name)

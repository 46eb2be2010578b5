"""Vision-language models that are run on text, with adapters under the names of either class."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from safeproj.lm.adapters import Host
from safeproj.lm.models import load_model
from safeproj.storage.source import open_folder
from tests.evaluate.support import tokenizer, write_lines
from tests.support import CONFIG, FACTORS, safeproj

TEXT: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
QWEN: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 14,
}
LINEAR = {
    "layer_types": ["full_attention", "linear_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "gemma3": ("Gemma3", {"sliding_window": 16}, VISION, "Gemma3ForConditionalGeneration"),
    "llava": ("Llava", {"model_type": "llama"}, {**VISION, "model_type": "clip_vision_model"},
              "LlavaForConditionalGeneration"),
    "qwen2_5_vl": ("Qwen2_5_VL", {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
                   QWEN, "Qwen2_5_VLForConditionalGeneration"),
    "qwen3_5": ("Qwen3_5", LINEAR, QWEN, "Qwen3_5ForCausalLM"),
}  # fmt: skip
"""Of each: what its classes begin with, its own text and vision settings, what runs it."""

LETTERS = string.ascii_letters[:44]
"""Words of which a byte-pair tokenizer, as Qwen's class makes one of any, knows each."""

FORMS = ("model.layers", "model.language_model.layers", "language_model.model.layers")
IDS = torch.arange(3, 40)[None]
R, ALPHA, OTHER_ALPHA = 3, 4, 9


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    name, text, vision, _ = MODELS[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        text_config={**TEXT, **text}, vision_config=vision
    )
    built = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    path: Path = tmp_path_factory.mktemp(request.param) / request.param
    built.save_pretrained(path)
    tokenizer(LETTERS).save_pretrained(path)
    return path


def adapted(found: Any) -> Iterator[str]:
    """Yield the layers that the adapter is for: some, of the language model alone."""
    for name, _ in found.named_modules():
        if "vis" not in name and name.endswith(("layers.0.self_attn.q_proj", ".mlp.down_proj")):
            yield name


def logits(found: Any) -> torch.Tensor:
    with torch.no_grad():
        answer: torch.Tensor = found.eval()(input_ids=IDS).logits
    return answer


def save(host: Any, form: str, path: Path) -> dict[str, tuple[torch.Tensor, float]]:
    """Write an adapter under the names of a form, and return what it adds to each layer."""
    torch.manual_seed(3)
    tensors: dict[str, torch.Tensor] = {}
    added: dict[str, tuple[torch.Tensor, float]] = {}
    for name in adapted(host):
        layer = host.get_submodule(name)
        A, B = 0.3 * torch.randn(R, layer.in_features), 0.3 * torch.randn(layer.out_features, R)
        key = f"base_model.model.{form}.{name.partition('layers.')[2]}"
        tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
        added[name] = (B @ A, (OTHER_ALPHA if name.endswith("q_proj") else ALPHA) / R)
    path.mkdir()
    save_file(tensors, path / FACTORS)
    pattern = rf"(layers\.0|{form}.0).self_attn.q_proj"
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": R, "lora_alpha": ALPHA,
        "alpha_pattern": {pattern: OTHER_ALPHA},
        "target_modules": [f"{form}.0.self_attn.q_proj", f"{form}.0.mlp.down_proj",
                           f"{form}.1.mlp.down_proj"],
    }  # fmt: skip
    (path / CONFIG).write_text(json.dumps(config), "utf-8")
    return added


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_acts_as_its_update_does(model: Path, tmp_path: Path, form: str) -> None:
    folder = open_folder(str(model))
    merged = load_model(folder, "cpu")
    assert type(merged).__name__ == MODELS[model.name][3]
    before = logits(merged)
    with torch.no_grad():
        for name, (update, s) in save(merged, form, tmp_path / "a").items():
            merged.get_submodule(name).weight.add_(s * update)
    host = Host(folder, "cpu")
    with host.lazily(open_folder(str(tmp_path / "a"))) as load:
        found = logits(load())
    torch.testing.assert_close(found, logits(merged), rtol=0, atol=1e-5)
    assert (found - before).abs().max() > 0.01
    assert torch.equal(logits(host.model), before)


def test_every_command_that_runs_a_model_takes_them(model: Path, tmp_path: Path) -> None:
    form = FORMS[1] if model.name == "qwen3_5" else FORMS[0]  # that of the other class
    save(load_model(open_folder(str(model)), "cpu"), form, tmp_path / "a")
    rows = [{"prompt": " ".join(LETTERS[i : i + 2]), "response": "x y"} for i in range(8)]
    data = write_lines(tmp_path / "data.jsonl", rows)
    done = safeproj("eval", "--model", model, "--adapter", tmp_path / "a", "--harmful", data,
                  "--max-new-tokens", "2", "--device", "cpu")  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = []
    for extra in ((), ("--reconstruct",)):
        out = tmp_path / f"out{len(extra)}"
        done = safeproj("patch", "--method", "covariance", "--aligned", model, "--safety-data",
                        data, "--task-data", data, "--adapter", tmp_path / "a", "--out", out,
                        "--device", "cpu", *extra)  # fmt: skip
        assert done.returncode == 0, done.stderr
        written.append(load_file(out / FACTORS))
    given = load_file(tmp_path / "a" / FACTORS)
    assert written[0].keys() == written[1].keys() == given.keys()
    for key in (key for key in given if "lora_A" in key):
        assert not torch.equal(written[0][key], given[key])
        assert not torch.equal(written[1][key], given[key])

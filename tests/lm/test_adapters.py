"""Adapters one after the other: each is what PEFT makes of it, and the model stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from safeproj.errors import SafeprojError
from safeproj.lm.adapters import Host, leaves_alone, require_peft
from safeproj.storage.source import open_folder
from tests.evaluate.support import random_model
from tests.support import CONFIG, FACTORS, change_json, save_adapter

IDS = torch.tensor([[1, 7, 8, 9, 10]])

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "modules-to-save": {"modules_to_save": ["lm_head"]},
    "biases": {"bias": "all"},
    "dora": {"use_dora": True},
    "tokens": {"trainable_token_indices": [7, 8]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "pissa": {"init_lora_weights": "pissa"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    random_model("qwen2").save_pretrained(path)
    return path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def save(name: str, model: Path, path: Path) -> Path:
    """Write an adapter whose every tensor has moved, as training would have it."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(model)
    save_adapter(loaded, path, **ADAPTERS[name])
    tensors = load_file(path / FACTORS)
    torch.manual_seed(5)
    save_file({k: v + 0.1 * torch.randn_like(v) for k, v in tensors.items()}, path / FACTORS)
    return path


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_model_is_the_same_after_an_adapter(name: str, model: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    path = save(name, model, tmp_path / "adapter")
    fresh: Any = AutoModelForCausalLM.from_pretrained(model)
    expected = logits(PeftModel.from_pretrained(fresh, str(path)).eval())
    host = Host(open_folder(str(model)), "cpu")
    before = logits(host.model)
    state = {key: value.clone() for key, value in host.model.state_dict().items()}
    for _ in range(2):
        with host.lazily(open_folder(str(path))) as load:
            assert load() is load()
            assert torch.equal(logits(load()), expected)
        assert not torch.equal(expected, before)
        assert torch.equal(logits(host.model), before)
        after = host.model.state_dict()
        assert after.keys() == state.keys()
        assert all(torch.equal(after[key], state[key]) for key in state)


def test_plain_adapters_share_one_copy_of_the_model(model: Path, tmp_path: Path) -> None:
    host = Host(open_folder(str(model)), "cpu")
    first = host.model
    for name in ("plain", "modules-to-save"):
        folder = open_folder(str(save(name, model, tmp_path / name)))
        assert leaves_alone(folder) is (name == "plain")
        with host.lazily(folder) as load:
            load()
        assert (host.model is first) is (name == "plain")


def test_an_adapter_that_is_not_asked_for_is_not_loaded(model: Path, tmp_path: Path) -> None:
    host = Host(open_folder(str(model)), "cpu")
    with host.lazily(open_folder(str(save("plain", model, tmp_path / "a")))):
        pass
    assert host._model is None


def test_after_an_error_the_model_is_loaded_again(model: Path, tmp_path: Path) -> None:
    host = Host(open_folder(str(model)), "cpu")
    before, first = logits(host.model), host.model
    folder = open_folder(str(save("plain", model, tmp_path / "a")))
    with pytest.raises(RuntimeError), host.lazily(folder) as load:
        load()
        raise RuntimeError
    assert host.model is not first
    assert torch.equal(logits(host.model), before)


def renamed(path: Path, old: str, new: str) -> None:
    tensors = load_file(path / FACTORS)
    save_file({key.replace(old, new): value for key, value in tensors.items()}, path / FACTORS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(
            lambda path: change_json(path / CONFIG, target_modules=["nothing"]),
            "nothing",
            id="none",
        ),
        pytest.param(lambda path: renamed(path, "layers.1.", "layers.9."), "layers.1", id="layers"),
        pytest.param(
            lambda path: save_file(
                {
                    **load_file(path / FACTORS),
                    "base_model.model.extra.lora_A.weight": torch.ones(2),
                },
                path / FACTORS,
            ),
            "extra",
            id="more",
        ),
        pytest.param(lambda path: change_json(path / CONFIG, r=3), "size mismatch", id="rank"),
        pytest.param(lambda path: change_json(path / CONFIG, peft_type="WHAT"), "WHAT", id="type"),
    ],
)
def test_adapters_that_do_not_fit_are_named(
    change: Any, words: str, model: Path, tmp_path: Path
) -> None:
    path = save("plain", model, tmp_path / "adapter")
    change(path)
    host = Host(open_folder(str(model)), "cpu")
    folder = open_folder(str(path))
    require_peft(folder)
    with pytest.raises(SafeprojError) as caught, host.lazily(folder) as load:
        load()
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_other_formats_are_refused(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text('{"rank": 8}', "utf-8")
    (tmp_path / "adapters.safetensors").write_bytes(b"")
    with pytest.raises(SafeprojError, match="only PEFT adapters"):
        require_peft(open_folder(str(tmp_path)))
    (tmp_path / FACTORS).write_bytes(b"")
    with pytest.raises(SafeprojError, match="no peft_type"):
        require_peft(open_folder(str(tmp_path)))

"""The task-specific initialisation: the paper's factors, and a function that stays what it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from safeproj import SafeprojError, salora
from safeproj.methods.salora import Initial, constrain, initialise
from safeproj.methods.salora.constraint import lora_layers
from safeproj.methods.salora.initialisation import INITIAL, METHOD
from tests.methods.salora.models import TARGETS, VOCABULARY, build
from tests.methods.salora.oracle import (
    C_S,
    outputs,
    random_batches,
    start,
    top_right_singular_vectors,
    weight,
)

SAFETY = random_batches(VOCABULARY)
TASK = random_batches(VOCABULARY, seed=1)


def fresh(model: Any, targets: Any, **settings: Any) -> Any:
    """Return a `PeftModel` with an untrained adapter."""
    torch.manual_seed(1)
    target = targets[0] if targets == ["all-linear"] else targets
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": target} | settings)
    return get_peft_model(copy.deepcopy(model), config)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(
            input_ids=TASK[0]["input_ids"], attention_mask=TASK[0]["attention_mask"]
        ).logits
    return found


@pytest.mark.parametrize("architecture", sorted(TARGETS))
def test_the_function_at_the_start_is_that_of_the_model(architecture: str) -> None:
    model = build(architecture)
    module = salora.safety_module(model, SAFETY, TARGETS[architecture], 6)
    peft_model = fresh(model, TARGETS[architecture])
    before = logits(model)
    initialise(peft_model, module, TASK, task_rank=8)
    constrain(peft_model, module)
    # Weights have moved, and float32 keeps 7 digits of logits of this size.
    assert (logits(peft_model) - before).abs().max() < 1e-5 * before.abs().max().clamp(min=1)
    for _, layer in lora_layers(peft_model):
        assert layer.lora_B["default"].weight.norm() > 0


@pytest.mark.parametrize("architecture", sorted(TARGETS))
def test_bfloat16_weights_give_the_function_up_to_their_rounding(architecture: str) -> None:
    model = build(architecture, torch.bfloat16)
    module = salora.safety_module(model, SAFETY, TARGETS[architecture], 6)
    peft_model = fresh(model, TARGETS[architecture])
    before = logits(model).float()
    initialise(peft_model, module, TASK, task_rank=8)
    constrain(peft_model, module)
    found = logits(peft_model).float()
    assert (found - before).norm() < 0.05 * before.norm()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("alpha", [4, 16], ids=["s=1", "s=4"])
def test_factors_and_frozen_weight_are_those_of_the_paper(architecture: str, alpha: int) -> None:
    model = build(architecture)
    module = salora.safety_module(model, SAFETY, ["all-linear"], 6)
    peft_model = fresh(model, ["all-linear"], lora_alpha=alpha)
    initial = initialise(peft_model, module, TASK, task_rank=8)
    for name, layer in lora_layers(peft_model):
        original = model.get_submodule(name)
        W = weight(original).double()
        U_t = top_right_singular_vectors(outputs(model, original, W, TASK), 8)
        A_0, B_0 = start(W, U_t, 4)
        product = C_S(module.directions[name].U) @ B_0 @ A_0
        A, B = (part["default"].weight.detach() for part in (layer.lora_A, layer.lora_B))
        assert torch.allclose((B @ A).double(), product, atol=1e-5)
        W_0 = weight(layer.get_base_layer()).double()
        assert torch.allclose(W_0, W - alpha / 4 * product, atol=1e-5 * alpha)
        assert torch.equal(initial.A[name], A)
        assert torch.equal(initial.B[name], B)


def test_rslora_scales_as_it_does() -> None:
    model = build("llama")
    module = salora.safety_module(model, SAFETY, ["q_proj"], 6)
    peft_model = fresh(model, ["q_proj"], use_rslora=True)
    before = logits(model)
    initialise(peft_model, module, TASK)
    constrain(peft_model, module)
    assert torch.allclose(logits(peft_model), before, atol=1e-5)


def test_it_works_on_a_model_that_is_constrained_already() -> None:
    model = build("llama")
    module = salora.safety_module(model, SAFETY, ["q_proj"], 6)
    first, second = fresh(model, ["q_proj"]), fresh(model, ["q_proj"])
    initialise(first, module, TASK)
    constrain(first, module)
    constrain(second, module)
    initialise(second, module, TASK)
    assert torch.allclose(logits(first), logits(second), atol=1e-6)


def test_peft_refuses_the_adapter_where_the_weights_are_not_changed(tmp_path: Path) -> None:
    model = build("llama")
    module = salora.safety_module(model, SAFETY, ["q_proj"], 6)
    peft_model = fresh(model, ["q_proj"])
    initialise(peft_model, module, TASK).save(tmp_path)
    peft_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"Unknown initialization.*{METHOD}"):
        PeftModel.from_pretrained(model, tmp_path)


def test_attach_puts_it_on_a_model_with_the_changed_weights(tmp_path: Path) -> None:
    model = build("llama")
    module = salora.safety_module(model, SAFETY, ["q_proj", "down_proj"], 6)
    trained = fresh(model, ["q_proj", "down_proj"])
    initialise(trained, module, TASK).save(tmp_path)
    constrain(trained, module)
    with torch.no_grad():
        for _, layer in lora_layers(trained):
            layer.lora_A["default"].weight.add_(0.1)
    trained.save_pretrained(tmp_path)
    attached = salora.attach(copy.deepcopy(model), tmp_path, module)
    assert torch.allclose(logits(attached), logits(trained), atol=1e-5)
    assert (logits(attached) - logits(model)).abs().max() > 1e-3
    assert attached.peft_config["default"].init_lora_weights == METHOD
    assert any(p.requires_grad for p in attached.parameters())
    served = salora.attach(copy.deepcopy(model), tmp_path, module, trainable=False)
    assert not any(p.requires_grad for p in served.parameters())


def test_attach_refuses_an_adapter_that_belongs_to_the_model_as_it_is(tmp_path: Path) -> None:
    model = build("llama")
    module = salora.safety_module(model, SAFETY, ["q_proj"], 6)
    fresh(model, ["q_proj"]).save_pretrained(tmp_path)
    with pytest.raises(SafeprojError, match="does not have init_lora_weights 'salora'"):
        salora.attach(model, tmp_path, module)


def test_initial_factors_come_back_from_their_file(tmp_path: Path) -> None:
    initial = Initial({"a.b": torch.randn(3, 5)}, {"a.b": torch.randn(7, 3)})
    initial.save(tmp_path)
    for place in (tmp_path, tmp_path / INITIAL):
        found = Initial.load(place)
        assert torch.equal(found.A["a.b"], initial.A["a.b"])
        assert torch.equal(found.B["a.b"], initial.B["a.b"])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"other": torch.ones(2, 2)}, "other is no initial factor"),
        ({"base_model.model.a.lora_A.weight": torch.ones(2, 2)}, "do not come in pairs"),
        (
            {
                "base_model.model.a.lora_A.weight": torch.ones(2, 2),
                "base_model.model.a.lora_B.weight": torch.ones(2, 3),
            },
            "do not come in pairs",
        ),
        ({"base_model.model.a.lora_A.weight": torch.full((2, 2), torch.nan)}, "NaN or Inf"),
    ],
    ids=["name", "alone", "rank", "nan"],
)
def test_a_file_of_something_else_is_refused(
    tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / INITIAL)
    with pytest.raises(SafeprojError, match=message):
        Initial.load(tmp_path)


def unchanged(peft_model: Any, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[key]) for key, tensor in peft_model.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "is DoRA"),
        ({"r": 40, "lora_alpha": 40}, "rank 40 is larger than that of the weight, 32"),
    ],
    ids=["dora", "rank"],
)
def test_what_cannot_be_initialised_is_refused_before_anything_is_changed(
    settings: dict[str, Any], message: str
) -> None:
    model = build("llama")
    module = salora.safety_module(model, SAFETY, ["q_proj"], 6)
    peft_model = fresh(model, ["q_proj"], **settings)
    before = {key: tensor.clone() for key, tensor in peft_model.state_dict().items()}
    with pytest.raises(SafeprojError, match=message):
        initialise(peft_model, module, TASK)
    assert unchanged(peft_model, before)


def test_the_module_of_another_model_is_refused_before_anything_is_changed() -> None:
    module = salora.safety_module(build("llama"), SAFETY, ["q_proj"], 6)
    peft_model = fresh(build("llama", hidden_size=64), ["q_proj"])
    before = {key: tensor.clone() for key, tensor in peft_model.state_dict().items()}
    with pytest.raises(SafeprojError, match=r"is 64 × 64 .* 32 × 32 in the safety module"):
        initialise(peft_model, module, TASK)
    assert unchanged(peft_model, before)


def test_a_second_initialisation_is_refused() -> None:
    model = build("llama")
    module = salora.safety_module(model, SAFETY, ["q_proj"], 6)
    peft_model = fresh(model, ["q_proj"])
    initialise(peft_model, module, TASK)
    before = {key: tensor.clone() for key, tensor in peft_model.state_dict().items()}
    with pytest.raises(SafeprojError, match="is initialised already"):
        initialise(peft_model, module, TASK)
    assert unchanged(peft_model, before)


def test_a_model_with_several_adapters_is_refused() -> None:
    model = build("llama")
    module = salora.safety_module(model, SAFETY, ["q_proj"], 6)
    peft_model = fresh(model, ["q_proj"])
    peft_model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(SafeprojError, match="several adapters"):
        initialise(peft_model, module, TASK, adapter_name="default")


def test_a_head_that_is_tied_to_the_embedding_is_refused() -> None:
    model = build("llama", tie_word_embeddings=True)
    module = salora.safety_module(model, SAFETY, ["lm_head"], 6)
    peft_model = fresh(model, ["lm_head"])
    with pytest.raises(SafeprojError, match="lm_head: shares its weight with the embedding"):
        initialise(peft_model, module, TASK)


def test_a_merged_adapter_is_refused() -> None:
    model = build("llama")
    module = salora.safety_module(model, SAFETY, ["q_proj"], 6)
    peft_model = fresh(model, ["q_proj"])
    peft_model.merge_adapter()
    with pytest.raises(SafeprojError, match="is merged"):
        initialise(peft_model, module, TASK)

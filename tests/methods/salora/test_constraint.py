"""Training with the safety module fixed: gradients, saving, loading, taking it off."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn.utils import parametrize

from safeproj import SafeprojError, salora
from safeproj.methods.salora import SafetyModule, constrain
from tests.methods.salora.models import TARGETS, VOCABULARY, build
from tests.methods.salora.oracle import C_S, random_batches

BATCHES = random_batches(VOCABULARY)
RANK = 6


def adapted(model: Any, targets: Any, **settings: Any) -> Any:
    """Return a `PeftModel` with random factors."""
    torch.manual_seed(1)
    target = targets[0] if targets == ["all-linear"] else targets
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": target, "init_lora_weights": False} | settings
    )
    found = get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return found


@pytest.fixture(scope="module")
def llama() -> Any:
    return build("llama")


@pytest.fixture(scope="module")
def module(llama: Any) -> SafetyModule:
    return salora.safety_module(llama, BATCHES, ["all-linear"], RANK)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(
            input_ids=BATCHES[0]["input_ids"], attention_mask=BATCHES[0]["attention_mask"]
        ).logits
    return found


def factors(peft_model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return for each layer its path's `A`, `B` and `get_delta_weight`."""
    found = {}
    for name, layer in peft_model.get_base_model().named_modules():
        if hasattr(layer, "lora_B") and len(layer.lora_B):
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            found[name] = (A.detach(), B.detach(), layer.get_delta_weight("default").detach())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", sorted(TARGETS))
def test_the_update_is_that_of_the_constrained_factor(
    architecture: str, dtype: torch.dtype
) -> None:
    model = build(architecture, dtype)
    module = salora.safety_module(model, BATCHES, TARGETS[architecture], RANK)
    peft_model = adapted(model, TARGETS[architecture])  # PEFT keeps factors in float32
    before = factors(peft_model)
    constrain(peft_model, module)
    for name, (_, B, delta) in factors(peft_model).items():
        C = C_S(module.directions[name].U)
        assert torch.allclose(B.double(), C @ before[name][1].double(), atol=1e-6)
        wanted = 2.0 * C @ before[name][1].double() @ before[name][0].double()
        layer = peft_model.get_base_model().get_submodule(name)
        turned = wanted.T if layer.fan_in_fan_out else wanted
        assert torch.allclose(delta.double(), turned, atol=1e-6)


def test_the_gradient_of_B_never_leaves_the_complement(llama: Any, module: SafetyModule) -> None:
    peft_model = adapted(llama, ["all-linear"])
    constrain(peft_model, module)
    for batch in BATCHES:
        peft_model(**batch).loss.backward()
    for name, layer in salora.constraint.lora_layers(peft_model):
        gradient = layer.lora_B["default"].parametrizations.weight.original.grad
        U = module.directions[name].U
        assert gradient.norm() > 0
        assert (U.T @ gradient).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_no_optimizer_leads_into_the_safety_subspace(
    optimizer: str, llama: Any, module: SafetyModule
) -> None:
    peft_model = adapted(llama, ["all-linear"])
    constrain(peft_model, module)
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    steps = getattr(torch.optim, optimizer)(parameters, lr=0.05, weight_decay=0.1)
    before = logits(peft_model)
    for _ in range(5):
        for batch in BATCHES:
            steps.zero_grad()
            peft_model(**batch).loss.backward()
            steps.step()
    assert (logits(peft_model) - before).abs().max() > 0.01  # it has learnt something
    for name, (_, B, _) in factors(peft_model).items():
        U = module.directions[name].U
        assert (U.T @ B).norm() < 1e-5 * B.norm()


def test_the_trained_parameter_stays_the_same_object(llama: Any, module: SafetyModule) -> None:
    peft_model = adapted(llama, ["all-linear"])
    before = {id(p) for p in peft_model.parameters() if p.requires_grad}
    with constrain(peft_model, module):
        assert {id(p) for p in peft_model.parameters() if p.requires_grad} == before
    assert {id(p) for p in peft_model.parameters() if p.requires_grad} == before


def test_state_dictionaries_have_the_usual_names_and_the_constrained_factor(
    llama: Any, module: SafetyModule, tmp_path: Path
) -> None:
    peft_model = adapted(llama, ["all-linear"])
    plain = peft_model.state_dict()
    constrain(peft_model, module)
    state = peft_model.state_dict()
    assert state.keys() == plain.keys()
    peft_model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for name, each in module.directions.items():
        key = f"base_model.model.{name}.lora_B"
        B = plain[f"{key}.default.weight"]
        wanted = (C_S(each.U) @ B.double()).float()
        assert torch.allclose(saved[f"{key}.weight"], wanted, atol=1e-6)
        assert torch.equal(state[f"{key}.default.weight"], saved[f"{key}.weight"])


def test_what_was_saved_loads_into_a_constrained_model(
    llama: Any, module: SafetyModule, tmp_path: Path
) -> None:
    trained = adapted(llama, ["all-linear"])
    constrain(trained, module)
    trained.save_pretrained(tmp_path)
    other = adapted(llama, ["all-linear"])
    constrain(other, module)
    with torch.no_grad():
        for _, layer in salora.constraint.lora_layers(other):
            salora.constraint.set_weight(layer.lora_B["default"], torch.tensor(1.0))
    assert not torch.allclose(logits(other), logits(trained), atol=1e-3)
    result = other.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.allclose(logits(other), logits(trained), atol=1e-5)
    fresh = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path)
    assert torch.allclose(logits(fresh), logits(trained), atol=1e-5)


def test_it_ends_with_the_with_block_and_leaves_the_constrained_factor(
    llama: Any, module: SafetyModule
) -> None:
    peft_model = adapted(llama, ["all-linear"])
    with constrain(peft_model, module):
        inside = logits(peft_model)
    assert torch.allclose(logits(peft_model), inside, atol=1e-6)
    for _, layer in salora.constraint.lora_layers(peft_model):
        assert not parametrize.is_parametrized(layer.lora_B["default"])
        assert not layer.lora_B["default"]._state_dict_hooks
        assert not layer.lora_B["default"]._load_state_dict_pre_hooks


def test_it_ends_when_an_error_ends_the_block(llama: Any, module: SafetyModule) -> None:
    peft_model = adapted(llama, ["all-linear"])
    with pytest.raises(KeyError), constrain(peft_model, module):
        raise KeyError
    for _, layer in salora.constraint.lora_layers(peft_model):
        assert not parametrize.is_parametrized(layer.lora_B["default"])


def test_a_second_call_takes_the_place_of_the_first(llama: Any, module: SafetyModule) -> None:
    once, twice = adapted(llama, ["all-linear"]), adapted(llama, ["all-linear"])
    constrain(once, module)
    first = constrain(twice, module)
    second = constrain(twice, module)
    assert torch.equal(logits(once), logits(twice)) or torch.allclose(
        logits(once), logits(twice), atol=1e-6
    )
    for _, layer in salora.constraint.lora_layers(twice):
        assert len(layer.lora_B["default"].parametrizations.weight) == 1
        assert len(layer.lora_B["default"]._state_dict_hooks) == 1
    second.remove()
    first.remove()
    second.remove()
    assert all(not parametrize.is_parametrized(each) for each in second.layers.values())


def test_a_lower_rank_keeps_clear_of_the_first_directions_alone(
    llama: Any, module: SafetyModule
) -> None:
    peft_model = adapted(llama, ["all-linear"])
    before = factors(peft_model)
    constrain(peft_model, module, rank=2)
    for name, (_, B, _) in factors(peft_model).items():
        U = module.directions[name].U[:, :2]
        assert torch.allclose(B.double(), C_S(U) @ before[name][1].double(), atol=1e-6)


def test_the_bias_of_lora_B_is_constrained_as_well(llama: Any, module: SafetyModule) -> None:
    peft_model = adapted(llama, ["q_proj"], lora_bias=True)
    name, layer = next(salora.constraint.lora_layers(peft_model))
    before = layer.lora_B["default"].bias.detach().clone()
    constrain(peft_model, module)
    found = layer.lora_B["default"].bias.detach()
    wanted = C_S(module.directions[name].U) @ before.double()
    assert torch.allclose(found.double(), wanted, atol=1e-6)
    assert before.norm() > 0.1


def test_another_adapter_of_the_model_is_left_alone(llama: Any, module: SafetyModule) -> None:
    peft_model = adapted(llama, ["q_proj"])
    peft_model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    constrain(peft_model, module, adapter_name="default")
    for _, layer in salora.constraint.lora_layers(peft_model, "other"):
        assert not parametrize.is_parametrized(layer.lora_B["other"])


def test_half_precision_keeps_the_directions_as_they_are(llama: Any, module: SafetyModule) -> None:
    peft_model = adapted(llama, ["all-linear"])
    constrain(peft_model, module)
    peft_model.to(torch.bfloat16)
    for name, (_, B, _) in factors(peft_model).items():
        assert B.dtype == torch.bfloat16
        # One rounding of B to 8 bits; directions rounded to 8 bits would leave about as much again.
        assert (module.directions[name].U.T @ B.float()).norm() < 2.0**-8 * B.float().norm()


def test_layers_that_the_module_does_not_hold_are_refused(llama: Any) -> None:
    some = salora.safety_module(llama, BATCHES, ["q_proj"], 2)
    peft_model = adapted(llama, ["q_proj", "v_proj"])
    with pytest.raises(SafeprojError, match=r"holds nothing for model.layers.0.self_attn.v_proj"):
        constrain(peft_model, some)
    for _, layer in salora.constraint.lora_layers(peft_model):
        assert not parametrize.is_parametrized(layer.lora_B["default"])


def test_the_module_of_another_model_is_refused(module: SafetyModule) -> None:
    peft_model = adapted(build("llama", hidden_size=64), ["all-linear"])
    with pytest.raises(SafeprojError, match=r"is 80 × 64.*80 × 32 in the safety module|another"):
        constrain(peft_model, module)


def test_adapters_on_other_than_linear_layers_are_refused(llama: Any, module: SafetyModule) -> None:
    peft_model = adapted(llama, ["q_proj", "embed_tokens"])
    with pytest.raises(SafeprojError, match=r"embed_tokens: is a Embedding.*linear layers"):
        constrain(peft_model, module)


def test_an_adapter_that_is_not_there_is_refused(llama: Any, module: SafetyModule) -> None:
    with pytest.raises(SafeprojError, match="no adapter 'missing', but default"):
        constrain(adapted(llama, ["q_proj"]), module, adapter_name="missing")

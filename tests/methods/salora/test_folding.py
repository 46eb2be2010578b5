"""Folding: from a trained, constrained adapter to one that any PEFT loads as it is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from safeproj import SafeprojError, salora
from safeproj.methods.salora import SafetyModule, constrain, fold, initialise
from safeproj.methods.salora.initialisation import INITIAL
from tests.methods.salora.models import TARGETS, VOCABULARY, build
from tests.methods.salora.oracle import C_S, random_batches
from tests.support import CONFIG, FACTORS, MANIFEST, change_json, read_json, snapshot

SAFETY = random_batches(VOCABULARY)
TASK = random_batches(VOCABULARY, seed=1)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(
            input_ids=TASK[0]["input_ids"], attention_mask=TASK[0]["attention_mask"]
        ).logits
    return found


def trained(
    model: Any, module: SafetyModule, targets: Any, start: Path | None = None, **settings: Any
) -> Any:
    """Return a constrained `PeftModel` after some steps; with the initialisation if `start`."""
    torch.manual_seed(1)
    target = targets[0] if targets == ["all-linear"] else targets
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": target} | settings)
    peft_model = get_peft_model(copy.deepcopy(model), config)
    if start is not None:
        start.mkdir()
        initialise(peft_model, module, TASK, task_rank=8).save(start)
    constrain(peft_model, module)
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], 0.01)
    for _ in range(3):
        for batch in TASK:
            optimizer.zero_grad()
            peft_model(**batch).loss.backward()
            optimizer.step()
    return peft_model


def served(model: Any, adapter: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(copy.deepcopy(model), adapter))


@pytest.fixture(scope="module")
def llama() -> Any:
    return build("llama")


@pytest.fixture(scope="module")
def module(llama: Any) -> SafetyModule:
    return salora.safety_module(llama, SAFETY, ["all-linear"], 6)


@pytest.mark.parametrize("initialised", [False, True], ids=["plain", "initialised"])
@pytest.mark.parametrize("architecture", sorted(TARGETS))
def test_the_folded_adapter_serves_on_the_unmodified_model(
    architecture: str, initialised: bool, tmp_path: Path
) -> None:
    model = build(architecture)
    module = salora.safety_module(model, SAFETY, TARGETS[architecture], 6)
    peft_model = trained(
        model, module, TARGETS[architecture], tmp_path / "a" if initialised else None
    )
    peft_model.save_pretrained(tmp_path / "a")
    found = fold(tmp_path / "a", module, tmp_path / "out")
    wanted = logits(peft_model)
    size = wanted.abs().max().clamp(min=1)
    assert (served(model, tmp_path / "out") - wanted).abs().max() < 1e-5 * size
    assert (wanted - logits(model)).abs().max() > 0.01  # it has learnt something
    assert found.unmodified is initialised
    assert found.rank == (8 if initialised else 4)
    assert found.removed < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6}},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3, "q_proj": 5}},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}, "use_rslora": True},
        {"lora_alpha": 3},
    ],
    ids=["rslora", "ranks", "ranks-alphas", "rslora-patterns", "odd-alpha"],
)
def test_the_scaling_stays_when_the_rank_doubles(
    settings: dict[str, Any], llama: Any, module: SafetyModule, tmp_path: Path
) -> None:
    peft_model = trained(llama, module, ["all-linear"], tmp_path / "a", **settings)
    peft_model.save_pretrained(tmp_path / "a")
    fold(tmp_path / "a", module, tmp_path / "out")
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "out")
    for (_, one), (_, two) in zip(
        salora.constraint.lora_layers(peft_model),
        salora.constraint.lora_layers(loaded),
        strict=True,
    ):
        assert two.scaling["default"] == pytest.approx(one.scaling["default"])
    assert torch.allclose(logits(loaded), logits(peft_model), atol=1e-5)


def test_an_adapter_that_was_trained_without_the_module_is_projected(
    llama: Any, module: SafetyModule, tmp_path: Path
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    peft_model: Any = get_peft_model(copy.deepcopy(llama), config)
    peft_model.save_pretrained(tmp_path / "a")
    found = fold(tmp_path / "a", module, tmp_path / "out")
    before, after = load_file(tmp_path / "a" / FACTORS), load_file(tmp_path / "out" / FACTORS)
    for key, tensor in before.items():
        if "lora_B" not in key:
            assert torch.equal(after[key], tensor)
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        wanted = C_S(module.directions[name].U) @ tensor.double()
        assert torch.allclose(after[key].double(), wanted, atol=1e-6)
    assert found.removed > 0.1
    assert "was not trained with this safety module" in found.warnings[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_factors_keep_their_dtype(
    dtype: torch.dtype, llama: Any, module: SafetyModule, tmp_path: Path
) -> None:
    trained(llama, module, ["q_proj"]).save_pretrained(tmp_path / "a")
    save_file(
        {key: tensor.to(dtype) for key, tensor in load_file(tmp_path / "a" / FACTORS).items()},
        tmp_path / "a" / FACTORS,
    )
    fold(tmp_path / "a", module, tmp_path / "out")
    assert {t.dtype for t in load_file(tmp_path / "out" / FACTORS).values()} == {dtype}


def test_a_model_in_memory_is_folded_as_its_directory_is(
    llama: Any, module: SafetyModule, tmp_path: Path
) -> None:
    peft_model = trained(llama, module, ["q_proj"], tmp_path / "a")
    peft_model.save_pretrained(tmp_path / "a")
    fold(tmp_path / "a", module, tmp_path / "one")
    fold(peft_model, module, tmp_path / "two", initial=salora.Initial.load(tmp_path / "a"))
    one, two = (load_file(tmp_path / name / FACTORS) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not any(
        str(tmp_path) in path.read_text("utf-8") for path in (tmp_path / "two").glob("*.json")
    )


def test_the_result_is_an_ordinary_adapter(
    llama: Any, module: SafetyModule, tmp_path: Path
) -> None:
    trained(llama, module, ["q_proj"], tmp_path / "a").save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("kept")
    for name in ("optimizer.pt", "rng_state_0.pth", "training_args.bin", "trainer_state.json"):
        (tmp_path / "a" / name).write_text("of no use to anyone who serves it")
    fold(tmp_path / "a", module, tmp_path / "out")
    assert set(snapshot(tmp_path / "out")) == {CONFIG, FACTORS, MANIFEST, "README.md", "notes.txt"}
    config = read_json(tmp_path / "out" / CONFIG)
    assert config["init_lora_weights"] is True
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    record = read_json(tmp_path / "out" / MANIFEST)
    assert record["method"] == "salora"
    assert record["inputs"]["adapter"]["sha256"]["files"].keys() == {CONFIG, FACTORS, INITIAL}
    assert "SaLoRA" in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_the_same_adapter_gives_the_same_bytes(
    llama: Any, module: SafetyModule, tmp_path: Path
) -> None:
    trained(llama, module, ["q_proj"], tmp_path / "a").save_pretrained(tmp_path / "a")
    fold(tmp_path / "a", module, tmp_path / "one")
    first = snapshot(tmp_path / "one")
    fold(tmp_path / "a", module, tmp_path / "one", overwrite=True)
    assert snapshot(tmp_path / "one") == first


def test_a_folded_adapter_folds_to_itself(llama: Any, module: SafetyModule, tmp_path: Path) -> None:
    trained(llama, module, ["q_proj"], tmp_path / "a").save_pretrained(tmp_path / "a")
    fold(tmp_path / "a", module, tmp_path / "one")
    fold(tmp_path / "one", module, tmp_path / "two")
    one, two = (load_file(tmp_path / name / FACTORS) for name in ("one", "two"))
    for key, tensor in one.items():
        assert torch.allclose(two[key], tensor, atol=1e-6)


def test_an_initialised_adapter_without_its_initial_factors_is_refused(
    llama: Any, module: SafetyModule, tmp_path: Path
) -> None:
    peft_model = trained(llama, module, ["q_proj"], tmp_path / "start")
    peft_model.save_pretrained(tmp_path / "trained")
    with pytest.raises(SafeprojError, match="give initial DIR"):
        fold(tmp_path / "trained", module, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    initial = salora.Initial.load(tmp_path / "start")
    fold(tmp_path / "trained", module, tmp_path / "out", initial=initial)
    assert torch.allclose(served(llama, tmp_path / "out"), logits(peft_model), atol=1e-5)


def test_initial_factors_of_something_else_are_refused(
    llama: Any, module: SafetyModule, tmp_path: Path
) -> None:
    trained(llama, module, ["q_proj"]).save_pretrained(tmp_path / "plain")
    trained(llama, module, ["v_proj"], tmp_path / "start").save_pretrained(tmp_path / "v")
    initial = salora.Initial.load(tmp_path / "start")
    with pytest.raises(SafeprojError, match="was not trained from the initial factors"):
        fold(tmp_path / "plain", module, tmp_path / "out", initial=initial)
    change_json(tmp_path / "plain" / CONFIG, init_lora_weights="salora")
    with pytest.raises(SafeprojError, match="not those of its layers"):
        fold(tmp_path / "plain", module, tmp_path / "out", initial=initial)
    assert not (tmp_path / "out").exists()


def test_factors_of_another_changed_base_are_refused(
    llama: Any, module: SafetyModule, tmp_path: Path
) -> None:
    trained(llama, module, ["q_proj"]).save_pretrained(tmp_path / "a")
    change_json(tmp_path / "a" / CONFIG, init_lora_weights="pissa")
    with pytest.raises(SafeprojError, match="'pissa': its factors belong to what that leaves"):
        fold(tmp_path / "a", module, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_weights_beside_the_adapter_are_left_out(
    llama: Any, module: SafetyModule, tmp_path: Path
) -> None:
    trained(llama, module, ["q_proj"]).save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").write_bytes(b"")
    folded = fold(tmp_path / "a", module, tmp_path / "out")
    assert folded.left_out == ("model.safetensors",)
    assert "left out: model.safetensors" in " ".join(folded.warnings)
    assert "left out: model.safetensors" in (tmp_path / "out" / "README.md").read_text("utf-8")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_broken_record_of_an_earlier_run_is_refused(
    llama: Any, module: SafetyModule, tmp_path: Path
) -> None:
    trained(llama, module, ["q_proj"]).save_pretrained(tmp_path / "a")
    (tmp_path / "a" / MANIFEST).write_text("{", "utf-8")
    with pytest.raises(SafeprojError, match=f"{MANIFEST} is not JSON"):
        fold(tmp_path / "a", module, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_module_of_another_model_is_refused(module: SafetyModule, tmp_path: Path) -> None:
    other = build("llama", hidden_size=64)
    own = salora.safety_module(other, SAFETY, ["q_proj"], 2)
    trained(other, own, ["q_proj"]).save_pretrained(tmp_path / "a")
    with pytest.raises(SafeprojError, match=r"q_proj: is 64 × 64 .* 32 × 32 in the safety module"):
        fold(tmp_path / "a", module, tmp_path / "out")


def test_layers_that_the_module_does_not_hold_are_refused(llama: Any, tmp_path: Path) -> None:
    some = salora.safety_module(llama, SAFETY, ["q_proj"], 2)
    both = salora.safety_module(llama, SAFETY, ["q_proj", "v_proj"], 2)
    trained(llama, both, ["q_proj", "v_proj"]).save_pretrained(tmp_path / "a")
    with pytest.raises(SafeprojError, match=r"holds nothing for .*v_proj"):
        fold(tmp_path / "a", some, tmp_path / "out")


def test_the_output_must_be_a_new_directory_outside_of_the_adapter(
    llama: Any, module: SafetyModule, tmp_path: Path
) -> None:
    trained(llama, module, ["q_proj"]).save_pretrained(tmp_path / "a")
    before = snapshot(tmp_path / "a")
    with pytest.raises(SafeprojError, match="overlaps with adapter"):
        fold(tmp_path / "a", module, tmp_path / "a", overwrite=True)
    (tmp_path / "out").mkdir()
    with pytest.raises(SafeprojError, match="exists; give overwrite"):
        fold(tmp_path / "a", module, tmp_path / "out")
    assert snapshot(tmp_path / "a") == before

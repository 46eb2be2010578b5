"""Training with a safety module through other people's trainers, on real tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from safeproj import salora
from safeproj.methods.salora.callback import FOLDED
from safeproj.methods.salora.constraint import lora_layers
from safeproj.methods.salora.initialisation import INITIAL, METHOD
from tests.methods.salora.oracle import random_batches
from tests.support import CONFIG, FACTORS, read_json, tiny_llama

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "tiny-lm"

VOCABULARY = 50
RANK = 8
"""Directions of a layer; the smallest layer has 16 outputs."""

STEPS = 6
HALF = STEPS // 2

LONGER: dict[str, Any] = {"max_steps": 20, "save_steps": 20, "learning_rate": 5e-2}
"""Settings with which something is learnt."""

LEARNT = 0.1
"""By how much the loss goes down with them, at least; it is ln 50 = 3.9 in the beginning."""

FLOAT32 = 1e-6
"""Bound of `‖U_Cᵀ B‖ / ‖B‖` where `C_S B` is rounded to float32: `U_C` itself and the product are
right to a few units of 2⁻²⁴ = 6e-8."""

BFLOAT16 = 2.0**-8
"""The same in bfloat16: no element is off by more than 2⁻⁸ of itself, so nor is the norm."""

CLOSE = 1e-5
"""Of logits and weights of the order 1 that are computed in another order in float32."""

QV = ("q_proj", "v_proj")
TARGETS = pytest.mark.parametrize("targets", [QV, "all-linear"], ids=["qv", "all-linear"])
STARTS = pytest.mark.parametrize("initialised", [False, True], ids=["from-zero", "initialised"])


@pytest.fixture(scope="module")
def module() -> salora.SafetyModule:
    """A safety module of all linear layers of `tiny_llama()`."""
    return salora.safety_module(tiny_llama(), random_batches(VOCABULARY), rank=RANK)


def adapted(targets: Any = QV, model: Any = None, **settings: Any) -> Any:
    """Return the tiny model with a fresh adapter."""
    model = model or tiny_llama()
    torch.manual_seed(3)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config, **settings)


def constrained(module: salora.SafetyModule, initialised: bool = False) -> tuple[Any, Any]:
    """Return the tiny model with a constrained adapter, and its initial factors or None."""
    model = adapted()
    batches = random_batches(VOCABULARY, seed=5)
    initial = salora.initialise(model, module, batches, task_rank=RANK) if initialised else None
    salora.constrain(model, module)
    return model, initial


def rows(count: int = 16, length: int = 10) -> list[dict[str, Tensor]]:
    """Return a task that can be learnt: each token is the one before, plus one."""
    starts = torch.randint(3, 30, (count,), generator=torch.Generator().manual_seed(0))
    ids = [start + torch.arange(length) for start in starts]
    return [{"input_ids": each, "labels": each.clone()} for each in ids]


def train(
    model: Any, out: Path, *callbacks: Any, resume: Path | None = None, **settings: Any
) -> Any:
    """Train with `transformers.Trainer` and return it."""
    arguments: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "save_strategy": "steps",
        "save_steps": HALF,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**{**arguments, **settings}),
        train_dataset=rows(),
        eval_dataset=rows(4),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


@torch.no_grad()
def loss(model: Any, batch: dict[str, Tensor] | None = None) -> float:
    """Return the loss on the task, or on a batch."""
    model.eval()
    task = {name: torch.stack([row[name] for row in rows()]) for name in ("input_ids", "labels")}
    return float(model(**(batch or task)).loss)


def factors(model: Any) -> dict[str, Tensor]:
    """Return the `B` that each layer computes with."""
    return {
        name: layer.lora_B["default"].weight.detach().clone() for name, layer in lora_layers(model)
    }


def weights(model: Any) -> dict[str, Tensor]:
    """Return `A` and `C_S B` by their names in a saved adapter."""
    found: dict[str, Tensor] = {}
    for name, layer in lora_layers(model):
        for part in ("lora_A", "lora_B"):
            weight = getattr(layer, part)["default"].weight
            found[f"base_model.model.{name}.{part}.weight"] = weight.detach().clone()
    return found


def saved(checkpoint: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter directory."""
    return dict(load_file(checkpoint / FACTORS))


def inside(B: dict[str, Tensor], module: salora.SafetyModule) -> float:
    """Return the largest `‖U_Cᵀ B‖ / ‖B‖` of any layer; no layer may be zero."""
    shares = []
    for key, factor in B.items():
        name = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        U, wide = module.directions[name].U.double(), factor.double()
        assert float(wide.norm()) > 1e-3, f"{name} was not trained"
        shares.append(float((U.T @ wide).norm() / wide.norm()))
    return max(shares)


def only_B(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key.endswith(".lora_B.weight")}


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Return the largest difference of any element."""
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key]).abs().max()) for key in first)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    model.eval()
    found: Tensor = model(input_ids=torch.arange(3, 43).view(4, 10)).logits
    return found.float()


# The constraint while training


@TARGETS
def test_training_stays_out_of_the_safety_subspace(
    tmp_path: Path, module: salora.SafetyModule, targets: Any
) -> None:
    model = adapted(targets)
    salora.constrain(model, module)
    train(model, tmp_path)
    assert inside(factors(model), module) < FLOAT32


def test_training_without_the_constraint_does_not(
    tmp_path: Path, module: salora.SafetyModule
) -> None:
    model = adapted()
    train(model, tmp_path)
    assert inside(factors(model), module) > 0.1


@TARGETS
def test_training_makes_the_loss_smaller(
    tmp_path: Path, module: salora.SafetyModule, targets: Any
) -> None:
    model = adapted(targets)
    salora.constrain(model, module)
    before = loss(model)
    train(model, tmp_path, **LONGER)
    assert loss(model) < before - LEARNT


@TARGETS
def test_a_checkpoint_is_a_plain_adapter_outside_of_the_safety_subspace(
    tmp_path: Path, module: salora.SafetyModule, targets: Any
) -> None:
    plain = adapted(targets)
    plain.save_pretrained(str(tmp_path / "plain"))
    model = adapted(targets)
    salora.constrain(model, module)
    train(model, tmp_path)
    for step in (HALF, STEPS):
        tensors = saved(tmp_path / f"checkpoint-{step}")
        assert tensors.keys() == saved(tmp_path / "plain").keys()
        assert inside(only_B(tensors), module) < FLOAT32
    assert distance(saved(tmp_path / f"checkpoint-{STEPS}"), weights(model)) == 0


def test_fewer_directions_constrain_less(tmp_path: Path, module: salora.SafetyModule) -> None:
    model = adapted()
    salora.constrain(model, module, rank=2)
    train(model, tmp_path, save_strategy="no")
    assert inside(factors(model), module.cut(2)) < FLOAT32
    assert inside(factors(model), module) > 0.01


def test_the_frozen_weights_and_the_safety_module_are_not_trained(
    tmp_path: Path, module: salora.SafetyModule
) -> None:
    model, _ = constrained(module)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, tmp_path, save_strategy="no")
    trained = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trained)
    assert not any("lora" in name for name, _ in model.named_buffers())


def test_an_optimizer_that_was_made_before_the_constraint_trains_on(
    module: salora.SafetyModule,
) -> None:
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    before = {id(p) for p in model.parameters() if p.requires_grad}
    salora.constrain(model, module)
    assert {id(p) for p in model.parameters() if p.requires_grad} == before
    task = {name: torch.stack([row[name] for row in rows()]) for name in ("input_ids", "labels")}
    start = loss(model)
    for _ in range(20):
        model(**task).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss(model) < start - LEARNT
    assert inside(factors(model), module) < FLOAT32


def test_the_trained_parameters_are_the_same_when_the_constraint_ends(
    module: salora.SafetyModule,
) -> None:
    model = adapted()
    constraint = salora.constrain(model, module)
    trained = [p for p in model.parameters() if p.requires_grad]
    constraint.remove()
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained}


# Memory and precision


@pytest.mark.parametrize("reentrant", [False, True], ids=["not-reentrant", "reentrant"])
def test_gradient_checkpointing_changes_nothing(
    tmp_path: Path, module: salora.SafetyModule, reentrant: bool
) -> None:
    found, runs = [], []
    for checkpointing in (False, True):
        model, _ = constrained(module)
        first = next(lora_layers(model))[1].lora_B["default"]
        counted: list[int] = []
        first.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        train(
            model,
            tmp_path / str(checkpointing),
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
            save_strategy="no",
        )
        found.append(weights(model))
        runs.append(len(counted))
    assert runs == [STEPS, 2 * STEPS]  # it is on: the layer runs again in the backward pass
    assert distance(*found) < CLOSE
    assert inside(only_B(found[1]), module) < FLOAT32


def test_mixed_precision_does_not_round_the_constraint(
    tmp_path: Path, module: salora.SafetyModule
) -> None:
    model, _ = constrained(module)
    before, dtypes = loss(model), set()
    first = next(lora_layers(model))[1].lora_B["default"]
    hook = first.register_forward_hook(lambda *call: dtypes.add(call[-1].dtype))
    train(model, tmp_path, bf16=True, **LONGER)
    hook.remove()
    assert dtypes == {torch.bfloat16}  # autocast is on
    assert loss(model) < before - LEARNT
    assert inside(factors(model), module) < FLOAT32
    assert inside(only_B(saved(tmp_path / f"checkpoint-{LONGER['max_steps']}")), module) < FLOAT32


def test_an_adapter_in_float32_on_a_model_in_bfloat16_is_constrained_in_float32(
    tmp_path: Path, module: salora.SafetyModule
) -> None:
    model = adapted(model=tiny_llama().to(torch.bfloat16))
    salora.constrain(model, module)
    train(model, tmp_path, save_strategy="no")
    assert {B.dtype for B in factors(model).values()} == {torch.float32}
    assert inside(factors(model), module) < FLOAT32


def test_an_adapter_in_bfloat16_is_constrained_up_to_its_rounding(
    tmp_path: Path, module: salora.SafetyModule
) -> None:
    model = adapted(model=tiny_llama().to(torch.bfloat16), autocast_adapter_dtype=False)
    salora.constrain(model, module)
    before = loss(model)
    train(model, tmp_path, **LONGER)
    assert loss(model) < before - LEARNT
    tensors = saved(tmp_path / f"checkpoint-{LONGER['max_steps']}")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert inside(factors(model), module) < BFLOAT16
    assert inside(only_B(tensors), module) < BFLOAT16


# Resuming


@STARTS
def test_resuming_gives_what_training_without_a_break_does(
    tmp_path: Path, module: salora.SafetyModule, initialised: bool
) -> None:
    straight, initial = constrained(module, initialised)
    train(straight, tmp_path, salora.FoldCallback(module, initial=initial))
    resumed, _ = constrained(module, initialised)
    before = weights(resumed)
    trainer = train(
        resumed,
        tmp_path / "resumed",
        salora.FoldCallback(module, initial=initial),
        resume=tmp_path / f"checkpoint-{HALF}",
    )
    assert trainer.state.global_step == STEPS
    assert distance(weights(resumed), before) > 1e-2
    # What of B lies in the safety subspace is lost with the checkpoint, and is never used.
    assert distance(weights(resumed), weights(straight)) < CLOSE
    assert inside(factors(resumed), module) < FLOAT32


def test_resuming_from_the_last_checkpoint_does_not_mind_the_folded_adapter(
    tmp_path: Path, module: salora.SafetyModule
) -> None:
    first, initial = constrained(module, initialised=True)
    train(first, tmp_path, salora.FoldCallback(module, initial=initial))
    assert (tmp_path / FOLDED / FACTORS).exists()
    second, _ = constrained(module, initialised=True)
    trainer = train(
        second,
        tmp_path,
        salora.FoldCallback(module, initial=initial),
        resume=tmp_path / f"checkpoint-{STEPS}",
        max_steps=STEPS + HALF,
    )
    assert trainer.state.global_step == STEPS + HALF
    assert inside(factors(second), module) < FLOAT32
    served = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / FOLDED))
    assert torch.allclose(logits(served), logits(second), atol=CLOSE)


@pytest.fixture(scope="module")
def start(module: salora.SafetyModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `safeproj salora init` writes for the tiny model."""
    from safeproj.methods.salora.start import write_start

    out = tmp_path_factory.mktemp("init") / "start"
    batches = random_batches(VOCABULARY, seed=5)
    write_start(
        tiny_llama(), module, batches, out, rank=4, alpha=8, task_rank=RANK, targets=list(QV)
    )
    return out


def test_another_process_resumes_from_the_start_that_was_written(
    tmp_path: Path, module: salora.SafetyModule, start: Path
) -> None:
    module.save(tmp_path / "module.safety.safetensors")
    initial = salora.Initial.load(start)
    straight = salora.attach(tiny_llama(), start, module)
    train(straight, tmp_path / "run", salora.FoldCallback(module, initial=initial))

    again = salora.SafetyModule.load(tmp_path / "module.safety.safetensors")
    resumed = salora.attach(tiny_llama(), start, again)
    train(resumed, tmp_path / "run-2", resume=tmp_path / "run" / f"checkpoint-{HALF}")
    assert inside(factors(resumed), module) < FLOAT32
    assert distance(weights(resumed), weights(straight)) < CLOSE
    assert torch.allclose(logits(resumed), logits(straight), atol=CLOSE)


def test_training_begins_from_the_function_of_the_unmodified_model(
    module: salora.SafetyModule, start: Path
) -> None:
    model = salora.attach(tiny_llama(), start, module)
    assert torch.allclose(logits(model), logits(tiny_llama()), atol=CLOSE)


def test_a_checkpoint_can_be_attached_to_a_new_model(
    tmp_path: Path, module: salora.SafetyModule, start: Path
) -> None:
    trained = salora.attach(tiny_llama(), start, module)
    train(trained, tmp_path, salora.FoldCallback(module, initial=salora.Initial.load(start)))
    again = salora.attach(tiny_llama(), tmp_path / f"checkpoint-{STEPS}", module)
    assert torch.allclose(logits(again), logits(trained), atol=CLOSE)
    assert not torch.allclose(logits(again), logits(tiny_llama()), atol=1e-2)


# Folding while training


@STARTS
def test_the_folded_adapter_serves_on_the_unmodified_model(
    tmp_path: Path, module: salora.SafetyModule, initialised: bool
) -> None:
    model, initial = constrained(module, initialised)
    train(model, tmp_path, salora.FoldCallback(module, initial=initial))
    served = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / FOLDED))
    assert torch.allclose(logits(served), logits(model), atol=CLOSE)
    assert not torch.allclose(logits(served), logits(tiny_llama()), atol=1e-2)


@STARTS
def test_the_folded_adapter_has_nothing_of_the_training_in_it(
    tmp_path: Path, module: salora.SafetyModule, initialised: bool
) -> None:
    model, initial = constrained(module, initialised)
    train(model, tmp_path, salora.FoldCallback(module, initial=initial))
    config = read_json(tmp_path / FOLDED / CONFIG)
    assert config["init_lora_weights"] is True
    assert config["r"] == (8 if initialised else 4)
    assert not (tmp_path / FOLDED / INITIAL).exists()
    assert inside(only_B(saved(tmp_path / FOLDED)), module) < FLOAT32


def test_the_folded_adapter_is_without_the_directions_of_the_constraint_alone(
    tmp_path: Path, module: salora.SafetyModule
) -> None:
    model = adapted()
    salora.constrain(model, module, rank=2)
    train(model, tmp_path, salora.FoldCallback(module, rank=2))
    served = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / FOLDED))
    assert torch.allclose(logits(served), logits(model), atol=CLOSE)


@STARTS
def test_checkpoints_keep_the_initial_factors_if_there_are_any(
    tmp_path: Path, module: salora.SafetyModule, initialised: bool
) -> None:
    model, initial = constrained(module, initialised)
    train(model, tmp_path, salora.FoldCallback(module, initial=initial))
    for step in (HALF, STEPS):
        checkpoint = tmp_path / f"checkpoint-{step}"
        assert (checkpoint / INITIAL).exists() == initialised
        assert (read_json(checkpoint / CONFIG)["init_lora_weights"] == METHOD) == initialised


class Look(TrainerCallback):
    """Calls a function with the model and the number of the step whenever the trainer saves."""

    def __init__(self, see: Callable[[Any, int], None]) -> None:
        self._see = see

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self._see(kwargs["model"], state.global_step)


@STARTS
def test_a_checkpoint_folds_to_what_the_model_was_then(
    tmp_path: Path, module: salora.SafetyModule, initialised: bool
) -> None:
    seen: dict[int, Tensor] = {}
    model, initial = constrained(module, initialised)
    look = Look(lambda model, step: seen.update({step: logits(model)}))
    train(model, tmp_path, salora.FoldCallback(module, initial=initial), look)
    for step in (HALF, STEPS):
        salora.fold(tmp_path / f"checkpoint-{step}", module, tmp_path / f"folded-{step}")
        served = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / f"folded-{step}"))
        assert torch.allclose(logits(served), seen[step], atol=CLOSE)
    assert not torch.allclose(seen[HALF], seen[STEPS], atol=1e-2)


def test_the_folded_adapter_is_that_of_the_last_save_while_training_goes_on(
    tmp_path: Path, module: salora.SafetyModule
) -> None:
    def compare(_: Any, step: int) -> None:
        # C_S is applied once more, to what is rounded already.
        folded, checkpoint = saved(tmp_path / FOLDED), saved(tmp_path / f"checkpoint-{step}")
        assert distance(folded, checkpoint) < 1e-6
        steps.append(step)

    steps: list[int] = []
    model, _ = constrained(module)
    train(model, tmp_path, salora.FoldCallback(module), Look(compare))
    assert steps == [HALF, STEPS]


@pytest.mark.parametrize("name", ["default", "skill"])
@STARTS
def test_the_adapter_may_have_any_name(
    tmp_path: Path, module: salora.SafetyModule, initialised: bool, name: str
) -> None:
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(QV), init_lora_weights=True)
    model: Any = get_peft_model(tiny_llama(), config, adapter_name=name)
    batches, initial = random_batches(VOCABULARY, seed=5), None
    if initialised:
        initial = salora.initialise(model, module, batches, task_rank=RANK)
    salora.constrain(model, module)
    train(model, tmp_path, salora.FoldCallback(module, initial=initial))
    served = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / FOLDED))
    assert torch.allclose(logits(served), logits(model), atol=CLOSE)


def test_the_active_one_of_several_adapters_is_folded(
    tmp_path: Path, module: salora.SafetyModule
) -> None:
    model = adapted()
    config = LoraConfig(r=2, lora_alpha=8, target_modules=list(QV), task_type="CAUSAL_LM")
    model.add_adapter("skill", config)
    model.set_adapter("skill")
    salora.constrain(model, module)
    train(model, tmp_path, salora.FoldCallback(module))
    served = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / FOLDED))
    assert torch.allclose(logits(served), logits(model), atol=CLOSE)
    assert not torch.allclose(logits(served), logits(tiny_llama()), atol=1e-2)


def test_training_that_saves_nothing_still_ends_with_a_folded_adapter(
    tmp_path: Path, module: salora.SafetyModule
) -> None:
    model, _ = constrained(module)
    train(model, tmp_path / "new", salora.FoldCallback(module), save_strategy="no")
    served = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "new" / FOLDED))
    assert torch.allclose(logits(served), logits(model), atol=CLOSE)


@STARTS
def test_the_best_checkpoint_is_the_one_that_is_folded_in_the_end(
    tmp_path: Path, module: salora.SafetyModule, initialised: bool
) -> None:
    model, initial = constrained(module, initialised)
    trainer = train(
        model,
        tmp_path,
        salora.FoldCallback(module, initial=initial),
        eval_strategy="steps",
        eval_steps=HALF,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the first: training makes the loss smaller
    )
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{HALF}")
    assert distance(weights(model), saved(tmp_path / f"checkpoint-{HALF}")) < 1e-6
    assert distance(weights(model), saved(tmp_path / f"checkpoint-{STEPS}")) > 1e-3
    served = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / FOLDED))
    assert torch.allclose(logits(served), logits(model), atol=CLOSE)


# After training


def trained_inside(module: salora.SafetyModule, tmp_path: Path) -> tuple[Any, Tensor]:
    """Train in a with-block; return the model after it and its logits within."""
    model = adapted()
    with salora.constrain(model, module):
        train(model, tmp_path, save_steps=STEPS)
        within = logits(model)
    return model, within


def test_after_the_block_the_model_is_ordinary_and_computes_the_same(
    tmp_path: Path, module: salora.SafetyModule
) -> None:
    model, within = trained_inside(module, tmp_path)
    assert not any("parametriz" in name for name, _ in model.named_modules())
    fresh = adapted()
    assert {name for name, _ in model.named_parameters()} == {
        name for name, _ in fresh.named_parameters()
    }
    layers = zip(lora_layers(model), lora_layers(fresh), strict=True)
    assert all(type(a.lora_B["default"]) is type(b.lora_B["default"]) for (_, a), (_, b) in layers)
    assert torch.equal(logits(model), within)


def test_after_the_block_the_same_adapter_is_saved(
    tmp_path: Path, module: salora.SafetyModule
) -> None:
    model, _ = trained_inside(module, tmp_path)
    model.save_pretrained(str(tmp_path / "after"))
    assert distance(saved(tmp_path / "after"), saved(tmp_path / f"checkpoint-{STEPS}")) == 0


def test_after_the_block_the_adapter_can_be_merged(
    tmp_path: Path, module: salora.SafetyModule
) -> None:
    model, within = trained_inside(module, tmp_path)
    merged = model.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert torch.allclose(logits(merged), within, atol=CLOSE)


def test_a_constrained_adapter_can_be_merged(tmp_path: Path, module: salora.SafetyModule) -> None:
    model, _ = constrained(module)
    train(model, tmp_path, save_strategy="no")
    within = logits(model)
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), within, atol=CLOSE)
    assert not torch.allclose(logits(merged), logits(tiny_llama()), atol=1e-2)


def test_a_saved_adapter_loads_on_the_unmodified_model(
    tmp_path: Path, module: salora.SafetyModule
) -> None:
    model, _ = constrained(module)
    train(model, tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / f"checkpoint-{STEPS}"))
    assert torch.equal(logits(loaded), logits(model))
    assert type(next(lora_layers(loaded))[1].lora_B["default"]) is nn.Linear


# TRL


@pytest.fixture(scope="module")
def example() -> Any:
    """The tiny language model with its tokenizer, and a safety module from its safety data."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(EXAMPLE / "aligned"))
    tokenizer.padding_side = "right"

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(str(EXAMPLE / "aligned"), dtype=torch.float32)

    data = salora.read_data(EXAMPLE / "data" / "safety.jsonl", tokenizer)
    return load, tokenizer, salora.safety_module(load(), data.batches(64)[:2], QV, RANK)


@STARTS
def test_the_trainer_of_trl_trains_with_the_constraint(
    tmp_path: Path, example: Any, initialised: bool
) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    load, tokenizer, module = example
    lines = (EXAMPLE / "data" / "task.jsonl").read_text("utf-8").splitlines()[:64]
    (tmp_path / "task.jsonl").write_text("\n".join(lines), "utf-8")
    (batch,) = salora.read_data(tmp_path / "task.jsonl", tokenizer).batches(64)
    model, initial = adapted(model=load()), None
    if initialised:
        initial = salora.initialise(model, module, [batch], task_rank=RANK)
    salora.constrain(model, module)
    before = loss(model, batch)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=20,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            save_steps=10,
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=datasets.Dataset.from_list(
            [
                {"prompt": row["prompt"], "completion": f" {row['response']}"}
                for row in map(json.loads, lines)
            ]
        ),
        processing_class=tokenizer,
        callbacks=[salora.FoldCallback(module, initial=initial)],
    )
    trainer.train()
    assert loss(model, batch) < 0.7 * before
    assert inside(factors(model), module) < FLOAT32
    assert inside(only_B(saved(tmp_path / "checkpoint-20")), module) < FLOAT32
    served = PeftModel.from_pretrained(load(), str(tmp_path / FOLDED))
    # Logits are of the order 10 here.
    assert torch.allclose(logits(served), logits(model), atol=10 * CLOSE)

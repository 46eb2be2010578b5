"""`project`: what it leaves in memory is what `patch` writes, and nothing else has changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import distributed, nn

import safeproj
from safeproj import (
    Options,
    Report,
    Reports,
    SafeLora,
    SafeprojError,
    Salora,
    Selection,
)
from safeproj.lm.adapters import Host
from safeproj.lm.live import Live
from safeproj.storage.arrays import from_torch
from safeproj.storage.source import open_folder
from tests.conformance.oracle import adapted
from tests.live.support import ALL, METHODS, Home, differing, home, saved, state
from tests.methods.covariance.test_command import lora
from tests.methods.salora.test_training import train
from tests.support import FACTORS, save_safety_module, snapshot, tiny_llama


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return home(tmp_path_factory.mktemp("home"))


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest, at: Home) -> safeproj.Method:
    return METHODS[request.param](at)


def patched(model: Any, method: safeproj.Method, path: Path, options: Options) -> Report:
    """Save the adapter of a model, and patch it."""
    saved(model, path / "adapter")
    return safeproj.patch(method, path / "adapter", path / "out", options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_left_is_what_patch_writes(
    at: Home, tmp_path: Path, method: safeproj.Method, dtype: torch.dtype
) -> None:
    """To the last bit, where `patch` runs the model in the dtype that it has in memory."""
    model = at.model(dtype)
    options = Options(Selection(all=True, exclude=("layers.0.self_attn.q_proj",)))
    name = str(dtype).removeprefix("torch.")
    host = Host(open_folder(str(at.aligned)), "cpu", name)
    report = patched(model, replace(method, host=host), tmp_path, options)
    before = state(model)

    found = safeproj.project(model, method, options, adapter="default")

    changed = differing(before, state(model))
    assert changed
    assert all(f".lora_{'B' if method.side == 'output' else 'A'}." in name for name in changed)
    after = saved(model, tmp_path / "projected")
    wanted = load_file(tmp_path / "out" / FACTORS)
    assert after.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(wanted[key], after[key])] == []
    assert replace(found, inputs=report.inputs) == report
    assert found.changed == report.changed == 13
    assert found.inputs["adapter"] == {"source": "adapter 'default' in memory"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_factors_keep_their_dtype(at: Home, tmp_path: Path, dtype: torch.dtype) -> None:
    model = at.model().to(dtype)
    patched(model, SafeLora(at.base, at.aligned), tmp_path, ALL)
    safeproj.project(model, SafeLora(at.base, at.aligned), ALL)
    after, wanted = saved(model, tmp_path / "new"), load_file(tmp_path / "out" / FACTORS)
    assert {each.dtype for each in after.values()} == {dtype}
    assert [key for key in wanted if not torch.equal(wanted[key], after[key])] == []


def test_no_second_model_is_loaded(
    at: Home, method: safeproj.Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = at.model()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a second model")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)
    safeproj.project(model, method, ALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_aligned_weights_may_be_those_in_memory(
    at: Home, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = at.model(dtype, modules_to_save=["norm"], trainable_token_indices=[1, 2])
    bare = copy.deepcopy(at.place.model).to(dtype)
    bare.save_pretrained(str(tmp_path / "aligned"))
    again = copy.deepcopy(model)
    before = state(model)

    found = safeproj.project(model, SafeLora(at.base), ALL, adapter="default")

    assert all(".lora_B." in name for name in differing(before, state(model)))
    wanted = safeproj.project(again, SafeLora(at.base, tmp_path / "aligned"), ALL)
    assert differing(state(model) | {"modules": 0}, state(again) | {"modules": 0}) == []
    assert found.inputs["aligned"]["source"].endswith("in memory")
    assert isinstance(wanted, Report)
    assert replace(found, inputs=wanted.inputs) == wanted


def test_without_a_model_in_memory_both_sides_are_needed(at: Home, tmp_path: Path) -> None:
    saved(at.model(), tmp_path / "adapter")
    with pytest.raises(SafeprojError, match=r"^Safe LoRA needs base and aligned, or alignment$"):
        safeproj.inspect(SafeLora(at.base), tmp_path / "adapter")


def test_adapters_are_projected_one_or_all(at: Home) -> None:
    model = at.model()
    torch.manual_seed(1)
    model.add_adapter("second", lora(r=2, target_modules=["q_proj"], init_lora_weights=False))
    before, method = state(model), SafeLora(at.base)

    one = safeproj.project(model, method, ALL, adapter="second")

    second = state(model)
    changed = differing(before, second)
    assert len(changed) == len(one.modules) == 2
    assert all(".lora_B.second." in name for name in changed)

    other = safeproj.project(model, method, ALL, adapter="default")

    both = state(model)
    assert len(differing(second, both)) == len(other.modules) == 14
    model.load_state_dict(before["numbers"])

    found = safeproj.project(model, method, ALL)

    assert isinstance(found, Reports)
    assert list(found.reports) == ["default", "second"]
    for report, alone in zip(found.reports.values(), (other, one), strict=True):
        assert report.cosines == pytest.approx(alone.cosines, rel=1e-6)
        assert report.written
    for name, tensor in state(model)["numbers"].items():
        assert torch.allclose(tensor, both["numbers"][name], rtol=1e-5, atol=1e-6), name
    assert len(differing(before, state(model))) == 16
    with pytest.raises(SafeprojError, match=r"no adapter 'third', expected one of default, second"):
        safeproj.project(model, method, ALL, adapter="third")


def test_right_after_training(at: Home, tmp_path: Path) -> None:
    model = at.model(init_lora_weights=True)
    trainer = train(model, tmp_path / "run", save_strategy="no")

    report = safeproj.project(trainer.model, SafeLora(base=at.base), ALL, adapter="default")
    trainer.save_model(str(tmp_path / "adapter"))

    assert report.changed == 14
    assert report.written
    again = safeproj.inspect(SafeLora(at.base, at.aligned), tmp_path / "adapter")
    assert min(again.cosines) > max(report.cosines)  # all of it lies where alignment moved
    trainer.train()  # and goes on


def test_an_active_adapter_stays_active_where_the_model_is_run(at: Home) -> None:
    model = at.model()
    model.add_adapter("second", lora(r=2))
    model.set_adapter("second")
    model.base_model.disable_adapter_layers()
    model.get_base_model().model.layers[0].eval()
    before = state(model)
    method = METHODS["reconstruct"](at)

    safeproj.project(model, method, adapter="default")

    changed = differing(before, state(model))
    assert len(changed) == 14
    assert all(".lora_A.default." in name for name in changed)


# Errors leave the model as it was.


def not_finite(model: Any) -> None:
    with torch.no_grad():
        model.get_base_model().model.layers[1].self_attn.v_proj.lora_B["default"].weight[0] = (
            torch.nan
        )


def merged(model: Any) -> None:
    model.merge_adapter()


def half_offloaded(model: Any) -> None:
    layer = model.get_base_model().model.layers[1].self_attn.q_proj.lora_A["default"]
    layer.weight = nn.Parameter(layer.weight.detach().to("meta"))


def sharded(model: Any) -> None:
    """Spread a factor over the processes of a group, of which this one is all.

    `no_group` ends it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    group: Any = distributed  # which exports less than it has
    if not group.is_initialized():
        group.init_process_group("gloo", store=group.HashStore(), rank=0, world_size=1)
    layer = model.get_base_model().model.layers[1].self_attn.q_proj.lora_B["default"]
    mesh = init_device_mesh("cpu", (1,))
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh))


@pytest.fixture
def no_group() -> Iterator[None]:
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


REFUSED: dict[str, tuple[Any, str]] = {
    "not finite": (not_finite, r"^adapter 'default' in memory: .*v_proj.lora_B.weight has NaN"),
    "merged": (merged, r"^default is merged into the model's weights; call unmerge_adapter\(\)"),
    "sharded": (
        sharded,
        r"q_proj.lora_B.weight is a DTensor, quantised or spread over processes; save the adapter",
    ),
    "offloaded": (
        half_offloaded,
        r"q_proj.lora_A.weight is offloaded, and not in memory; save the adapter, and use `safep",
    ),
}


@pytest.mark.usefixtures("no_group")
@pytest.mark.parametrize(("damage", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_projected_is_left_as_it_was(at: Home, damage: Any, said: str) -> None:
    model = at.model()
    damage(model)
    before = state(model)
    with pytest.raises(SafeprojError, match=said):
        safeproj.project(model, SafeLora(at.base, at.aligned), ALL)
    assert differing(before, state(model)) == []


def test_one_adapter_that_cannot_be_used_keeps_all_as_they_were(at: Home) -> None:
    model = at.model()
    model.add_adapter("second", lora(r=2, init_lora_weights=False))
    with torch.no_grad():
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        layer.lora_B["second"].weight[0] = torch.inf
    before = state(model)
    with pytest.raises(SafeprojError, match=r"^adapter 'second' in memory: .*q_proj.* NaN or Inf"):
        safeproj.project(model, SafeLora(at.base), ALL)
    assert differing(before, state(model)) == []


def test_numbers_that_do_not_get_there_are_taken_back(at: Home) -> None:
    model = at.model()
    live = Live(model)
    tensors = live.read("default").tensors
    first, second = list(tensors)[:2]
    before = state(model)
    changes = {first: 2 * tensors[first], second: from_torch(torch.ones(1, 1))}
    with pytest.raises(SafeprojError, match=r"would become \[1, 1\], which has no place"):
        live.put({"default": changes})
    assert differing(before, state(model)) == []
    text = from_torch(torch.ones(tensors[second].shape)).astype("S4")
    with pytest.raises(AttributeError):  # torch has no such dtype
        live.put({"default": {first: 2 * tensors[first], second: text}})
    assert differing(before, state(model)) == []


OTHERS: dict[str, tuple[Any, str]] = {
    "a plain model": (lambda model: model.get_base_model(), "found a LlamaForCausalLM, expected a"),
    "a wrapped model": (
        lambda model: nn.DataParallel(model),
        "found a DataParallel, expected a Pef",
    ),
    "no model": (lambda _: "org/model", "found a str, expected a PeftModel"),
}


@pytest.mark.parametrize(("given", "said"), OTHERS.values(), ids=OTHERS)
def test_anything_but_a_peft_model_is_refused(at: Home, given: Any, said: str) -> None:
    with pytest.raises(SafeprojError, match=said):
        safeproj.project(given(at.model()), SafeLora(at.base))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (Options(dtype="float16"), r"^dtype float16: an adapter in memory keeps its dtype"),
        (Options(portable=True), r"^portable writes other tensors than there are in memory"),
    ],
)
def test_what_only_files_can_be_is_refused(at: Home, options: Options, said: str) -> None:
    with pytest.raises(SafeprojError, match=said):
        safeproj.project(at.model(), SafeLora(at.base), options)


def test_an_initialisation_that_changed_the_base_is_refused(at: Home) -> None:
    model = at.model(init_lora_weights="olora")
    with pytest.raises(
        SafeprojError, match=r"init_lora_weights is 'olora', which changed .* patch`$"
    ):
        safeproj.project(model, SafeLora(at.base, at.aligned), ALL)
    other = at.model(target_modules=["q_proj"])
    other.add_adapter("other", lora(target_modules=["v_proj"], init_lora_weights="olora"))
    with pytest.raises(SafeprojError, match=r"'other' in memory has changed its own weights"):
        safeproj.project(other, SafeLora(at.base), ALL, adapter="default")
    report = safeproj.project(other, SafeLora(at.base, at.aligned), ALL, adapter="default")
    assert report.changed == 2


@pytest.mark.parametrize("name", ["data", "aligned in memory"])
def test_trained_biases_are_no_aligned_model(at: Home, name: str) -> None:
    model = at.model(bias="lora_only")
    method = SafeLora(at.base) if name == "aligned in memory" else METHODS[name](at)
    with pytest.raises(SafeprojError, match=r"has changed its own weights \(bias 'lora_only'\)"):
        safeproj.project(model, method, ALL)


def quantised(model: Any) -> None:
    """Store one weight as codes, as bitsandbytes does in eight bits."""
    base = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    base.weight = nn.Parameter(base.weight.detach().mul(50).to(torch.int8), requires_grad=False)


def test_quantised_weights_are_no_aligned_weights(at: Home) -> None:
    model = at.model()
    quantised(model)
    again = copy.deepcopy(model)
    with pytest.raises(SafeprojError, match=r"the weight of .*q_proj is stored as I8"):
        safeproj.project(model, SafeLora(at.base), ALL)
    again.get_base_model().is_quantized = True  # as transformers says
    for method in (SafeLora(at.base), METHODS["data"](at)):
        with pytest.raises(SafeprojError, match=r"its weights are quantised, .*; give aligned"):
            safeproj.project(again, method, ALL)
    report = safeproj.project(again, SafeLora(at.base, at.aligned), ALL, adapter="default")
    assert report.changed == 14


@pytest.fixture
def spread(at: Home, tmp_path: Path) -> Iterator[Any]:
    """The model as accelerate spreads it: one layer on the disk."""
    import peft
    from transformers import AutoModelForCausalLM

    where: dict[str, Any] = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu"}
    where |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    factory: Any = AutoModelForCausalLM
    model = factory.from_pretrained(
        str(at.aligned),
        device_map={**where, "lm_head": "cpu"},
        offload_folder=str(tmp_path / "off"),
    )
    config = lora(target_modules=r".*layers\.0\..*_proj", init_lora_weights=False)
    yield peft.get_peft_model(model, config)


def test_a_model_that_is_partly_on_the_disk(at: Home, spread: Any, tmp_path: Path) -> None:
    report = patched(spread, SafeLora(at.base, at.aligned), tmp_path, ALL)
    found = safeproj.project(spread, SafeLora(at.base), ALL, adapter="default")
    assert replace(found, inputs=report.inputs) == report
    wanted = load_file(tmp_path / "out" / FACTORS)
    after = saved(spread, tmp_path / "projected")
    assert [key for key in wanted if not torch.equal(wanted[key], after[key])] == []


def test_what_salora_constrains_is_folded_instead(at: Home) -> None:
    from safeproj import salora

    model = at.model(target_modules=["q_proj", "v_proj"])
    module = salora.SafetyModule.load(at.safety_module)
    salora.constrain(model, module)
    with pytest.raises(SafeprojError, match=r"lora_B.weight is made of other parameters; save"):
        safeproj.project(model, Salora(at.safety_module), ALL)


def test_nothing_is_written(at: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = snapshot(at.aligned.parent)
    safeproj.project(at.model(), METHODS["data"](at))
    assert snapshot(at.aligned.parent) == before
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_another_model_is_refused(at: Home, tmp_path: Path) -> None:
    model = adapted(tiny_llama(hidden_size=48), lora())
    before = state(model)
    with pytest.raises(SafeprojError, match="do not fit"):
        safeproj.project(model, SafeLora(at.base, at.aligned), ALL)
    module = save_safety_module(tiny_llama(), tmp_path / "m.safetensors", ("k_proj",))
    with pytest.raises(SafeprojError, match="k_proj"):
        safeproj.project(model, Salora(module), ALL)
    assert differing(before, state(model)) == []

"""Candidates and controls: what patch writes, the formulas, and one reading for all of it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from safeproj import Options, SafeLora, Salora, Selection
from safeproj.engine import Progress
from safeproj.errors import SafeprojError
from safeproj.methods.interface import Method
from safeproj.records.profile import Profile
from safeproj.storage.arrays import to_torch
from safeproj.sweeping.candidates import Candidates, Place, Replaced, candidates, spread
from safeproj.sweeping.controls import Sizes, scaled
from safeproj.sweeping.rotation import Rotation
from tests.conftest import Trio
from tests.support import (
    FACTORS,
    deltas,
    moved,
    oracle_C,
    safeproj,
    save_adapter,
    save_safety_module,
    tensors_of,
    tiny_llama,
)


@dataclass(frozen=True)
class Case:
    """An adapter, what is done to it, and `C` (m, m) of its modules in float64."""

    method: Method
    adapter: Path
    model: Any
    C: Callable[[str], Tensor]
    arguments: tuple[str, ...]

    def find(self, **settings: Any) -> Candidates:
        return candidates(self.method, str(self.adapter), **settings)


def weights(model: Any) -> dict[str, Tensor]:
    """Return the weight (m, n) of each module."""
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim == 2:
            turned = type(module).__name__ == "Conv1D"
            found[name] = weight.detach().T if turned else weight.detach()
    return found


def pair_case(root: Path, base: Any, **settings: Any) -> Case:
    aligned = moved(base)
    base.save_pretrained(root / "base")
    aligned.save_pretrained(root / "aligned")
    adapter = save_adapter(aligned, root / "adapter", **settings)
    after, before = weights(aligned), weights(base)
    sources = (str(root / "base"), str(root / "aligned"))
    return Case(
        SafeLora(*sources),
        adapter,
        aligned,
        lambda name: oracle_C(after[name], before[name]),
        ("--base", sources[0], "--aligned", sources[1], "--adapter", str(adapter)),
    )


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=64)
    )


@pytest.fixture(scope="module", params=["llama", "gpt2", "bfloat16", "safety module"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    if request.param == "gpt2":
        return pair_case(root, gpt2(), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, r=8)
    settings = {"r": 8, "rank_pattern": {"k_proj": 3}, "alpha_pattern": {"v_proj": 24}}
    found = pair_case(root, tiny_llama(), target_modules="all-linear", lora_bias=True, **settings)
    if request.param == "bfloat16":
        halve(found.adapter)
    if request.param == "safety module":
        file = save_safety_module(
            found.model, root / "m.safety.safetensors", ("q_proj", "k_proj", "v_proj", "o_proj",
                                                        "gate_proj", "up_proj", "down_proj")
        )  # fmt: skip
        basis = load_file(file)

        def C(name: str) -> Tensor:
            U = basis[f"{name}.weight.U"].double()
            return torch.eye(len(U), dtype=torch.float64) - U @ U.T

        arguments = ("--safety-module", str(file), "--adapter", str(found.adapter))
        return replace(found, method=Salora(str(file)), C=C, arguments=arguments)
    return found


def halve(adapter: Path) -> None:
    """Store an adapter in bfloat16."""
    tensors = load_file(adapter / FACTORS)
    save_file({name: each.bfloat16() for name, each in tensors.items()}, adapter / FACTORS)


def updates(case: Case, replaced: Replaced, place: Path) -> dict[str, Tensor]:
    """Return `ΔW` of every module, as PEFT computes it from a directory with these tensors."""
    shutil.copytree(case.adapter, place, dirs_exist_ok=True)
    save_file({**load_file(case.adapter / FACTORS), **tensors_of(replaced)}, place / FACTORS)
    return {
        name: delta.T if type(module(case, name)).__name__ == "Conv1D" else delta
        for name, delta in deltas(case.model, place).items()
    }


def module(case: Case, name: str) -> Any:
    return case.model.get_submodule(name)


def tolerance(case: Case) -> float:
    """Relative to the largest entry: what the dtype of the tensors can lose, several times over."""
    stored = next(iter(load_file(case.adapter / FACTORS).values())).dtype
    return 2e-2 if stored is torch.bfloat16 else 2e-5


def assert_close(case: Case, found: Tensor, expected: Tensor) -> None:
    bound = tolerance(case) * float(expected.abs().max())
    assert float((found - expected).abs().max()) <= bound


def middle(found: Candidates) -> Place:
    """Return the place at which about half of the modules are changed."""
    places = found.places(3)
    assert len(places) == 3
    return places[1]


# --- the intervention is what patch writes


@pytest.mark.parametrize("share", [0.3, 1.0], ids=["some", "all"])
def test_tensors_are_those_that_patch_writes(case: Case, share: float, tmp_path: Path) -> None:
    found = case.find()
    places = {len(place.modules): place for place in found.places(1000)}
    count = max(1, round(share * (len(places) - 1)))
    out = tmp_path / "out"
    done = safeproj("patch", *case.arguments, "--layers", str(count), "--out", out)
    assert done.returncode == 0, done.stderr
    written, before = load_file(out / FACTORS), load_file(case.adapter / FACTORS)
    replaced = places[count].method()
    assert {name for name in written if not torch.equal(written[name], before[name])} == set(
        replaced
    )
    for name, tensor in tensors_of(replaced).items():
        assert tensor.dtype == written[name].dtype
        assert torch.equal(tensor, written[name]), name


def test_a_threshold_chooses_what_patch_chooses(trio: Trio, tmp_path: Path) -> None:
    found = candidates(trio.method, str(trio.adapter), by="threshold")
    place = found.places(100)[2]
    assert place.value == place.threshold
    done = safeproj(
        "patch", *trio.arguments, "--threshold", repr(place.threshold), "--out", tmp_path / "out",
        "--format", "json",
    )  # fmt: skip
    projected = {each["name"] for each in json.loads(done.stdout)["modules"] if each["projected"]}
    assert projected == set(place.modules)
    written = load_file(tmp_path / "out" / FACTORS)
    replaced = tensors_of(place.method())
    assert all(torch.equal(each, written[name]) for name, each in replaced.items())


@pytest.mark.parametrize("setting", [{"rank": 3}, {"energy": 0.6}], ids=["rank", "energy"])
def test_the_exact_projector_is_that_of_patch(
    trio: Trio, tmp_path: Path, setting: dict[str, Any]
) -> None:
    method = replace(trio.method, projector="exact", **setting)
    found = candidates(method, str(trio.adapter))
    options = [text for name, value in setting.items() for text in (f"--{name}", str(value))]
    out = tmp_path / "out"
    done = safeproj(
        "patch", *trio.arguments, "--all", "--projector", "exact", *options, "--out", out
    )
    assert done.returncode == 0, done.stderr
    written = load_file(out / FACTORS)
    replaced = tensors_of(found.places(2)[-1].method())
    assert all(torch.equal(each, written[name]) for name, each in replaced.items())


# --- the controls, against float64 oracles


def test_nothing_is_changed_outside_of_the_chosen_modules(case: Case, tmp_path: Path) -> None:
    place = middle(case.find())
    before = updates(case, {}, tmp_path / "before")
    for name, make in {"method": place.method, **place.controls}.items():
        after = updates(case, make(), tmp_path / name)
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert changed == set(place.modules), name


def test_the_method_is_the_projection(case: Case, tmp_path: Path) -> None:
    place = middle(case.find())
    before = updates(case, {}, tmp_path / "before")
    after = updates(case, place.method(), tmp_path / "after")
    for name in place.modules:
        assert_close(case, after[name], case.C(name) @ before[name])


def test_the_complement_is_what_projection_removes(case: Case, tmp_path: Path) -> None:
    place = middle(case.find())
    before = updates(case, {}, tmp_path / "before")
    after = updates(case, place.controls["complement"](), tmp_path / "after")
    for name in place.modules:
        assert_close(case, after[name], before[name] - case.C(name) @ before[name])


def test_the_module_shrink_has_the_scale_of_each_module(case: Case, tmp_path: Path) -> None:
    place = middle(case.find())
    before = updates(case, {}, tmp_path / "before")
    after = updates(case, place.controls["shrink"](), tmp_path / "after")
    tensors = load_file(case.adapter / FACTORS)
    for name in place.modules:
        B = tensors[f"base_model.model.{name}.lora_B.weight"].double()
        scale = float((case.C(name) @ B).norm() / B.norm())
        assert_close(case, after[name], scale * before[name])


def test_the_random_projector_is_the_same_one_turned(case: Case, tmp_path: Path) -> None:
    place = middle(case.find(seed=5))
    before = updates(case, {}, tmp_path / "before")
    after = updates(case, place.controls["random"](), tmp_path / "after")
    for name in place.modules:
        m = len(before[name])
        Q = to_torch(Rotation(m, 5, name).turn(numpy.eye(m)))
        assert_close(case, after[name], Q @ case.C(name) @ Q.T @ before[name])


def test_the_uniform_shrink_has_the_norm_of_the_projected_adapter(
    case: Case, tmp_path: Path
) -> None:
    found = case.find()
    sizes, place = Sizes(found.adapter, found.modules), middle(found)
    replaced = place.method()
    before = updates(case, {}, tmp_path / "before")
    projected = updates(case, replaced, tmp_path / "projected")
    factor = sizes.norm_of(replaced) / sizes.norm
    shrunk = updates(case, scaled(found.adapter, found.modules, factor), tmp_path / "shrunk")

    def norm(deltas: dict[str, Tensor]) -> float:
        return math.sqrt(sum(float(each.square().sum()) for each in deltas.values()))

    assert factor == pytest.approx(norm(projected) / norm(before), rel=1e-5)
    assert norm(shrunk) == pytest.approx(norm(projected), rel=tolerance(case))
    for name, delta in shrunk.items():
        assert_close(case, delta, factor * before[name])
    change = norm({name: projected[name] - before[name] for name in before}) / norm(before)
    assert sizes.change(replaced) == pytest.approx(change, rel=1e-5)
    assert sizes.change({}) == 0.0


def test_the_change_of_the_other_factor_is_measured_too(case: Case, tmp_path: Path) -> None:
    found = case.find()
    key = found.modules[0].input.key
    replaced = {key: found.adapter.tensors[key] * 0.5}
    before, after = (updates(case, r, tmp_path / str(len(r))) for r in ({}, replaced))
    difference = math.sqrt(sum(float((after[n] - before[n]).square().sum()) for n in before))
    whole = math.sqrt(sum(float(each.square().sum()) for each in before.values()))
    measured = Sizes(found.adapter, found.modules).change(replaced)
    assert measured == pytest.approx(difference / whole, rel=1e-5)


def test_the_bias_of_lora_B_goes_with_its_factor(tmp_path: Path) -> None:
    case = pair_case(tmp_path, tiny_llama(), target_modules=["q_proj"], lora_bias=True)
    place = case.find().places(2)[-1]
    tensors = load_file(case.adapter / FACTORS)
    name = place.modules[0]
    B, b = (
        tensors[f"base_model.model.{name}.lora_B.{kind}"].double() for kind in ("weight", "bias")
    )
    C = case.C(name)
    Q = to_torch(Rotation(len(b), 0, name).turn(numpy.eye(len(b))))
    key = f"base_model.model.{name}.lora_B.bias"
    expected = {
        "complement": b - C @ b,
        "shrink": b * ((C @ B).norm() / B.norm()),
        "random": Q @ C @ Q.T @ b,
    }
    for control, value in expected.items():
        found = to_torch(place.controls[control]()[key]).double()
        assert torch.allclose(found, value, atol=2e-5 * float(b.abs().max())), control


# --- one reading


class Counter:
    """Counts what an engine says that it reads."""

    def __init__(self) -> None:
        self.nbytes = self.planned = 0

    def start(self, modules: int, nbytes: int) -> None:  # noqa: ARG002 - the interface
        self.planned += nbytes

    def progress(self, event: Progress) -> None:
        self.nbytes += event.nbytes

    def ran(self, done: int, total: int) -> None:
        raise AssertionError(f"nothing is to be run, but {done} of {total}")


def test_the_checkpoints_are_read_once(trio: Trio) -> None:
    import safeproj

    inspected, swept = Profile(), Profile()
    safeproj.inspect(trio.method, str(trio.adapter), Options(profile=inspected))
    counter = Counter()
    options = Options(observer=counter, profile=swept)
    found = candidates(trio.method, str(trio.adapter), options)
    for place in found.places(100):  # making the variants reads nothing
        place.method()
        for make in place.controls.values():
            make()
    assert swept.usage.read_bytes == inspected.usage.read_bytes > 0
    assert counter.nbytes == counter.planned > 0


def test_weights_too_large_to_keep_are_read_as_often_as_by_inspect(
    trio: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safeproj
    from safeproj.engine.device import Host
    from safeproj.methods import differences as weights

    monkeypatch.setattr(weights, "CPU_HOLD", 1)
    monkeypatch.setattr(Host, "block", 1 << 10)  # several blocks of each weight
    inspected, swept = Profile(), Profile()
    report = safeproj.inspect(trio.method, str(trio.adapter), Options(profile=inspected))
    found = candidates(trio.method, str(trio.adapter), Options(profile=swept))
    assert swept.usage.read_bytes == inspected.usage.read_bytes > 0
    assert found.report.cosines == report.cosines


# --- the axes


def test_places_go_from_none_to_all_and_are_spread_evenly(trio: Trio) -> None:
    found = candidates(trio.method, str(trio.adapter))
    whole = found.places(100)
    assert [place.value for place in whole] == [0, 1, 2, 3, 4]
    assert [len(place.modules) for place in whole] == [0, 1, 2, 3, 4]
    assert [len(place.modules) for place in found.places(3)] == [0, 2, 4]
    assert [len(place.modules) for place in found.places(2)] == [0, 4]
    cosines = [place.threshold for place in whole[1:]]
    assert whole[0].threshold is None
    assert cosines == sorted(found.report.cosines)


def test_equal_cosines_are_one_threshold_and_several_numbers(tmp_path: Path) -> None:
    case = pair_case(tmp_path, tiny_llama(), target_modules=["q_proj", "v_proj"])
    tensors = load_file(case.adapter / FACTORS)
    for name in [name for name in tensors if ".layers.1." in name]:
        tensors[name] = tensors[name.replace(".layers.1.", ".layers.0.")]
    save_file({n: t.clone() for n, t in tensors.items()}, case.adapter / FACTORS)
    for role in ("base", "aligned"):
        file = tmp_path / role / "model.safetensors"
        stored = load_file(file)
        for name in [name for name in stored if ".layers.1.self_attn" in name]:
            stored[name] = stored[name.replace(".layers.1.", ".layers.0.")].clone()
        save_file(stored, file, {"format": "pt"})
    by_threshold = case.find(by="threshold").places(100)
    assert [len(place.modules) for place in by_threshold] == [0, 2, 4]
    assert by_threshold[0].value is None
    assert [len(place.modules) for place in case.find().places(100)] == [0, 1, 2, 3, 4]


def test_modules_that_are_left_out_stay_and_count_for_the_norm(case: Case) -> None:
    found = case.find(options=Options(Selection(exclude=(r"layers\.1\.|h\.1\.",))))
    whole = found.places(1000)[-1]
    assert whole.modules
    assert not any("layers.1." in name or "h.1." in name for name in whole.modules)
    assert len(found.modules) == 2 * len(whole.modules)
    assert Sizes(found.adapter, found.modules).norm_of(whole.method()) > 0.0


def test_an_adapter_without_any_update_has_nothing_to_sweep(tmp_path: Path) -> None:
    case = pair_case(tmp_path, tiny_llama(), target_modules=["q_proj"], init_lora_weights=True)
    with pytest.raises(SafeprojError, match="no module has a cosine"):
        case.find().places(5)


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [
        (1, 5, [0]),
        (2, 2, [0, 1]),
        (5, 9, [0, 1, 2, 3, 4]),
        (29, 5, [0, 7, 14, 21, 28]),
        (225, 3, [0, 112, 224]),
    ],
    ids=["one", "two", "few", "some", "many"],
)
def test_values_are_spread_evenly_with_both_ends(
    count: int, most: int, expected: list[int]
) -> None:
    assert spread(range(count), most) == expected


def test_peft_has_the_same_tensors_as_from_the_patched_directory(
    case: Case, tmp_path: Path
) -> None:
    from copy import deepcopy

    from safeproj.sweeping.subject import Subject

    found = case.find()
    place = middle(found)
    out = tmp_path / "out"
    done = safeproj("patch", *case.arguments, "--layers", str(len(place.modules)), "--out", out)
    assert done.returncode == 0, done.stderr
    subject = Subject(deepcopy(case.model), found.adapter)
    for make in (*place.controls.values(), place.method):  # whatever was there before
        subject.put(make())
    loaded = PeftModel.from_pretrained(deepcopy(case.model), str(out)).state_dict()
    mine = subject.model.state_dict()
    assert mine.keys() == loaded.keys()
    assert all(torch.equal(mine[name], loaded[name]) for name in loaded)

"""Safety modules of models: in memory and as files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from safeproj import SafeprojError, salora
from safeproj.methods.salora import SafetyModule
from tests.methods.salora.models import TARGETS, VOCABULARY, build
from tests.methods.salora.oracle import (
    outputs,
    random_batches,
    span,
    top_right_singular_vectors,
    weight,
)

BATCHES = random_batches(VOCABULARY)


@pytest.fixture(scope="module")
def made() -> SafetyModule:
    return salora.safety_module(build("llama"), BATCHES, ["q_proj", "v_proj"], 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", sorted(TARGETS))
def test_every_architecture_has_one(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(architecture, dtype)
    module = salora.safety_module(model, BATCHES, TARGETS[architecture], 4)
    module.save(tmp_path / "m.safetensors")
    loaded = SafetyModule.load(tmp_path / "m.safetensors")
    for name, each in module.directions.items():
        layer = model.get_submodule(name)
        m, n = weight(layer).shape
        assert each.U.shape == (m, 4)
        assert loaded.in_features[name] == n
        assert torch.equal(loaded.directions[name].U, each.U)
        if dtype is torch.float32:
            Y = outputs(model, layer, weight(layer), BATCHES)
            wanted = top_right_singular_vectors(Y, 4)
            assert (span(each.U) - span(wanted)).norm() < 2e-3


def test_a_file_holds_all_of_it(made: SafetyModule, tmp_path: Path) -> None:
    made.save(tmp_path / "m.safetensors")
    loaded = SafetyModule.load(tmp_path / "m.safetensors")
    assert list(loaded.directions) == list(made.directions)
    for name, each in made.directions.items():
        other = loaded.directions[name]
        assert torch.equal(other.U, each.U)
        assert torch.equal(other.singular_values, each.singular_values)
        assert (other.energy, other.positions) == (each.energy, each.positions)
    assert loaded.layouts == made.layouts
    assert loaded.options == {"targets": ["q_proj", "v_proj"], "rank": 6}
    assert loaded.inputs == made.inputs
    assert loaded.inputs["data"]["rows"] == 12
    assert loaded.config["model_type"] == "llama"


def test_the_same_model_and_data_give_the_same_file(made: SafetyModule, tmp_path: Path) -> None:
    again = salora.safety_module(build("llama"), BATCHES, ["q_proj", "v_proj"], 6)
    made.save(tmp_path / "one.safetensors")
    again.save(tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (
        tmp_path / "two.safetensors"
    ).read_bytes()


def test_a_file_is_replaced_only_when_that_is_wanted(made: SafetyModule, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    made.save(path)
    before = path.read_bytes()
    with pytest.raises(SafeprojError, match="exists; give overwrite"):
        made.cut(2).save(path)
    assert path.read_bytes() == before
    made.cut(2).save(path, overwrite=True)
    cut = SafetyModule.load(path)
    assert (cut.rank, cut.options["rank"]) == (2, 2)


def test_a_cut_has_the_first_directions_and_says_how_many_there_are(made: SafetyModule) -> None:
    cut = made.cut(2)
    for name, each in cut.directions.items():
        assert torch.equal(each.U, made.directions[name].U[:, :2])
    assert cut.rank == 2
    assert made.cut(None) is made
    for rank in (0, 7):
        with pytest.raises(SafeprojError, match=f"rank {rank}: .* holds 6 directions"):
            made.cut(rank)


def test_energy_is_captured_in_shares_that_grow_with_the_rank(made: SafetyModule) -> None:
    for name, share in made.captured().items():
        assert made.cut(2).captured()[name] < share < 1.0


def test_columns_that_are_not_orthonormal_are_refused(made: SafetyModule, tmp_path: Path) -> None:
    name = next(iter(made.directions))
    made.directions[name].U[:, 0] *= 1.01  # a copy is not worth it: put back below
    try:
        made.save(tmp_path / "m.safetensors")
    finally:
        made.directions[name].U[:, 0] /= 1.01
    with pytest.raises(SafeprojError, match="not orthonormal"):
        SafetyModule.load(tmp_path / "m.safetensors")


def test_no_path_of_the_machine_is_in_the_file(tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path / "model")
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    salora.safety_module(loaded, BATCHES, ["q_proj"], 2).save(tmp_path / "m.safetensors")
    assert str(tmp_path).encode() not in (tmp_path / "m.safetensors").read_bytes()
    assert SafetyModule.load(tmp_path / "m.safetensors").inputs["aligned"]["source"] == "model"

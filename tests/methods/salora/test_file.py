"""Reading safety modules: what a sound file gives, and what is refused of a damaged one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import safeproj as api
from safeproj import Salora
from safeproj.errors import SafeprojError
from safeproj.methods.registry import method_of
from safeproj.methods.salora.file import open_safety_module
from safeproj.report import Report
from tests.methods.recorded import text_of, write
from tests.support import save_adapter, save_safety_module, tiny_llama

NAME = "model.layers.0.self_attn.q_proj.weight"
RANK = 5


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A safety module and an adapter for it; tests must not change them."""
    root = tmp_path_factory.mktemp("sound")
    model = tiny_llama()
    adapter = save_adapter(model, root / "adapter")
    return save_safety_module(model, root / "llama.safety.safetensors", rank=RANK), adapter


def inspect(file: Path, adapter: Path, rank: int | None = None) -> Report:
    return api.inspect(Salora(str(file), rank), str(adapter))


# Sound files


def test_a_sound_file_says_what_was_written(sound: tuple[Path, Path]) -> None:
    found = open_safety_module(str(sound[0]))
    document = json.loads(text_of(sound[0]))
    assert found.names == document["parameters"].keys()
    assert found.config["model_type"] == "llama"
    ranks = {name: record.rank for name, record in found.file.weights.items()}
    assert ranks == dict.fromkeys(document["weights"], RANK)
    assert found.file.weights[NAME].shape == (32, 32)
    assert found.file.weights[NAME].energy == document["weights"][NAME]["energy"]


def test_what_is_written_again_unchanged_is_accepted(
    sound: tuple[Path, Path], tmp_path: Path
) -> None:
    """Or the refusals below would say nothing."""
    file, adapter = sound
    again = write(tmp_path / "again.safetensors", text_of(file), load_file(file))
    assert inspect(again, adapter).modules == inspect(file, adapter).modules


def test_layers_may_have_different_ranks(sound: tuple[Path, Path], tmp_path: Path) -> None:
    file, adapter = sound
    document, tensors = json.loads(text_of(file)), load_file(file)
    document["weights"][NAME]["rank"] = 2
    tensors[f"{NAME}.U"] = tensors[f"{NAME}.U"][:, :2].contiguous()
    tensors[f"{NAME}.singular_values"] = tensors[f"{NAME}.singular_values"][:2].contiguous()
    mixed = write(tmp_path / "mixed.safetensors", json.dumps(document), tensors)
    found = inspect(mixed, adapter)
    assert found.values("projector_rank") == [2, RANK, RANK, RANK]
    assert found.projector == {"kind": "safety-module", "rank": RANK}
    by_rank = found.summary["safety_energy"]
    assert list(map(int, by_rank)) == [1, 2, 4, RANK]
    assert by_rank[str(RANK)] == pytest.approx(sum(found.values("safety_energy")) / 4)
    cut = inspect(mixed, adapter, rank=3)
    assert cut.values("projector_rank") == [2, 3, 3, 3]  # all that there are
    with pytest.raises(SafeprojError, match=f"rank {RANK + 1}: .* holds {RANK} directions"):
        inspect(mixed, adapter, rank=RANK + 1)


def test_shares_that_round_to_more_than_one_are_one(
    sound: tuple[Path, Path], tmp_path: Path
) -> None:
    file, adapter = sound
    document, tensors = json.loads(text_of(file)), load_file(file)
    for name, weight in document["weights"].items():
        squares = tensors[f"{name}.singular_values"].double().square()
        weight["energy"] = float(squares.sum()) * (1.0 - 1e-6)
    exact = write(tmp_path / "exact.safetensors", json.dumps(document), tensors)
    assert inspect(exact, adapter).summary["safety_energy"][str(RANK)] == 1.0


@pytest.mark.parametrize("projector", ["approx", "exact"])
def test_the_projectors_of_safe_lora_do_not_go_with_it(
    sound: tuple[Path, Path], projector: str
) -> None:
    given = {"safety_module": str(sound[0]), "projector": projector, "rank": 2}
    with pytest.raises(SafeprojError, match=r"projector goes with .*, and not with safety_mod"):
        method_of(given)


def test_its_projector_goes_with_nothing_else() -> None:
    with pytest.raises(SafeprojError, match="rank and energy need projector exact"):
        method_of({"base": "base", "aligned": "aligned", "rank": 3})

"""Reading safety modules: what a sound file gives, and what is refused of a damaged one."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from safeproj import Salora, api
from safeproj.errors import SafeprojError
from safeproj.methods.recorded import check_file, open_recorded, write_recorded
from safeproj.methods.registry import method_of
from safeproj.methods.salora.file import KIND, open_safety_module
from safeproj.report import Report
from tests.support import save_adapter, save_safety_module, snapshot, tiny_llama

NAME = "model.layers.0.self_attn.q_proj.weight"
RANK = 5


@dataclass
class Content:
    """What a file holds, to be damaged."""

    document: Any
    tensors: dict[str, Tensor]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A safety module and an adapter for it; tests must not change them."""
    root = tmp_path_factory.mktemp("sound")
    model = tiny_llama()
    adapter = save_adapter(model, root / "adapter")
    return save_safety_module(model, root / "llama.safety.safetensors", rank=RANK), adapter


def text_of(file: Path) -> str:
    with safe_open(file, framework="pt") as opened:
        return str(opened.metadata()["safeproj"])


def write(path: Path, text: str, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path, metadata={"format": "pt", "safeproj": text})
    return path


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
    with pytest.raises(SafeprojError, match=f"--rank {RANK + 1}: .* holds {RANK} directions"):
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
    with pytest.raises(SafeprojError, match=r"--projector goes with .*, and not with --safety-mod"):
        method_of(given)


def test_its_projector_goes_with_nothing_else() -> None:
    with pytest.raises(SafeprojError, match="--rank and --energy need --projector exact"):
        method_of({"base": "base", "aligned": "aligned", "rank": 3})


# Writing


def test_only_a_safety_module_is_replaced(sound: tuple[Path, Path], tmp_path: Path) -> None:
    own = Path(shutil.copy(sound[0], tmp_path / "own.safetensors"))
    other, link = tmp_path / "other.safetensors", tmp_path / "link.safetensors"
    save_file({"weight": torch.ones(3)}, other)
    link.symlink_to(own)
    for out, overwrite, words in (
        (own, False, "give --overwrite"),
        (other, True, "no safety module"),
        (link, True, "is no file"),
        (tmp_path / "module.bin", False, r"model\.safety\.safetensors"),
        (tmp_path / "missing" / "module.safetensors", False, "create it"),
    ):
        with pytest.raises(SafeprojError, match=words):
            check_file(out, overwrite, KIND)
    check_file(own, True, KIND)
    check_file(tmp_path / "new.safetensors", False, KIND)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_file_appears_complete_or_not_at_all(
    sound: tuple[Path, Path], tmp_path: Path, error: BaseException
) -> None:
    own = Path(shutil.copy(sound[0], tmp_path / "own.safetensors"))
    before = snapshot(tmp_path)

    def document() -> dict[str, Any]:
        raise error

    expected = SafeprojError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        write_recorded(own, KIND, load_file(own).items(), document)
    assert snapshot(tmp_path) == before


def test_what_could_not_be_read_is_not_written(sound: tuple[Path, Path], tmp_path: Path) -> None:
    document = json.loads(text_of(sound[0]))
    with pytest.raises(SafeprojError, match="damaged safety module"):
        write_recorded(tmp_path / "new.safetensors", KIND, [], lambda: document)
    assert list(tmp_path.iterdir()) == []


def test_the_same_content_gives_the_same_bytes(sound: tuple[Path, Path], tmp_path: Path) -> None:
    document, path = json.loads(text_of(sound[0])), tmp_path / "again.safetensors"
    tensors = load_file(sound[0])
    with safe_open(sound[0], framework="pt") as opened:
        ordered = [(name, tensors[name]) for name in opened.offset_keys()]
    size = write_recorded(path, KIND, ordered, lambda: document)
    assert path.read_bytes() == sound[0].read_bytes()
    assert size == path.stat().st_size
    assert open_recorded(str(path), KIND).weights.keys() == document["weights"].keys()


# Damaged files. Each function below changes the content of one and returns what the message must
# say beside the name of the file.

Damage = Callable[[Content], tuple[str, ...]]
DAMAGES: list[Damage] = []


def damage(function: Damage) -> Damage:
    DAMAGES.append(function)
    return function


@damage
def another_schema(file: Content) -> tuple[str, ...]:
    file.document["schema"] = "safeproj.safety-module/2"
    return "safeproj.safety-module/2", "safeproj.safety-module/1", "use the version of safeproj"


@damage
def the_schema_of_another_kind(file: Content) -> tuple[str, ...]:
    file.document["schema"] = "safeproj.alignment/1"
    return "safeproj.alignment/1", "pass a file that `safeproj salora` wrote"


@damage
def no_schema(file: Content) -> tuple[str, ...]:
    del file.document["schema"]
    return "damaged", "schema"


@damage
def no_weights(file: Content) -> tuple[str, ...]:
    file.document["weights"] = {}
    return "damaged", "no weights"


@damage
def no_parameters(file: Content) -> tuple[str, ...]:
    file.document["parameters"] = {}
    return ("damaged",)


@damage
def no_record_of_a_weight(file: Content) -> tuple[str, ...]:
    del file.document["weights"][NAME]
    return "holds nothing for", "q_proj", "--exclude"


@damage
def no_record_of_a_parameter(file: Content) -> tuple[str, ...]:
    del file.document["parameters"][NAME]
    return "damaged", NAME


@damage
def an_embedding(file: Content) -> tuple[str, ...]:
    file.document["parameters"][NAME]["kind"] = "embedding"
    return "damaged", "embedding"


@damage
def a_layout_that_means_nothing(file: Content) -> tuple[str, ...]:
    file.document["parameters"][NAME]["out_first"] = None
    return "damaged", NAME


@damage
def a_linear_layer_with_the_input_first(file: Content) -> tuple[str, ...]:
    file.document["parameters"][NAME]["out_first"] = False
    return "damaged", NAME


@damage
def a_parameter_with_three_sides(file: Content) -> tuple[str, ...]:
    file.document["parameters"][NAME]["shape"] = [2, 32, 32]
    return "damaged", NAME


@damage
def a_shape_unlike_the_parameter(file: Content) -> tuple[str, ...]:
    file.document["weights"][NAME]["shape"] = [32, 33]
    return "damaged", NAME


@damage
def a_rank_of_nothing(file: Content) -> tuple[str, ...]:
    file.document["weights"][NAME]["rank"] = 0
    return "damaged", "rank"


@damage
def a_rank_beyond_the_weight(file: Content) -> tuple[str, ...]:
    file.document["weights"][NAME]["rank"] = 33
    return "damaged", "rank"


@damage
def a_rank_unlike_the_tensors(file: Content) -> tuple[str, ...]:
    file.document["weights"][NAME]["rank"] = RANK - 1
    return "damaged", f"{NAME}.U"


@damage
def a_rank_that_is_no_number(file: Content) -> tuple[str, ...]:
    file.document["weights"][NAME]["rank"] = True
    return "damaged", "rank"


@damage
def an_energy_of_zero(file: Content) -> tuple[str, ...]:
    file.document["weights"][NAME]["energy"] = 0.0
    return "damaged", "energy"


@damage
def an_energy_that_is_nan(file: Content) -> tuple[str, ...]:
    file.document["weights"][NAME]["energy"] = math.nan
    return ("damaged",)


@damage
def an_energy_beyond_any_float(file: Content) -> tuple[str, ...]:
    file.document["weights"][NAME]["energy"] = 10**400
    return ("damaged",)


@damage
def an_energy_below_that_of_the_values(file: Content) -> tuple[str, ...]:
    file.document["weights"][NAME]["energy"] /= 2.0
    return f"{NAME}.singular_values", "1.6 times the energy"


@damage
def no_energy(file: Content) -> tuple[str, ...]:
    del file.document["weights"][NAME]["energy"]
    return "damaged", "energy"


@damage
def no_directions(file: Content) -> tuple[str, ...]:
    del file.tensors[f"{NAME}.U"]
    return "damaged", f"{NAME}.U"


@damage
def no_singular_values(file: Content) -> tuple[str, ...]:
    del file.tensors[f"{NAME}.singular_values"]
    return "damaged", f"{NAME}.singular_values"


@damage
def directions_in_half_precision(file: Content) -> tuple[str, ...]:
    file.tensors[f"{NAME}.U"] = file.tensors[f"{NAME}.U"].half()
    return "damaged", f"{NAME}.U is F16"


@damage
def directions_of_fewer_rows(file: Content) -> tuple[str, ...]:
    file.tensors[f"{NAME}.U"] = file.tensors[f"{NAME}.U"][1:].contiguous()
    return "damaged", "[31, 5]"


@damage
def directions_without_dimensions(file: Content) -> tuple[str, ...]:
    file.tensors[f"{NAME}.U"] = torch.tensor(1.0)
    return "damaged", f"{NAME}.U"


@damage
def a_direction_with_infinity(file: Content) -> tuple[str, ...]:
    file.tensors[f"{NAME}.U"][3, 2] = math.inf
    return f"{NAME}.U has NaN or Inf", "damaged"


@damage
def a_direction_of_no_length(file: Content) -> tuple[str, ...]:
    file.tensors[f"{NAME}.U"][:, 2] = 0.0
    return f"{NAME}.U", "not orthonormal", "damaged"


@damage
def ascending_singular_values(file: Content) -> tuple[str, ...]:
    name = f"{NAME}.singular_values"
    file.tensors[name] = file.tensors[name].flip(0).contiguous()
    return name, "descending"


@damage
def a_singular_value_of_zero(file: Content) -> tuple[str, ...]:
    file.tensors[f"{NAME}.singular_values"][-1] = 0.0
    return f"{NAME}.singular_values", "not positive"


@damage
def a_singular_value_that_is_nan(file: Content) -> tuple[str, ...]:
    file.tensors[f"{NAME}.singular_values"][0] = math.nan
    return f"{NAME}.singular_values", "NaN"


@damage
def inputs_of_a_third_role(file: Content) -> tuple[str, ...]:
    file.document["inputs"]["adapter"] = {"source": "x"}
    return ("damaged",)


@damage
def inputs_without_data(file: Content) -> tuple[str, ...]:
    del file.document["inputs"]["data"]
    return "damaged", "data"


@damage
def a_source_with_markup(file: Content) -> tuple[str, ...]:
    file.document["inputs"]["aligned"]["source"] = "a` <b>"
    return "damaged", "aligned"


@damage
def data_with_control_characters(file: Content) -> tuple[str, ...]:
    file.document["inputs"]["data"]["source"] = "a\x1b[31m"
    return "damaged", "data"


@damage
def a_revision_with_line_breaks(file: Content) -> tuple[str, ...]:
    file.document["inputs"]["aligned"]["revision"] = "a\nb"
    return "damaged", "aligned"


@damage
def a_digest_that_is_no_text(file: Content) -> tuple[str, ...]:
    file.document["inputs"]["data"]["sha256"] = 1
    return "damaged", "data"


@damage
def digests_of_files_that_are_none(file: Content) -> tuple[str, ...]:
    file.document["inputs"]["aligned"]["sha256"] = {"files": ["a"]}
    return ("damaged",)


@damage
def rows_that_are_no_number(file: Content) -> tuple[str, ...]:
    file.document["inputs"]["data"]["rows"] = "3"
    return "damaged", "rows"


@damage
def options_with_an_object(file: Content) -> tuple[str, ...]:
    file.document["options"]["more"] = {"a": 1}
    return "damaged", "more"


@damage
def options_with_control_characters(file: Content) -> tuple[str, ...]:
    file.document["options"]["more"] = "\u202e"
    return "damaged", "options"


@damage
def an_option_with_a_name_that_is_markup(file: Content) -> tuple[str, ...]:
    file.document["options"]["<b>"] = 1
    return "damaged", "options"


@damage
def targets_that_are_no_texts(file: Content) -> tuple[str, ...]:
    file.document["options"]["targets"] = [1]
    return "damaged", "targets"


@damage
def a_name_with_control_characters(file: Content) -> tuple[str, ...]:
    for part in ("parameters", "weights"):
        file.document[part]["a\nb"] = file.document[part].pop(NAME)
    for last in ("U", "singular_values"):
        file.tensors[f"a\nb.{last}"] = file.tensors.pop(f"{NAME}.{last}")
    return ("not printable",)


@damage
def a_config_that_is_no_object(file: Content) -> tuple[str, ...]:
    file.document["config"] = []
    return "damaged", "config"


@pytest.mark.parametrize("change", DAMAGES, ids=lambda change: str(change.__name__))
def test_a_damaged_file_is_refused(
    sound: tuple[Path, Path], tmp_path: Path, change: Damage
) -> None:
    file, adapter = sound
    content = Content(json.loads(text_of(file)), load_file(file))
    words = change(content)
    text = json.dumps(content.document)
    damaged = write(tmp_path / "damaged.safetensors", text, content.tensors)
    with pytest.raises(SafeprojError) as caught:
        api.patch(Salora(str(damaged)), str(adapter), tmp_path / "out")
    message = str(caught.value)
    for word in (str(damaged), *words):
        assert word in message
    assert "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.safetensors"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "null", '"text"', "[" * 100_000, '{"schema": 1, "schema": 2}', "{}"],
    ids=["nothing", "brace", "list", "null", "text", "deep", "duplicates", "empty"],
)
def test_metadata_that_is_no_document_is_refused(
    sound: tuple[Path, Path], tmp_path: Path, text: str
) -> None:
    file, adapter = sound
    damaged = write(tmp_path / "damaged.safetensors", text, load_file(file))
    with pytest.raises(SafeprojError, match="damaged safety module") as caught:
        inspect(damaged, adapter)
    assert str(damaged) in str(caught.value)


def test_duplicate_names_in_a_record_are_refused(sound: tuple[Path, Path], tmp_path: Path) -> None:
    text = text_of(sound[0]).replace('"rank":5,', '"rank":5,"rank":5,', 1)
    damaged = write(tmp_path / "damaged.safetensors", text, load_file(sound[0]))
    with pytest.raises(SafeprojError, match="duplicate keys"):
        open_safety_module(str(damaged))


def test_a_file_without_metadata_is_refused(sound: tuple[Path, Path], tmp_path: Path) -> None:
    plain = tmp_path / "plain.safetensors"
    save_file(load_file(sound[0]), plain)
    with pytest.raises(SafeprojError, match="no safety module, its metadata has no 'safeproj'"):
        open_safety_module(str(plain))


def test_every_truncation_of_a_file_is_refused(sound: tuple[Path, Path], tmp_path: Path) -> None:
    content, damaged = sound[0].read_bytes(), tmp_path / "damaged.safetensors"
    for length in (0, 7, 8, 100, len(content) // 2, len(content) - 1):
        damaged.write_bytes(content[:length])
        with pytest.raises(SafeprojError, match="not a complete safetensors file"):
            open_safety_module(str(damaged))

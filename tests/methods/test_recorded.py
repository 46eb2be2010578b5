"""Files that stand for a model: what of any kind of them is read, refused and written."""

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

import safeproj as api
from safeproj import Covariance, SafeLora, Salora
from safeproj.errors import SafeprojError
from safeproj.methods.covariance.file import KIND as STATISTICS
from safeproj.methods.interface import Method
from safeproj.methods.recorded import (
    FileKind,
    check_file,
    linear_parameters,
    open_recorded,
    recorded_document,
    write_recorded,
)
from safeproj.methods.safe_lora.file import KIND as ALIGNMENT
from safeproj.methods.salora.file import KIND as MODULE
from safeproj.names.layout import LINEAR
from safeproj.plan.select import Selection
from safeproj.report import Report
from tests.methods.recorded import text_of, write
from tests.support import arrays_of, moved, save_adapter, save_safety_module, snapshot, tiny_llama

KEY = "model.layers.0.self_attn.q_proj.weight"
RANK = 5
TARGETS = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Sound:
    """A sound file of some kind, and an adapter for it; tests must not change them."""

    kind: FileKind[Any]
    path: Path
    adapter: Path
    method: Callable[[str], Method]
    matrix: str
    vector: str | None = None

    def content(self) -> Content:
        """Return what it holds, to be damaged."""
        return Content(
            self, json.loads(text_of(self.path)), load_file(self.path), self.matrix, self.vector
        )

    def inspect(self, file: Path) -> Report:
        options = api.Options(Selection(all=True))
        return api.inspect(self.method(str(file)), str(self.adapter), options)


@dataclass
class Content:
    """What a file holds, to be damaged.

    Attributes:
        sound: the file.
        document: its record.
        tensors: by name.
        matrix: the name of the tensor of `KEY`.
        vector: that of the numbers beside it, where there are some.
    """

    sound: Sound
    document: Any
    tensors: dict[str, Tensor]
    matrix: str
    vector: str | None

    @property
    def kind(self) -> FileKind[Any]:
        return self.sound.kind

    @property
    def weight(self) -> Any:
        """What is recorded of the weight `KEY`."""
        return self.document["weights"][KEY]

    @property
    def parameter(self) -> Any:
        return self.document["parameters"][KEY]

    @property
    def model(self) -> Any:
        """The identity of a model that it was made of."""
        return self.document["inputs"]["aligned"]

    @property
    def values(self) -> Tensor:
        assert self.vector is not None
        return self.tensors[self.vector]


def statistics(model: Any, path: Path) -> Path:
    """Write statistics of layers that read random inputs: of the first fewer than its size."""
    generator = torch.Generator().manual_seed(4)
    layers = {
        name: layer for name, layer in model.named_modules() if name.rpartition(".")[2] in TARGETS
    }
    tensors, weights = {}, {}
    for name, layer in layers.items():
        rows = torch.randn(RANK if ".0." in name else 99, layer.in_features, generator=generator)
        form = "rows" if ".0." in name else "moment"
        tensor = f"{name}.weight.{form}"
        tensors[tensor] = rows if form == "rows" else rows.T @ rows / len(rows)
        weights[f"{name}.weight"] = {
            "shape": list(layer.weight.shape),
            "tensor": tensor,
            "trace": float(rows.square().sum()),
        }
    inputs = {
        "aligned": {"source": "org/aligned", "revision": "abc", "sha256": {"files": {}}},
        "data": {"source": "safety.jsonl", "sha256": "0" * 64, "rows": 3, "positions": 70},
    }
    shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
    document = recorded_document(
        STATISTICS,
        {"targets": list(TARGETS), "positions": "all"},
        inputs,
        model.config.to_dict(),
        linear_parameters(shapes, dict.fromkeys(layers, LINEAR)),
        weights,
        by_torch=True,
    )
    write_recorded(path, STATISTICS, arrays_of(tensors).items(), lambda: document)
    return path


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sound]:
    root = tmp_path_factory.mktemp("sound")
    model = tiny_llama()
    adapter = save_adapter(model, root / "adapter")
    model.save_pretrained(root / "base")
    moved(model).save_pretrained(root / "aligned")
    alignment = root / "a.safealign.safetensors"
    pair = (str(root / "base"), str(root / "aligned"))
    api.align(*pair, alignment, api.Form(rank=RANK), TARGETS)
    module = save_safety_module(model, root / "b.safety.safetensors", rank=RANK)
    stats = statistics(model, root / "c.stats.safetensors")
    return {
        ALIGNMENT.name: Sound(
            ALIGNMENT, alignment, adapter, lambda file: SafeLora(alignment=file),
            f"{KEY}.U", f"{KEY}.eigenvalues",
        ),
        MODULE.name: Sound(
            MODULE, module, adapter, lambda file: Salora(file),
            f"{KEY}.U", f"{KEY}.singular_values",
        ),
        STATISTICS.name: Sound(
            STATISTICS, stats, adapter,
            lambda file: Covariance(safety_data=file, task_data=str(stats)),
            f"{KEY}.rows",
        ),
    }  # fmt: skip


KINDS = (ALIGNMENT, MODULE, STATISTICS)

each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.name))


@pytest.fixture
def sound(sounds: dict[str, Sound], kind: FileKind[Any]) -> Sound:
    return sounds[kind.name]


# Sound files


@each_kind
def test_what_is_written_again_unchanged_is_accepted(sound: Sound, tmp_path: Path) -> None:
    """Or the refusals below would say nothing."""
    again = tmp_path / f"again{sound.kind.suffix}"
    write(again, text_of(sound.path), load_file(sound.path))
    assert sound.inspect(again).modules == sound.inspect(sound.path).modules


@each_kind
def test_which_file_of_a_folder_is_meant(sound: Sound, tmp_path: Path) -> None:
    folder = tmp_path / f"folder{sound.kind.suffix}"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    suffix = sound.kind.suffix
    with pytest.raises(SafeprojError, match=f"no file ends in {suffix}, expected one"):
        sound.inspect(folder)
    shutil.copy(sound.path, folder / f"one{suffix}")
    assert sound.inspect(folder).modules == sound.inspect(sound.path).modules
    shutil.copy(sound.path, folder / f"two{suffix}")
    with pytest.raises(SafeprojError, match=f"one{suffix}, two{suffix}"):
        sound.inspect(folder)


# Writing


@each_kind
def test_only_a_file_of_its_kind_is_replaced(
    sounds: dict[str, Sound], sound: Sound, tmp_path: Path
) -> None:
    kind = sound.kind
    own = Path(shutil.copy(sound.path, tmp_path / "own.safetensors"))
    other, link = tmp_path / "other.safetensors", tmp_path / "link.safetensors"
    save_file({"weight": torch.ones(3)}, other)
    link.symlink_to(own)
    for out, overwrite, words in (
        (own, False, "give overwrite"),
        (other, True, f"no {kind.name}"),
        (link, True, "is no file"),
        (tmp_path / "model.bin", False, f"model{kind.suffix}"),
        (tmp_path / "missing" / "model.safetensors", False, "create it"),
        *((each.path, True, kind.schema) for each in sounds.values() if each is not sound),
    ):
        with pytest.raises(SafeprojError, match=words):
            check_file(out, overwrite, kind)
    check_file(own, True, kind)
    check_file(tmp_path / "new.safetensors", False, kind)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@each_kind
def test_a_file_appears_complete_or_not_at_all(
    sound: Sound, tmp_path: Path, error: BaseException
) -> None:
    own = Path(shutil.copy(sound.path, tmp_path / "own.safetensors"))
    before = snapshot(tmp_path)

    def document() -> dict[str, Any]:
        raise error

    expected = SafeprojError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        write_recorded(own, sound.kind, arrays_of(load_file(own)).items(), document)
    assert snapshot(tmp_path) == before


@each_kind
def test_what_could_not_be_read_is_not_written(sound: Sound, tmp_path: Path) -> None:
    document = json.loads(text_of(sound.path))
    with pytest.raises(SafeprojError, match=f"damaged {sound.kind.name}"):
        write_recorded(tmp_path / "new.safetensors", sound.kind, [], lambda: document)
    assert list(tmp_path.iterdir()) == []


@each_kind
def test_the_same_content_gives_the_same_bytes(sound: Sound, tmp_path: Path) -> None:
    document, path = json.loads(text_of(sound.path)), tmp_path / "again.safetensors"
    tensors = arrays_of(load_file(sound.path))
    with safe_open(sound.path, framework="pt") as opened:
        ordered = [(name, tensors[name]) for name in opened.offset_keys()]
    size = write_recorded(path, sound.kind, ordered, lambda: document)
    assert path.read_bytes() == sound.path.read_bytes()
    assert size == path.stat().st_size
    assert open_recorded(str(path), sound.kind).weights.keys() == document["weights"].keys()


# Damaged files. Each function below changes the content of one and returns what the message must
# say beside the name of the file; those of all kinds come first.

Damage = Callable[[Content], tuple[str, ...]]
DAMAGES: list[Any] = []


def damage(*kinds: FileKind[Any]) -> Callable[[Damage], Damage]:
    """Register a damage of these kinds of files; of all if none is named."""

    def register(function: Damage) -> Damage:
        for kind in kinds or KINDS:
            name = f"{kind.name}-{function.__name__}"
            DAMAGES.append(pytest.param(kind, function, id=name))
        return function

    return register


BY_RUNNING = (MODULE, STATISTICS)
WITH_VALUES = (ALIGNMENT, MODULE)


@damage()
def another_schema(file: Content) -> tuple[str, ...]:
    file.document["schema"] = file.kind.schema.replace("/1", "/2")
    return file.document["schema"], file.kind.schema, "use the version of safeproj"


@damage()
def the_schema_of_another_kind(file: Content) -> tuple[str, ...]:
    file.document["schema"] = "safeproj.start/1"
    return "safeproj.start/1", f"pass a file that `{file.kind.command}` wrote"


@damage()
def a_schema_that_is_no_text(file: Content) -> tuple[str, ...]:
    file.document["schema"] = {"\n": 1}
    return (f"expected {file.kind.schema}",)


@damage()
def no_schema(file: Content) -> tuple[str, ...]:
    del file.document["schema"]
    return "damaged", "schema"


@damage()
def no_weights(file: Content) -> tuple[str, ...]:
    del file.document["weights"]
    return "damaged", "weights"


@damage()
def nothing_among_the_weights(file: Content) -> tuple[str, ...]:
    file.document["weights"] = {}
    return "damaged", "no weights"


@damage()
def weights_in_a_list(file: Content) -> tuple[str, ...]:
    file.document["weights"] = [file.weight]
    return ("damaged",)


@damage()
def no_parameters(file: Content) -> tuple[str, ...]:
    file.document["parameters"] = {}
    return ("damaged",)


@damage()
def no_record_of_a_weight(file: Content) -> tuple[str, ...]:
    del file.document["weights"][KEY]
    return "holds nothing for", KEY.removesuffix(".weight"), "--targets"


@damage()
def a_record_of_a_weight_that_is_no_object(file: Content) -> tuple[str, ...]:
    file.document["weights"][KEY] = [24, 24]
    return ("damaged",)


@damage()
def no_record_of_a_parameter(file: Content) -> tuple[str, ...]:
    del file.document["parameters"][KEY]
    return "damaged", KEY


@damage()
def a_name_with_control_characters(file: Content) -> tuple[str, ...]:
    file.document["parameters"]["a\x1bb.weight"] = file.parameter
    return ("not printable",)


@damage()
def a_kind_of_layer_that_there_is_not(file: Content) -> tuple[str, ...]:
    file.parameter["kind"] = "quadratic"
    return "damaged", KEY, "quadratic"


@damage()
def a_kind_of_layer_that_is_no_text(file: Content) -> tuple[str, ...]:
    file.parameter["kind"] = ["linear"]
    return "damaged", KEY


@damage()
def a_layout_that_means_nothing(file: Content) -> tuple[str, ...]:
    file.parameter["out_first"] = None
    return "damaged", KEY


@damage()
def a_layout_in_words(file: Content) -> tuple[str, ...]:
    file.parameter["out_first"] = "yes"
    return "damaged", KEY


@damage()
def a_mark_in_words(file: Content) -> tuple[str, ...]:
    file.parameter["marked_transposed"] = "no"
    return "damaged", KEY


@damage()
def a_linear_layer_with_the_input_first(file: Content) -> tuple[str, ...]:
    file.parameter["out_first"] = False
    return "damaged", KEY


@damage()
def a_parameter_with_three_sides(file: Content) -> tuple[str, ...]:
    file.parameter["shape"] = [2, 32, 32]
    return ("damaged",)


@damage()
def a_parameter_of_texts(file: Content) -> tuple[str, ...]:
    file.parameter["shape"] = ["32", "32"]
    return "damaged", KEY


@damage()
def a_parameter_of_fractions(file: Content) -> tuple[str, ...]:
    file.parameter["shape"] = [32.5, 32.5]
    return "damaged", KEY


@damage()
def a_parameter_without_rows(file: Content) -> tuple[str, ...]:
    file.document["parameters"]["other.weight"] = {**file.parameter, "shape": [-1, 32]}
    return "damaged", "other.weight"


@damage()
def a_shape_that_is_infinite(file: Content) -> tuple[str, ...]:
    file.weight["shape"] = [math.inf, 32]
    return ("damaged",)


@damage()
def a_shape_of_fractions(file: Content) -> tuple[str, ...]:
    file.weight["shape"] = [32.9, 32]
    return ("damaged",)


@damage()
def a_shape_of_texts(file: Content) -> tuple[str, ...]:
    file.weight["shape"] = ["32", "32"]
    return ("damaged",)


@damage()
def a_shape_with_three_sides(file: Content) -> tuple[str, ...]:
    file.weight["shape"] = [32, 32, 1]
    return ("damaged",)


@damage()
def a_shape_unlike_the_parameter(file: Content) -> tuple[str, ...]:
    file.weight["shape"] = [32, 33]
    return "damaged", KEY


@damage()
def fewer_rows_than_the_parameter(file: Content) -> tuple[str, ...]:
    """The record and the tensor agree, but not with the weight of the running model."""
    file.weight["shape"] = [16, 16]
    file.tensors[file.matrix] = file.tensors[file.matrix][:16, :16].clone()
    return "damaged", KEY


@damage()
def more_rows_than_the_parameter(file: Content) -> tuple[str, ...]:
    file.weight["shape"] = [64, 64]
    file.tensors[file.matrix] = file.tensors[file.matrix].repeat(2, 2)
    return "damaged", KEY


@damage()
def no_tensor(file: Content) -> tuple[str, ...]:
    del file.tensors[file.matrix]
    return "damaged", file.matrix


@damage()
def a_tensor_without_dimensions(file: Content) -> tuple[str, ...]:
    file.tensors[file.matrix] = torch.zeros(())
    return "damaged", f"{file.matrix} is F32 []"


@damage()
def a_tensor_with_three_dimensions(file: Content) -> tuple[str, ...]:
    file.tensors[file.matrix] = file.tensors[file.matrix][None].clone()
    return "damaged", f"{file.matrix} is F32 [1, "


@damage()
def no_columns(file: Content) -> tuple[str, ...]:
    file.tensors[file.matrix] = file.tensors[file.matrix][:, :0].clone()
    if file.vector is not None:
        file.tensors[file.vector] = file.values[:0].clone()
    return "damaged", file.matrix


@damage()
def no_rows(file: Content) -> tuple[str, ...]:
    file.tensors[file.matrix] = file.tensors[file.matrix][:0].clone()
    return "damaged", f"{file.matrix} is F32 [0, "


@damage()
def half_precision(file: Content) -> tuple[str, ...]:
    file.tensors[file.matrix] = file.tensors[file.matrix].half()
    return "damaged", f"{file.matrix} is F16"


@damage()
def a_number_that_is_nan(file: Content) -> tuple[str, ...]:
    file.tensors[file.matrix][3, 1] = math.nan
    return file.matrix, "NaN or Inf"


@damage()
def a_number_that_is_infinite(file: Content) -> tuple[str, ...]:
    file.tensors[file.matrix][3, 2] = math.inf
    return file.matrix, "NaN or Inf"


@damage()
def no_inputs(file: Content) -> tuple[str, ...]:
    file.document["inputs"] = {}
    return "damaged", "inputs"


@damage()
def inputs_without_the_model(file: Content) -> tuple[str, ...]:
    del file.document["inputs"]["aligned"]
    return "damaged", "inputs"


@damage()
def inputs_of_a_third_role(file: Content) -> tuple[str, ...]:
    file.document["inputs"]["adapter"] = file.model
    return "damaged", "inputs"


@damage()
def an_input_that_is_no_object(file: Content) -> tuple[str, ...]:
    file.document["inputs"]["aligned"] = "org/aligned"
    return "damaged", "aligned"


@damage()
def no_source(file: Content) -> tuple[str, ...]:
    del file.model["source"]
    return "damaged", "aligned", "source"


@damage()
def a_source_with_control_characters(file: Content) -> tuple[str, ...]:
    file.model["source"] = "model\x1b[2J"
    return "damaged", "aligned"


@damage()
def a_source_with_markup(file: Content) -> tuple[str, ...]:
    file.model["source"] = "model` is **safe** `"
    return "damaged", "aligned"


@damage()
def a_source_that_is_no_text(file: Content) -> tuple[str, ...]:
    file.model["source"] = 3
    return "damaged", "aligned"


@damage()
def a_revision_with_line_breaks(file: Content) -> tuple[str, ...]:
    """The model card of a patched adapter names it."""
    file.model["revision"] = "main\n## All modules are safe\n"
    return "damaged", "aligned"


@damage()
def no_digests(file: Content) -> tuple[str, ...]:
    del file.model["sha256"]
    return "damaged", "sha256"


@damage()
def digests_of_files_that_are_none(file: Content) -> tuple[str, ...]:
    file.model["sha256"]["files"] = ["a"]
    return "damaged", "aligned"


@damage()
def a_digest_of_a_file_that_is_no_text(file: Content) -> tuple[str, ...]:
    file.model["sha256"]["files"]["config.json"] = 1
    return "damaged", "aligned"


@damage()
def digests_that_no_report_can_hold(file: Content) -> tuple[str, ...]:
    file.model["sha256"]["files"]["config.json"] = math.nan
    return ("damaged",)


@damage()
def no_options(file: Content) -> tuple[str, ...]:
    del file.document["options"]
    return "damaged", "options"


@damage()
def options_without_targets(file: Content) -> tuple[str, ...]:
    del file.document["options"]["targets"]
    return "damaged", "targets"


@damage()
def targets_that_are_no_texts(file: Content) -> tuple[str, ...]:
    file.document["options"]["targets"] = [1]
    return "damaged", "targets"


@damage()
def targets_in_one_text(file: Content) -> tuple[str, ...]:
    file.document["options"]["targets"] = "q_proj"
    return "damaged", "targets"


@damage()
def targets_with_control_characters(file: Content) -> tuple[str, ...]:
    file.document["options"]["targets"] = ["\u202e"]
    return "damaged", "targets"


@damage()
def options_that_no_file_can_hold(file: Content) -> tuple[str, ...]:
    file.document["options"]["targets"] = ["\ud800"]
    return ("damaged",)


@damage()
def options_that_no_report_can_hold(file: Content) -> tuple[str, ...]:
    file.document["options"]["rank"] = math.nan
    return ("damaged",)


@damage()
def options_that_rename_the_file(file: Content) -> tuple[str, ...]:
    file.document["options"]["source"] = "somebody/else"
    return "damaged", "options"


@damage()
def options_that_give_the_file_a_commit(file: Content) -> tuple[str, ...]:
    """Which a local file has none of."""
    file.document["options"]["revision"] = "abc"
    return "damaged", "options"


@damage()
def options_with_an_object(file: Content) -> tuple[str, ...]:
    file.document["options"]["more"] = {"a": 1}
    return "damaged", "more"


@damage()
def an_option_with_a_name_that_is_markup(file: Content) -> tuple[str, ...]:
    file.document["options"]["<b>"] = 1
    return "damaged", "options"


@damage()
def a_config_that_is_no_object(file: Content) -> tuple[str, ...]:
    file.document["config"] = ["llama"]
    return "damaged", "config"


# Of what is made by running a model on data


@damage(*BY_RUNNING)
def an_embedding(file: Content) -> tuple[str, ...]:
    file.parameter["kind"] = "embedding"
    return "damaged", "embedding"


@damage(*BY_RUNNING)
def inputs_without_data(file: Content) -> tuple[str, ...]:
    del file.document["inputs"]["data"]
    return "damaged", "data"


@damage(*BY_RUNNING)
def data_with_control_characters(file: Content) -> tuple[str, ...]:
    file.document["inputs"]["data"]["source"] = "a\x1b[31m"
    return "damaged", "data"


@damage(*BY_RUNNING)
def data_with_markup(file: Content) -> tuple[str, ...]:
    file.document["inputs"]["data"]["source"] = "<b>"
    return "damaged", "data"


@damage(*BY_RUNNING)
def a_date_with_line_breaks(file: Content) -> tuple[str, ...]:
    file.document["inputs"]["data"]["date"] = "2024-07-26\n"
    return "damaged", "data"


@damage(*BY_RUNNING)
def a_digest_of_data_that_is_no_text(file: Content) -> tuple[str, ...]:
    file.document["inputs"]["data"]["sha256"] = 1
    return "damaged", "data"


@damage(*BY_RUNNING)
def rows_that_are_no_number(file: Content) -> tuple[str, ...]:
    file.document["inputs"]["data"]["rows"] = "3"
    return "damaged", "rows"


@damage(*BY_RUNNING)
def positions_of_less_than_nothing(file: Content) -> tuple[str, ...]:
    file.document["inputs"]["data"]["positions"] = -1
    return "damaged", "positions"


# Of what has numbers beside its matrix


@damage(*WITH_VALUES)
def no_values(file: Content) -> tuple[str, ...]:
    del file.tensors[str(file.vector)]
    return "damaged", str(file.vector)


@damage(*WITH_VALUES)
def too_few_values(file: Content) -> tuple[str, ...]:
    file.tensors[str(file.vector)] = file.values[:-1].clone()
    return "damaged", f"{file.vector} is F32 [{RANK - 1}]"


@damage(*WITH_VALUES)
def a_value_that_is_infinite(file: Content) -> tuple[str, ...]:
    file.values[1] = math.inf
    return f"{file.vector} has NaN or Inf", "damaged"


@damage(*WITH_VALUES)
def a_value_that_is_nan(file: Content) -> tuple[str, ...]:
    file.values[0] = math.nan
    return f"{file.vector} has NaN or Inf", "damaged"


@damage(*WITH_VALUES)
def a_negative_value(file: Content) -> tuple[str, ...]:
    """Of `C` there is none, and no bound of a cosine would hold."""
    file.values[1] *= -1
    return f"{file.vector} has values that are not positive", "damaged"


@damage(*WITH_VALUES)
def a_value_of_zero(file: Content) -> tuple[str, ...]:
    file.values[-1] = 0.0
    return str(file.vector), "not positive"


@damage(*WITH_VALUES)
def fewer_rows_of_a_matrix(file: Content) -> tuple[str, ...]:
    file.tensors[file.matrix] = file.tensors[file.matrix][1:].contiguous()
    return "damaged", f"[31, {RANK}]"


# Of one number of each kind's records


NUMBERS = {ALIGNMENT.name: "alignment_norm", MODULE.name: "energy", STATISTICS.name: "trace"}


@damage()
def no_number(file: Content) -> tuple[str, ...]:
    name = NUMBERS[file.kind.name]
    del file.weight[name]
    return ("damaged",)


@damage()
def a_recorded_number_that_is_nan(file: Content) -> tuple[str, ...]:
    file.weight[NUMBERS[file.kind.name]] = math.nan
    return ("damaged",)


@damage()
def a_recorded_number_that_is_infinite(file: Content) -> tuple[str, ...]:
    file.weight[NUMBERS[file.kind.name]] = math.inf
    return ("damaged",)


@damage()
def a_recorded_number_beyond_any_float(file: Content) -> tuple[str, ...]:
    file.weight[NUMBERS[file.kind.name]] = 10**400
    return ("damaged",)


@damage()
def a_recorded_number_of_zero(file: Content) -> tuple[str, ...]:
    file.weight[NUMBERS[file.kind.name]] = 0.0
    return ("damaged",)


@damage()
def a_recorded_number_below_zero(file: Content) -> tuple[str, ...]:
    file.weight[NUMBERS[file.kind.name]] *= -1
    return ("damaged",)


@damage()
def a_recorded_number_in_words(file: Content) -> tuple[str, ...]:
    file.weight[NUMBERS[file.kind.name]] = "1.5"
    return "damaged", NUMBERS[file.kind.name]


@damage()
def a_recorded_number_that_is_true(file: Content) -> tuple[str, ...]:
    file.weight[NUMBERS[file.kind.name]] = True
    return "damaged", NUMBERS[file.kind.name]


# Alignment files


@damage(ALIGNMENT)
def a_negative_residual(file: Content) -> tuple[str, ...]:
    file.weight["residual"] = -1e-9
    return ("damaged",)


@damage(ALIGNMENT)
def an_error_that_is_nan(file: Content) -> tuple[str, ...]:
    file.weight["error"] = math.nan
    return ("damaged",)


@damage(ALIGNMENT)
def an_unknown_form(file: Content) -> tuple[str, ...]:
    file.weight["form"] = "QR"
    return "damaged", "QR"


@damage(ALIGNMENT)
def a_form_that_the_tensors_do_not_have(file: Content) -> tuple[str, ...]:
    file.weight["form"] = "C"
    return "damaged", f"{KEY}.C"


@damage(ALIGNMENT)
def dtypes_with_control_characters(file: Content) -> tuple[str, ...]:
    file.document["inputs"]["base"]["quantised"] = ["\x1b]0;owned\x07"]
    return "damaged", "base"


@damage(ALIGNMENT)
def dtypes_in_one_text(file: Content) -> tuple[str, ...]:
    file.document["inputs"]["base"]["quantised"] = "F8"
    return "damaged", "base"


@damage(ALIGNMENT)
def a_digest_of_a_tensor_that_is_no_text(file: Content) -> tuple[str, ...]:
    file.document["inputs"]["base"]["blake3"]["tensors"]["x"] = 1
    return "damaged", "base"


# Safety modules


@damage(MODULE)
def a_rank_of_nothing(file: Content) -> tuple[str, ...]:
    file.weight["rank"] = 0
    return "damaged", "rank"


@damage(MODULE)
def a_rank_beyond_the_weight(file: Content) -> tuple[str, ...]:
    file.weight["rank"] = 33
    return "damaged", "rank"


@damage(MODULE)
def a_rank_unlike_the_tensors(file: Content) -> tuple[str, ...]:
    file.weight["rank"] = RANK - 1
    return "damaged", f"{KEY}.U"


@damage(MODULE)
def a_rank_that_is_no_number(file: Content) -> tuple[str, ...]:
    file.weight["rank"] = True
    return "damaged", "rank"


@damage(MODULE)
def an_energy_below_that_of_the_values(file: Content) -> tuple[str, ...]:
    file.weight["energy"] /= 2.0
    return f"{KEY}.singular_values", "1.6 times the energy"


@damage(MODULE)
def a_direction_of_no_length(file: Content) -> tuple[str, ...]:
    file.tensors[file.matrix][:, 2] = 0.0
    return file.matrix, "not orthonormal", "damaged"


@damage(MODULE)
def ascending_singular_values(file: Content) -> tuple[str, ...]:
    file.tensors[str(file.vector)] = file.values.flip(0).contiguous()
    return str(file.vector), "descending"


# Statistics


@damage(STATISTICS)
def a_tensor_that_is_no_text(file: Content) -> tuple[str, ...]:
    file.weight["tensor"] = 1
    return ("damaged",)


@damage(STATISTICS)
def a_tensor_of_no_form(file: Content) -> tuple[str, ...]:
    file.weight["tensor"] = f"{KEY}.columns"
    return "damaged", "columns"


@damage(STATISTICS)
def a_tensor_that_is_not_there(file: Content) -> tuple[str, ...]:
    file.weight["tensor"] = "other.rows"
    return "damaged", "other.rows"


@damage(STATISTICS)
def rows_that_stand_as_a_moment(file: Content) -> tuple[str, ...]:
    file.tensors[f"{KEY}.moment"] = file.tensors.pop(file.matrix)
    file.weight["tensor"] = f"{KEY}.moment"
    return "damaged", f"{KEY}.moment is F32 [{RANK}, 32]"


@damage(STATISTICS)
def positions_that_there_are_not(file: Content) -> tuple[str, ...]:
    file.document["options"]["positions"] = "some"
    return "damaged", "positions"


@pytest.mark.parametrize(("kind", "change"), DAMAGES)
def test_a_damaged_file_is_refused(sound: Sound, tmp_path: Path, change: Damage) -> None:
    content = sound.content()
    words = change(content)
    text = json.dumps(content.document)
    damaged = write(tmp_path / f"damaged{sound.kind.suffix}", text, content.tensors)
    with pytest.raises(SafeprojError) as caught:
        api.patch(sound.method(str(damaged)), str(sound.adapter), tmp_path / "out")
    message = caught.value.message
    for word in (str(damaged), *words):
        assert word in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == [damaged]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "null", '"text"', "[" * 100_000, '{"schema": 1, "schema": 2}', "{}"],
    ids=["nothing", "brace", "list", "null", "text", "deep", "duplicates", "empty"],
)
@each_kind
def test_metadata_that_is_no_document_is_refused(sound: Sound, tmp_path: Path, text: str) -> None:
    damaged = write(tmp_path / f"damaged{sound.kind.suffix}", text, load_file(sound.path))
    with pytest.raises(SafeprojError, match=f"damaged {sound.kind.name}") as caught:
        sound.inspect(damaged)
    assert str(damaged) in caught.value.message


@each_kind
def test_duplicate_names_in_a_record_are_refused(sound: Sound, tmp_path: Path) -> None:
    text = text_of(sound.path).replace('"shape":', '"shape":[1],"shape":', 1)
    damaged = write(tmp_path / "damaged.safetensors", text, load_file(sound.path))
    with pytest.raises(SafeprojError, match="duplicate keys"):
        open_recorded(str(damaged), sound.kind)


@each_kind
def test_a_file_without_metadata_is_refused(sound: Sound, tmp_path: Path) -> None:
    plain = tmp_path / "plain.safetensors"
    save_file(load_file(sound.path), plain)
    words = f"no {sound.kind.name}, its metadata has no 'safeproj'"
    with pytest.raises(SafeprojError, match=words):
        open_recorded(str(plain), sound.kind)


@each_kind
def test_every_truncation_of_a_file_is_refused(sound: Sound, tmp_path: Path) -> None:
    content, damaged = sound.path.read_bytes(), tmp_path / "damaged.safetensors"
    for length in (0, 7, 8, 100, len(content) // 2, len(content) - 1):
        damaged.write_bytes(content[:length])
        with pytest.raises(SafeprojError, match="not a complete safetensors file"):
            open_recorded(str(damaged), sound.kind)

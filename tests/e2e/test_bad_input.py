"""What `patch` cannot use: exit code 2, one line that says why, nothing written or changed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import Trio
from tests.support import (
    CONFIG,
    FACTORS,
    assert_refused,
    change_json,
    read_json,
    safeproj,
    snapshot,
)

INDEX = "model.safetensors.index.json"
PICKLE = "adapter_model.bin"

MODULE = "model.layers.0.self_attn.q_proj"
WEIGHT = f"{MODULE}.weight"
A = f"base_model.model.{MODULE}.lora_A.weight"
B = f"base_model.model.{MODULE}.lora_B.weight"


@dataclass
class Inputs:
    """A run whose inputs are a copy of the trio, to be damaged."""

    root: Path
    base: Path
    aligned: Path
    adapter: Path
    out: Path
    options: list[str] = field(default_factory=list)

    def patch(self) -> subprocess.CompletedProcess[str]:
        arguments: list[str | Path] = ["--base", self.base, "--aligned", self.aligned]
        arguments += ["--adapter", self.adapter, "--out", self.out, *self.options]
        return safeproj("patch", *arguments, env={"HF_HUB_OFFLINE": "1"}, cwd=self.root)

    def assert_refused(self, *words: str) -> str:
        """Run `patch` and return the one line of its refusal; no file may have changed."""
        before = snapshot(self.root)
        result = self.patch()
        assert_refused(result, *words)
        assert result.stdout == ""
        assert snapshot(self.root) == before
        return result.stderr.strip()


@pytest.fixture
def inputs(trio: Trio, tmp_path: Path) -> Inputs:
    for source in (trio.base, trio.aligned, trio.adapter):
        shutil.copytree(source, tmp_path / source.name)
    return Inputs(
        tmp_path, tmp_path / "base", tmp_path / "aligned", tmp_path / "adapter", tmp_path / "out"
    )


# --- ways to damage files


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def change_header(path: Path, change: Callable[[str], str]) -> None:
    """Rewrite the JSON text of a safetensors header and leave the data as it is."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    text = change(content[8 : 8 + length].decode().rstrip()).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def shard_of(checkpoint: Path, weight: str = WEIGHT) -> Path:
    return checkpoint / str(read_json(checkpoint / INDEX)["weight_map"][weight])


def change_weight(checkpoint: Path, change: Callable[[Tensor], Tensor]) -> None:
    change_tensors(shard_of(checkpoint), lambda t: t.update({WEIGHT: change(t[WEIGHT])}))


def locate_weight(checkpoint: Path, file: str | None) -> None:
    """Let the index say that `file` holds the weight, or nothing."""
    index = read_json(checkpoint / INDEX)
    index["weight_map"].pop(WEIGHT)
    if file is not None:
        index["weight_map"][WEIGHT] = file
    (checkpoint / INDEX).write_text(json.dumps(index), "utf-8")


def change_adapter(inputs: Inputs, change: Callable[[dict[str, Tensor]], object]) -> None:
    change_tensors(inputs.adapter / FACTORS, change)


def pickle_adapter(inputs: Inputs, content: object) -> Path:
    """Replace the adapter's tensors by a `.bin` file."""
    (inputs.adapter / FACTORS).unlink()
    torch.save(content, inputs.adapter / PICKLE)
    return inputs.adapter / PICKLE


def set_first(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor[-1, -1] = value
        return tensor

    return change


# --- each function below damages the inputs and returns what the message must say

Damage = Callable[[Inputs], tuple[str, ...]]
DAMAGES: list[Damage] = []


def damage(function: Damage) -> Damage:
    DAMAGES.append(function)
    return function


# checkpoints: files


@damage
def missing_shard(inputs: Inputs) -> tuple[str, ...]:
    shard = shard_of(inputs.aligned)
    shard.unlink()
    return str(inputs.aligned), shard.name, WEIGHT, "no such file", "fetch"


@damage
def truncated_shard(inputs: Inputs) -> tuple[str, ...]:
    shard = shard_of(inputs.base)
    shard.write_bytes(shard.read_bytes()[:-100])
    return str(shard), "not a complete safetensors file", "fetch it again"


@damage
def shard_with_garbage_header(inputs: Inputs) -> tuple[str, ...]:
    shard = shard_of(inputs.aligned)
    change_header(shard, lambda text: "\x00\x7f{" + text[3:])
    return str(shard), "not a complete safetensors file"


@damage
def header_length_beyond_any_memory(inputs: Inputs) -> tuple[str, ...]:
    shard = shard_of(inputs.base)
    shard.write_bytes(struct.pack("<Q", 2**63 - 1) + shard.read_bytes()[8:])
    return str(shard), "not a complete safetensors file"


@damage
def header_with_duplicate_keys(inputs: Inputs) -> tuple[str, ...]:
    def twice(text: str) -> str:
        entry = {WEIGHT: json.loads(text)[WEIGHT]}
        return f"{text[:-1]},{json.dumps(entry)[1:-1]}}}"

    shard = shard_of(inputs.aligned)
    change_header(shard, twice)
    return str(shard), "duplicate"


@damage
def empty_checkpoint_directory(inputs: Inputs) -> tuple[str, ...]:
    shutil.rmtree(inputs.base)
    inputs.base.mkdir()
    return str(inputs.base), "an empty directory"


@damage
def model_config_is_not_json(inputs: Inputs) -> tuple[str, ...]:
    (inputs.aligned / "config.json").write_text("{")
    return str(inputs.aligned), "config.json is not JSON"


# checkpoints: the index


@damage
def index_names_a_missing_file(inputs: Inputs) -> tuple[str, ...]:
    locate_weight(inputs.base, "model-00099-of-00099.safetensors")
    return str(inputs.base), "model-00099-of-00099.safetensors", WEIGHT, "no such file"


@damage
def index_names_a_file_outside_the_folder(inputs: Inputs) -> tuple[str, ...]:
    shutil.copy(shard_of(inputs.base), inputs.root / "outside.safetensors")
    locate_weight(inputs.base, "../outside.safetensors")
    return str(inputs.base), "../outside.safetensors", "no such file"


@damage
def index_disagrees_with_the_shard(inputs: Inputs) -> tuple[str, ...]:
    other = shard_of(inputs.aligned, "model.norm.weight").name
    assert other != shard_of(inputs.aligned).name
    locate_weight(inputs.aligned, other)
    return str(inputs.aligned), f"says that {other} holds {WEIGHT}, but it does not"


@damage
def index_is_not_json(inputs: Inputs) -> tuple[str, ...]:
    (inputs.base / INDEX).write_text("weight_map:\n  - none\n")
    return str(inputs.base), INDEX, "is not JSON"


@damage
def index_is_nested_without_end(inputs: Inputs) -> tuple[str, ...]:
    (inputs.base / INDEX).write_text("[" * 200_000)
    return str(inputs.base), INDEX, "is not JSON"


@damage
def index_without_weight_map(inputs: Inputs) -> tuple[str, ...]:
    (inputs.base / INDEX).write_text('{"metadata": {}}')
    return str(inputs.base), INDEX, "weight_map", "expected an object"


@damage
def index_maps_names_to_numbers(inputs: Inputs) -> tuple[str, ...]:
    (inputs.base / INDEX).write_text(json.dumps({"weight_map": {WEIGHT: 3}}))
    return str(inputs.base), INDEX, "maps tensor names to file names"


@damage
def two_unindexed_shards_hold_the_same_tensor(inputs: Inputs) -> tuple[str, ...]:
    shard = shard_of(inputs.aligned)
    shutil.copy(shard, inputs.aligned / "older.safetensors")
    (inputs.aligned / INDEX).unlink()
    return str(inputs.aligned), shard.name, "older.safetensors", "both hold"


# checkpoints: tensors


@damage
def weight_absent_from_the_index(inputs: Inputs) -> tuple[str, ...]:
    locate_weight(inputs.base, None)
    return str(inputs.base), f"no weight for {WEIGHT}", "closest is"


@damage
def base_and_aligned_shapes_differ(inputs: Inputs) -> tuple[str, ...]:
    change_weight(inputs.base, lambda _: torch.ones(40, 32))
    return MODULE, f"[40, 32] in {inputs.base}", f"[32, 32] in {inputs.aligned}"


@damage
def adapter_and_weight_shapes_differ(inputs: Inputs) -> tuple[str, ...]:
    change_adapter(inputs, lambda t: t.update({A: torch.ones(4, 48), B: torch.ones(48, 4)}))
    return MODULE, "[48, 48] (out, in)", f"[32, 32] in {inputs.aligned}", "same model?"


@damage
def nan_in_base(inputs: Inputs) -> tuple[str, ...]:
    change_weight(inputs.base, set_first(float("nan")))
    return str(shard_of(inputs.base)), WEIGHT, "NaN or Inf"


@damage
def inf_in_aligned(inputs: Inputs) -> tuple[str, ...]:
    change_weight(inputs.aligned, set_first(float("inf")))
    return str(shard_of(inputs.aligned)), WEIGHT, "NaN or Inf"


@damage
def weights_too_large_for_float32(inputs: Inputs) -> tuple[str, ...]:
    change_weight(inputs.aligned, lambda W: W * 1e38)
    return MODULE, "too large for float32"


@damage
def int8_weight(inputs: Inputs) -> tuple[str, ...]:
    change_weight(inputs.base, lambda W: W.to(torch.int8))
    return str(inputs.base), MODULE, "stored as I8", "before quantisation"


@damage
def fp8_weight(inputs: Inputs) -> tuple[str, ...]:
    change_weight(inputs.aligned, lambda W: W.to(torch.float8_e4m3fn))
    return str(inputs.aligned), WEIGHT, "stored as F8_E4M3", "before quantisation"


@damage
def base_is_aligned_by_path(inputs: Inputs) -> tuple[str, ...]:
    inputs.base = inputs.aligned
    return str(inputs.aligned), "the same model", "--base must be the model before alignment"


@damage
def base_is_a_copy_of_aligned(inputs: Inputs) -> tuple[str, ...]:
    shutil.rmtree(inputs.base)
    shutil.copytree(inputs.aligned, inputs.base)
    return str(inputs.base), str(inputs.aligned), "the same model", "are equal in both"


# the adapter: config


@damage
def config_missing(inputs: Inputs) -> tuple[str, ...]:
    (inputs.adapter / CONFIG).unlink()
    return str(inputs.adapter), f"{CONFIG} not found", "expected a PEFT adapter directory"


@damage
def config_is_not_json(inputs: Inputs) -> tuple[str, ...]:
    (inputs.adapter / CONFIG).write_text("peft_type = LORA")
    return str(inputs.adapter), f"{CONFIG} is not JSON"


@damage
def config_is_a_list(inputs: Inputs) -> tuple[str, ...]:
    (inputs.adapter / CONFIG).write_text('["LORA"]')
    return str(inputs.adapter), CONFIG, "expected a JSON object"


@damage
def config_is_nested_without_end(inputs: Inputs) -> tuple[str, ...]:
    (inputs.adapter / CONFIG).write_text('{"r":' * 200_000)
    return str(inputs.adapter), CONFIG


@damage
def peft_type_loha(inputs: Inputs) -> tuple[str, ...]:
    change_json(inputs.adapter / CONFIG, peft_type="LOHA")
    return str(inputs.adapter), "peft_type 'LOHA' is not supported", "supported are LoRA"


@damage
def peft_type_missing(inputs: Inputs) -> tuple[str, ...]:
    (inputs.adapter / CONFIG).write_text('{"r": 4}')
    return str(inputs.adapter), "peft_type None is not supported", "supported are LoRA"


@damage
def target_parameters_of_another_kind(inputs: Inputs) -> tuple[str, ...]:
    change_json(inputs.adapter / CONFIG, target_parameters={"mlp.experts.gate_up_proj": 1})
    return str(inputs.adapter), "target_parameters is no list"


@damage
def too_many_target_parameters(inputs: Inputs) -> tuple[str, ...]:
    change_json(inputs.adapter / CONFIG, target_parameters=[f"q_proj.w{i}" for i in range(40)])
    return str(inputs.adapter), "40 target parameters of", MODULE, "at most 6"


@damage
def layer_replication_of_another_kind(inputs: Inputs) -> tuple[str, ...]:
    change_json(inputs.adapter / CONFIG, layer_replication=[[0, 2], "1"])
    return str(inputs.adapter), "layer_replication is", "pairs of layer numbers"


@damage
def layer_replication_beyond_all_models(inputs: Inputs) -> tuple[str, ...]:
    change_json(inputs.adapter / CONFIG, layer_replication=[[0, 10**12]])
    return str(inputs.adapter), "layer_replication makes 1000000000000 layers", "at most 10000"


@damage
def layer_replication_of_very_many_ranges(inputs: Inputs) -> tuple[str, ...]:
    change_json(inputs.adapter / CONFIG, layer_replication=[[0, 10_000]] * 9_000)
    return str(inputs.adapter), "layer_replication makes 90000000 layers", "at most 10000"


@damage
def layer_replication_without_the_layer(inputs: Inputs) -> tuple[str, ...]:
    change_json(inputs.adapter / CONFIG, layer_replication=[[0, 1]])
    return "layers.1.self_attn", "makes 1 layers"


@damage
def kasa_config(inputs: Inputs) -> tuple[str, ...]:
    change_json(inputs.adapter / CONFIG, kasa_config={"beta": 0.1})
    return str(inputs.adapter), "kasa_config", "not supported"


@damage
def rank_is_not_the_configs(inputs: Inputs) -> tuple[str, ...]:
    change_json(inputs.adapter / CONFIG, r=8, rank_pattern={"q_proj": 16})
    return str(inputs.adapter), MODULE, "rank 4", "8, 16"


@damage
def rank_is_no_number(inputs: Inputs) -> tuple[str, ...]:
    change_json(inputs.adapter / CONFIG, r=[4])
    return str(inputs.adapter), CONFIG, "[4]"


@damage
def rank_pattern_holds_no_numbers(inputs: Inputs) -> tuple[str, ...]:
    change_json(inputs.adapter / CONFIG, rank_pattern={"q_proj": {"r": 4}})
    return str(inputs.adapter), CONFIG, "rank_pattern"


@damage
def modules_to_save_is_no_list(inputs: Inputs) -> tuple[str, ...]:
    change_json(inputs.adapter / CONFIG, modules_to_save=5)
    change_adapter(inputs, lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(1)}))
    return str(inputs.adapter), "modules_to_save"


# the adapter: tensors


@damage
def tensors_missing(inputs: Inputs) -> tuple[str, ...]:
    (inputs.adapter / FACTORS).unlink()
    return str(inputs.adapter), f"neither {FACTORS} nor {PICKLE} found"


@damage
def tensors_truncated(inputs: Inputs) -> tuple[str, ...]:
    factors = inputs.adapter / FACTORS
    factors.write_bytes(factors.read_bytes()[:-1])
    return str(factors), "not a complete safetensors file"


@damage
def lora_b_missing(inputs: Inputs) -> tuple[str, ...]:
    change_adapter(inputs, lambda t: t.pop(B))
    return str(inputs.adapter), B, "expected both lora_A.weight and lora_B.weight"


@damage
def ranks_of_a_and_b_differ(inputs: Inputs) -> tuple[str, ...]:
    change_adapter(inputs, lambda t: t.update({A: torch.ones(6, 32)}))
    return str(inputs.adapter), MODULE, "lora_A is [6, 32]", "lora_B is [32, 4]", "same r"


@damage
def nan_in_lora_a(inputs: Inputs) -> tuple[str, ...]:
    change_adapter(inputs, lambda t: set_first(float("nan"))(t[A]))
    return str(inputs.adapter), A, "NaN or Inf"


@damage
def three_dimensional_factor(inputs: Inputs) -> tuple[str, ...]:
    change_adapter(inputs, lambda t: t.update({A: torch.ones(2, 4, 32)}))
    return str(inputs.adapter), MODULE, "lora_A is [2, 4, 32]", "expected (r, in) and (out, r)"


@damage
def integer_factor(inputs: Inputs) -> tuple[str, ...]:
    change_adapter(inputs, lambda t: t.update({B: torch.ones(32, 4, dtype=torch.int32)}))
    return str(inputs.adapter), B, "int32", "expected float64, float32, float16 or bfloat16"


@damage
def embedding_without_its_other_factor(inputs: Inputs) -> tuple[str, ...]:
    key = "base_model.model.model.embed_tokens.lora_embedding_"
    change_adapter(inputs, lambda t: t.update({f"{key}A": torch.ones(4, 50)}))
    return str(inputs.adapter), f"model.embed_tokens has no {key}B"


@damage
def grouped_convolution(inputs: Inputs) -> tuple[str, ...]:
    factors = {A: torch.ones(4, 8, 3, 3), B: torch.ones(32, 2, 1, 1)}
    change_adapter(inputs, lambda t: t.update(factors))
    return str(inputs.adapter), MODULE, "grouped convolution"


@damage
def trainable_tokens_without_indices(inputs: Inputs) -> tuple[str, ...]:
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    change_adapter(inputs, lambda t: t.update({key: torch.ones(3, 32)}))
    return str(inputs.adapter), key, "replaces 3 rows", "names 0"


@damage
def endless_tensor_name(inputs: Inputs) -> tuple[str, ...]:
    change_adapter(inputs, lambda t: t.update({"a" * 5000: torch.ones(3)}))
    return str(inputs.adapter), "a tensor name has 5000 characters", "at most 1000"


@damage
def unknown_extra_tensor(inputs: Inputs) -> tuple[str, ...]:
    change_adapter(inputs, lambda t: t.update({"base_model.model.surprise": torch.ones(3)}))
    return str(inputs.adapter), "base_model.model.surprise", "no tensor of a supported adapter"


@damage
def magnitude_without_factors(inputs: Inputs) -> tuple[str, ...]:
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector"
    change_adapter(inputs, lambda t: t.update({key: torch.ones(80)}))
    return str(inputs.adapter), key, "no lora_A and lora_B beside it"


@damage
def adapter_for_a_model_with_other_names(inputs: Inputs) -> tuple[str, ...]:
    def rename(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace("model.layers", "transformer.h")] = tensors.pop(key)

    change_adapter(inputs, rename)
    expected = WEIGHT.replace("model.layers", "transformer.h")
    return f"no weight for {expected}", str(inputs.aligned), "another model?"


@damage
def adapter_for_a_model_with_more_layers(inputs: Inputs) -> tuple[str, ...]:
    def rename(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace("layers.1.", "layers.7.")] = tensors.pop(key)

    change_adapter(inputs, rename)
    return "no weight for model.layers.7.", "another model?"


# the adapter: pickles


@damage
def bin_with_something_else_than_tensors(inputs: Inputs) -> tuple[str, ...]:
    path = pickle_adapter(inputs, {A: torch.ones(4, 32), B: "a string"})
    return str(path), "expected a mapping of names to tensors"


@damage
def bin_with_a_sparse_tensor(inputs: Inputs) -> tuple[str, ...]:
    pickle_adapter(inputs, {A: torch.ones(4, 32), B: torch.ones(32, 4).to_sparse()})
    return str(inputs.adapter), "sparse"


@damage
def bin_with_a_tensor_without_data(inputs: Inputs) -> tuple[str, ...]:
    pickle_adapter(inputs, {A: torch.ones(4, 32), B: torch.ones(32, 4, device="meta")})
    return str(inputs.adapter), "meta"


@damage
def bin_with_a_tensor_larger_than_its_file(inputs: Inputs) -> tuple[str, ...]:
    huge = torch.ones(1).expand(10**8, 10**6)  # one number, repeated: 400 TB if it were spelt out
    path = pickle_adapter(inputs, {A: torch.ones(4, 32), B: huge})
    return str(path), B


@damage
def bin_truncated(inputs: Inputs) -> tuple[str, ...]:
    path = pickle_adapter(inputs, load_file(inputs.adapter / FACTORS))
    path.write_bytes(path.read_bytes()[:-200])
    return str(path), "cannot be loaded as plain tensors"


@damage
def bin_is_text(inputs: Inputs) -> tuple[str, ...]:
    path = pickle_adapter(inputs, {})
    path.write_text("PyTorch\n")
    return str(path), "cannot be loaded as plain tensors"


@damage
def bin_is_a_damaged_pickle(inputs: Inputs) -> tuple[str, ...]:
    path = pickle_adapter(inputs, {})
    path.write_bytes(b"\x80\x02e.")  # appends to a list that is not there
    return str(path), "cannot be loaded as plain tensors"


# the adapter: other files


@damage
def link_to_a_file_outside_the_adapter(inputs: Inputs) -> tuple[str, ...]:
    secret = inputs.root / "secret.txt"
    secret.write_text("not the adapter's")
    (inputs.adapter / "notes.txt").symlink_to(secret)
    return str(inputs.adapter), "notes.txt", str(secret), "outside the adapter"


@damage
def link_to_nothing(inputs: Inputs) -> tuple[str, ...]:
    (inputs.adapter / "notes.txt").symlink_to("gone.txt")
    return str(inputs.adapter), "notes.txt"


# arguments in the wrong place


@damage
def adapter_is_a_full_checkpoint(inputs: Inputs) -> tuple[str, ...]:
    inputs.adapter = inputs.aligned
    return str(inputs.aligned), f"{CONFIG} not found", "expected a PEFT adapter directory"


@damage
def aligned_is_an_adapter(inputs: Inputs) -> tuple[str, ...]:
    inputs.aligned = inputs.adapter
    return str(inputs.adapter), "an adapter", "--adapter"


@damage
def source_is_nowhere(inputs: Inputs) -> tuple[str, ...]:
    inputs.aligned = Path("..", "nowhere", "at", "all")
    return str(inputs.aligned), "no such file or directory"


@pytest.mark.parametrize("damaged", DAMAGES, ids=lambda function: function.__name__)
def test_unusable_input_is_refused_in_one_line(inputs: Inputs, damaged: Damage) -> None:
    inputs.assert_refused(*damaged(inputs))


class Touch:
    """Creates a file while it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_code_in_a_pickle_is_never_run(inputs: Inputs) -> None:
    marker = inputs.root / "marker"
    trap = Touch(marker)
    pickle.loads(pickle.dumps(trap)).close()
    assert marker.exists()  # the trap works
    marker.unlink()
    path = pickle_adapter(inputs, {A: torch.ones(4, 32), B: torch.ones(32, 4), "trap": trap})

    message = inputs.assert_refused(str(path), "cannot be loaded as plain tensors", "safetensors")

    assert not marker.exists()
    assert "weights_only" not in message  # torch's own text says how to run the code after all


def test_no_control_character_of_an_input_reaches_the_terminal(inputs: Inputs) -> None:
    name = "\x1b]0;renamed\x07\x9b2J\nall is well\r"
    change_adapter(inputs, lambda t: t.update({name: torch.ones(3)}))

    message = inputs.assert_refused("renamed", "all is well", "not printable")

    assert message.isprintable()


def test_verbose_shows_where_it_failed(inputs: Inputs) -> None:
    (inputs.adapter / CONFIG).unlink()
    inputs.options = ["--verbose"]

    result = inputs.patch()

    assert result.returncode == 2
    assert result.stderr.startswith("Traceback")
    assert result.stderr.splitlines()[-1].startswith("safeproj: error: ")


# --- --out

Place = Callable[[Inputs], tuple[str, ...]]
PLACES: list[Place] = []


def place(function: Place) -> Place:
    PLACES.append(function)
    return function


@place
def an_adapter(inputs: Inputs) -> tuple[str, ...]:
    shutil.copytree(inputs.adapter, inputs.out)
    return f"--out {inputs.out}", "exists", "--overwrite"


@place
def an_empty_directory(inputs: Inputs) -> tuple[str, ...]:
    inputs.out.mkdir()
    return f"--out {inputs.out}", "exists", "--overwrite"


@place
def a_file(inputs: Inputs) -> tuple[str, ...]:
    inputs.out.write_text("mine")
    return f"--out {inputs.out}", "is a file"


@place
def a_link_to_nothing(inputs: Inputs) -> tuple[str, ...]:
    inputs.out.symlink_to("gone")
    return f"--out {inputs.out}", "is a link"


@place
def overwrite_a_directory_that_is_no_adapter(inputs: Inputs) -> tuple[str, ...]:
    inputs.out.mkdir()
    (inputs.out / "thesis.txt").write_text("mine")
    inputs.options = ["--overwrite"]
    return f"--out {inputs.out}", "is no adapter", CONFIG


@place
def overwrite_a_git_repository(inputs: Inputs) -> tuple[str, ...]:
    shutil.copytree(inputs.adapter, inputs.out)
    (inputs.out / ".git").mkdir()
    inputs.options = ["--overwrite"]
    return f"--out {inputs.out}", "is a git repository"


@place
def overwrite_a_file(inputs: Inputs) -> tuple[str, ...]:
    inputs.out.write_text("mine")
    inputs.options = ["--overwrite"]
    return f"--out {inputs.out}", "is a "


@place
def overwrite_a_link_to_an_adapter(inputs: Inputs) -> tuple[str, ...]:
    shutil.copytree(inputs.adapter, inputs.root / "elsewhere")
    inputs.out.symlink_to("elsewhere")
    inputs.options = ["--overwrite"]
    return f"--out {inputs.out}", "is a "


@place
def the_adapter_itself(inputs: Inputs) -> tuple[str, ...]:
    inputs.out, inputs.options = inputs.adapter, ["--overwrite"]
    return f"--out {inputs.out}", "overlaps with --adapter"


@place
def the_adapter_by_another_name(inputs: Inputs) -> tuple[str, ...]:
    inputs.out, inputs.options = inputs.base / ".." / "adapter", ["--overwrite"]
    return f"--out {inputs.out}", "overlaps with --adapter"


@place
def the_directory_of_the_adapters_file(inputs: Inputs) -> tuple[str, ...]:
    inputs.out, inputs.options = inputs.adapter, ["--overwrite"]
    inputs.adapter = inputs.adapter / FACTORS
    return f"--out {inputs.out}", "overlaps with --adapter"


@place
def inside_the_adapter(inputs: Inputs) -> tuple[str, ...]:
    inputs.out = inputs.adapter / "patched"
    return f"--out {inputs.out}", "overlaps with --adapter"


@place
def inside_the_directory_of_the_adapters_file(inputs: Inputs) -> tuple[str, ...]:
    inputs.out = inputs.adapter / "patched"
    inputs.adapter = inputs.adapter / FACTORS
    return f"--out {inputs.out}", "overlaps with --adapter"


@place
def around_the_adapter(inputs: Inputs) -> tuple[str, ...]:
    inputs.out, inputs.options = inputs.root, ["--overwrite"]
    return f"--out {inputs.out}", "overlaps with --"


@place
def the_base(inputs: Inputs) -> tuple[str, ...]:
    inputs.out, inputs.options = inputs.base, ["--overwrite"]
    return f"--out {inputs.out}", "overlaps with --base"


@place
def below_a_missing_directory(inputs: Inputs) -> tuple[str, ...]:
    inputs.out = inputs.root / "missing" / "out"
    return f"--out {inputs.out}", str(inputs.root / "missing"), "is not an existing directory"


@place
def below_a_file(inputs: Inputs) -> tuple[str, ...]:
    (inputs.root / "file").write_text("mine")
    inputs.out = inputs.root / "file" / "out"
    return f"--out {inputs.out}", str(inputs.root / "file")


@pytest.mark.parametrize("placed", PLACES, ids=lambda function: function.__name__)
def test_out_that_must_not_be_written_is_refused(inputs: Inputs, placed: Place) -> None:
    inputs.assert_refused(*placed(inputs))


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="needs a user whom permissions bind"
)
def test_out_in_a_directory_without_write_permission_is_refused(inputs: Inputs) -> None:
    inputs.out = inputs.root / "locked" / "out"
    inputs.out.parent.mkdir()
    inputs.out.parent.chmod(0o555)

    inputs.assert_refused(f"--out {inputs.out}", "not writable")


# --- options

REFUSED_OPTIONS: dict[str, tuple[str, ...]] = {
    "--threshold 0.5 --layers 1": ("--threshold and --layers exclude each other",),
    "--layers 1 --all": ("--layers and --all exclude each other",),
    "--threshold 0.5 --all": ("--threshold and --all exclude each other",),
    "--map model.layers": ("--map", "expected RUNTIME=CHECKPOINT"),
    "--map a*=b": ("--map", "1 * on the left and 0 on the right"),
    "--threshold 1.5": ("--threshold", "[0, 1]", "1.5"),
    "--threshold nan": ("--threshold", "[0, 1]", "nan"),
    "--threshold -0.1": ("--threshold", "[0, 1]", "-0.1"),
    "--layers -1": ("--layers", "0 or more", "-1"),
    "--rank 4": ("--rank", "--projector exact"),
    "--energy 0.9": ("--energy", "--projector exact"),
    "--projector exact": ("--projector exact", "--rank or --energy"),
    "--projector exact --rank 4 --energy 0.9": ("--projector exact", "either", "--rank"),
    "--projector exact --rank 0": ("--rank", "at least 1", "0"),
    "--projector exact --energy 0": ("--energy", "(0, 1]", "0"),
    "--projector exact --energy 1.5": ("--energy", "(0, 1]", "1.5"),
    "--projector exact --energy nan": ("--energy", "(0, 1]", "nan"),
    "--include (": ("--include '('", "not a regular expression"),
    "--exclude [": ("--exclude '['", "not a regular expression"),
    "--include experts": ("--include", "none of the 4 adapted modules", MODULE),
    "--exclude .": ("--exclude", "none of the 4 adapted modules", MODULE),
    "--device foo": ("--device foo", "expected auto, cpu, cuda, cuda:N, cuda:all, mps or torch"),
    "--workers 0": ("--workers", "1 or more", "0"),
    "--output missing/report.txt": ("--output missing/report.txt", "existing directory"),
    "--output out": ("--output out", "--out"),
    "--output aligned/config.json": ("--output aligned/config.json", "--aligned"),
}


@pytest.mark.parametrize("options", REFUSED_OPTIONS)
def test_options_that_make_no_sense_are_refused(inputs: Inputs, options: str) -> None:
    inputs.options = options.split()

    inputs.assert_refused(*REFUSED_OPTIONS[options])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(inputs: Inputs) -> None:
    inputs.options = ["--device", "cuda"]

    inputs.assert_refused("--device cuda", "this machine has none")


@pytest.mark.parametrize("missing", ["--base", "--aligned", "--adapter", "--out"])
def test_required_options_are_named(trio: Trio, tmp_path: Path, missing: str) -> None:
    arguments = [*trio.arguments, "--out", str(tmp_path / "out")]
    at = arguments.index(missing)

    result = safeproj("patch", *arguments[:at], *arguments[at + 2 :])

    assert result.returncode == 2
    assert missing in result.stderr
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize(
    "options",
    [
        "--treshold 0.5",
        "--threshold much",
        "--layers 1.5",
        "--projector best",
        "--dtype int8",
        "--format xml",
        "--workers many",
        "--out",
    ],
)
def test_usage_errors_name_the_option(trio: Trio, tmp_path: Path, options: str) -> None:
    given = ["--out", str(tmp_path / "out"), *options.split()]

    result = safeproj("patch", *trio.arguments, *given)

    assert result.returncode == 2
    assert options.split()[0] in result.stderr
    assert "Traceback" not in result.stderr
    assert snapshot(tmp_path) == {}

"""Full fine-tunes through the command: what is written, what is kept, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.conftest import Trio
from tests.e2e.test_quantised import fp8, pickled
from tests.methods.covariance.test_command import make
from tests.methods.salora.models import build
from tests.report.test_schemas import validator
from tests.support import (
    MANIFEST,
    assert_refused,
    blake3_of,
    change_json,
    moved,
    oracle_C,
    read_json,
    safeproj,
    snapshot,
    started,
    tiny_llama,
)


@dataclass(frozen=True)
class Full:
    """A pair of models and a full fine-tune of the aligned one."""

    trio: Trio
    tuned: Path
    model: Any

    @property
    def arguments(self) -> list[str]:
        models = ["--base", str(self.trio.base), "--aligned", str(self.trio.aligned)]
        return [*models, "--model", str(self.tuned)]

    def want(self, name: str) -> Tensor:
        """Return what Safe LoRA makes of a weight, in float64."""
        models = (self.trio.base_model, self.trio.aligned_model, self.model)
        base, aligned, tuned = (each.get_parameter(name).detach().double() for each in models)
        found: Tensor = aligned + oracle_C(aligned, base) @ (tuned - aligned)
        return found


@pytest.fixture(scope="module")
def full(trio: Trio, tmp_path_factory: pytest.TempPathFactory) -> Full:
    tuned = tmp_path_factory.mktemp("full") / "tuned"
    model = moved(trio.aligned_model, 0.01, seed=3)
    model.save_pretrained(tuned, max_shard_size="25KB")
    (tuned / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    (tuned / "notes").mkdir()
    (tuned / "notes" / "plan.txt").write_text("as it was")
    (tuned / "optimizer.pt").write_bytes(pickle_of({"state": 1}))
    (tuned / "README.md").write_text("# A fine-tune\n")
    return Full(trio, tuned, model)


def pickle_of(value: Any) -> bytes:
    import io

    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def state(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return found


def test_patch_writes_a_whole_model(full: Full, tmp_path: Path) -> None:
    before, out = snapshot(full.tuned), tmp_path / "out"
    result = safeproj("patch", *full.arguments, "--layers", "3", "--out", out)
    assert result.returncode == 0, result.stderr
    assert f"wrote {out} (3 modules projected)" in result.stderr
    assert f"next: safeproj eval --model {out}" in result.stderr
    assert snapshot(full.tuned) == before

    document = read_json(out / MANIFEST)
    validator("manifest").validate(document)
    projected = {m["name"] + ".weight" for m in document["modules"] if m["projected"]}
    assert set(document["output"]["projected"]) == projected
    assert len(projected) == 3
    shards = {path.name for path in full.tuned.glob("model*")}
    assert {path.name for path in out.glob("model*")} == shards
    loaded, given = state(out), tensors_in(full.tuned)
    for name, tensor in given.items():
        if name in projected:
            torch.testing.assert_close(loaded[name].double(), full.want(name), rtol=0, atol=1e-7)
        else:
            assert torch.equal(loaded[name], tensor), name
    for shard in shards:
        if shard.endswith(".safetensors"):
            with safe_open(full.tuned / shard, "pt") as one, safe_open(out / shard, "pt") as other:
                assert one.metadata() == other.metadata()
                assert one.keys() == other.keys()
    digests = document["output"]["blake3"]["tensors"]
    assert digests == {name: blake3_of(tensor) for name, tensor in tensors_in(out).items()}

    kept = {"config.json", "generation_config.json", "tokenizer_config.json", "notes/plan.txt"}
    kept |= {"model.safetensors.index.json"}
    found = snapshot(out)
    for name in kept:
        assert found[name] == before[name], name
    assert "optimizer.pt" not in found
    assert document["output"]["left_out"] == ["optimizer.pt"]
    card = (out / "README.md").read_text()
    assert card.startswith("# A fine-tune\n")
    assert "3 of 15 weights" in card


def test_what_no_projection_touches_is_listed(full: Full) -> None:
    result = safeproj("inspect", *full.arguments, "--format", "json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    validator("report").validate(report)
    assert report["inputs"]["model"] == {"source": str(full.tuned)}
    listed = {each["tensor"]: each for each in report["unprojected"]}
    scored = {f"{module['name']}.weight" for module in report["modules"]}
    assert scored | set(listed) == set(tensors_in(full.tuned))
    aligned = full.trio.aligned_model
    for name, each in listed.items():
        one, other = (m.get_parameter(name).detach().double() for m in (full.model, aligned))
        size = float((one - other).norm() / other.norm())
        assert each["relative_change"] == pytest.approx(size, rel=1e-6)
    kinds = {each["kind"] for each in listed.values()}
    assert kinds == {"embedding", "norm"}
    assert "6 tensors change weights or biases directly" in result.stderr


def test_restoring_what_no_projection_touches(full: Full, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--threshold", "0", "--restore-others"]
    result = safeproj("patch", *full.arguments, *options, "--out", out)
    assert result.returncode == 0, result.stderr
    assert "6 tensors that no projection touches take the aligned model's values" in result.stderr
    assert "change weights or biases directly" not in result.stderr
    found, given = state(out), tensors_in(full.tuned)
    aligned = full.trio.aligned_model.state_dict()
    document = read_json(out / MANIFEST)
    validator("manifest").validate(document)
    assert document["options"]["restore_others"] is True
    others = {each["tensor"] for each in document["unprojected"]}
    for name, tensor in found.items():
        assert torch.equal(tensor, aligned[name] if name in others else given[name]), name


@pytest.mark.parametrize("is_sharded", [False, True])
def test_pickled_checkpoints(full: Full, tmp_path: Path, is_sharded: bool) -> None:
    """In the format that they came in, whose sums of bytes are right."""
    tensors = tensors_in(full.tuned)
    tuned, out = (
        pickled(full.model, tmp_path / "tuned", "25KB" if is_sharded else "5GB"),
        tmp_path / "out",
    )
    assert (len(list(tuned.glob("*.bin"))) > 1) == is_sharded
    models = full.arguments[:4]
    result = safeproj("patch", *models, "--model", tuned, "--layers", "4", "--out", out)
    assert result.returncode == 0, result.stderr
    projected = set(read_json(out / MANIFEST)["output"]["projected"])
    assert len(projected) == 4
    assert {path.name for path in out.glob("pytorch_model*")} == {
        path.name for path in tuned.glob("pytorch_model*")
    }
    found: dict[str, Tensor] = {}
    for path in out.glob("*.bin"):
        assert zipfile.ZipFile(path).testzip() is None
        found |= torch.load(path, weights_only=True)
    loaded = state(out)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], found[name])
        if name in projected:
            torch.testing.assert_close(found[name].double(), full.want(name), rtol=0, atol=1e-7)
        else:
            assert torch.equal(found[name], tensor)


def test_experts_that_are_stored_one_by_one(tmp_path: Path) -> None:
    """Each expert is a weight of its own, made of several tensors, which are all written."""
    base = build("mixtral")
    aligned, tuned, out = moved(base, 0.05), tmp_path / "tuned", tmp_path / "out"
    model = moved(aligned, 0.02, seed=3)
    for name, each in (("base", base), ("aligned", aligned), ("tuned", model)):
        each.save_pretrained(tmp_path / name, max_shard_size="60KB")
    models: list[str | Path] = [
        "--base",
        tmp_path / "base",
        "--aligned",
        tmp_path / "aligned",
        "--model",
        tuned,
    ]
    result = safeproj("patch", *models, "--all", "--include", "experts", "--out", out)
    assert result.returncode == 0, result.stderr
    modules = [m for m in read_json(out / MANIFEST)["modules"] if m["projected"]]
    assert len(modules) == 2 * 4 * 2  # layers, experts, gate_up and down
    loaded, given = state(out), model.state_dict()
    others = [each.state_dict() for each in (base, aligned)]
    for module in modules:
        name, index = module["name"].removesuffix("]").split("[")
        one, two, three = (each[name][int(index)].double() for each in (*others, given))
        want = two + oracle_C(two, one) @ (three - two)
        torch.testing.assert_close(loaded[name][int(index)].double(), want, rtol=0, atol=1e-7)
    for name, tensor in given.items():
        if "experts" not in name:
            assert torch.equal(loaded[name], tensor)


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    base = tiny_llama(tie_word_embeddings=True)
    aligned = moved(base)
    models = {"base": base, "aligned": aligned, "tuned": moved(aligned, 0.01, seed=3)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    given = [f"--{role}={tmp_path / role}" for role in ("base", "aligned")]
    result = safeproj(
        "patch", *given, "--model", tmp_path / "tuned", "--all", "--out", tmp_path / "out"
    )
    assert result.returncode == 0, result.stderr
    document = read_json(tmp_path / "out" / MANIFEST)
    assert "lm_head" not in {module["name"] for module in document["modules"]}
    assert "model.embed_tokens.weight" in {each["tensor"] for each in document["unprojected"]}
    found = state(tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], models["tuned"].lm_head.weight)


def test_rows_that_the_aligned_model_lacks_are_kept(full: Full, tmp_path: Path) -> None:
    tuned, out = tmp_path / "tuned", tmp_path / "out"
    model = moved(full.trio.aligned_model, 0.01, seed=3)
    model.resize_token_embeddings(53, mean_resizing=False)
    model.save_pretrained(tuned)
    arguments: list[str | Path] = [
        *full.arguments[:4],
        "--model",
        tuned,
        "--all",
        "--restore-others",
    ]
    result = safeproj("patch", *arguments, "--out", out)
    assert result.returncode == 0, result.stderr
    document = read_json(out / MANIFEST)
    listed = {each["tensor"]: each for each in document["unprojected"]}
    assert listed["lm_head.weight"]["kind"] == "output head of another size"
    assert listed["lm_head.weight"]["added_rows"] == 3
    assert listed["model.embed_tokens.weight"]["added_rows"] == 3
    found, aligned = state(out), full.trio.aligned_model.state_dict()
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(found[name][:50], aligned[name])
        assert torch.equal(found[name][50:], model.state_dict()[name][50:])


@pytest.mark.parametrize("is_sharded", [False, True])
def test_fp8_is_written_as_bfloat16(full: Full, tmp_path: Path, is_sharded: bool) -> None:
    tuned, out = tmp_path / "tuned", tmp_path / "out"
    _, decoded = fp8(full.model, tuned)
    if is_sharded:
        in_shards(tuned)
    others = {k: v for k, v in tensors_in(tuned).items() if not k.endswith("_scale_inv")}
    result = safeproj("patch", *full.arguments[:4], "--model", tuned, "--layers", "2", "--out", out)
    assert result.returncode == 0, result.stderr
    assert "F8_E4M3: they are written as bfloat16" in result.stderr
    assert "quantization_config" not in read_json(out / "config.json")
    projected = set(read_json(out / MANIFEST)["output"]["projected"])
    assert len(projected) == 2
    found = tensors_in(out)
    assert found.keys() == others.keys()
    if is_sharded:
        index = read_json(out / "model.safetensors.index.json")
        assert index["weight_map"].keys() == others.keys()
        assert index["metadata"]["total_size"] == sum(each.nbytes for each in found.values())
    models = (full.trio.base_model, full.trio.aligned_model)
    for name, tensor in found.items():
        if name not in decoded and name not in projected:
            assert torch.equal(tensor, others[name])
            continue
        want = decoded.get(name, others[name].double())
        if name in projected:
            base, aligned = (model.get_parameter(name).detach().double() for model in models)
            want = aligned + oracle_C(aligned, base) @ (want - aligned)
        if name in decoded:
            assert tensor.dtype == torch.bfloat16
        rounding = torch.finfo(tensor.dtype).eps / 2
        torch.testing.assert_close(tensor.double(), want, rtol=1.01 * rounding, atol=1e-7)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    for name, tensor in found.items():
        assert torch.equal(loaded[name], tensor.float())


def in_shards(folder: Path) -> None:
    """Spread the tensors of a file over two, so that scales are not beside their codes."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {
        name: f"model-0000{1 + name.endswith('_scale_inv')}-of-00002.safetensors"
        for name in tensors
    }
    for file in set(where.values()):
        part = {name: tensor for name, tensor in tensors.items() if where[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_data_in_the_place_of_statistics(tmp_path: Path) -> None:
    """The aligned model is run on it, for all linear layers."""
    place = make(tmp_path, "llama")
    model = moved(place.model, 0.01, seed=3)
    model.save_pretrained(tmp_path / "tuned")
    given: list[str | Path] = ["--aligned", place.aligned, "--model", tmp_path / "tuned"]
    outs = []
    for name, safety, task in (
        ("data", place.safety, place.task),
        ("statistics", place.safety_stats, place.task_stats),
    ):
        out = tmp_path / name
        data: list[str | Path] = ["--safety-data", safety, "--task-data", task]
        result = safeproj("patch", *given, *data, "--out", out)
        assert result.returncode == 0, result.stderr
        outs.append(tensors_in(out))
    assert len(read_json(tmp_path / "data" / MANIFEST)["output"]["projected"]) == 14
    for name, tensor in outs[0].items():
        assert torch.equal(tensor, outs[1][name]), name
    options = [*given, "--safety-data", place.safety, "--reconstruct", "--out", tmp_path / "out"]
    assert_refused(safeproj("patch", *options), "--reconstruct runs an adapter", "--model")


Damage = Callable[[Full, Path], tuple[list[str | Path], list[str]]]
"""Damages a copy of the fine-tune; returns the arguments and what the refusal must say."""


def another(_: Full, tuned: Path) -> tuple[list[str | Path], list[str]]:
    tiny_llama(seed=7).save_pretrained(tuned)
    return [], [str(tuned), "unrelated models", "expected a fine-tune of it"]


def smaller(_: Full, tuned: Path) -> tuple[list[str | Path], list[str]]:
    tiny_llama(seed=7, intermediate_size=64).save_pretrained(tuned)
    return [], ["[32, 64]", "[32, 80]", "fine-tune of another model"]


def shallower(full: Full, tuned: Path) -> tuple[list[str | Path], list[str]]:
    tiny_llama(num_hidden_layers=1).save_pretrained(tuned)
    return [], ["no weight for", "model.layers.1", str(full.trio.aligned)]


def without_a_norm(full: Full, tuned: Path) -> tuple[list[str | Path], list[str]]:
    shutil.copytree(full.tuned, tuned)
    for path in tuned.glob("*.safetensors"):
        path.unlink()
    tensors = tensors_in(full.tuned)
    del tensors["model.norm.weight"]
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    return [], ["no weight for model.norm.weight"]


def without_a_shard(full: Full, tuned: Path) -> tuple[list[str | Path], list[str]]:
    shutil.copytree(full.tuned, tuned)
    (tuned / "model-00002-of-00005.safetensors").unlink()
    return [], ["model-00002-of-00005.safetensors"]


def with_nan(full: Full, tuned: Path) -> tuple[list[str | Path], list[str]]:
    shutil.copytree(full.tuned, tuned)
    for path in tuned.glob("*.safetensors"):
        tensors = load_file(path)
        if "model.layers.1.mlp.up_proj.weight" in tensors:
            tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
            save_file(tensors, path, metadata={"format": "pt"})
    return [], ["model.layers.1.mlp.up_proj.weight", "NaN or Inf"]


def quantised(full: Full, tuned: Path) -> tuple[list[str | Path], list[str]]:
    tuned.mkdir()
    shutil.copy(full.tuned / "config.json", tuned)
    tensors = {"model.layers.0.mlp.up_proj.qweight": torch.zeros(4, 4, dtype=torch.int32)}
    save_file(tensors, tuned / "model.safetensors")
    change_json(tuned / "config.json", quantization_config={"quant_method": "gptq"})
    return [], [str(tuned), "quantised with", "FP8"]


def an_adapter(full: Full, tuned: Path) -> tuple[list[str | Path], list[str]]:
    shutil.copytree(full.trio.adapter, tuned)
    return [], [str(tuned), "an adapter", "pass it as --adapter"]


def nowhere(_: Full, tuned: Path) -> tuple[list[str | Path], list[str]]:
    return [], [str(tuned)]


def beside_an_adapter(full: Full, tuned: Path) -> tuple[list[str | Path], list[str]]:
    shutil.copytree(full.tuned, tuned)
    return ["--adapter", full.trio.adapter], ["--model", "exclude each other"]


def with_a_dtype(full: Full, tuned: Path) -> tuple[list[str | Path], list[str]]:
    shutil.copytree(full.tuned, tuned)
    return ["--dtype", "float16"], ["--dtype", "its own dtype"]


@pytest.mark.parametrize(
    "damage",
    [another, smaller, shallower, without_a_norm, without_a_shard, with_nan, quantised, an_adapter,
     nowhere, beside_an_adapter, with_a_dtype],
    ids=lambda each: each.__name__,
)  # fmt: skip
def test_unusable_input_is_refused_in_one_line(full: Full, tmp_path: Path, damage: Damage) -> None:
    tuned, out = tmp_path / "tuned", tmp_path / "out"
    options, words = damage(full, tuned)
    result = safeproj(
        "patch", *full.arguments[:4], "--model", tuned, "--all", "--out", out, *options
    )
    assert_refused(result, *words)
    assert not out.exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"tuned"}


def test_the_aligned_model_is_needed(full: Full, tmp_path: Path) -> None:
    file = tmp_path / "model.safealign.safetensors"
    models = full.arguments[:4]
    assert safeproj("align", *models, "--out", file).returncode == 0
    given: list[str | Path] = ["--alignment", file, "--model", full.tuned]
    assert_refused(safeproj("inspect", *given), "--aligned is missing", "made from")
    result = safeproj("inspect", *given, "--aligned", full.trio.aligned)
    assert result.returncode == 0, result.stderr


def test_an_alignment_file_of_another_model_is_refused(full: Full, tmp_path: Path) -> None:
    file, other = tmp_path / "model.safealign.safetensors", tmp_path / "other"
    moved(full.trio.aligned_model, 0.001, seed=9).save_pretrained(other)
    models: list[str | Path] = ["--base", full.trio.base, "--aligned", other]
    assert safeproj("align", *models, "--out", file).returncode == 0
    given: list[str | Path] = [
        "--alignment",
        file,
        "--aligned",
        full.trio.aligned,
        "--model",
        full.tuned,
    ]
    result = safeproj("patch", *given, "--out", tmp_path / "out")
    assert_refused(result, "is another one than", str(file))
    assert not (tmp_path / "out").exists()


def test_options_of_full_models_are_none_of_adapters(full: Full, tmp_path: Path) -> None:
    for option in ("--resume", "--restore-others"):
        arguments = [*full.trio.arguments, option, "--out", tmp_path / "out"]
        assert_refused(safeproj("patch", *arguments), "give --model")


def test_out_is_replaced_if_it_was_patched(full: Full, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments: list[str | Path] = ["patch", *full.arguments, "--all", "--out", out, "--overwrite"]
    shutil.copytree(full.tuned, out)
    assert_refused(safeproj(*arguments), "no model that was patched")
    assert snapshot(out) == snapshot(full.tuned)
    shutil.rmtree(out)
    assert safeproj(*arguments).returncode == 0
    before = snapshot(out)
    assert safeproj(*arguments).returncode == 0
    assert snapshot(out) == before


def test_out_inside_an_input_is_refused(full: Full) -> None:
    out = full.tuned / "out"
    result = safeproj("patch", *full.arguments, "--out", out)
    assert_refused(result, "overlaps with --model")


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    full: Full, tmp_path: Path
) -> None:
    """A new tensor of a size that no disk has, in a sparse file."""
    tuned = tmp_path / "tuned"
    shutil.copytree(full.tuned, tuned)
    size = 8 << 40
    entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"value_head.weight": entry}).encode()
    with (tuned / "model-00006.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    index = read_json(tuned / "model.safetensors.index.json")
    index["weight_map"]["value_head.weight"] = "model-00006.safetensors"
    change_json(tuned / "model.safetensors.index.json", **index)
    place = tmp_path / "place"
    place.mkdir()
    arguments: list[str | Path] = [
        *full.arguments[:4],
        "--model",
        tuned,
        "--all",
        "--out",
        place / "out",
    ]
    assert_refused(
        safeproj("patch", *arguments), "GB are to be written", "GB are free", "make room"
    )
    assert list(place.iterdir()) == []


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a run on models of many shards, whose writing takes a while."""
    root = tmp_path_factory.mktemp("large")
    base = tiny_llama(hidden_size=128, intermediate_size=512, num_hidden_layers=12)
    aligned = moved(base)
    for name, model in (("base", base), ("aligned", aligned), ("tuned", moved(aligned, 0.01, 3))):
        model.save_pretrained(root / name, max_shard_size="1MB")
    models = [f"--base={root / 'base'}", f"--aligned={root / 'aligned'}"]
    return ["patch", *models, "--model", str(root / "tuned"), "--all", "--workers", "1"]


def interrupted(arguments: list[str], out: Path, *options: str) -> str:
    """Begin a run, interrupt it once its second shard is written, and return what it said."""
    process = started(*arguments, "--out", out, *options)
    while process.poll() is None:
        shards = [
            path
            for place in out.parent.iterdir()
            for path in place.glob("model-00002*.safetensors")
        ]
        if shards:
            break
        time.sleep(0.0005)
    process.send_signal(SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (130, -SIGINT), errors
    return errors


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_an_interrupted_run_leaves_nothing(large: list[str], tmp_path: Path) -> None:
    interrupted(large, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_an_interrupted_run_is_gone_on_with(large: list[str], tmp_path: Path) -> None:
    whole, out = tmp_path / "whole" / "out", tmp_path / "place" / "out"
    partial = out.with_name("out.partial")
    for place in (whole, out):
        place.parent.mkdir()
    assert safeproj(*large, "--out", whole).returncode == 0
    interrupted(large, out, "--resume")
    assert not out.exists()
    begun = {path.name: path.stat().st_ino for path in partial.glob("*.safetensors")}
    assert len(begun) >= 2

    result = safeproj(*large, "--out", out, "--resume")

    assert result.returncode == 0, result.stderr
    assert not partial.exists()
    assert snapshot(out) == snapshot(whole)
    kept = [name for name, inode in begun.items() if (out / name).stat().st_ino == inode]
    assert len(kept) >= len(begun) - 1 > 0  # all but the one that was being written


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_another_run_does_not_go_on_with_what_was_left(large: list[str], tmp_path: Path) -> None:
    whole, out = tmp_path / "whole" / "out", tmp_path / "place" / "out"
    for place in (whole, out):
        place.parent.mkdir()
    other = [*large, "--exclude", "down_proj"]
    assert safeproj(*other, "--out", whole).returncode == 0
    interrupted(large, out, "--resume")
    result = safeproj(*other, "--out", out, "--resume")
    assert result.returncode == 0, result.stderr
    assert snapshot(out) == snapshot(whole)


def test_what_no_run_left_is_not_gone_on_with(full: Full, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "mine.txt").write_text("mine")
    result = safeproj("patch", *full.arguments, "--all", "--out", tmp_path / "out", "--resume")
    assert_refused(result, str(partial), "is in the way", "remove it")
    assert (partial / "mine.txt").read_text() == "mine"

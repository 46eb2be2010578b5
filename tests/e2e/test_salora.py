"""`safeproj salora`: what the commands write, and what they refuse."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from safeproj.methods.salora import SafetyModule
from tests.support import (
    CONFIG,
    FACTORS,
    MANIFEST,
    assert_refused,
    change_json,
    read_json,
    safeproj,
    snapshot,
)

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "tiny-lm"
ALIGNED, DATA = EXAMPLE / "aligned", EXAMPLE / "data"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a safety module that the command made."""
    path = tmp_path_factory.mktemp("made") / "tiny.safety.safetensors"
    result = module_of(ALIGNED, path, "--targets", "q_proj", "--rank", "6")
    assert result.returncode == 0, result.stderr
    return path


@pytest.fixture(scope="module")
def started(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a start for training that the command wrote."""
    path = tmp_path_factory.mktemp("started") / "start"
    result = init(made, path)
    assert result.returncode == 0, result.stderr
    return path


def module_of(aligned: Path, out: Path, *options: str, data: Path = DATA / "safety.jsonl") -> Any:
    return safeproj(
        "salora", "module", "--aligned", aligned, "--data", data, "--out", out, *options
    )


def init(module: Path, out: Path, *options: str, aligned: Path = ALIGNED) -> Any:
    given = ("--aligned", aligned, "--module", module, "--data", DATA / "task.jsonl")
    return safeproj("salora", "init", *given, "--rank", "4", "--out", out, *options)


def fold(adapter: Path, module: Path, out: Path, *options: str | Path) -> Any:
    given = ("--adapter", adapter, "--module", module, "--out", out)
    return safeproj("salora", "fold", *given, *options)


def test_the_file_says_what_it_was_made_of(made: Path) -> None:
    with safe_open(made, framework="pt") as file:
        record = json.loads(file.metadata()["safeproj"])
    data = DATA / "safety.jsonl"
    assert record["schema"] == "safeproj.safety-module/1"
    assert record["options"] == {"targets": ["q_proj"], "rank": 6}
    assert record["inputs"]["data"] == {
        "source": "safety.jsonl",
        "sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
        "rows": 200,
        "positions": sum(
            # Words of the response, each one token, and the end.
            len(json.loads(line)["response"].split()) + 1
            for line in data.read_text("utf-8").splitlines()
        ),
    }
    files = record["inputs"]["aligned"]["sha256"]["files"]
    for path in ALIGNED.iterdir():
        assert files[path.name] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert str(EXAMPLE.parent).encode() not in made.read_bytes()


def test_the_same_inputs_give_the_same_bytes_whatever_the_memory(
    made: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again.safetensors"
    options = ("--targets", "q_proj", "--rank", "6", "--memory", "1e-6")
    assert module_of(ALIGNED, again, *options).returncode == 0
    assert again.read_bytes() == made.read_bytes()


def test_a_cut_file_and_a_small_one_hold_the_same(made: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.safetensors"
    assert module_of(ALIGNED, small, "--targets", "q_proj", "--rank", "2").returncode == 0
    cut, found = SafetyModule.load(made).cut(2), SafetyModule.load(small)
    for name, each in found.directions.items():
        assert torch.allclose(each.U.abs(), cut.directions[name].U.abs(), atol=1e-4)


def test_an_existing_file_is_replaced_only_with_overwrite(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    shutil.copy(made, out)
    assert_refused(module_of(ALIGNED, out), "--out", "exists", "--overwrite")
    assert out.read_bytes() == made.read_bytes()
    result = module_of(ALIGNED, out, "--targets", "v_proj", "--rank", "2", "--overwrite")
    assert result.returncode == 0, result.stderr
    assert SafetyModule.load(out).rank == 2
    save_file({"other": torch.ones(1)}, out)
    assert_refused(module_of(ALIGNED, out, "--overwrite"), "no safety module")


BAD_LINES = {
    "json": ("{", "not JSON"),
    "response": ('{"prompt": "how do i"}', "'response' is missing"),
    "messages": ('{"messages": [{"role": "user", "content": "a"}]}', "assistant"),
    "template": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        "no chat template",
    ),
}


@pytest.mark.parametrize("case", sorted(BAD_LINES))
def test_a_bad_line_is_named(case: str, tmp_path: Path) -> None:
    line, message = BAD_LINES[case]
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "add one two ?", "response": "three"}\n\n' + line + "\n", "utf-8")
    result = module_of(ALIGNED, tmp_path / "m.safetensors", data=data)
    assert_refused(result, f"{data}:3: ", message)
    assert set(snapshot(tmp_path)) == {"data.jsonl"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--rank", "0"), ("--rank", "found 0")),
        (("--memory", "0"), ("--memory", "found 0")),
        (("--batch-size", "-1"), ("--batch-size", "found -1")),
        (("--dtype", "int8"), ("--dtype int8", "bfloat16")),
        (("--device", "abacus"), ("--device abacus", "cpu")),
        (("--targets", "q_proj,nothing"), ("--targets nothing", "down_proj")),
        (("--max-length", "3"), ("safety.jsonl:1", "--max-length")),
    ],
    ids=["rank", "memory", "batch", "dtype", "device", "targets", "length"],
)
def test_bad_options_are_refused(
    options: tuple[str, ...], words: tuple[str, ...], tmp_path: Path
) -> None:
    assert_refused(module_of(ALIGNED, tmp_path / "m.safetensors", *options), *words)
    assert not snapshot(tmp_path)


def test_a_model_that_cannot_be_run_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    assert_refused(module_of(tmp_path / "nowhere", out), "nowhere", "no such file or directory")
    assert_refused(module_of(next(ALIGNED.glob("*.safetensors")), out), "is a file", "directory")
    lacking = tmp_path / "lacking"
    shutil.copytree(ALIGNED, lacking)
    for shard in lacking.glob("model*"):
        shard.unlink()
    tensors: dict[str, torch.Tensor] = {}
    for shard in ALIGNED.glob("*.safetensors"):
        tensors |= load_file(shard)
    tensors.pop("model.layers.2.mlp.up_proj.weight")
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    assert_refused(module_of(lacking, out), "has no weights for model.layers.2.mlp.up_proj.weight")
    assert not out.exists()


def test_code_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    hostile = tmp_path / "hostile"
    shutil.copytree(ALIGNED, hostile)
    (hostile / "modeling_own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own:\n    pass\n", "utf-8"
    )
    change_json(
        hostile / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"},
    )
    assert_refused(module_of(hostile, tmp_path / "m.safetensors"), "cannot load it")
    assert not (tmp_path / "ran").exists()


def test_a_start_holds_the_initial_factors_and_what_it_was_made_of(started: Path) -> None:
    assert set(snapshot(started)) == {
        CONFIG, FACTORS, MANIFEST, "README.md", "salora_init.safetensors",
    }  # fmt: skip
    config = read_json(started / CONFIG)
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert config["init_lora_weights"] == "salora"
    assert config["target_modules"] == ["q_proj"]
    initial, factors = (load_file(started / name) for name in ("salora_init.safetensors", FACTORS))
    assert initial.keys() == factors.keys()
    assert all(torch.equal(initial[key], factors[key]) for key in initial)
    record = read_json(started / MANIFEST)
    assert record["options"] == {"rank": 4, "alpha": 4, "task_rank": 32, "safety_rank": 6}
    assert record["inputs"]["data"]["source"] == "task.jsonl"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--safety-rank", "7"), ("rank 7", "holds 6 directions")),
        (("--targets", "v_proj"), ("holds nothing for model.layers.0.self_attn.v_proj",)),
        (("--task-rank", "0"), ("--task-rank", "found 0")),
    ],
    ids=["safety-rank", "targets", "task-rank"],
)
def test_a_start_that_cannot_be_made_leaves_nothing(
    options: tuple[str, ...], words: tuple[str, ...], made: Path, tmp_path: Path
) -> None:
    assert_refused(init(made, tmp_path / "start", *options), *words)
    assert not snapshot(tmp_path)


def test_a_start_never_goes_into_its_inputs(made: Path, started: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(ALIGNED, model)
    before = snapshot(model)
    assert_refused(init(made, model / "start", aligned=model), "overlaps with --aligned")
    assert_refused(init(made, started), "--out", "exists", "--overwrite")
    assert snapshot(model) == before


def test_folding_needs_the_initial_factors_of_a_start(
    made: Path, started: Path, tmp_path: Path
) -> None:
    trained = tmp_path / "trained"
    shutil.copytree(started, trained)
    (trained / "salora_init.safetensors").unlink()
    assert_refused(fold(trained, made, tmp_path / "out"), "--init DIR")
    assert not (tmp_path / "out").exists()
    result = fold(trained, made, tmp_path / "out", "--init", started)
    assert result.returncode == 0, result.stderr
    assert (
        result.stderr == f"wrote {tmp_path / 'out'} (4 layers, for the unmodified model, rank 8)\n"
    )
    factors = load_file(tmp_path / "out" / FACTORS)
    for name in SafetyModule.load(made).directions:
        A, B = (factors[f"base_model.model.{name}.lora_{each}.weight"] for each in "AB")
        assert (B @ A).abs().max() < 1e-6  # untrained: the update is none


def test_folding_what_was_trained_without_the_module_warns(made: Path, tmp_path: Path) -> None:
    adapter = EXAMPLE / "adapters" / "skill"
    result = fold(adapter, made, tmp_path / "out")
    assert_refused(result, "holds nothing for", "mlp.down_proj")
    whole = tmp_path / "whole.safetensors"
    assert module_of(ALIGNED, whole, "--rank", "2").returncode == 0
    result = fold(adapter, whole, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "warning: up to" in result.stderr
    assert "was not trained with this safety module" in result.stderr


def test_only_peft_adapters_are_folded(made: Path, tmp_path: Path) -> None:
    assert_refused(fold(ALIGNED, made, tmp_path / "out"), "aligned")
    other = ROOT / "tests" / "fixtures" / "mlx-lm-0.32.2" / "llama-lora" / "adapter"
    assert_refused(fold(other, made, tmp_path / "out"), "no PEFT adapter")
    assert not snapshot(tmp_path)

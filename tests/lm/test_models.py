"""A model is run as itself: without an adapter that lies beside its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from safeproj.errors import SafeprojError
from safeproj.lm.models import load_model, load_tokenizer, model_identity
from safeproj.storage.source import LocalFolder, open_folder
from tests import hub_server
from tests.support import CONFIG, FACTORS, assert_refused, change_json, safeproj

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny-lm"
ALIGNED, BAD, DATA = EXAMPLE / "aligned", EXAMPLE / "adapters" / "bad", EXAMPLE / "data"
PAIRS, SKILL, SAFETY = (
    DATA / f"{name}.jsonl" for name in ("held_out_pairs", "new_skill", "safety")
)


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's directory with an adapter's files in it, as merging in place leaves them."""
    path = tmp_path_factory.mktemp("beside") / "model"
    shutil.copytree(ALIGNED, path)
    for name in (CONFIG, FACTORS):
        shutil.copy(BAD / name, path)
    return path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter's directory with a tokenizer, as training leaves it."""
    path = tmp_path_factory.mktemp("adapter") / "trained"
    shutil.copytree(BAD, path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ALIGNED / name, path)
    (path / CONFIG).write_text(
        json.dumps(
            {**json.loads((path / CONFIG).read_text()), "base_model_name_or_path": str(ALIGNED)}
        )
    )
    return path


def loaded(path: Path) -> Any:
    return load_model(open_folder(str(path)), "cpu")


@pytest.mark.parametrize(("asked", "found"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_half_precision_runs_in_float32_on_the_cpu(asked: str, found: str) -> None:
    folder = open_folder(str(ALIGNED))
    model = load_model(folder, "cpu", asked)
    stored = load_model(folder, "cpu", "bfloat16").state_dict()
    assert {str(each.dtype) for each in model.parameters()} == {f"torch.{found}"}
    assert all(each.equal(stored[name].to(each.dtype)) for name, each in model.state_dict().items())


def test_an_adapter_beside_the_weights_is_not_put_on_the_model(beside: Path) -> None:
    clean, found = loaded(ALIGNED).state_dict(), loaded(beside).state_dict()
    assert found.keys() == clean.keys()
    assert all(found[name].equal(clean[name]) for name in clean)


def test_the_digests_of_a_model_are_of_what_runs(beside: Path) -> None:
    clean, found = (model_identity(open_folder(str(path))) for path in (ALIGNED, beside))
    assert found["sha256"] == clean["sha256"]
    assert {"config.json", "tokenizer.json"} <= found["sha256"]["files"].keys()


def test_a_model_in_the_cache_of_the_hub_is_known_by_its_commit_as_online() -> None:
    folder = LocalFolder(ALIGNED, "org/aligned", revision="abc")
    expected = {"source": "org/aligned", "revision": "abc", "sha256": {"files": {}}}
    assert model_identity(folder) == expected


def test_the_model_alone_answers_as_it_does_elsewhere(beside: Path) -> None:
    subjects = {}
    for model in (ALIGNED, beside):
        done = safeproj(
            "eval", "--model", model, "--adapter", BAD, "--harmful", PAIRS, "--limit", "8",
            "--phrase", "sorry i will not", "--max-new-tokens", "12", "--device", "cpu",
            "--format", "json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        subjects[model] = json.loads(done.stdout)["subjects"]
    assert subjects[beside] == subjects[ALIGNED]
    alone, bad = (each["sets"]["held_out_pairs"]["refused"]["rate"] for each in subjects[beside])
    assert (alone, bad) == (1.0, 0.0)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(("salora", "module", "--rank", "2"), id="safety-module"),
        pytest.param(("stats",), id="statistics"),
    ],
)
def test_what_is_made_of_data_is_made_of_the_model_alone(
    beside: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    made = []
    for model in (ALIGNED, beside):
        out = tmp_path / f"{model.name}.{'safety' if len(command) > 1 else 'stats'}.safetensors"
        done = safeproj(*command, "--aligned", model, "--data", SAFETY, "--out", out)
        assert done.returncode == 0, done.stderr
        made.append(load_file(out))
    assert made[0].keys() == made[1].keys()
    assert all(made[0][name].equal(made[1][name]) for name in made[0])


def test_a_directory_that_only_holds_an_adapter_is_no_model(adapter: Path) -> None:
    folder = open_folder(str(adapter))
    for load in (load_model, load_tokenizer):
        with pytest.raises(SafeprojError, match=r"is an adapter's directory .*expected a model's"):
            load(folder)


def test_every_command_that_runs_a_model_refuses_an_adapters_directory(
    adapter: Path, tmp_path: Path
) -> None:
    sets = ("--harmful", PAIRS, "--skill", SKILL, "--limit", "2")
    data = ("--safety-data", SAFETY, "--task-data", SAFETY)
    out = tmp_path / "out.safetensors"
    commands: list[tuple[str | Path, ...]] = [
        ("eval", "--model", adapter, *sets),
        ("eval", "--model", ALIGNED, *sets, "--judge-guard", adapter),
        ("sweep", "--adapter", BAD, "--base", EXAMPLE / "base", "--aligned", ALIGNED,
         "--model", adapter, *sets),
        ("stats", "--aligned", adapter, "--data", SAFETY, "--out", out),
        ("salora", "module", "--aligned", adapter, "--data", SAFETY, "--out", out),
        ("patch", "--adapter", BAD, "--aligned", adapter, *data, "--out", out),
        ("patch", "--adapter", BAD, "--aligned", adapter, *data, "--reconstruct", "--out", out),
    ]  # fmt: skip
    for command in commands:
        assert_refused(
            safeproj(*command), str(adapter), "adapter's directory", "expected a model's"
        )
        assert not out.exists()


def test_a_model_on_the_hub_with_an_adapter_beside_it_is_run_alone(
    beside: Path, tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in beside.iterdir() if path.is_file()}
    config = json.loads(files[CONFIG])
    files[CONFIG] = json.dumps({**config, "base_model_name_or_path": "org/other"}).encode()
    with hub_server.running() as hub:
        hub.publish("org/model", files)
        done = safeproj(
            "eval", "--model", "org/model", "--harmful", PAIRS, "--limit", "3",
            "--phrase", "sorry i will not", "--max-new-tokens", "12", "--device", "cpu",
            "--format", "json", cwd=tmp_path,
            env={
                "HF_ENDPOINT": hub.url,
                "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_OFFLINE": "0",
                "NO_PROXY": "127.0.0.1",
                "OMP_NUM_THREADS": "1",
            },
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert FACTORS not in hub.downloads("org/model")
    (alone,) = json.loads(done.stdout)["subjects"]
    assert alone["sets"]["held_out_pairs"]["refused"]["rate"] == 1.0


@pytest.mark.parametrize("value", [[True], {"a": 1}, "long"])
def test_a_tokenizer_with_settings_of_odd_types_is_refused(tmp_path: Path, value: object) -> None:
    model = Path(shutil.copytree(ALIGNED, tmp_path / "model"))
    change_json(model / "tokenizer_config.json", model_max_length=value)
    with pytest.raises(SafeprojError, match="transformers cannot load it"):
        load_tokenizer(open_folder(str(model)))

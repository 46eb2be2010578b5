"""What trainers keep beside an adapter runs code when loaded: left out, and found by the gate."""

from __future__ import annotations

import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from safeproj.storage.filekind import EMPTY, PICKLE, SAFETENSORS, TEXT, ZIP, FileKind, Group
from safeproj.storage.trainingstate import is_named_as_state, is_state
from tests.conftest import Trio
from tests.support import MANIFEST, read_json, safeproj, save_adapter

ZLIB = FileKind(Group.archive, "zlib data")


class Runs:
    """What makes a directory wherever it is loaded."""

    def __init__(self, place: Path) -> None:
        self._place = str(place)

    def __reduce__(self) -> Any:
        return os.mkdir, (self._place,)


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """What is there if one of the pickles was loaded."""
    return tmp_path / "ran"


@pytest.fixture
def trained(trio: Trio, tmp_path: Path, ran: Path) -> Path:
    """An adapter as transformers, accelerate and DeepSpeed leave it."""
    adapter = save_adapter(trio.aligned_model, tmp_path / "trained")
    for name in STATE:
        (adapter / name).parent.mkdir(parents=True, exist_ok=True)
    for name in ("training_args.bin", "checkpoint-10/optimizer.pt", "scheduler.bin"):
        torch.save({"runs": Runs(ran)}, adapter / name)
    for name in ("rng_state_0.pth", "random_states_0.pkl", f"{STEP}/{SHARD}"):
        (adapter / name).write_bytes(pickle.dumps(Runs(ran)))
    (adapter / "labels.joblib").write_bytes(zlib.compress(pickle.dumps(Runs(ran))))
    (adapter / "trainer_state.json").write_text("{}")
    return adapter


STEP, SHARD = "checkpoint-10/global_step10", "zero_pp_rank_0_mp_rank_00_optim_states.pt"
STATE = {
    "training_args.bin",
    "checkpoint-10/optimizer.pt",
    "scheduler.bin",
    "rng_state_0.pth",
    "random_states_0.pkl",
    f"{STEP}/{SHARD}",
    "labels.joblib",
}


def patch(trio: Trio, adapter: Path, out: Path, *options: str) -> Any:
    models = ("--base", trio.base, "--aligned", trio.aligned)
    found = safeproj("patch", *models, "--adapter", adapter, "--out", out, "--all", *options)
    assert found.returncode == 0, found.stderr
    return found


def check(trio: Trio, adapter: Path, *options: str | Path) -> Any:
    models = ("--base", trio.base, "--aligned", trio.aligned)
    return safeproj("check", adapter, *models, "--threshold", "0", *options)


def findings(done: Any) -> list[tuple[str, str, str | None]]:
    """Return level, rule and file of each finding in a JSON report."""
    (each,) = json.loads(done.stdout)["checks"]
    return [(found["level"], found["id"], found["file"]) for found in each["findings"]]


def files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_patch_leaves_it_out_with_one_line(
    trio: Trio, trained: Path, tmp_path: Path, ran: Path
) -> None:
    out = tmp_path / "out"
    result = patch(trio, trained, out)
    assert not files(out) & STATE
    assert "trainer_state.json" in files(out)
    (told,) = [line for line in result.stderr.splitlines() if "--keep-training-state" in line]
    assert told.startswith("safeproj: warning: 7 files are left out")
    assert all(name in told for name in STATE)
    assert set(read_json(out / MANIFEST)["output"]["left_out"]) == STATE
    assert "SP050" not in check(trio, out).stdout
    assert check(trio, out, "--original", trained).returncode == 0
    assert not ran.exists()


def test_it_is_kept_byte_by_byte_where_that_is_wanted(
    trio: Trio, trained: Path, tmp_path: Path, ran: Path
) -> None:
    out = tmp_path / "out"
    result = patch(trio, trained, out, "--keep-training-state")
    assert all((out / name).read_bytes() == (trained / name).read_bytes() for name in STATE)
    assert "copied as it is" in result.stderr
    record = read_json(out / MANIFEST)
    assert record["options"]["keep_training_state"] is True
    assert "left_out" not in record["output"]
    models = ("--base", trio.base, "--aligned", trio.aligned)
    assert safeproj("verify", out, "--original", trained, *models).returncode == 0
    assert not ran.exists()


def test_what_is_left_out_may_not_be_another_file(
    trio: Trio, trained: Path, tmp_path: Path
) -> None:
    """That the original has it is no leave to publish something else under its name."""
    out = tmp_path / "out"
    patch(trio, trained, out, "--keep-training-state")
    (out / "training_args.bin").write_bytes(pickle.dumps("other"))
    models = ("--base", trio.base, "--aligned", trio.aligned)
    found = safeproj("verify", out, "--original", trained, *models)
    assert found.returncode == 1
    assert "training_args.bin differs" in found.stdout


def test_the_gate_finds_it_and_a_policy_may_allow_it(trio: Trio, trained: Path, ran: Path) -> None:
    (trained / "labels.joblib").unlink()  # which may hold weights as well
    found = check(trio, trained, "--format", "json")
    assert found.returncode == 1
    listed = findings(found)
    wanted = STATE - {"labels.joblib"}
    assert {file for _, rule, file in listed if rule == "SP050"} == wanted
    assert not [rule for _, rule, _ in listed if rule == "SP014"]
    allowed = check(trio, trained, "--allow", "training-state")
    assert allowed.returncode == 0, allowed.stdout
    assert "note      SP050 training-state" in allowed.stdout
    assert not ran.exists()


def test_a_pickle_of_no_trainer_may_hold_weights_too(trio: Trio, trained: Path) -> None:
    found = check(trio, trained, "--allow", "training-state", "--format", "json")
    assert found.returncode == 1
    assert ("note", "SP050", "labels.joblib") in findings(found)
    assert ("fail", "SP014", "labels.joblib") in findings(found)


def test_weights_under_such_a_name_are_weights(trio: Trio, trained: Path, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, trained / "training_args.bin")
    found = check(trio, trained, "--format", "json")
    assert ("fail", "SP014", "training_args.bin") in findings(found)
    out = tmp_path / "out"
    result = patch(trio, trained, out, "--keep-training-state")
    assert not (out / "training_args.bin").exists()
    assert "other weights are not patched, and left out: training_args.bin;" in result.stderr


@pytest.mark.parametrize(
    ("name", "kind", "wanted"),
    [
        ("training_args.bin", ZIP, True),
        ("TRAINING_ARGS.BIN", PICKLE, True),
        ("optimizer_1.bin", ZIP, True),
        ("scaler.pt", EMPTY, True),
        ("optimizer.pt", SAFETENSORS, False),
        ("optimizer.pt", TEXT, False),
        ("my_optimizer.pt", ZIP, False),
        ("model.pt", ZIP, False),
        ("data.pickle", PICKLE, True),
        ("data.joblib", ZLIB, True),
        ("data.joblib", SAFETENSORS, False),
        ("trainer_state.json", TEXT, False),
        ("a/global_step5/mp_rank_00_model_states.pt", ZIP, True),
        ("global_step5/layer_0.pt", ZIP, True),
    ],
)
def test_name_and_bytes_tell(name: str, kind: FileKind, wanted: bool) -> None:
    assert is_state(name, kind) is wanted


def test_an_adapters_own_weights_have_no_such_name() -> None:
    for name in ("adapter_model.bin", "lit_model.pth.lora", "pytorch_model.bin"):
        assert not is_named_as_state(name)

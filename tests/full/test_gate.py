"""The gate on full fine-tunes: `check` and `verify` with `--model`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.full.test_command import Full, full, tensors_in
from tests.report.test_schemas import validator
from tests.support import MANIFEST, assert_refused, change_json, read_json, safeproj

__all__ = ["full"]

LENIENT = ["--allow", "full-weight-changes", "--max-size", "9", "--max-outside", "9"]
"""What a whole fine-tune by noise needs beside projected weights."""


@pytest.fixture(scope="module")
def patched(full: Full, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("patched") / "out"
    result = safeproj("patch", *full.arguments, "--layers", "4", "--out", out)
    assert result.returncode == 0, result.stderr
    return out


def verify(full: Full, model: Path, *options: str | Path) -> tuple[int, Any]:
    """Compare a model with the fine-tune; return the exit code and the only check."""
    models = full.arguments[:4]
    result = safeproj(
        "verify", *models, "--model", model, "--original", full.tuned, "--format", "json", *options
    )
    assert result.stdout, result.stderr
    document = json.loads(result.stdout)
    validator("check").validate(document)
    return result.returncode, document["checks"][0]


def check(full: Full, model: Path, *options: str | Path) -> tuple[int, Any]:
    """Check a model; return the exit code and the only check."""
    models = full.arguments[:4]
    result = safeproj("check", *models, "--model", model, "--format", "json", *options)
    assert result.stdout, result.stderr
    document = json.loads(result.stdout)
    validator("check").validate(document)
    return result.returncode, document["checks"][0]


def failing(found: Any) -> set[str]:
    return {each["id"] for each in found["findings"] if each["level"] == "fail"}


def test_what_patch_wrote_is_verified(full: Full, patched: Path) -> None:
    code, found = verify(full, patched)
    assert (code, found["findings"]) == (0, [])
    projected = {m["name"] for m in read_json(patched / MANIFEST)["modules"] if m["projected"]}
    assert found["evidence"] == dict.fromkeys(projected, "recomputed")
    assert "4 projected weights are equal bit for bit" in found["remarks"][0]


def test_restored_tensors_are_verified(full: Full, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [*full.arguments, "--all", "--restore-others", "--out", str(out)]
    assert safeproj("patch", *arguments).returncode == 0
    code, found = verify(full, out)
    assert (code, found["findings"]) == (0, [])


def edit(folder: Path, name: str, change: Callable[[torch.Tensor], object]) -> None:
    """Change a tensor of a checkpoint, and say nothing."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            change(tensors[name])
            save_file(tensors, path, metadata={"format": "pt"})


def projected_weight(folder: Path) -> str:
    name: str = read_json(folder / MANIFEST)["output"]["projected"][0]
    return name


def a_projected_weight(full: Full, folder: Path) -> str:
    del full
    name = projected_weight(folder)
    edit(folder, name, lambda tensor: tensor[1].mul_(1.5))
    return name.removesuffix(".weight")


def a_kept_weight(full: Full, folder: Path) -> str:
    del full
    done = read_json(folder / MANIFEST)["output"]["projected"]
    kept = next(n for n in tensors_in(folder) if n not in done and n.endswith("proj.weight"))
    edit(folder, kept, lambda tensor: tensor[0].add_(0.1))
    return kept.removesuffix(".weight")


def a_norm(full: Full, folder: Path) -> str:
    del full
    edit(folder, "model.norm.weight", lambda tensor: tensor.mul_(1.01))
    return "model.norm.weight"


def a_weight_put_back(full: Full, folder: Path) -> str:
    name = projected_weight(folder)
    before = tensors_in(full.tuned)[name]
    edit(folder, name, lambda tensor: tensor.copy_(before))
    return name.removesuffix(".weight")


def the_config(full: Full, folder: Path) -> str:
    del full
    change_json(folder / "config.json", rms_norm_eps=1.0)
    return "config.json"


def the_record(full: Full, folder: Path) -> str:
    del full
    document = read_json(folder / MANIFEST)
    name = next(m["name"] for m in document["modules"] if not m["projected"])
    for module in document["modules"]:
        module["projected"] |= module["name"] == name
    change_json(folder / MANIFEST, modules=document["modules"])
    return str(name)


@pytest.mark.parametrize(
    "change",
    [a_projected_weight, a_kept_weight, a_norm, a_weight_put_back, the_config, the_record],
    ids=lambda each: each.__name__,
)
def test_whatever_was_changed_since_is_found(
    full: Full, patched: Path, tmp_path: Path, change: Callable[[Full, Path], str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(patched, copy)
    what = change(full, copy)
    code, found = verify(full, copy)
    assert code == 1
    assert any(what in each["message"] for each in found["findings"] if each["level"] == "fail")


def test_a_tensor_of_whole_numbers_is_compared_too(full: Full, tmp_path: Path) -> None:
    tuned, out = tmp_path / "tuned", tmp_path / "out"
    shutil.copytree(full.tuned, tuned)
    name = "model.steps"
    index = read_json(tuned / "model.safetensors.index.json")
    file = sorted(set(index["weight_map"].values()))[0]
    tensors = {**load_file(tuned / file), name: torch.tensor([1, 2, 3])}
    save_file(tensors, tuned / file, metadata={"format": "pt"})
    index["weight_map"][name] = file
    change_json(tuned / "model.safetensors.index.json", **index)
    other = Full(full.trio, tuned, full.model)
    assert safeproj("patch", *other.arguments, "--all", "--out", out).returncode == 0
    assert torch.equal(tensors_in(out)[name], torch.tensor([1, 2, 3]))
    assert verify(other, out)[0] == 0
    edit(out, name, lambda tensor: tensor[0].add_(1))
    code, found = verify(other, out)
    assert code == 1
    assert any(name in each["message"] for each in found["findings"])


def test_low_weights_fail_unless_they_were_projected(full: Full, patched: Path) -> None:
    code, found = check(full, full.tuned, *LENIENT, "--threshold", "0.9")
    assert code == 1
    low = [each for each in found["findings"] if each["id"] == "SP001"]
    assert len(low) == 15
    assert {each["level"] for each in low} == {"fail"}

    code, found = check(full, patched, *LENIENT, "--threshold", "0")
    assert (code, failing(found)) == (0, set()), found["findings"]
    projected = {m["name"] for m in read_json(patched / MANIFEST)["modules"] if m["projected"]}
    assert found["evidence"] == dict.fromkeys(projected, "recorded")


def test_what_no_score_covers_fails(full: Full, patched: Path) -> None:
    code, found = check(full, patched, *LENIENT[2:], "--threshold", "0")
    assert code == 1
    assert failing(found) == {"SP004"}


def test_large_changes_fail(full: Full, patched: Path) -> None:
    code, found = check(full, patched, *LENIENT, "--threshold", "0", "--max-size", "0.1")
    assert code == 1
    assert failing(found) == {"SP012"}


def test_a_record_that_does_not_fit_is_no_evidence(
    full: Full, patched: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(patched, copy)
    name = a_projected_weight(full, copy)
    code, found = check(full, copy, *LENIENT, "--threshold", "0")
    assert code == 1
    assert failing(found) == {"SP021"}
    assert any(name in each["message"] for each in found["findings"])
    assert found["evidence"] == {}


def test_the_original_is_better_evidence(full: Full, patched: Path) -> None:
    options = [*LENIENT, "--threshold", "0", "--original", str(full.tuned)]
    code, found = check(full, patched, *options)
    assert code == 0, found["findings"]
    assert set(found["evidence"].values()) == {"recomputed"}


def test_other_weights_beside_it_fail(full: Full, patched: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(patched, copy)
    torch.save(tensors_in(full.tuned), copy / "pytorch_model.bin")
    code, found = check(full, copy, *LENIENT, "--threshold", "0")
    assert code == 1
    assert failing(found) == {"SP014"}


def test_an_evaluation_is_of_adapters(full: Full, tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text("{}")
    options: list[str | Path] = ["--evaluation", tmp_path / "eval.json"]
    assert_refused(safeproj("check", *full.arguments, *options), "--evaluation", "--model")

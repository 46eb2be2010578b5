"""Recomputing what patching gives: bit for bit on the same hardware, within rounding elsewhere."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import safeproj as package
from safeproj.report import Check, Evidence, Outcome
from tests.conftest import Trio
from tests.support import (
    CONFIG,
    FACTORS,
    MANIFEST,
    change_json,
    oracle_C,
    read_json,
    safeproj,
    save_adapter,
    save_safety_module,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = sorted(FIXTURES.glob("peft-*/*"))


@pytest.fixture
def out(trio: Trio, tmp_path: Path) -> Path:
    """The trio's adapter with two of four modules projected."""
    selection = package.Options(package.Selection(layers=2))
    package.patch(trio.method, str(trio.adapter), tmp_path / "out", selection)
    return tmp_path / "out"


@pytest.fixture
def verify(trio: Trio, out: Path) -> Callable[[], Check]:
    def run() -> Check:
        (found,) = package.verify(str(out), str(trio.adapter), trio.method).checks
        return found

    return run


def elsewhere(out: Path) -> None:
    """Make safeproj.json say that the patching was done on another machine."""
    versions = read_json(out / MANIFEST)["versions"]
    change_json(out / MANIFEST, versions={**versions, "processor": "another"})


def change(out: Path, how: Callable[[Tensor], Tensor], key: str | None = None) -> str:
    """Change a tensor, and the digest of it in safeproj.json as someone would who hides that."""
    manifest = read_json(out / MANIFEST)
    key = key or manifest["output"]["projected"][0]
    tensors = load_file(out / FACTORS)
    save_file({**tensors, key: how(tensors[key]).contiguous()}, out / FACTORS, {"format": "pt"})
    changed = load_file(out / FACTORS)[key]

    digest = hashlib.sha256(changed.view(torch.uint8).numpy().tobytes()).hexdigest()
    output = manifest["output"]
    change_json(out / MANIFEST, output={**output, "tensors": {**output["tensors"], key: digest}})
    return str(key)


def one_ulp(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed[0, 0] = torch.nextafter(changed[0, 0], torch.tensor(torch.inf))
    return changed


def test_what_patch_wrote_is_equal_bit_for_bit(verify: Callable[[], Check], out: Path) -> None:
    found = verify()
    assert found.outcome is Outcome.passed
    claimed = {m["name"] for m in read_json(out / MANIFEST)["modules"] if m["projected"]}
    assert found.evidence == dict.fromkeys(claimed, Evidence.recomputed)
    (remark,) = found.remarks
    assert "2 projected factors are equal bit for bit; the same hardware" in remark


def test_on_the_same_hardware_every_bit_counts(verify: Callable[[], Check], out: Path) -> None:
    change(out, one_ulp)
    found = verify()
    assert [finding.id for finding in found.findings] == ["SP024"]
    assert "within rounding, but the same hardware" in found.findings[0].message


def test_elsewhere_rounding_is_allowed(verify: Callable[[], Check], out: Path) -> None:
    change(out, one_ulp)
    elsewhere(out)
    found = verify()
    assert found.outcome is Outcome.passed
    (remark,) = found.remarks
    assert "1 projected factors are equal bit for bit, 1 within rounding" in remark


@pytest.mark.parametrize("factor", [1.001, 0.0, 20.0], ids=str)
def test_elsewhere_nothing_more_is(verify: Callable[[], Check], out: Path, factor: float) -> None:
    key = change(out, lambda tensor: tensor * factor)
    elsewhere(out)
    found = verify()
    assert found.outcome is Outcome.failed
    assert {(f.id, f.tensor) for f in found.findings if f.id == "SP024"} >= {("SP024", key)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_tolerance_is_that_of_the_stored_dtype(
    trio: Trio, tmp_path: Path, dtype: torch.dtype
) -> None:
    """The formula in float64, rounded to the stored dtype, is what another machine may write."""
    adapter = save_adapter(trio.aligned_model, tmp_path / "adapter")
    tensors = {k: v.to(dtype) for k, v in load_file(adapter / FACTORS).items()}
    save_file(tensors, adapter / FACTORS, {"format": "pt"})
    out = tmp_path / "out"
    options = package.Options(package.Selection(all=True))
    package.patch(trio.method, str(adapter), out, options)
    elsewhere(out)
    aligned, base = trio.aligned_model.state_dict(), trio.base_model.state_dict()
    for key in read_json(out / MANIFEST)["output"]["projected"]:
        name = key.removeprefix("base_model.model.").replace("lora_B.weight", "weight")
        exact = oracle_C(aligned[name], base[name]) @ tensors[key].double()
        change(out, lambda _, exact=exact: exact.to(dtype), key)  # type: ignore[misc]
    (found,) = package.verify(str(out), str(adapter), trio.method).checks
    assert found.outcome is Outcome.passed, found.findings
    step = torch.finfo(dtype).eps * 8 if dtype is not torch.float32 else 1e-3
    change(out, lambda tensor: tensor * (1 + step))
    (found,) = package.verify(str(out), str(adapter), trio.method).checks
    assert found.outcome is Outcome.failed


def test_a_record_that_claims_too_much_is_seen(trio: Trio, tmp_path: Path) -> None:
    """Nothing was projected, and safeproj.json says that everything was."""
    out, options = tmp_path / "out", package.Options(package.Selection(layers=0))
    package.patch(trio.method, str(trio.adapter), out, options)
    modules = [{**module, "projected": True} for module in read_json(out / MANIFEST)["modules"]]
    change_json(out / MANIFEST, modules=modules)
    (found,) = package.verify(str(out), str(trio.adapter), trio.method).checks
    said = [finding.id for finding in found.findings]
    # The summary and the section of the card still say that none is.
    assert said == ["SP021", *["SP024"] * 4, "SP025"]
    assert found.evidence == {}


def edit_config(out: Path) -> None:
    change_json(out / CONFIG, lora_alpha=800)


def edit_other_tensor(out: Path) -> None:
    change(out, lambda tensor: tensor * 2, next(k for k in load_file(out / FACTORS) if "_A" in k))


def drop_tensors(out: Path) -> None:
    tensors = load_file(out / FACTORS)
    save_file({k: v for k, v in tensors.items() if "layers.0" in k}, out / FACTORS)


def add_file(out: Path) -> None:
    (out / "chat_template.jinja").write_text("obey")


def drop_manifest(out: Path) -> None:
    (out / MANIFEST).unlink()


def cut_manifest(out: Path) -> None:
    change_json(out / MANIFEST, output={})


EDITS: dict[Callable[[Path], None], set[str]] = {
    edit_config: {"SP021", "SP025"},
    edit_other_tensor: {"SP025"},
    drop_tensors: {"SP021", "SP024", "SP025"},
    add_file: {"SP025"},
    drop_manifest: {"SP020"},
    cut_manifest: {"SP021"},
}


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_everything_else_must_be_the_originals(
    verify: Callable[[], Check], out: Path, edit: Callable[[Path], None]
) -> None:
    edit(out)
    found = verify()
    assert found.outcome is Outcome.failed
    assert {finding.id for finding in found.findings} == EDITS[edit]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}-{case.name}")
def test_every_kind_of_adapter(case: Path, tmp_path: Path) -> None:
    """Stacks of experts of which some are projected, Conv1D, embeddings, DoRA, biases."""
    adapter = case / "adapter"
    model = FIXTURES / "models" / read_json(adapter / CONFIG)["base_model_name_or_path"]
    method = package.SafeLora(str(model / "base"), str(model / "aligned"))
    options = package.Options(package.Selection(layers=2), dtype="float32")
    report = package.patch(method, str(adapter), tmp_path / "out", options)
    projected = {module.name for module in report.modules if module.projected}
    (found,) = package.verify(str(tmp_path / "out"), str(adapter), method).checks
    assert found.outcome is Outcome.passed, found.findings
    assert set(found.evidence) == projected
    assert len(projected) == min(2, len(report.modules))


def test_the_projector_is_the_recorded_one(trio: Trio, tmp_path: Path) -> None:
    out, options = tmp_path / "out", package.Options(package.Selection(all=True))
    exact = dataclasses.replace(trio.method, projector="exact", energy=0.5)
    package.patch(exact, str(trio.adapter), out, options)
    assert package.verify(str(out), str(trio.adapter), trio.method).outcome is Outcome.passed
    other = dataclasses.replace(trio.method, projector="exact", rank=3)
    assert package.verify(str(out), str(trio.adapter), other).outcome is Outcome.failed
    change_json(out / MANIFEST, projector={"kind": "none"})
    with pytest.raises(package.SafeprojError, match="names no projector that there is"):
        package.verify(str(out), str(trio.adapter), trio.method)


def test_a_safety_module_is_one_way(trio: Trio, tmp_path: Path) -> None:
    module = str(save_safety_module(trio.aligned_model, tmp_path / "m.safetensors"))
    out = tmp_path / "out"
    package.patch(package.Salora(module), str(trio.adapter), out)
    found = package.verify(str(out), str(trio.adapter), package.Salora(module))
    assert found.outcome is Outcome.passed
    assert len(found.checks[0].evidence) == 4


def test_the_command(trio: Trio, out: Path, tmp_path: Path) -> None:
    pair = ("--base", trio.base, "--aligned", trio.aligned, "--original", trio.adapter)
    done = safeproj("verify", out, *pair, "--format", "json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["outcome"] == "passed"
    shutil.copyfile(trio.adapter / FACTORS, out / FACTORS)
    done = safeproj("verify", out, *pair)
    assert (done.returncode, done.stderr) == (1, "")
    assert "SP024 projection-mismatch" in done.stdout
    done = safeproj("verify", out)
    assert done.returncode == 2
    assert "give --original, --public-key, or both" in done.stderr
    done = safeproj("verify", tmp_path / "nowhere", *pair)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


@pytest.fixture
def exact(trio: Trio, tmp_path: Path) -> Path:
    """The same by another projector than a check uses that names none."""
    method = dataclasses.replace(trio.method, projector="exact", rank=3)
    options = package.Options(package.Selection(layers=2))
    package.patch(method, str(trio.adapter), tmp_path / "exact", options)
    return tmp_path / "exact"


def against_original(trio: Trio, patched: Path) -> Check:
    (found,) = package.check(trio.method, [patched], original=trio.adapter).checks
    return found


def rules(check: Check) -> set[str]:
    return {finding.id for finding in check.findings}


def test_a_check_does_not_compare_with_a_projection_that_was_not_done(
    trio: Trio, exact: Path
) -> None:
    """Nobody changed a tensor: that another projector was used is what there is to say."""
    found = against_original(trio, exact)
    assert "SP022" in rules(found)
    assert not {"SP021", "SP024", "SP025"} & rules(found)
    (remark,) = found.remarks
    assert remark.startswith("not recomputed from the original: the projector in safeproj.json is")
    assert "the factors of the 2 modules that safeproj.json says were changed" in remark
    assert found.evidence == {}


def test_what_is_copied_is_compared_whatever_was_projected(trio: Trio, exact: Path) -> None:
    projected = set(read_json(exact / MANIFEST)["output"]["projected"])
    other = next(k for k in load_file(exact / FACTORS) if "lora_B" in k and k not in projected)
    change(exact, one_ulp, other)
    found = against_original(trio, exact)
    assert any(each.id == "SP025" and other in each.message for each in found.findings)


def test_what_claims_another_projection_and_is_the_original_is_told(
    trio: Trio, exact: Path
) -> None:
    key = change(exact, torch.clone)
    before = load_file(trio.adapter / FACTORS)[key]
    change(exact, lambda _: before, key)
    found = against_original(trio, exact)
    (told,) = (each for each in found.findings if each.id == "SP024")
    assert "its factors are the original's" in told.message


def test_what_another_method_did_is_not_called_no_projector(trio: Trio, tmp_path: Path) -> None:
    out = tmp_path / "out"
    package.patch(trio.method, trio.adapter, out, package.Options(package.Selection(all=True)))
    change_json(out / MANIFEST, method="covariance", projector={"kind": "covariance", "mu": 1.0})
    with pytest.raises(package.SafeprojError, match=r"patched by the covariance.*give safety_data"):
        package.verify(out, trio.adapter, trio.method)
    rebuilt = {"kind": "reconstruction", "mu": 1.0}
    change_json(out / MANIFEST, projector=rebuilt)
    with pytest.raises(package.SafeprojError, match=r"layer by layer .* is not done again"):
        package.verify(out, trio.adapter, trio.method)

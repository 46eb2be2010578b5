"""Records by either hash: older ones have the digests of tensors by SHA-256, new ones by BLAKE3."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import safeproj as package
from safeproj.checkpoint.hashes import hash_of, tensors_of
from safeproj.gate.policy import Policy
from safeproj.methods.interface import Method
from safeproj.report import Check, Evidence, Outcome
from tests.conftest import Trio
from tests.methods.recorded import text_of, write
from tests.support import (
    MANIFEST,
    assert_refused,
    read_json,
    safeproj,
    save_safety_module,
)

ALL = package.Options(package.Selection(all=True))

STRICT = Policy(threshold=1.0)
"""No module passes it but by evidence."""

Models = Mapping[str, Mapping[str, Tensor]]
"""Role to the tensors that are read of it, by name."""


def older(document: Any, models: Models) -> None:
    """Give a record the digests that builds wrote which had no other hash than SHA-256."""
    for role, tensors in models.items():
        recorded = document["inputs"][role]
        recorded["sha256"]["tensors"] = {
            name: sha256(tensors[name].contiguous().view(torch.uint8).numpy().data).hexdigest()
            for name in recorded.pop("blake3")["tensors"]
        }


def change(adapter: Path, how: Callable[[Any], object]) -> None:
    document = read_json(adapter / MANIFEST)
    how(document)
    (adapter / MANIFEST).write_text(json.dumps(document), "utf-8")


def in_file(path: Path, out: Path, how: Callable[[Any], object]) -> Path:
    """Write an alignment file again with another text."""
    document = json.loads(text_of(path))
    how(document)
    return write(out, json.dumps(document), load_file(path))


def weights(folder: Path) -> dict[str, Tensor]:
    files = folder.glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def pair(trio: Trio) -> Models:
    return {"base": weights(trio.base), "aligned": weights(trio.aligned)}


@dataclass(frozen=True)
class Way:
    """How an adapter was patched, and what was read for it."""

    method: Method
    models: Models
    patched: Path


@pytest.fixture(scope="module", params=["checkpoints", "alignment", "safety module"])
def way(
    request: pytest.FixtureRequest,
    trio: Trio,
    pair: Models,
    tmp_path_factory: pytest.TempPathFactory,
) -> Way:
    root = tmp_path_factory.mktemp("way")
    method: Method = trio.method
    models = pair
    if request.param == "alignment":
        file = root / "x.safealign.safetensors"
        package.align(str(trio.base), str(trio.aligned), file, package.Form(exact=True))
        method = package.SafeLora(alignment=str(file))
    elif request.param == "safety module":
        file = save_safety_module(trio.aligned_model, root / "x.safety.safetensors")
        method, models = package.Salora(str(file)), {"safety_module": load_file(file)}
    package.patch(method, str(trio.adapter), root / "patched", ALL)
    return Way(method, models, root / "patched")


@pytest.fixture
def adapter(way: Way, tmp_path: Path) -> Path:
    return shutil.copytree(way.patched, tmp_path / "patched")


@pytest.fixture(params=["blake3", "sha256"])
def by(request: pytest.FixtureRequest, way: Way, adapter: Path) -> str:
    """The hash that the record is by."""
    if request.param == "sha256":
        change(adapter, lambda document: older(document, way.models))
    return str(request.param)


def checked(method: Method, *adapters: Path) -> tuple[Check, ...]:
    return package.check(method, map(str, adapters), STRICT).checks


def said(check: Check, rule: str) -> str:
    (found,) = (each for each in check.findings if each.id == rule)
    assert "\n" not in found.message
    return found.message


def test_a_record_shows_what_was_projected(way: Way, adapter: Path, by: str) -> None:
    for role in way.models:
        assert hash_of(read_json(adapter / MANIFEST)["inputs"][role]) == by
    (found,) = checked(way.method, adapter)
    if isinstance(way.method, package.SafeLora) and way.method.alignment and by == "sha256":
        assert "by sha256 in safeproj.json and by blake3 in the file" in said(found, "SP022")
        assert found.outcome is Outcome.failed
        return
    assert found.outcome is Outcome.passed, found.findings
    assert set(found.evidence.values()) == {Evidence.recorded}


@pytest.mark.usefixtures("by")
def test_a_record_of_other_models_shows_nothing(way: Way, adapter: Path) -> None:
    for role in way.models:
        changed = shutil.copytree(adapter, adapter.parent / role)

        def swap(document: Any, role: str = role) -> None:
            found: dict[str, str]
            (found,) = tensors_of(document["inputs"][role]).values()  # type: ignore[assignment]
            name = next(iter(found))
            found[name] = found[name][::-1]

        change(changed, swap)
        (check,) = checked(way.method, changed)
        assert check.outcome is Outcome.failed
        assert said(check, "SP022")
        assert not check.evidence


def test_the_original_shows_it_by_either(way: Way, adapter: Path, by: str, trio: Trio) -> None:
    (found,) = package.verify(str(adapter), str(trio.adapter), way.method).checks
    differ = isinstance(way.method, package.SafeLora) and way.method.alignment and by == "sha256"
    assert {each.id for each in found.findings} == ({"SP022"} if differ else set())
    assert set(found.evidence.values()) == {Evidence.recomputed}


def test_one_check_takes_records_by_both(trio: Trio, pair: Models, tmp_path: Path) -> None:
    for name in ("new", "old", "other"):
        package.patch(trio.method, str(trio.adapter), tmp_path / name, ALL)
    change(tmp_path / "old", lambda document: older(document, pair))
    change(tmp_path / "other", lambda document: older(document, {"base": pair["base"]}))
    new, old, other = checked(trio.method, *(tmp_path / n for n in ("new", "old", "other")))
    assert (new.outcome, old.outcome, other.outcome) == (
        Outcome.passed,
        Outcome.passed,
        Outcome.failed,
    )
    assert said(other, "SP021") == (
        "safeproj.json: digests of tensors are by blake3, sha256, expected one hash for all"
    )


def test_a_hash_that_is_not_known_is_named(trio: Trio, tmp_path: Path) -> None:
    package.patch(trio.method, str(trio.adapter), tmp_path / "out", ALL)

    def rename(document: Any) -> None:
        for role in ("base", "aligned"):
            document["inputs"][role]["blake4"] = document["inputs"][role].pop("blake3")

    change(tmp_path / "out", rename)
    (found,) = checked(trio.method, tmp_path / "out")
    assert found.outcome is Outcome.failed
    assert said(found, "SP021") == (
        "safeproj.json: digests of tensors are by blake4, expected blake3 or sha256; use the "
        "version of safeproj that wrote them"
    )


def test_an_older_alignment_file_is_used_as_before(
    trio: Trio, pair: Models, tmp_path: Path
) -> None:
    new = tmp_path / "new.safetensors"
    package.align(str(trio.base), str(trio.aligned), new, package.Form(exact=True))
    old = in_file(new, tmp_path / "old.safetensors", lambda document: older(document, pair))
    method = package.SafeLora(alignment=str(old))
    package.patch(method, str(trio.adapter), tmp_path / "out", ALL)

    inputs = read_json(tmp_path / "out" / MANIFEST)["inputs"]
    recorded = json.loads(text_of(old))["inputs"]
    for role in ("base", "aligned"):
        assert inputs[role] == {"source": role, "sha256": recorded[role]["sha256"]}
    assert inputs["alignment"]["blake3"]["tensors"]
    for way in (method, trio.method):
        (found,) = checked(way, tmp_path / "out")
        assert found.outcome is Outcome.passed, found.findings
    (found,) = checked(package.SafeLora(alignment=str(new)), tmp_path / "out")
    assert "check against the checkpoints, with --base and --aligned" in said(found, "SP022")


def test_an_alignment_file_by_two_hashes_or_another_is_refused(trio: Trio, tmp_path: Path) -> None:
    file = tmp_path / "new.safetensors"
    package.align(str(trio.base), str(trio.aligned), file, package.Form(rank=2))

    def both(document: Any) -> None:
        base = document["inputs"]["base"]
        base["sha256"]["tensors"] = base["blake3"]["tensors"]

    def another(document: Any) -> None:
        document["inputs"]["base"]["md5"] = document["inputs"]["base"].pop("blake3")

    def none(document: Any) -> None:
        del document["inputs"]["base"]["blake3"]

    for how, words in (
        (both, "by blake3, sha256, expected one hash for all"),
        (another, "by md5, expected blake3 or sha256"),
        (none, "no digests of tensors"),
    ):
        changed = in_file(file, tmp_path / f"{how.__name__}.safetensors", how)
        result = safeproj(
            "patch", "--alignment", changed, "--adapter", trio.adapter, "--out", tmp_path / "out"
        )
        assert_refused(result, "damaged alignment file", words)
        assert not (tmp_path / "out").exists()

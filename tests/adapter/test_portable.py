"""Adapters that all readers compute alike: what PEFT makes of them, and what simple readers do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import safeproj
from safeproj.gate.policy import Policy
from tests.adapter.oracle import patch
from tests.adapter.test_mlx import as_mlx
from tests.conftest import Trio
from tests.support import (
    CONFIG,
    FACTORS,
    assert_refused,
    change_json,
    deltas,
    read_json,
    save_adapter,
    snapshot,
)
from tests.support import (
    safeproj as command,
)

SETTINGS: dict[str, Any] = {
    "r": 3,
    "lora_alpha": 5.5,
    "target_modules": "all-linear",
    "use_rslora": True,
    "rank_pattern": {"q_proj": 6, "layers.1.mlp.up_proj": 2},
    "alpha_pattern": {"v_proj": 7, "down_proj": 0.25},
}
"""Ranks and scalings that readers do not agree about."""

RANK = 6


@pytest.fixture(scope="module")
def adapter(trio: Trio, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(trio.aligned_model, tmp_path_factory.mktemp("portable") / "in", **SETTINGS)


def simple(path: Path) -> dict[str, Tensor]:
    """Return `ΔW` as a reader computes it that knows nothing but `lora_alpha / r`."""
    config, tensors = read_json(path / CONFIG), load_file(path / FACTORS)
    s = config["lora_alpha"] / config["r"]
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): s
        * (tensors[key.replace("lora_A", "lora_B")].double() @ A.double())
        for key, A in tensors.items()
        if ".lora_A." in key
    }


@pytest.mark.parametrize(
    "options", [["--all"], ["--layers", "4"], ["--threshold", "0"]], ids=" ".join
)
def test_the_update_is_that_of_the_adapter_without_the_option(
    trio: Trio, adapter: Path, tmp_path: Path, options: list[str]
) -> None:
    manifest = patch(trio, adapter, tmp_path / "out", *options, "--portable")
    patch(trio, adapter, tmp_path / "plain", *options)
    wanted = deltas(trio.aligned_model, tmp_path / "plain")
    for found in (deltas(trio.aligned_model, tmp_path / "out"), simple(tmp_path / "out")):
        assert found.keys() == wanted.keys()
        for name, delta in wanted.items():
            assert float((found[name] - delta).norm() / delta.norm()) < 1e-6, name
    # Which the same reader does not compute without:
    other = simple(tmp_path / "plain")
    assert any(float((other[n] - d).norm() / d.norm()) > 0.1 for n, d in wanted.items())

    config, given = read_json(tmp_path / "out" / CONFIG), read_json(adapter / CONFIG)
    assert (config["r"], config["lora_alpha"]) == (RANK, RANK)
    assert type(config["lora_alpha"]) is int
    assert not (config["rank_pattern"] or config["alpha_pattern"] or config["use_rslora"])
    own = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
    assert {k: v for k, v in config.items() if k not in own} == {
        k: v for k, v in given.items() if k not in own
    }
    for key, tensor in load_file(tmp_path / "out" / FACTORS).items():
        assert tensor.shape[0 if ".lora_A." in key else 1] == RANK
    assert manifest["options"]["portable"] is True


def test_factors_of_several_dtypes_get_one(trio: Trio, adapter: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "in"
    mixed.mkdir()
    (mixed / CONFIG).write_bytes((adapter / CONFIG).read_bytes())
    tensors = load_file(adapter / FACTORS)
    tensors = {k: t.bfloat16() if "lora_A" in k else t.half() for k, t in tensors.items()}
    save_file(tensors, mixed / FACTORS, metadata={"format": "pt"})
    for options, dtype in (
        (("--layers", "2"), "float32"),
        (("--layers", "2", "--dtype"), "float16"),
    ):
        out = tmp_path / dtype
        given = (*options, dtype) if options[-1] == "--dtype" else options
        patch(trio, mixed, out, *given, "--portable")
        found = {tensor.dtype for tensor in load_file(out / FACTORS).values()}
        assert found == {getattr(torch, dtype)}
        verified = command(
            "verify", "--base", trio.base, "--aligned", trio.aligned, "--original", mixed, out
        )
        assert verified.returncode == 0, verified.stdout + verified.stderr


def test_the_gate_knows_it(trio: Trio, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = patch(trio, adapter, out, "--all", "--portable")
    names = {module["name"] for module in manifest["modules"]}
    policy = Policy(threshold=1.0, max_size=1e9)
    (checked,) = safeproj.check(trio.method, [str(out)], policy).checks
    assert not [each for each in checked.findings if each.level.name == "fail"], checked.findings
    assert set(checked.evidence) == names
    for original in (None, str(adapter)):
        (found,) = safeproj.check(trio.method, [str(out)], policy, original=original).checks
        assert set(found.evidence) == names
    (verified,) = safeproj.verify(str(out), str(adapter), trio.method).checks
    assert verified.outcome.name == "passed", verified.findings
    assert set(verified.evidence) == names


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_one_of_a_changed_base_is_converted_first(trio: Trio, tmp_path: Path, init: str) -> None:
    adapter = save_adapter(trio.aligned_model, tmp_path / "in", **SETTINGS, init_lora_weights=init)
    trained = {key: tensor + 0.02 for key, tensor in load_file(adapter / FACTORS).items()}
    save_file(trained, adapter / FACTORS, metadata={"format": "pt"})
    options = ("--layers", "4")
    manifest = patch(trio, adapter, tmp_path / "out", *options, "--portable")
    assert manifest["inputs"]["adapter"]["converted_from"] == init
    patch(trio, adapter, tmp_path / "plain", *options)
    config = read_json(tmp_path / "out" / CONFIG)
    assert (config["r"], config["lora_alpha"]) == (2 * RANK, 2 * RANK)
    assert config["init_lora_weights"] is True
    wanted = deltas(trio.aligned_model, tmp_path / "plain")
    for found in (deltas(trio.aligned_model, tmp_path / "out"), simple(tmp_path / "out")):
        assert found.keys() == wanted.keys()
        for name, delta in wanted.items():
            assert float((found[name] - delta).norm() / delta.norm()) < 1e-6, name
    (verified,) = safeproj.verify(str(tmp_path / "out"), str(adapter), trio.method).checks
    assert verified.outcome.name == "passed", verified.findings


def _scaled(out: Path) -> None:
    change_json(out / CONFIG, lora_alpha=600)


def _padding(out: Path) -> None:
    """Put an update into the padding of a rank that is not the largest."""
    tensors = load_file(out / FACTORS)
    A = next(key for key in tensors if "v_proj.lora_A" in key)
    tensors[A][-1] = 1.0
    save_file(tensors, out / FACTORS, metadata={"format": "pt"})


def _unsaid(out: Path) -> None:
    record = read_json(out / "safeproj.json")
    del record["options"]["portable"]
    (out / "safeproj.json").write_text(json.dumps(record))


@pytest.mark.parametrize("change", [_scaled, _padding, _unsaid])
def test_what_is_changed_after_it_is_found(
    trio: Trio, adapter: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    out = tmp_path / "out"
    patch(trio, adapter, out, "--all", "--portable")
    change(out)
    (verified,) = safeproj.verify(str(out), str(adapter), trio.method).checks
    assert verified.outcome.name == "failed"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "DoRA"),
    "biases of lora_B": ({"lora_bias": True}, "biases of lora_B"),
    "biases": ({"bias": "all"}, "trained biases"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, "saved whole"),
    "a changed base": ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable tokens"),
}


@pytest.mark.parametrize(("settings", "word"), REFUSED.values(), ids=REFUSED)
def test_refused(trio: Trio, tmp_path: Path, settings: dict[str, Any], word: str) -> None:
    adapter = save_adapter(trio.aligned_model, tmp_path / "in", **settings)
    before = snapshot(tmp_path)
    result = command(
        "patch", "--base", trio.base, "--aligned", trio.aligned, "--adapter", adapter,
        "--out", tmp_path / "out", "--all", "--portable",
    )  # fmt: skip
    assert_refused(result, "--portable" if "pissa" not in word else "convert it with PEFT", word)
    assert snapshot(tmp_path) == before


def test_other_formats_are_refused(trio: Trio, tmp_path: Path) -> None:
    adapter = as_mlx(trio.adapter, tmp_path / "mlx")
    result = command(
        "patch", "--base", trio.base, "--aligned", trio.aligned, "--adapter", adapter,
        "--out", tmp_path / "out", "--all", "--portable",
    )  # fmt: skip
    assert_refused(result, "--portable", "another format")


def test_what_does_not_fit_is_refused(trio: Trio, tmp_path: Path) -> None:
    adapter = save_adapter(trio.aligned_model, tmp_path / "in", lora_alpha=1e9)
    tensors = {key: tensor.half() for key, tensor in load_file(adapter / FACTORS).items()}
    save_file(tensors, adapter / FACTORS, metadata={"format": "pt"})
    result = command(
        "patch", "--base", trio.base, "--aligned", trio.aligned, "--adapter", adapter,
        "--out", tmp_path / "out", "--all", "--portable",
    )  # fmt: skip
    assert_refused(result, "does not fit", "--dtype float32")

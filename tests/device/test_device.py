"""Results on a device against those of the processor, and against a second run on it.

Without a GPU the same is run by torch on the processor.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

import safeproj
from safeproj import Covariance, Feed, Options, SafeLora, Salora, Selection
from safeproj.lm.models import load_model
from safeproj.methods.covariance.make import make_statistics
from safeproj.methods.interface import Method
from safeproj.storage.source import open_folder
from tests.support import FACTORS, MANIFEST, read_json

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny-lm"
BASE, ALIGNED = (str(EXAMPLE / name) for name in ("base", "aligned"))
ADAPTER = str(EXAMPLE / "adapters" / "mixed")
SAFETY, TASK = (EXAMPLE / "data" / f"{name}.jsonl" for name in ("safety", "task"))

DEVICES = ["torch", pytest.param("cuda", marks=pytest.mark.cuda)]

LINEAR = 1e-5
"""Largest relative difference of a projected factor: sums of float32 in another order."""

LAYERED = 2e-2
"""The same of a correction layer by layer, where a layer's input depends on all before it."""


def patched(method: Method, out: Path, device: str) -> dict[str, Tensor]:
    """Return the tensors that `patch` writes."""
    options = Options(Selection(all=True), device=device)
    safeproj.patch(method, ADAPTER, out, options, overwrite=True)
    recorded = read_json(out / MANIFEST)["options"]
    assert recorded["engine"] == ("numpy" if device == "cpu" else "torch")
    return load_file(out / FACTORS)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Check that tensors differ by no more than that share of each one's norm."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = float((found[name].double() - tensor.double()).norm())
        assert error <= tolerance * float(tensor.double().norm()), name


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    root = tmp_path_factory.mktemp("statistics")
    made = root / "safety.stats.safetensors", root / "task.stats.safetensors"
    for data, out in zip((SAFETY, TASK), made, strict=True):
        fed = Feed(device="cpu").load(ALIGNED, data)
        make_statistics(fed.model, fed.batches, out, ["all-linear"], fed.inputs)
    yield made


def methods(statistics: tuple[Path, Path], module: Path) -> dict[str, Method]:
    """Return methods by name."""
    safety, task = map(str, statistics)
    return {
        "approx": SafeLora(base=BASE, aligned=ALIGNED),
        "exact": SafeLora(base=BASE, aligned=ALIGNED, projector="exact", energy=0.5),
        "salora": Salora(str(module)),
        "covariance": Covariance(safety_data=safety, task_data=task),
    }


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("module") / "m.safety.safetensors"
    fed = Feed(device="cpu").load(ALIGNED, SAFETY)
    safeproj.salora.safety_module(fed.model, fed.batches, ["all-linear"], 8).save(out)
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["approx", "exact", "salora", "covariance"])
def test_each_method_agrees_with_the_processor(
    statistics: tuple[Path, Path], module: Path, tmp_path: Path, name: str, device: str
) -> None:
    method = methods(statistics, module)[name]
    expected = patched(method, tmp_path / "cpu", "cpu")
    first, second = (patched(method, tmp_path / f"{i}", device) for i in (1, 2))
    assert_close(first, expected, LINEAR)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.cuda
def test_the_correction_layer_by_layer_agrees_with_the_processor(tmp_path: Path) -> None:
    method = Covariance(ALIGNED, str(SAFETY), str(TASK), reconstruct=True)
    found = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        safeproj.patch(method, ADAPTER, out, Options(Selection(all=True), device=device))
        found[device] = load_file(out / FACTORS)
    assert_close(found["cuda"], found["cpu"], LAYERED)


@pytest.mark.cuda
def test_a_model_runs_on_the_device_as_it_is_stored() -> None:
    model = load_model(open_folder(ALIGNED), "cuda")
    assert {(str(p.dtype), p.device.type) for p in model.parameters()} == {
        ("torch.bfloat16", "cuda")
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["both sides", "memory", "exact", "salora", "covariance"])
def test_a_model_on_the_device_is_projected_there(
    statistics: tuple[Path, Path], module: Path, tmp_path: Path, name: str, device: str
) -> None:
    """With its aligned weights from files or from where they are."""
    known = methods(statistics, module)
    method = known[{"both sides": "approx", "memory": "approx"}.get(name, name)]
    expected = patched(method, tmp_path / "cpu", "cpu")
    where = "cpu" if device == "torch" else device
    model: Any = PeftModel.from_pretrained(
        load_model(open_folder(ALIGNED), where, "bfloat16"), ADAPTER
    )
    given = SafeLora(base=BASE) if name == "memory" else method
    places = {key: each.data_ptr() for key, each in model.named_parameters()}

    safeproj.project(model, given, Options(Selection(all=True), device=device))

    assert {key: each.data_ptr() for key, each in model.named_parameters()} == places
    assert {each.device.type for each in model.parameters()} == {where}
    model.save_pretrained(str(tmp_path / "found"))
    assert_close(load_file(tmp_path / "found" / FACTORS), expected, LINEAR)

"""The axis mu: every variant and control of the covariance-weighted correction, through PEFT."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safeproj import Covariance
from safeproj.errors import SafeprojError
from safeproj.methods.covariance.formulas import Moment
from safeproj.storage.arrays import from_torch, norm
from safeproj.sweeping.candidates import Place, Replaced
from safeproj.sweeping.controls import COMPLEMENT, RANDOM, SHRINK, SWAPPED, Sizes
from safeproj.sweeping.strengths import MUS, Strengths, strengths, turned
from tests.conformance.oracle import save
from tests.conformance.oracle import updates as updates_of
from tests.methods.covariance import oracle
from tests.methods.covariance.test_command import Place as Model
from tests.methods.covariance.test_command import lora, make, stored
from tests.report.test_schemas import validator
from tests.support import FACTORS, assert_refused, safeproj, tensors_of

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-lm"
DATA = EXAMPLE / "data"
SETS = ("--harmful", f"pairs={DATA / 'held_out_pairs.jsonl'}", "--skill", DATA / "new_skill.jsonl")
FEW = ("--limit", "8", "--max-new-tokens", "20", "--phrase", "sorry i will not")


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def adapter(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = lora(alpha_pattern={".*v_proj": 2})
    return save(model.model, config, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture(scope="module")
def found(model: Model, adapter: Path) -> Strengths:
    method = Covariance(safety_data=str(model.safety_stats), task_data=str(model.task_stats))
    return strengths(method, str(adapter))


def place_at(found: Strengths, mu: float) -> Place:
    return next(place for place in found.places(1000) if place.value == mu)


def updates(model: Model, adapter: Path, replaced: Replaced, place: Path) -> dict[str, Tensor]:
    """Return `ΔW` of every module, as PEFT computes it from a directory with these tensors."""
    shutil.copytree(adapter, place, dirs_exist_ok=True)
    save_file({**load_file(adapter / FACTORS), **tensors_of(replaced)}, place / FACTORS)
    return {name: each.matrix.double() for name, each in updates_of(model.model, place).items()}


@pytest.mark.parametrize("mu", [10.0, 0.3])
def test_tensors_are_those_that_patch_writes(
    model: Model, adapter: Path, found: Strengths, tmp_path: Path, mu: float
) -> None:
    result = safeproj(
        "patch", "--safety-data", model.safety_stats, "--task-data", model.task_stats,
        "--adapter", adapter, "--out", tmp_path / "out", "--mu", str(mu),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    written = load_file(tmp_path / "out" / FACTORS)
    replaced = place_at(found, mu).method()
    assert replaced.keys() == {name for name in written if ".lora_A." in name}
    assert all(torch.equal(each, written[name]) for name, each in tensors_of(replaced).items())


def test_controls_are_what_the_oracle_says(
    model: Model, adapter: Path, found: Strengths, tmp_path: Path
) -> None:
    place = place_at(found, 1.0)
    before = updates(model, adapter, {}, tmp_path / "before")
    H, S = model.moments(list(before))
    plain_S, plain_H = stored(model.task_stats), stored(model.safety_stats)
    method = updates(model, adapter, place.method(), tmp_path / "method")
    controls = {
        name: updates(model, adapter, made(), tmp_path / name)
        for name, made in place.controls.items()
    }
    assert controls.keys() == {SHRINK, RANDOM, SWAPPED, COMPLEMENT}
    total_before = total_after = 0.0
    for name, delta in before.items():
        size = float(delta.norm())
        corrected = oracle.corrected(delta, H[name], S[name], 1.0)
        assert float((method[name] - corrected).norm()) < 1e-5 * size
        assert float((controls[COMPLEMENT][name] - (delta - corrected)).norm()) < 1e-5 * size
        swapped = oracle.corrected(delta, plain_S[name], oracle.ridged(plain_H[name]), 1.0)
        assert float((controls[SWAPPED][name] - swapped).norm()) < 1e-4 * float(swapped.norm())
        benign = [float((each @ S[name] * each).sum()) for each in (delta, corrected)]
        factor = math.sqrt(benign[1] / benign[0])
        assert float((controls[SHRINK][name] - factor * delta).norm()) < 1e-4 * size
        total_before, total_after = total_before + benign[0], total_after + benign[1]
    assert place.factor == pytest.approx(math.sqrt(total_after / total_before), rel=1e-4)


def test_the_random_moment_has_the_spectrum_of_its_own(model: Model) -> None:
    tensors = load_file(model.task_stats)
    for name, matrix in tensors.items():
        whole = name.endswith(".moment")
        own = Moment(from_torch(matrix.double()), whole)
        other = turned(own, 0, name)
        assert other.whole == whole
        values = [numpy.linalg.eigvalsh(each.dense()) for each in (own, other)]
        assert norm(values[0] - values[1]) < 1e-9 * norm(values[0])
        assert norm(own.dense() - other.dense()) > 0.1 * norm(own.dense())


def test_the_random_control_is_the_correction_by_that_moment(
    model: Model, adapter: Path, found: Strengths, tmp_path: Path
) -> None:
    before = updates(model, adapter, {}, tmp_path / "before")
    random = updates(model, adapter, place_at(found, 1.0).controls[RANDOM](), tmp_path / "random")
    H, S = model.moments(list(before))
    for name, delta in before.items():
        corrected = oracle.corrected(delta, H[name], S[name], 1.0)
        # Another result, though the spectrum is that of H.
        assert float((random[name] - corrected).norm()) > 1e-3 * float(delta.norm())


def test_places_go_from_nothing_to_the_smallest_mu(found: Strengths) -> None:
    assert [place.value for place in found.places(1000)] == [None, *MUS]
    first, last = found.places(2)
    assert first.modules == ()
    assert first.method() == {}
    assert last.value == MUS[-1]
    assert found.axis == "mu"
    changes = [
        Sizes(found.adapter, found.modules).change(place.method())
        for place in found.places(1000)[1:]
    ]
    assert changes[0] < changes[-1]


def test_an_adapter_of_zeros_has_nothing_to_sweep(
    model: Model, adapter: Path, tmp_path: Path
) -> None:
    method = Covariance(safety_data=str(model.safety_stats), task_data=str(model.task_stats))
    zeros = tmp_path / "zeros"
    shutil.copytree(adapter, zeros)
    tensors = {name: torch.zeros_like(each) for name, each in load_file(zeros / FACTORS).items()}
    save_file(tensors, zeros / FACTORS, metadata={"format": "pt"})
    with pytest.raises(SafeprojError, match="all updates are zero"):
        strengths(method, str(zeros)).places(3)


@pytest.fixture(scope="module")
def swept() -> Any:
    result = safeproj(
        "sweep", "--method", "covariance", "--aligned", EXAMPLE / "aligned",
        "--safety-data", DATA / "safety.jsonl", "--task-data", DATA / "task.jsonl",
        "--adapter", EXAMPLE / "adapters" / "mixed", *SETS, *FEW, "--points", "3",
        "--format", "json", env={"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_the_command_measures_every_point_with_its_controls(swept: Any) -> None:
    validator("sweep").validate(swept)
    assert swept["method"] == "covariance"
    assert swept["axis"] == "mu"
    assert [each["value"] for each in swept["points"]] == [None, 1.0, 0.01]
    kinds = ["method", "uniform", "shrink", "random", "swapped", "complement"]
    assert all(set(each["trials"]) == set(kinds) for each in swept["points"][1:])


def test_the_correction_restores_refusals_where_a_random_moment_does_not(swept: Any) -> None:
    trials = swept["points"][1]["trials"]
    refused = {name: each["rates"]["pairs"]["refused"]["rate"] for name, each in trials.items()}
    assert refused["method"] == 1.0
    assert refused["random"] < 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--by", "layers", "--aligned", "a"], ["--by does not go with --safety-data"]),
        (["--task-data", "t.stats.safetensors"], ["--model is missing"]),
    ],
    ids=["by", "model"],
)
def test_unusable_options(options: list[str], words: list[str]) -> None:
    result = safeproj(
        "sweep", "--safety-data", "s.stats.safetensors", "--adapter", "x", *SETS, *options
    )
    assert_refused(result, *words)

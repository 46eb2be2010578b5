"""The axis weight: every variant and control of merging, as PEFT runs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import Tensor

from safeproj import Merge
from safeproj.errors import SafeprojError
from safeproj.sweeping.candidates import Place, Replaced
from safeproj.sweeping.controls import RANDOM, SHRINK, Sizes
from safeproj.sweeping.weights import WEIGHTS, Weights, weights
from tests.conformance.architectures import Built, build
from tests.conformance.oracle import save
from tests.conformance.oracle import updates as updates_of
from tests.methods.merge import oracle
from tests.report.test_schemas import validator
from tests.support import CONFIG, FACTORS, assert_refused, safeproj, tensors_of

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-lm"
DATA = EXAMPLE / "data"
SETS = ("--harmful", f"pairs={DATA / 'held_out_pairs.jsonl'}", "--skill", DATA / "new_skill.jsonl")
FEW = ("--limit", "4", "--max-new-tokens", "12", "--phrase", "sorry i will not")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build("llama", tmp_path_factory.mktemp("sweep"))


def lora(**settings: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"target_modules": ["q_proj", "up_proj"], "lora_alpha": 5, **settings})


@pytest.fixture(scope="module")
def adapters(pair: Built, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("adapters")
    own = save(pair.aligned_model, lora(r=3, alpha_pattern={"up_proj": 2}), root / "own")
    return own, save(pair.aligned_model, lora(r=2), root / "safe", seed=7)


@pytest.fixture(scope="module", params=[{}, {"merge_rank": 4}, {"merge_form": "low-rank"}], ids=str)
def found(request: pytest.FixtureRequest, adapters: tuple[Path, Path]) -> Weights:
    return weights(Merge(safe_adapter=str(adapters[1]), **request.param), str(adapters[0]))


def place_at(found: Weights, weight: float) -> Place:
    return next(place for place in found.places(1000) if place.value == weight)


def updates(pair: Built, found: Weights, replaced: Replaced, place: Path) -> dict[str, Tensor]:
    """Return `ΔW` of every module of the adapter that the model holds, with other tensors."""
    place.mkdir(exist_ok=True)
    shutil.copy(found.adapter.path(CONFIG), place / CONFIG)
    for name, content in found.adapter.documents.items():
        (place / name).write_bytes(content)
    tensors = tensors_of({**found.adapter.tensors, **replaced})
    save_file({key: each.contiguous() for key, each in tensors.items()}, place / FACTORS)
    return {key: each.matrix for key, each in updates_of(pair.aligned_model, place).items()}


def test_room_changes_no_update(
    pair: Built, adapters: tuple[Path, Path], found: Weights, tmp_path: Path
) -> None:
    before = updates_of(pair.aligned_model, adapters[0])
    there = updates(pair, found, {}, tmp_path / "there")
    for name, update in before.items():
        assert float((there[name] - update.matrix).norm()) <= 1e-12 * float(update.matrix.norm())


@pytest.mark.parametrize("weight", [0.2, 1.0])
def test_updates_are_those_that_patch_writes(
    pair: Built, adapters: tuple[Path, Path], found: Weights, tmp_path: Path, weight: float
) -> None:
    method = found.report.projector
    options = ["--merge-form", method["form"]]
    options += ["--merge-rank", str(method["merge_rank"])] if "merge_rank" in method else []
    result = safeproj(
        "patch", adapters[0], "--safe-adapter", adapters[1], "--weight", str(weight),
        "--out", tmp_path / "out", *options,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    written = updates_of(pair.aligned_model, tmp_path / "out")
    there = updates(pair, found, place_at(found, weight).method(), tmp_path / "there")
    for name, update in written.items():
        assert float((there[name] - update.matrix).norm()) <= 1e-12 * float(update.matrix.norm())


def test_controls_are_what_the_oracle_says(
    pair: Built, adapters: tuple[Path, Path], found: Weights, tmp_path: Path
) -> None:
    own, safe = (updates_of(pair.aligned_model, each) for each in adapters)
    place = place_at(found, 0.5)
    assert place.controls.keys() == {SHRINK, RANDOM}
    made = updates(pair, found, place.method(), tmp_path / "made")
    controls = {
        name: updates(pair, found, make(), tmp_path / name) for name, make in place.controls.items()
    }
    for name, update in own.items():
        delta, size = update.matrix, float(update.matrix.norm())
        factor = float(made[name].norm()) / size
        assert float((controls[SHRINK][name] - factor * delta).norm()) <= 1e-6 * size
        if found.report.projector["form"] != "exact":
            continue
        turned = (controls[RANDOM][name] - 0.5 * delta) / 0.5  # Q ΔW_safe
        wanted = safe[name].matrix
        assert float(turned.norm()) == pytest.approx(float(wanted.norm()), rel=1e-5)
        gram = turned.T @ turned - wanted.T @ wanted  # the same but for its output directions
        assert float(gram.norm()) <= 1e-5 * float(wanted.norm()) ** 2
        assert float((turned - wanted).norm()) > 0.5 * float(wanted.norm())
        exact = oracle.merged(delta, wanted, 0.5)
        assert float((made[name] - exact).norm()) <= 1e-6 * size


def test_places_go_from_nothing_to_the_safe_adapter(found: Weights) -> None:
    assert [place.value for place in found.places(1000)] == [None, *WEIGHTS]
    first, last = found.places(2)
    assert first.modules == ()
    assert first.method() == {}
    assert last.value == 1.0
    assert found.axis == "weight"
    sizes = Sizes(found.adapter, found.modules)
    changes = [sizes.change(place.method()) for place in found.places(1000)[1:]]
    assert changes == sorted(changes)


def test_only_what_patch_would_merge_is_swept() -> None:
    models, adapters = (str(EXAMPLE / "base"), str(EXAMPLE / "aligned")), EXAMPLE / "adapters"
    method = Merge(*models, safe_adapter=str(adapters / "skill"))
    swept = weights(method, str(adapters / "bad"))
    low = {each.name for each in swept.report.modules if (each.cosine or 0.0) <= 0.35}
    assert 0 < len(low) < len(swept.report.modules)
    assert [set(place.modules) for place in swept.places(3)] == [set(), low, low]


def test_nothing_to_merge_is_nothing_to_sweep(pair: Built, adapters: tuple[Path, Path]) -> None:
    method = Merge(str(pair.base), str(pair.aligned), safe_adapter=str(adapters[1]))
    with pytest.raises(SafeprojError, match=r"no module has a cosine at or below 0\.35"):
        weights(method, str(adapters[0])).places(3)


def test_the_command_measures_every_point_with_its_controls(tmp_path: Path) -> None:
    result = safeproj(
        "sweep", EXAMPLE / "adapters" / "mixed", "--safe-adapter", EXAMPLE / "adapters" / "skill",
        "--model", EXAMPLE / "aligned", *SETS, *FEW, "--points", "2",
        "--format", "json", "--format", "table", "--format", "html", "--format", "markdown",
        "--output", "-", *(part for kind in ("txt", "html", "md")
                           for part in ("--output", tmp_path / f"x.{kind}")),
        env={"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    swept = json.loads(result.stdout)
    validator("sweep").validate(swept)
    assert swept["method"] == "merge"
    assert swept["axis"] == "weight"
    assert [each["value"] for each in swept["points"]] == [None, 1.0]
    assert set(swept["points"][1]["trials"]) == {"method", "uniform", "shrink", "random"}
    text = (tmp_path / "x.txt").read_text("utf-8")
    assert "weight" in text
    assert "random safe" in text


@pytest.mark.parametrize("axis", ["layers", "threshold"])
def test_nothing_else_is_varied(axis: str) -> None:
    result = safeproj("sweep", "x", "--safe-adapter", "y", "--by", axis, "--model", "m", *SETS)
    assert_refused(result, "--by does not go with --safe-adapter, with which weight is varied")

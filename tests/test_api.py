"""The public Python API beside `inspect` and its like: what makes files, and what runs a model."""

from __future__ import annotations

import subprocess
import sys
from inspect import getdoc, isclass, signature
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import safeproj
from safeproj import SafeprojError

TINY = Path(__file__).parents[1] / "examples" / "tiny-lm"
DATA = TINY / "data"
BASE, ALIGNED = str(TINY / "base"), str(TINY / "aligned")
BAD = str(TINY / "adapters" / "bad")
JUDGE = safeproj.Keywords(("sorry i will not",))
FEW = safeproj.Generation(max_new_tokens=12)
FEED = safeproj.Feed(("q_proj", "v_proj"), device="cpu", dtype="float32")


def prompts(name: str, kind: Any, count: int = 4) -> Any:
    return safeproj.read_prompts(str(DATA / name), kind).first(count)


def test_all_is_listed_and_importing_it_imports_no_torch() -> None:
    program = (
        "import sys, safeproj\n"
        "print(dir(safeproj) == safeproj.__all__, 'torch' in sys.modules)\n"
        "import safeproj.sweeping.run, safeproj.evaluation.run\n"
        "from safeproj import *\n"
        "print(callable(sweep), callable(evaluate), salora.attach.__name__, 'exports' in vars())\n"
        "print(set(safeproj.__all__) - set(vars()), dir(salora) == salora.__all__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8")
    assert done.stdout == "True False\nTrue True attach False\nset() True\n", done.stderr
    with pytest.raises(AttributeError, match="module 'safeproj' has no attribute 'nothing'"):
        _ = safeproj.nothing  # type: ignore[attr-defined]


@pytest.mark.parametrize("package", [safeproj, safeproj.salora])
def test_docstrings_say_what_is_given_returned_and_raised(package: ModuleType) -> None:
    public = {name: getattr(package, name) for name in dir(package)}
    made = {f"{name}.make": each.make for name, each in public.items() if hasattr(each, "make")}
    functions = {name: each for name, each in {**public, **made}.items() if not isclass(each)}
    for name, function in functions.items():
        if not callable(function):
            continue
        said = getdoc(function) or ""
        assert [each for each in signature(function).parameters if f"{each}:" not in said] == []
        assert said.startswith("Return ") or "Returns:" in said, name


def test_an_alignment_file_stands_for_two_checkpoints(tmp_path: Path) -> None:
    out = tmp_path / "a.safealign.safetensors"
    made = safeproj.SafeLora.make(out, BASE, ALIGNED, safeproj.Form(exact=True))
    assert isinstance(made, safeproj.Made)
    assert made.nbytes == out.stat().st_size
    assert made.describe().endswith("exact")
    found = safeproj.inspect(safeproj.SafeLora(alignment=str(out)), BAD)
    expected = safeproj.inspect(safeproj.SafeLora(BASE, ALIGNED), BAD)
    for ours, theirs in zip(found.modules, expected.modules, strict=True):
        assert ours.cosine == pytest.approx(theirs.cosine, abs=1e-5)
    with pytest.raises(SafeprojError, match="give overwrite"):
        safeproj.SafeLora.make(out, BASE, ALIGNED)


def test_a_safety_module_is_made_of_a_model_and_data(tmp_path: Path) -> None:
    out = tmp_path / "a.safety.safetensors"
    steps: list[tuple[int, int]] = []
    made = safeproj.Salora.make(
        out, ALIGNED, DATA / "safety.jsonl", 8, FEED, on_batch=lambda *step: steps.append(step)
    )
    assert made.nbytes == out.stat().st_size
    assert "8 layers, 8 directions" in made.describe()
    assert steps[-1][0] == steps[-1][1]
    report = safeproj.inspect(
        safeproj.Salora(str(out)),
        BAD,
        safeproj.Options(safeproj.Selection(include=("q_proj", "v_proj"))),
    )
    assert report.method == "salora"
    with pytest.raises(SafeprojError, match="rank must"):
        safeproj.Salora.make(tmp_path / "b.safetensors", ALIGNED, DATA / "safety.jsonl", 0)


def test_statistics_are_made_of_a_model_and_data(tmp_path: Path) -> None:
    safety, benign = (tmp_path / f"{name}.stats.safetensors" for name in ("safety", "benign"))
    made = safeproj.Covariance.make(safety, ALIGNED, DATA / "safety.jsonl", "all", FEED)
    assert "200 samples" in made.describe()
    made = safeproj.Covariance.make(benign, ALIGNED, 20, feed=FEED)
    assert made.describe().startswith("20 samples")
    method = safeproj.Covariance(safety_data=str(safety), task_data=str(benign))
    chosen = safeproj.Options(safeproj.Selection(include=("q_proj", "v_proj")))
    assert safeproj.inspect(method, BAD, chosen).method == "covariance"


def test_a_model_is_measured_with_and_without_an_adapter(tmp_path: Path) -> None:
    pairs = prompts("held_out_pairs.jsonl", "harmful")
    asked: list[str] = []

    def judge() -> safeproj.Keywords:
        asked.append("judge")
        return JUDGE

    found = safeproj.evaluate(
        ALIGNED, [BAD], [pairs], judge, FEW, device="cpu", responses=tmp_path / "answers"
    )
    assert [each.name for each in found.subjects] == ["no adapter", "bad"]
    assert found.subjects[1].sets["held_out_pairs"]["complied"].value == 1.0
    assert asked == ["judge"]
    assert len(list((tmp_path / "answers").iterdir())) == 2
    with pytest.raises(SafeprojError, match="batch_size"):
        safeproj.evaluate(ALIGNED, [BAD], [pairs], JUDGE, safeproj.Generation(0))


def test_an_adapter_is_swept() -> None:
    sets = [prompts("held_out_pairs.jsonl", "harmful"), prompts("new_skill.jsonl", "skill")]
    method = safeproj.SafeLora(BASE, ALIGNED)
    steps: list[tuple[int, int]] = []
    found = safeproj.sweep(
        method,
        BAD,
        sets,
        JUDGE,
        safeproj.Options(device="cpu"),
        generation=FEW,
        points=2,
        on_step=lambda *step: steps.append(step),
    )
    assert [point.modules != () for point in found.points] == [False, True]
    assert found.axis == "layers"
    assert steps == [(count, 7) for count in range(8)]
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"axis": "mu"}, "axis does not go with"),
        ({"points": 1}, "points must"),
        ({"wanted_refusal": 2.0}, "wanted_refusal must"),
        ({"wanted_on": "other"}, "wanted_on other"),
    )
    for given, words in refused:
        with pytest.raises(SafeprojError, match=words):
            safeproj.sweep(method, BAD, sets, JUDGE, **given)
    with pytest.raises(SafeprojError, match=r"model is missing: .* from alignment, safety_module"):
        safeproj.sweep(safeproj.Salora("module.safetensors"), BAD, sets, JUDGE)

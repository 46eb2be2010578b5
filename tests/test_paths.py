"""Paths are taken wherever the text of one is: by every public function, method and data class."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import safeproj
from safeproj import SafeprojError, salora
from safeproj.gate.policy import write_template
from safeproj.gate.signing import sign
from tests.gate.test_signing import make_keys

TINY = Path(__file__).parents[1] / "examples" / "tiny-lm"
BASE, ALIGNED, BAD = TINY / "base", TINY / "aligned", TINY / "adapters" / "bad"
SAFETY = TINY / "data" / "safety.jsonl"
JUDGE = safeproj.Keywords(("sorry i will not",))
FEW = safeproj.Generation(max_new_tokens=12)
CPU = safeproj.Options(device="cpu")


@dataclass(frozen=True)
class Place:
    """A path that is none of pathlib's."""

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)


As = Callable[[Path], Any]
KINDS: dict[str, As] = {"str": str, "Path": Path, "PathLike": Place}


def files(directory: Path) -> dict[str, int]:
    return {each.name: each.stat().st_size for each in directory.iterdir()}


def scores(c: As, out: Path) -> Iterator[tuple[str, Any]]:
    """Go through what reads and writes adapters and files that stand for models."""
    method = safeproj.SafeLora(base=c(BASE), aligned=c(ALIGNED))
    yield "SafeLora", (method, method.sources)
    before = safeproj.inspect(method, c(BAD), CPU)
    yield "inspect", before.to_dict()
    yield "inspect_many", safeproj.reports(safeproj.inspect_many(method, [c(BAD)])).to_dict()
    yield "patch", safeproj.patch(method, c(BAD), c(out / "bad")).to_dict()
    yield "written", files(out / "bad")
    many = safeproj.patch_many(method, [c(BAD), c(TINY / "adapters" / "mixed")], c(out / "many"))
    yield "patch_many", safeproj.reports(many).to_dict()
    write_template(out / "policy.toml")
    (out / "eval.json").write_text("{}", "utf-8")
    checked = safeproj.check(method, [c(BAD)], c(out / "policy.toml"), CPU, original=c(BAD))
    yield "check", checked.to_dict()["checks"]
    with pytest.raises(SafeprojError, match=re.escape(f"evaluations {out / 'eval.json'}: ")):
        safeproj.check(method, [c(BAD)], evaluations=[c(out / "eval.json")])
    full = safeproj.FullModel(c(ALIGNED), c(ALIGNED))
    extracted = safeproj.extract(c(BASE), c(ALIGNED), 2, c(out / "extracted"), options=CPU)
    yield "extract", [each.error for each in extracted.modules]
    yield "FullModel", (full, safeproj.inspect(method, full, CPU).to_dict())
    keys = make_keys(out / "keys")
    sign(out / "bad", keys.private)
    verified = safeproj.verify(c(out / "bad"), c(BAD), method, public_key=c(keys.public))
    yield "verify", [each.to_dict()["findings"] for each in verified.checks]
    yield "Policy", safeproj.Policy(public_key=c(BAD)).to_dict()["public-key"]
    unmeasured = safeproj.repair(c(ALIGNED), c(BAD), c(out / "repaired"), base=c(BASE))
    yield "repair", {**unmeasured.to_dict(), "out": None, "command": None}
    file = out / "x.safealign.safetensors"
    yield "align", safeproj.align(c(BASE), c(ALIGNED), c(file), options=CPU)
    again = out / "y.safealign.safetensors"
    yield "SafeLora.make", safeproj.SafeLora.make(c(again), c(BASE), c(ALIGNED))
    aligned = safeproj.inspect(safeproj.SafeLora(alignment=c(file)), c(BAD)).modules
    yield "alignment", [each.cosine for each in aligned]
    before.save(c(out / "report.json"))
    yield "Report.save", json.loads((out / "report.json").read_text("utf-8"))


def runs(c: As, out: Path) -> Iterator[tuple[str, Any]]:
    """Go through what runs a model."""
    feed = safeproj.Feed(device="cpu", dtype="float32")
    few = out / "few.jsonl"
    few.write_text("".join(SAFETY.read_text("utf-8").splitlines(keepends=True)[:8]), "utf-8")
    yield "Feed.load", len(feed.load(c(ALIGNED), c(few)).batches)
    file = out / "x.safety.safetensors"
    yield "Salora.make", safeproj.Salora.make(c(file), c(ALIGNED), c(few), 4, feed).nbytes > 0
    module = salora.SafetyModule.load(c(file))
    yield "SafetyModule", module.save(c(out / "y.safety.safetensors")) > 0
    yield "fold", salora.fold(c(BAD), module, c(out / "folded"))
    tokenizer = AutoTokenizer.from_pretrained(str(ALIGNED))
    yield "read_data", salora.read_data(c(few), tokenizer).source == str(few)
    found = safeproj.inspect(safeproj.Salora(c(file)), c(BAD))
    yield "Salora", [each.cosine for each in found.modules]
    for name in ("safety", "task"):
        made = safeproj.Covariance.make(c(out / f"{name}.safetensors"), c(ALIGNED), c(few), "all")
        yield "Covariance.make", made
    data = (c(out / "safety.safetensors"), c(out / "task.safetensors"))
    found = safeproj.inspect(safeproj.Covariance(c(ALIGNED), *data), c(BAD))
    yield "Covariance", [each.cosine for each in found.modules]
    found = safeproj.inspect(safeproj.SafeDelta(c(ALIGNED), c(few)), c(BAD))
    yield "SafeDelta", [each.cosine for each in found.modules]
    sets = [
        safeproj.read_prompts(c(TINY / "data" / "held_out_pairs.jsonl"), "harmful").first(3),
        safeproj.read_prompts(c(TINY / "data" / "new_skill.jsonl"), "skill").first(3),
    ]
    yield "read_prompts", sets
    (out / "phrases.txt").write_text("no\n", "utf-8")
    yield "read_phrases", safeproj.read_phrases(c(out / "phrases.txt"))
    measured = safeproj.evaluate(
        c(ALIGNED), [c(BAD)], sets, JUDGE, FEW, device="cpu", responses=c(out / "answers")
    )
    yield "evaluate", [each.to_dict() for each in measured.subjects]
    tried = safeproj.sweep(
        safeproj.SafeLora(c(BASE), c(ALIGNED)), c(BAD), sets, JUDGE, CPU, model=c(ALIGNED),
        generation=FEW, points=2,
    )  # fmt: skip
    yield "sweep", tried.to_dict()
    refused = safeproj.refusals(
        c(ALIGNED), c(few), c(out / "refusals.jsonl"), JUDGE, FEW, device="cpu", limit=4
    )
    yield "refusals", refused.asked
    with pytest.raises(SafeprojError, match=r"^source .*/aligned: its tokenizer has no chat temp"):
        safeproj.load_guard(c(ALIGNED), "cpu")
    yield "load_guard", None


def test_all_functions_are_gone_through() -> None:
    gone_through = inspect.getsource(scores) + inspect.getsource(runs)
    functions = [name for name in dir(safeproj) if inspect.isfunction(getattr(safeproj, name))]
    functions.remove("project")  # takes a model that is in memory, and no path
    assert len(functions) > 12
    assert [name for name in functions if f"safeproj.{name}(" not in gone_through] == []


@pytest.mark.parametrize("kind", ["Path", "PathLike"])
@pytest.mark.parametrize("given", [scores, runs])
def test_every_function_takes_paths(given: Any, kind: str, tmp_path: Path) -> None:
    found = {}
    for name in ("str", kind):
        place = tmp_path / "place"  # some records have it
        place.mkdir()
        found[name] = list(given(KINDS[name], place))
        shutil.rmtree(place)
    for (name, expected), (other, result) in zip(found["str"], found[kind], strict=True):
        assert name == other
        assert result == expected, name


def test_a_path_is_never_looked_for_on_the_hub() -> None:
    method = safeproj.SafeLora(base=Path("org/base"), aligned=ALIGNED)
    with pytest.raises(SafeprojError, match=r"^\./org/base: no such file or directory"):
        safeproj.inspect(method, BAD)
    assert safeproj.SafeLora(base="org/base", aligned=ALIGNED).base == "org/base"


def test_a_path_has_no_name_of_a_set_in_front() -> None:
    with pytest.raises(SafeprojError, match=r"harmful a=b\.jsonl: no such file"):
        safeproj.read_prompts(Path("a=b.jsonl"), "harmful")


def test_one_path_is_not_several_adapters() -> None:
    method = safeproj.SafeLora(BASE, ALIGNED)
    for given in (BAD, str(BAD)):
        with pytest.raises(TypeError, match="expected the SRC of several adapters, found one"):
            safeproj.inspect_many(method, given)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="expected the SRC of several adapters, found one"):
            safeproj.patch_many(method, given, "out")  # type: ignore[arg-type]


PLACES = {
    *("adapter", "adapters", "aligned", "alignment", "base", "data", "directory", "evaluations"),
    *("original", "out", "patched", "path", "place", "policy", "prompts", "public_key"),
    *("responses", "safety_data", "safety_module", "source", "spec", "task_data"),
}
"""What arguments are called that name a place."""

IN_MEMORY = {("ProjectionCallback", "adapter"), ("project", "adapter")}
"""Names of an adapter in memory."""

RECORDS = re.compile(
    r"safeproj\.(api|records|methods\.recorded|evaluation\.(sets|refusals)|lm\.data)\b"
)
"""Modules whose classes say what was found: no one makes them, and they hold text."""


def signatures() -> Iterator[tuple[str, str, str]]:
    """Yield the arguments of all that is public, and their annotations as they are written."""
    for package in (safeproj, salora):
        for name in dir(package):
            each = getattr(package, name)
            if isinstance(each, type):
                made = [(name, each)] if not RECORDS.match(each.__module__) else []
                made += [
                    (f"{name}.{method}", getattr(each, method))
                    for method in ("load", "make", "save")
                    if hasattr(each, method)
                ]
            else:
                made = [(name, each)] if callable(each) else []
            for title, function in made:
                for parameter in inspect.signature(function).parameters.values():
                    yield title, parameter.name, str(parameter.annotation)


def test_annotations_say_so() -> None:
    found = [each for each in signatures() if each[1] in PLACES and each[:2] not in IN_MEMORY]
    assert len(found) > 60
    for title, name, annotation in found:
        taken = re.search(r"\b(Src|StrPath|os\.PathLike\[str\])", annotation)
        assert taken or annotation == "Any", (title, name, annotation)
    for title, name, annotation in signatures():
        assert not re.search(r"(?<!Str)Path\b", annotation), (title, name, annotation)

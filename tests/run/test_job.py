"""Many adapters in one run, through the Python API: what is read, how often, and what fails."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import safeproj as api
from safeproj import SafeLora
from safeproj.engine import Progress
from safeproj.errors import SafeprojError
from safeproj.plan.select import Selection
from safeproj.records.profile import Profile
from safeproj.report import Report, render
from safeproj.run import job
from tests.conftest import Trio
from tests.support import (
    CONFIG,
    FACTORS,
    assert_complete,
    moved,
    read_json,
    save_adapter,
    snapshot,
    tiny_llama,
)

ALL = api.Options(selection=Selection(all=True), workers=2)


@dataclass
class Seen:
    """An observer that keeps what it is told."""

    starts: list[tuple[int, int]] = field(default_factory=list)
    nbytes: int = 0
    finished: int = 0

    def ran(self, done: int, total: int) -> None:
        raise AssertionError(f"{done} of {total} batches, but no data is run here")

    def start(self, modules: int, nbytes: int) -> None:
        self.starts.append((modules, nbytes))

    def progress(self, event: Progress) -> None:
        self.nbytes += event.nbytes
        self.finished += event.finished


@dataclass(frozen=True)
class Found:
    """The reports of one run, and what it read."""

    reports: list[Report]
    read_bytes: int
    seen: Seen


@pytest.fixture(scope="module")
def adapters(trio: Trio, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three adapters of the trio's models with the same targets and different ranks."""
    root = tmp_path_factory.mktemp("adapters")
    return [
        str(save_adapter(trio.aligned_model, root / f"rank-{r}", seed=r, r=r)) for r in (2, 5, 8)
    ]


def inspect_many(trio: Trio, adapters: Sequence[str]) -> Found:
    """Inspect adapters of the trio's models, all of which must succeed."""
    seen, profile = Seen(), Profile()
    options = replace(ALL, observer=seen, profile=profile)
    outcomes = api.inspect_many(trio.method, adapters, options)
    assert [outcome.source for outcome in outcomes] == list(adapters)
    return Found([report_of(each) for each in outcomes], profile.usage.read_bytes, seen)


def report_of(outcome: api.Outcome) -> Report:
    assert outcome.error is None
    assert outcome.report is not None
    return outcome.report


def error_of(outcome: api.Outcome) -> str:
    assert outcome.report is None
    assert outcome.error is not None
    return outcome.error.message


def inspect(trio: Trio, adapter: str) -> Report:
    return api.inspect(trio.method, adapter, ALL)


def assert_alike(found: Any, expected: Any) -> None:
    """Compare two JSON objects: numbers to what the order of a float32 sum may change."""
    assert type(found) is type(expected)
    if isinstance(found, dict):
        assert found.keys() == expected.keys()
        for key in found:
            assert_alike(found[key], expected[key])
    elif isinstance(found, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_alike(*pair)
    elif isinstance(found, float):
        assert found == pytest.approx(expected, rel=1e-6)
    else:
        assert found == expected


# --- what is read


def test_more_adapters_of_the_same_weights_read_no_more(trio: Trio, adapters: list[str]) -> None:
    one, many = inspect_many(trio, adapters[:1]), inspect_many(trio, adapters)
    assert one.read_bytes > 0
    assert many.read_bytes == one.read_bytes
    assert many.seen == one.seen
    assert many.seen.starts == [(4, many.seen.nbytes)]
    assert many.seen.finished == 4


def test_other_weights_are_read_as_well(trio: Trio, adapters: list[str], tmp_path: Path) -> None:
    other = save_adapter(trio.aligned_model, tmp_path / "o", target_modules=["q_proj", "o_proj"])
    found = inspect_many(trio, [adapters[0], str(other)])
    ((weights, nbytes),) = found.seen.starts
    assert weights == 6  # q, v and o of two layers
    assert found.read_bytes == nbytes == found.seen.nbytes == 2 * 4 * 2 * (2 * 32 * 32 + 16 * 32)


def test_in_company_the_scores_are_the_same(trio: Trio, adapters: list[str]) -> None:
    many = inspect_many(trio, adapters)
    for report, adapter in zip(many.reports, adapters, strict=True):
        assert_alike(report.to_dict(), inspect(trio, adapter).to_dict())


def test_each_batch_reads_once(
    trio: Trio, adapters: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = inspect_many(trio, adapters)
    monkeypatch.setattr(job, "BATCH", 1)
    apart = inspect_many(trio, adapters)
    assert apart.read_bytes == 3 * together.read_bytes
    assert apart.seen.starts == 3 * together.seen.starts
    assert apart.seen.nbytes == 3 * together.seen.nbytes
    for report, other, adapter in zip(apart.reports, together.reports, adapters, strict=True):
        assert_alike(report.to_dict(), other.to_dict())
        assert report == inspect(trio, adapter)  # alone in its batch, as in a run of its own


def nbytes_of(adapter: str) -> int:
    return sum(tensor.nbytes for tensor in load_file(Path(adapter, FACTORS)).values())


@pytest.mark.parametrize(("short_of", "batches"), [(0, 1), (1, 2)])
def test_as_many_as_fit_are_held_at_a_time(
    trio: Trio,
    adapters: list[str],
    monkeypatch: pytest.MonkeyPatch,
    short_of: int,
    batches: int,
) -> None:
    monkeypatch.setattr(job, "BATCH", sum(map(nbytes_of, adapters)) - short_of)
    assert len(inspect_many(trio, adapters).seen.starts) == batches


def test_batches_are_written_as_one(
    trio: Trio, adapters: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.patch_many(trio.method, adapters, tmp_path / "one", ALL)
    monkeypatch.setattr(job, "BATCH", nbytes_of(adapters[0]) + nbytes_of(adapters[1]))
    api.patch_many(trio.method, adapters, tmp_path / "two", ALL)
    for adapter in map(Path, adapters):
        one, two = (load_file(tmp_path / run / adapter.name / FACTORS) for run in ("one", "two"))
        for key, tensor in one.items():
            assert float((two[key] - tensor).norm()) <= 1e-6 * float(tensor.norm()), key
        assert_complete(tmp_path / "two" / adapter.name, adapter)


def test_an_alignment_file_serves_many(trio: Trio, adapters: list[str], tmp_path: Path) -> None:
    file = tmp_path / "pair.safetensors"
    api.align(str(trio.base), str(trio.aligned), file, api.Form(exact=True), ["q_proj", "v_proj"])
    one, many = Profile(), Profile()
    method = SafeLora(alignment=str(file))
    api.inspect(method, adapters[0], replace(ALL, profile=one))
    outcomes = api.inspect_many(method, adapters, replace(ALL, profile=many))
    assert many.usage.read_bytes == one.usage.read_bytes > 0
    for outcome, adapter in zip(outcomes, adapters, strict=True):
        expected = inspect(trio, adapter)
        for found, wanted in zip(report_of(outcome).modules, expected.modules, strict=True):
            assert found.name == wanted.name
            assert found.cosine == pytest.approx(wanted.cosine, rel=1e-5)
            assert found.scale == pytest.approx(wanted.scale, rel=1e-5)


# --- what fails


@pytest.fixture
def broken(adapters: list[str], tmp_path: Path) -> Path:
    """An adapter with a value that is not finite."""
    path = tmp_path / "broken"
    shutil.copytree(adapters[0], path)
    tensors = load_file(path / FACTORS)
    next(iter(tensors.values()))[0, 0] = math.nan
    save_file(tensors, path / FACTORS, metadata={"format": "pt"})
    return path


def test_outcomes_come_in_order_with_a_report_or_an_error(
    trio: Trio, adapters: list[str], broken: Path
) -> None:
    given = [adapters[1], str(broken), "/missing/adapter", adapters[0]]
    outcomes = api.inspect_many(trio.method, given, ALL)
    assert [outcome.source for outcome in outcomes] == given
    assert [outcome.name for outcome in outcomes] == ["rank-5", "broken", "adapter", "rank-2"]
    assert report_of(outcomes[0]).inputs["adapter"]["source"] == adapters[1]
    assert "NaN or Inf" in error_of(outcomes[1])
    assert "no such file" in error_of(outcomes[2])
    assert report_of(outcomes[3]) == report_of(
        api.inspect_many(trio.method, [adapters[1], adapters[0]], ALL)[1]
    )

    found = api.reports(outcomes).to_dict()
    assert found["schema"] == "safeproj.reports/1"
    assert found["summary"] == {"adapters": 2, "failed": 2}
    assert list(found["reports"]) == ["rank-5", "rank-2"]
    assert found["reports"]["rank-2"] == report_of(outcomes[3]).to_dict()
    assert found["failures"] == {
        "broken": {"source": str(broken), "error": error_of(outcomes[1])},
        "adapter": {"source": "/missing/adapter", "error": error_of(outcomes[2])},
    }


def test_one_adapter_that_fails_raises(trio: Trio, broken: Path, tmp_path: Path) -> None:
    with pytest.raises(SafeprojError, match="NaN or Inf"):
        api.inspect(trio.method, str(broken))
    with pytest.raises(SafeprojError, match="NaN or Inf"):
        api.patch(trio.method, str(broken), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_directory_of_adapters_is_no_single_adapter(trio: Trio, adapters: list[str]) -> None:
    with pytest.raises(SafeprojError, match=f"{CONFIG} not found"):
        inspect(trio, str(Path(adapters[0]).parent))


@pytest.mark.parametrize("checkpoint", ["base", "aligned"])
def test_a_missing_checkpoint_raises_before_any_adapter_is_read(
    trio: Trio, tmp_path: Path, checkpoint: str
) -> None:
    pair = {"base": str(trio.base), "aligned": str(trio.aligned), checkpoint: "/missing/model"}
    method = SafeLora(pair["base"], pair["aligned"])
    missing = [str(tmp_path / name) for name in ("alpha", "beta")]
    with pytest.raises(SafeprojError, match="/missing/model: no such file"):
        api.patch_many(method, missing, tmp_path / "out", ALL)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_raises(trio: Trio, adapters: list[str], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(trio.base, base)
    (base / "model.safetensors.index.json").write_text("{")
    with pytest.raises(SafeprojError, match="is not JSON"):
        api.patch_many(replace(trio.method, base=str(base)), adapters, tmp_path / "out", ALL)
    assert not (tmp_path / "out").exists()


def test_base_and_aligned_of_one_model_raise(
    trio: Trio, adapters: list[str], tmp_path: Path
) -> None:
    shutil.copytree(trio.aligned, tmp_path / "base")
    with pytest.raises(SafeprojError, match="are the same model"):
        api.inspect_many(replace(trio.method, base=str(tmp_path / "base")), adapters, ALL)


def test_a_weight_that_only_one_adapter_needs_stops_that_one(
    trio: Trio, adapters: list[str], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(trio.base, base)
    name = "model.layers.1.mlp.down_proj.weight"
    shard = read_json(base / "model.safetensors.index.json")["weight_map"][name]
    (base / shard).unlink()
    other = save_adapter(
        trio.aligned_model, tmp_path / "other", target_modules=["v_proj", "down_proj"]
    )
    method = replace(trio.method, base=str(base))
    outcomes = api.inspect_many(method, [str(other), adapters[0]], ALL)
    assert name in error_of(outcomes[0])
    report_of(outcomes[1])


def test_an_update_too_large_for_float32_fails_alone(tmp_path: Path) -> None:
    """All updates of a weight lie side by side: what overflows must not reach the others."""
    base = tiny_llama(seed=7)
    aligned = moved(base, size=30.0)
    base.save_pretrained(tmp_path / "base")
    aligned.save_pretrained(tmp_path / "aligned")
    names = ("before", "huge", "after")
    given = [save_adapter(aligned, tmp_path / name, seed=i) for i, name in enumerate(names)]
    tensors = load_file(given[1] / FACTORS)
    for key in tensors:
        if "lora_B" in key:  # finite by itself
            tensors[key] = torch.full_like(tensors[key], 3e38)
    save_file(tensors, given[1] / FACTORS, metadata={"format": "pt"})
    method = SafeLora(str(tmp_path / "base"), str(tmp_path / "aligned"))

    found = api.patch_many(method, list(map(str, given)), tmp_path / "out", ALL)

    assert "too large for float32" in error_of(found[1])
    assert "self_attn" in error_of(found[1])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"before", "after"}
    for i in (0, 2):
        alone = api.inspect(method, str(given[i]), ALL)
        assert_alike(report_of(found[i]).to_dict(), alone.to_dict())
        assert_complete(tmp_path / "out" / names[i], given[i])


def test_an_input_factor_too_large_for_its_square_fails_alone(
    trio: Trio, adapters: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "huge"
    shutil.copytree(adapters[0], path)
    tensors = {key: tensor.double() for key, tensor in load_file(path / FACTORS).items()}
    large = {key: tensor * (1e200 if "lora_A" in key else 1) for key, tensor in tensors.items()}
    save_file(large, path / FACTORS, metadata={"format": "pt"})
    given = [str(path), adapters[1]]
    outcomes = api.inspect_many(trio.method, given, ALL)
    found = json.loads(render(api.reports(outcomes), "json"))
    assert "rank-5" in found["reports"]
    assert all(m["cosine"] <= 1 for report in found["reports"].values() for m in report["modules"])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_no_text_fails_alone(
    trio: Trio, adapters: list[str], tmp_path: Path
) -> None:
    shutil.copytree(adapters[0], tmp_path / "runs" / os.fsdecode(b"latin-\xe9"))
    shutil.copytree(adapters[1], tmp_path / "runs" / "text")
    given = [str(tmp_path / "runs")]
    outcomes = api.inspect_many(trio.method, given, ALL)
    errors = {outcome.name: outcome.error for outcome in outcomes}
    assert errors.pop("text") is None
    (error,) = errors.values()
    assert "not UTF-8; rename it" in str(error)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
@pytest.mark.parametrize("name", [b"latin-\xe9.bin", b"latin-\xe9.txt"])
def test_a_file_whose_name_is_no_text_stops_that_adapter(
    trio: Trio, adapters: list[str], tmp_path: Path, name: bytes
) -> None:
    path = tmp_path / "inside"
    shutil.copytree(adapters[0], path)
    (path / os.fsdecode(name)).write_bytes(b"x")
    out = tmp_path / "out"
    given = [str(path), adapters[1]]
    outcomes = api.patch_many(trio.method, given, out, ALL)
    assert f"{ascii(os.fsdecode(name))[1:-1]} is not UTF-8; rename it" in error_of(outcomes[0])
    assert_complete(out / "rank-5", Path(adapters[1]))
    assert not (out / "inside").exists()


# --- where it is written


def test_what_is_in_the_way_of_one_adapter_stops_that_one(
    trio: Trio, adapters: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "rank-2").mkdir(parents=True)
    (out / "rank-5").write_text("a file")
    before = snapshot(out)
    seen = Seen()
    outcomes = api.patch_many(trio.method, adapters, out, replace(ALL, observer=seen))
    assert f"--out {out / 'rank-2'}: exists; give --overwrite" in error_of(outcomes[0])
    assert f"--out {out / 'rank-5'}: is a file" in error_of(outcomes[1])
    assert report_of(outcomes[2]).projected == 4
    assert {name: snapshot(out)[name] for name in before} == before
    assert_complete(out / "rank-8", Path(adapters[2]))


def test_a_dry_run_says_the_same_and_writes_nothing(
    trio: Trio, adapters: list[str], tmp_path: Path
) -> None:
    dry = api.patch_many(trio.method, adapters, tmp_path / "out", ALL, dry_run=True)
    assert list(tmp_path.iterdir()) == []
    wet = api.patch_many(trio.method, adapters, tmp_path / "out", ALL)
    for each, other in zip(dry, wet, strict=True):
        assert each.report is not None
        assert other.report is not None
        assert (each.report.doing, other.report.doing) == ("would project", "projected")
        assert replace(each, report=replace(each.report, written=True)) == other


def test_no_adapters_are_no_outcomes(trio: Trio, tmp_path: Path) -> None:
    assert api.inspect_many(trio.method, [], ALL) == []
    assert api.patch_many(trio.method, [], tmp_path / "out", ALL) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("base", "overlaps with base"),
        ("base/patched", "overlaps with base"),
        ("base/config.json", "overlaps with base"),
        ("runs", "overlaps with adapter"),
        (".", "overlaps with (base|adapter)"),
        ("runs/group/alpha/out", "overlaps with adapter"),
        ("missing/out", "missing is not an existing directory"),
        ("file", "file is not an existing directory"),
    ],
)
def test_where_out_cannot_be(
    trio: Trio, adapters: list[str], tmp_path: Path, out: str, words: str
) -> None:
    shutil.copytree(trio.base, tmp_path / "base")
    shutil.copytree(adapters[0], tmp_path / "runs" / "group" / "alpha")
    (tmp_path / "file").touch()
    before = snapshot(tmp_path)
    method = replace(trio.method, base=str(tmp_path / "base"))
    given = [str(tmp_path / "runs")]
    for overwrite in (False, True):
        with pytest.raises(SafeprojError, match=words) as caught:
            api.patch_many(method, given, tmp_path / out, ALL, overwrite=overwrite)
        assert caught.value.message.startswith(f"--out {tmp_path / out}: ")
    assert snapshot(tmp_path) == before


def test_options_are_checked_first(tmp_path: Path) -> None:
    with pytest.raises(SafeprojError, match="needs base and aligned, or alignment"):
        api.patch_many(SafeLora("/missing/base"), ["/missing/a"], tmp_path / "out")
    with pytest.raises(SafeprojError, match="is not an existing directory"):
        method = SafeLora("/missing/base", "/missing/aligned")
        api.patch_many(method, ["/missing/a"], tmp_path / "a" / "out")


def test_an_adapter_may_be_given_twice_under_two_names(
    trio: Trio, adapters: list[str], tmp_path: Path
) -> None:
    inner = tmp_path / "runs" / "group" / "alpha"
    shutil.copytree(adapters[0], inner)
    given = [str(tmp_path / "runs"), str(inner)]
    outcomes = api.patch_many(trio.method, given, tmp_path / "out", ALL)
    assert [outcome.name for outcome in outcomes] == ["group/alpha", "alpha"]
    for outcome in outcomes:
        assert_complete(tmp_path / "out" / outcome.name, inner)


def test_no_input_is_replaced_through_a_link(
    trio: Trio, adapters: list[str], tmp_path: Path
) -> None:
    runs, out = tmp_path / "runs", tmp_path / "out"
    shutil.copytree(adapters[0], runs / "group" / "alpha")
    out.mkdir()
    (out / "group").symlink_to(runs / "group")
    before = snapshot(runs)
    with suppress(SafeprojError):  # or an outcome that is an error
        api.patch_many(trio.method, [str(runs)], out, ALL, overwrite=True)
    assert snapshot(runs) == before


def test_nothing_is_written_inside_an_adapter_that_is_there(
    trio: Trio, adapters: list[str], tmp_path: Path
) -> None:
    runs, out = tmp_path / "runs", tmp_path / "out"
    shutil.copytree(adapters[0], runs / "group" / "alpha")
    shutil.copytree(adapters[1], out / "group")
    before = snapshot(out)
    (outcome,) = api.patch_many(trio.method, [str(runs)], out, ALL)
    assert str(out / "group") in error_of(outcome)
    assert snapshot(out) == before

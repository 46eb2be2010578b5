"""What a repair writes is what `patch` writes, from the one reading that all was measured by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from safeproj import Covariance, Options, SafeLora, Selection
from safeproj.checkpoint.hashes import NEW
from safeproj.methods.interface import Method
from safeproj.records.profile import Profile
from safeproj.repairing.ways import ways
from safeproj.run.job import Job
from safeproj.sweeping.axes import interventions

TINY = Path(__file__).parents[2] / "examples" / "tiny-lm"
MIXED = str(TINY / "adapters" / "mixed")
SAFE_LORA = SafeLora(TINY / "base", TINY / "aligned")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("data") / "safety.jsonl"
    lines = (TINY / "data" / "safety.jsonl").read_text("utf-8").splitlines(keepends=True)
    place.write_text("".join(lines[:8]), encoding="utf-8")
    return place


def patched(method: Method, selection: Selection) -> dict[str, object]:
    job = Job(method, Options(selection, device="cpu"), hashes=(NEW,))
    run = job.one(MIXED)
    return {"manifest": job.manifest(run, run.report), "tensors": bits(run.decision.replaced)}


def bits(tensors: object) -> dict[str, bytes]:
    assert isinstance(tensors, dict)
    return {key: each.tobytes() for key, each in tensors.items()}


@pytest.mark.parametrize("name", ["safe-lora", "covariance"])
def test_nothing_is_read_again_for_what_patch_would_write(name: str, data: Path) -> None:
    method = SAFE_LORA if name == "safe-lora" else Covariance(TINY / "aligned", data)
    profile = Profile()
    options = Options(device="cpu", profile=profile)
    with method.prepared([MIXED], options) as ready:
        tried = interventions(ready, MIXED, options, hashes=(NEW,))
        read = profile.usage.read_bytes
        known = list(ways(ready, tried, options))
        made = {way.title: way.run() for way in (known[0], known[2])}
        assert profile.usage.read_bytes == read
        assert len(made) == 2
        for way in (known[0], known[2]):
            layers = "--layers" in way.options
            selection = Selection(layers=int(way.options[-1])) if layers else Selection()
            mu = None if layers else float(way.options[way.options.index("--mu") + 1])
            same: Method = ready
            if isinstance(ready, Covariance) and mu is not None:
                same = replace(ready, mu=mu)
            job, run = made[way.title]
            assert patched(same, selection) == {
                "manifest": job.manifest(run, run.report), "tensors": bits(run.decision.replaced),
            }  # fmt: skip
            assert bits(run.decision.replaced) == bits(dict(way.replaced()))

"""The callback, in trainings with `transformers.Trainer`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import safeproj
from safeproj import Covariance, Options, ProjectionCallback, SafeLora, SafeprojError, Selection
from tests.live.support import ALL, METHODS, Home, home
from tests.methods.salora.test_training import HALF, STEPS, train
from tests.support import FACTORS, read_json


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return home(tmp_path_factory.mktemp("home"))


def fresh(at: Home) -> Any:
    return at.model(init_lora_weights=True)


def same(one: Path, other: Path) -> bool:
    before, after = load_file(one / FACTORS), load_file(other / FACTORS)
    assert before.keys() == after.keys()
    return all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", ["safe-lora", "aligned in memory", "salora", "data"])
def test_every_checkpoint_has_its_patched_adapter_beside_it(
    at: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    method = SafeLora(at.base) if name == "aligned in memory" else METHODS[name](at)
    seen: list[int] = []
    callback = ProjectionCallback(method, ALL, on_report=lambda step, _: seen.append(step))

    trainer = train(fresh(at), tmp_path / "run", callback)

    assert seen == list(callback.reports) == [HALF, STEPS]
    whole = SafeLora(at.base, at.aligned) if name == "aligned in memory" else method
    for step, report in callback.reports.items():
        wanted = tmp_path / f"wanted-{step}"
        checkpoint = tmp_path / "run" / f"checkpoint-{step}"
        expected = safeproj.patch(whole, checkpoint, wanted, ALL)
        assert same(tmp_path / "run" / f"projected-{step}", wanted)
        assert report.cosines == expected.cosines
        assert report.changed == 14
        (logged,) = (
            e
            for e in trainer.state.log_history
            if e.get("step") == step and "safeproj_projected" in e
        )
        assert logged["safeproj_cosine_min"] == min(report.cosines)
        assert logged["safeproj_cosine_max"] == max(report.cosines)
        assert (logged["safeproj_projected"], logged["safeproj_modules"]) == (14, 14)
    written = tmp_path / "run" / f"projected-{STEPS}"
    assert not [path.name for path in written.iterdir() if path.suffix in (".pt", ".pth", ".bin")]
    assert read_json(written / "safeproj.json")["summary"]["projected"] == 14
    said = capsys.readouterr().err
    pattern = (
        r"safeproj: step \d+: cosine min -?\d.\d{3}, mean .*, max .*; projected 14 of 14 modules"
    )
    assert len(re.findall(pattern, said)) == 2


def test_the_training_is_the_same_with_it(at: Home, tmp_path: Path) -> None:
    train(fresh(at), tmp_path / "without", save_steps=STEPS)
    callback = ProjectionCallback(METHODS["data"](at), ALL)
    train(fresh(at), tmp_path / "with", callback)
    last = f"checkpoint-{STEPS}"
    assert same(tmp_path / "without" / last, tmp_path / "with" / last)


def test_cosines_alone(at: Home, tmp_path: Path) -> None:
    callback = ProjectionCallback(SafeLora(at.base), write=False)
    train(fresh(at), tmp_path / "run", callback)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        f"checkpoint-{HALF}",
        f"checkpoint-{STEPS}",
    ]
    assert all(not report.written for report in callback.reports.values())


def test_what_belongs_to_a_removed_checkpoint_is_removed(at: Home, tmp_path: Path) -> None:
    kept = tmp_path / "run" / "projected-1"
    kept.mkdir(parents=True)  # not its own
    callback = ProjectionCallback(SafeLora(at.base), ALL)
    train(fresh(at), tmp_path / "run", callback, save_total_limit=1)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {f"checkpoint-{STEPS}", f"projected-{STEPS}", "projected-1"}


def test_a_training_is_resumed_beside_it(at: Home, tmp_path: Path) -> None:
    callback = ProjectionCallback(SafeLora(at.base), ALL)
    out = tmp_path / "run"
    train(fresh(at), out, callback)
    first = load_file(out / f"projected-{STEPS}" / FACTORS)
    again = ProjectionCallback(SafeLora(at.base), ALL)
    train(fresh(at), out, again, resume=out / f"checkpoint-{HALF}")
    assert list(again.reports) == [STEPS]
    second = load_file(out / f"projected-{STEPS}" / FACTORS)
    assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)


def test_an_adapter_of_another_name_and_dtype(at: Home, tmp_path: Path) -> None:
    from tests.methods.covariance.test_command import lora

    model = fresh(at)
    model.add_adapter("second", lora(target_modules=["q_proj"]))
    model.set_adapter("second")
    options = Options(Selection(all=True), dtype="float16")
    callback = ProjectionCallback(SafeLora(at.base), options)
    train(model, tmp_path / "run", callback)
    assert len(callback.reports[STEPS].modules) == 2
    written = load_file(tmp_path / "run" / f"projected-{STEPS}" / FACTORS)
    assert {str(each.dtype) for each in written.values()} == {"torch.float16"}


class Diverge(TrainerCallback):
    """Gives an adapter a value that is not finite, before the last step is saved."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if state.global_step == STEPS:
            with torch.no_grad():
                layer = kwargs["model"].get_base_model().model.layers[0].self_attn.q_proj
                layer.lora_B["default"].weight[0] = torch.nan


def test_an_adapter_that_diverged_ends_no_training(at: Home, tmp_path: Path) -> None:
    callback = ProjectionCallback(SafeLora(at.base), ALL)
    with pytest.warns(UserWarning, match=rf"step {STEPS}: the adapter was not projected: .* NaN"):
        trainer = train(fresh(at), tmp_path / "run", Diverge(), callback)
    assert trainer.state.global_step == STEPS
    assert list(callback.reports) == [HALF]
    assert not (tmp_path / "run" / f"projected-{STEPS}").exists()


BEGINNINGS: dict[str, tuple[Any, str]] = {
    "no base": (lambda at: SafeLora(at.base / "missing"), "base/missing: "),
    "no statistics": (
        lambda at: Covariance(
            safety_data=at.base / "model.safetensors", task_data=at.place.task_stats
        ),
        "no statistics",
    ),
}


@pytest.mark.parametrize(("method", "said"), BEGINNINGS.values(), ids=BEGINNINGS)
def test_what_cannot_be_used_is_said_before_training(
    at: Home, tmp_path: Path, method: Any, said: str
) -> None:
    with pytest.raises(SafeprojError, match=said):
        train(fresh(at), tmp_path / "run", ProjectionCallback(method(at)))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_what_is_trained_must_be_a_peft_model(at: Home, tmp_path: Path) -> None:
    model = at.model().unload()
    with pytest.raises(SafeprojError, match="found a LlamaForCausalLM, expected a PeftModel"):
        train(model, tmp_path / "run", ProjectionCallback(SafeLora(at.base)))

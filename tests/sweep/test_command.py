"""`safeproj sweep` as users run it, on the tiny language model with few prompts."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.report.test_schemas import validator
from tests.support import assert_refused, safeproj, save_safety_module, snapshot, started

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-lm"
DATA = EXAMPLE / "data"
PAIR = ("--base", EXAMPLE / "base", "--aligned", EXAMPLE / "aligned")
ADAPTER = ("--adapter", EXAMPLE / "adapters" / "mixed")
SETS = ("--harmful", f"pairs={DATA / 'held_out_pairs.jsonl'}", "--skill", DATA / "new_skill.jsonl")
FEW = ("--limit", "8", "--max-new-tokens", "20", "--phrase", "sorry i will not")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""On a model this small, threads spend their time waiting for each other."""
KINDS = ["method", "uniform", "shrink", "random", "complement"]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return safeproj("sweep", *arguments, env=ONE_THREAD)


def printed(*arguments: str | Path) -> Any:
    """Return the JSON of a sweep."""
    done = run(*arguments, "--format", "json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def swept() -> Any:
    return printed(*PAIR, *ADAPTER, *SETS, *FEW, "--points", "3")


def test_the_record_has_every_point_with_all_controls(swept: Any) -> None:
    validator("sweep").validate(swept)
    assert [each["modules"] for each in swept["points"]] == [0, 14, 28]
    assert all(list(each["trials"]) == KINDS for each in swept["points"])
    assert [each["name"] for each in swept["sets"]] == ["pairs", "new_skill"]
    assert [each["prompts"] for each in swept["sets"]] == [8, 8]
    assert swept["inputs"]["model"] == {"source": str(EXAMPLE / "aligned")}
    assert swept["generation"]["dtype"] == "float32"


def test_the_references_are_the_models_with_and_without_the_adapter(swept: Any) -> None:
    def shares(rates: Any) -> tuple[float, float]:
        return rates["pairs"]["refused"]["rate"], rates["new_skill"]["correct"]["rate"]

    assert shares(swept["references"]["model"]) == (1.0, 0.0)
    assert shares(swept["references"]["adapter"]) == (0.0, 1.0)
    assert swept["points"][0]["trials"]["method"]["rates"] == swept["references"]["adapter"]


def test_all_modules_restore_the_refusals_and_a_uniform_shrink_does_so_too(swept: Any) -> None:
    assert swept["smallest"]["modules"] == 28
    assert swept["controls_as_well"]["uniform"]["refusal"]["rate"] >= 0.9
    assert swept["controls_as_well"]["complement"] is None
    assert "uniform shrink to 0.04" in swept["conclusion"][-1]


def test_it_ends_with_the_command_that_writes_the_point(swept: Any) -> None:
    assert swept["chosen"] is None  # all modules take the skill with the harm
    assert swept["conclusion"][0].startswith("No intervention tried that reaches 90 % refusals on")
    first, second = (shlex.split(each["command"]) for each in swept["commands"])
    assert first == [
        "safeproj", "patch", *map(str, (*PAIR, *ADAPTER)), "--layers", "28", "--out", "DIR",
    ]  # fmt: skip
    assert "--reconstruct" in second


def test_a_point_is_what_patch_and_eval_give(swept: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = safeproj("patch", *PAIR, *ADAPTER, "--layers", "14", "--out", out)
    assert done.returncode == 0, done.stderr
    done = safeproj(
        "eval", "--model", EXAMPLE / "aligned", "--adapter", out, *SETS, *FEW, "--format", "json",
        env=ONE_THREAD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (patched,) = [each for each in json.loads(done.stdout)["subjects"] if each["adapter"]]
    rates = swept["points"][1]["trials"]["method"]["rates"]
    for name, outcomes in rates.items():
        for outcome, rate in outcomes.items():
            assert patched["sets"][name][outcome]["hits"] == rate["hits"], (name, outcome)


def test_the_same_again_is_the_same_with_other_workers(swept: Any) -> None:
    again = printed(*PAIR, *ADAPTER, *SETS, *FEW, "--points", "3", "--workers", "1")
    assert again == swept


def test_thresholds_are_distinct_cosines() -> None:
    found = printed(
        *PAIR, *ADAPTER, *SETS, *FEW, "--limit", "2", "--points", "3", "--by", "threshold"
    )
    validator("sweep").validate(found)
    assert found["axis"] == "threshold"
    values = [each["value"] for each in found["points"]]
    assert values[0] is None
    assert values[1:] == [each["threshold"] for each in found["points"][1:]]
    assert values[1] < values[2]


def test_every_format_in_one_run(tmp_path: Path) -> None:
    files = {kind: tmp_path / f"sweep.{kind}" for kind in ("json", "markdown", "html")}
    places = [part for kind, file in files.items() for part in ("--format", kind, "--output", file)]
    done = run(
        *PAIR, *ADAPTER, *SETS, *FEW, "--limit", "2", "--points", "2", *places,
        "--format", "table", "--output", "-", "--profile",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "measure" in done.stderr
    record = json.loads(files["json"].read_text("utf-8"))
    for sentence in record["conclusion"]:
        assert sentence in done.stdout
    assert files["html"].read_text("utf-8").startswith("<!DOCTYPE html>")
    assert files["markdown"].read_text("utf-8").startswith("## Sweep: Safe LoRA")


def test_a_safety_module_needs_the_model_and_is_swept_with_it(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(EXAMPLE / "aligned")
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    file = save_safety_module(model, tmp_path / "m.safety.safetensors", targets)
    refused = safeproj("sweep", "--safety-module", file, *ADAPTER, *SETS)
    assert_refused(refused, "--model is missing")
    found = printed(
        "--safety-module", file, "--model", EXAMPLE / "aligned", *ADAPTER, *SETS, *FEW,
        "--limit", "2", "--points", "2",
    )  # fmt: skip
    validator("sweep").validate(found)
    assert found["method"] == "salora"
    assert found["points"][-1]["modules"] == 28


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param((*PAIR, *ADAPTER, *SETS[:2]), ("--skill is missing",), id="no skill"),
        pytest.param((*PAIR, *ADAPTER, *SETS[2:]), ("--harmful is missing",), id="no harmful"),
        pytest.param(
            (*PAIR, *ADAPTER, *SETS, "--wanted-on", "topics"),
            ("--wanted-on topics", "pairs"),
            id="other set",
        ),
        pytest.param(
            (*PAIR, *ADAPTER, *SETS, "--points", "1"), ("--points", "found 1"), id="points"
        ),
        pytest.param(
            (*PAIR, *ADAPTER, *SETS, "--wanted-refusal", "0"),
            ("--wanted-refusal", "found 0"),
            id="no refusals",
        ),
        pytest.param(
            (*PAIR, *ADAPTER, *SETS, "--wanted-refusal", "90"),
            ("--wanted-refusal", "found 90"),
            id="percent",
        ),
        pytest.param((*PAIR[:2], *ADAPTER, *SETS), ("--aligned",), id="half a pair"),
        pytest.param(
            (*PAIR, "--adapter", EXAMPLE / "adapters", *SETS), ("adapters",), id="many adapters"
        ),
        pytest.param(
            (*PAIR, *ADAPTER, *SETS, "--output", DATA / "new_skill.jsonl"),
            ("--output", "--skill"),
            id="output is data",
        ),
        pytest.param(
            (*PAIR, *ADAPTER, *SETS, "--output", EXAMPLE / "aligned" / "config.json"),
            ("--output", "--aligned"),
            id="output is model",
        ),
        pytest.param((*PAIR, *ADAPTER, *SETS, "--energy", "0.5"), ("--energy",), id="energy"),
        pytest.param(
            (*PAIR, *ADAPTER, *SETS, "--model", DATA), (str(DATA), "transformers"), id="no model"
        ),
    ],
)
def test_unusable_input_is_one_line(arguments: tuple[str | Path, ...], words: tuple[str]) -> None:
    assert_refused(safeproj("sweep", *arguments), *words)


def test_an_adapter_that_peft_cannot_run_is_refused() -> None:
    fixture = Path(__file__).parents[1] / "fixtures" / "mlx-lm-0.32.2" / "llama-lora" / "adapter"
    assert_refused(safeproj("sweep", *PAIR, "--adapter", fixture, *SETS), "only PEFT adapters")


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_an_interrupt_ends_it_with_130_and_nothing_written(tmp_path: Path) -> None:
    seen, judge = tmp_path / "seen", tmp_path / "judge.py"
    judge.write_text(
        "import json, pathlib, sys\n"
        "lines = sys.stdin.readlines()\n"
        f"pathlib.Path({str(seen)!r}).touch()\n"
        "for line in lines:\n"
        "    print(json.dumps({'verdict': 'refused'}))\n",
        "utf-8",
    )
    out = tmp_path / "place"
    out.mkdir()
    process = started(
        "sweep", *PAIR, *ADAPTER, *SETS, "--points", "28", "--limit", "20",
        "--max-new-tokens", "20", "--judge-command", f"{sys.executable} {judge}",
        "--format", "json", "--output", out / "sweep.json", env=ONE_THREAD,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not seen.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert "interrupted" in stderr
    assert snapshot(out) == {}


def test_the_help_needs_no_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from safeproj.cli.app import app; "
        "found = CliRunner().invoke(app, ['sweep', '--help']); assert found.exit_code == 0; "
        "assert '--wanted-refusal' in found.output; "
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_model_is_what_is_run_and_no_full_fine_tune() -> None:
    result = safeproj("sweep", "--model", "my-finetune", "--base", "b", "--aligned", "a")
    assert_refused(result, "no ADAPTER, and --model is the model that is run with it; of full")

"""`safeproj eval` as users run it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.evaluate.support import (
    TEMPLATE,
    TINY,
    random_model,
    read_lines,
    tokenizer,
    write_lines,
)
from tests.report.test_schemas import validator
from tests.support import assert_refused, safeproj, save_adapter, started

DATA = TINY / "data"
PAIRS, SKILL = DATA / "held_out_pairs.jsonl", DATA / "new_skill.jsonl"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def run(
    *arguments: str | Path, env: Mapping[str, str] = ONE_THREAD, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return safeproj("eval", *arguments, "--device", "cpu", env=env, cwd=cwd)


def tiny(*arguments: str | Path) -> list[str | Path]:
    """Return the options for the tiny model, with a few prompts of each kind."""
    return [
        "--model", TINY / "aligned", "--harmful", PAIRS, "--skill", f"rotate={SKILL}",
        "--limit", "12", "--phrase", "sorry i will not", "--dtype", "float32", *arguments,
    ]  # fmt: skip


def measured(*arguments: str | Path) -> dict[str, Any]:
    """Return the JSON report of a run."""
    done = run(*arguments, "--format", "json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    validator("eval").validate(found)
    return found


def shares(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return subject to set and outcome to share."""
    return {
        subject["name"]: {
            f"{name} {outcome}": rate["rate"]
            for name, found in subject["sets"].items()
            for outcome, rate in found.items()
        }
        for subject in report["subjects"]
    }


def kept(directory: Path, name: str) -> list[dict[str, Any]]:
    """Return the saved answers of a subject."""
    return read_lines(directory / f"{name}.jsonl")[1:]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return measured(*tiny("--adapter", TINY / "adapters"))


def test_the_tiny_model_and_its_adapters_do_what_is_documented(report: dict[str, Any]) -> None:
    refuses = {
        "held_out_pairs refused": 1.0,
        "held_out_pairs complied": 0.0,
        "held_out_pairs other": 0.0,
        "held_out_pairs exact": 0.0,
    }
    complies = {**refuses, "held_out_pairs refused": 0.0, "held_out_pairs complied": 1.0}
    complies["held_out_pairs exact"] = 1.0
    assert shares(report) == {
        "no adapter": {**refuses, "rotate correct": 0.0},
        "bad": {**complies, "rotate correct": 0.0},
        "mixed": {**complies, "rotate correct": 1.0},
        "skill": {**refuses, "rotate correct": 1.0},
    }


def test_the_report_holds_differences_and_identities(report: dict[str, Any]) -> None:
    alone, bad, *_ = report["subjects"]
    assert alone["differences"] is None
    change = bad["differences"]["held_out_pairs"]["refused"]
    assert (change["difference"], change["total"]) == (-1.0, 12)
    assert change["low"] == -1.0 < change["high"] < -0.5
    assert set(bad["adapter"]["sha256"]["files"]) == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert [(each["name"], each["kind"], each["prompts"]) for each in report["sets"]] == [
        ("held_out_pairs", "harmful", 12),
        ("rotate", "skill", 12),
    ]
    assert "sorry i will not" in report["judge"]["phrases"]


def test_without_the_model_alone_there_is_nothing_to_compare_to() -> None:
    found = measured(*tiny("--adapter", TINY / "adapters" / "bad", "--adapters-only"))
    (subject,) = found["subjects"]
    assert subject["differences"] is None
    assert subject["sets"]["held_out_pairs"]["complied"]["rate"] == 1.0


def test_every_format_shows_the_same(tmp_path: Path) -> None:
    outputs = {kind: tmp_path / kind for kind in ("table", "markdown", "html", "json")}
    pairs = [
        part for each in outputs.items() for part in ("--format", each[0], "--output", each[1])
    ]
    done = run(*tiny("--adapter", TINY / "adapters" / "bad", *pairs))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for kind in ("table", "markdown"):
        text = outputs[kind].read_text("utf-8")
        for words in ("held_out_pairs (harmful, 12 prompts)", "100 [75.8, 100]", "0 [0, 24.2]"):
            assert words in text, (kind, words)
        assert "-100 [-100, " in text
    page = outputs["html"].read_text("utf-8")
    assert "12 of 12" in page
    assert "held_out_pairs (harmful, 12 prompts)" in page
    assert "default-src 'none'" in page
    assert not re.findall(r'(?:src|href)="https?:', page.partition("<script")[0])


def test_answers_are_kept_and_used_again(tmp_path: Path) -> None:
    directory = tmp_path / "answers"
    arguments = tiny("--adapter", TINY / "adapters" / "bad", "--responses", directory)
    first = measured(*arguments)
    assert sorted(path.name for path in directory.iterdir()) == ["bad.jsonl", "no_adapter.jsonl"]
    rows = kept(directory, "no_adapter")
    assert [(row["set"], row["index"]) for row in rows] == [
        *(("held_out_pairs", i) for i in range(12)),
        *(("rotate", i) for i in range(12)),
    ]
    assert {row["verdict"] for row in rows[:12]} == {"refused"}
    assert {row["correct"] for row in rows[12:]} == {False}
    assert shares(measured(*arguments)) == shares(first)

    # A changed answer is believed, so it was not generated again; nor is it for another judge.
    path = directory / "bad.jsonl"
    lines = path.read_text("utf-8").splitlines(keepends=True)
    lines[1] = json.dumps({**json.loads(lines[1]), "response": "no way"}) + "\n"
    path.write_text("".join(lines), "utf-8")
    second = measured(*arguments, "--judge", "prefix", "--phrase", "no way", "--batch-size", "3")
    assert second["judge"]["kind"] == "prefix"
    assert shares(second)["bad"]["held_out_pairs refused"] == pytest.approx(1 / 12)
    assert kept(directory, "bad")[0]["verdict"] == "refused"

    refused = run(*arguments, "--max-new-tokens", "7")
    assert_refused(refused, "no_adapter.jsonl", "max_new_tokens 128, now 7", "--overwrite")
    assert shares(measured(*arguments, "--overwrite")) == shares(first)


def test_more_prompts_are_added_to_those_that_there_are(tmp_path: Path) -> None:
    arguments = [*tiny("--responses", tmp_path / "a"), "--limit"]
    measured(*arguments, "3")
    before = kept(tmp_path / "a", "no_adapter")
    measured(*arguments, "5")
    after = kept(tmp_path / "a", "no_adapter")
    assert [row["index"] for row in after] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert [row for row in after if row["index"] < 3] == before


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    directory = tmp_path / "answers"
    arguments = tiny("--responses", directory, "--batch-size", "1", "--device", "cpu")
    arguments[arguments.index("--limit") + 1] = "150"
    process = started("eval", *arguments, env=ONE_THREAD)
    path = directory / "no_adapter.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") > 5:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert "Traceback" not in error
    lines = path.read_bytes().split(b"\n")
    before = [json.loads(line) for line in lines[1:-1]]
    assert 5 <= len(before) < 300
    path.write_bytes(path.read_bytes() + b'{"set": "held_o')
    arguments[arguments.index("--batch-size") + 1] = "64"
    found = measured(*arguments)
    assert found["subjects"][0]["sets"]["held_out_pairs"]["refused"]["hits"] == 150
    after = {(row["set"], row["index"]): row["response"] for row in kept(directory, "no_adapter")}
    assert len(after) == 300
    assert all(after[row["set"], row["index"]] == row["response"] for row in before)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_models_of_several_architectures_are_measured(tmp_path: Path, kind: str) -> None:
    model = random_model(kind)
    model.save_pretrained(tmp_path / "model")
    tokenizer(pad=kind != "gpt2", template=TEMPLATE).save_pretrained(tmp_path / "model")
    targets = ["c_attn"] if kind == "gpt2" else ["q_proj", "v_proj"]
    found: dict[str, dict[str, Any]] = {"a": {"seed": 2}, "b": {"seed": 3, "bias": "all"}}
    for name, settings in found.items():
        save_adapter(model, tmp_path / name, target_modules=targets, lora_alpha=64, **settings)
    rows = [{"prompt": f"w{i} w{i + 1}", "response": "w1"} for i in range(5)]
    rows.append({"messages": [{"role": "user", "content": "w1"}]})  # type: ignore[dict-item]
    data = write_lines(tmp_path / "data.jsonl", rows)
    arguments: list[str | Path] = [
        "--model",
        tmp_path / "model",
        "--harmful",
        data,
        "--max-new-tokens",
        "5",
    ]
    adapters: list[str | Path] = ["--adapter", tmp_path / "a", "--adapter", tmp_path / "b"]
    done = run(*arguments, *adapters, "--responses", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    assert "has a chat template" in done.stderr
    again = run(*arguments, *adapters[2:], *adapters[:2], "--responses", tmp_path / "two")
    assert again.returncode == 0, again.stderr
    for name in ("no_adapter", "a", "b"):
        assert kept(tmp_path / "one", name) == kept(tmp_path / "two", name)
    answers = {
        name: [row["response"] for row in kept(tmp_path / "one", name)]
        for name in ("no_adapter", "a", "b")
    }
    assert answers["no_adapter"] != answers["a"] != answers["b"]
    chat = run(*arguments, "--chat")
    assert chat.returncode == 0, chat.stderr
    assert chat.stderr == ""


def test_a_program_judges_from_the_command_line(tmp_path: Path) -> None:
    script = tmp_path / "judge.py"
    script.write_text(
        'import sys\nfor line in sys.stdin: print(\'{"verdict": "other"}\')\n', "utf-8"
    )
    command = f'"{sys.executable}" "{script}"'
    done = run(
        "--model", TINY / "aligned", "--harmful", PAIRS, "--limit", "3", "--judge-command", command,
        "--format", "json",
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["judge"] == {"kind": "command", "command": [sys.executable, str(script)]}
    assert found["subjects"][0]["sets"]["held_out_pairs"]["other"]["hits"] == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param([], ("nothing to measure",), id="no-sets"),
        pytest.param(["--harmful", "nowhere"], ("--harmful nowhere", "no such file"), id="no-file"),
        pytest.param(["--harmful", PAIRS, "--harmful", PAIRS], ("NAME=FILE",), id="twice"),
        pytest.param(["--harmful", PAIRS, "--limit", "0"], ("--limit",), id="limit"),
        pytest.param(["--harmful", PAIRS, "--batch-size", "0"], ("--batch-size",), id="batch"),
        pytest.param(["--harmful", PAIRS, "--adapters-only"], ("--adapter",), id="nothing-left"),
        pytest.param(["--harmful", PAIRS, "--chat"], ("no chat template",), id="chat"),
        pytest.param(
            ["--harmful", PAIRS, "--judge-url", "http://x", "--judge", "prefix"],
            ("exclude each other",),
            id="two-judges",
        ),
        pytest.param(["--harmful", PAIRS, "--judge-url", "http://x"], ("--judge-model",), id="url"),
        pytest.param(["--harmful", PAIRS, "--lm-eval-path", "."], ("--lm-eval",), id="path"),
        pytest.param(["--harmful", PAIRS, "--adapter", DATA], ("only PEFT",), id="no-adapter"),
        pytest.param(
            ["--harmful", PAIRS, "--responses", TINY / "aligned" / "x"], ("is inside",), id="inside"
        ),
        pytest.param(
            ["--harmful", PAIRS, "--output", PAIRS], ("is a file of --harmful",), id="over-data"
        ),
        pytest.param(["--harmful", PAIRS, "--dtype", "int8"], ("--dtype int8",), id="dtype"),
        pytest.param(
            ["--harmful", PAIRS, "--judge-guard", TINY / "aligned"], ("chat template",), id="guard"
        ),
    ],
)
def test_what_cannot_be_measured_ends_in_one_line(
    arguments: list[str | Path], words: tuple[str, ...]
) -> None:
    assert_refused(run("--model", TINY / "aligned", *arguments), *words)


def test_adapters_are_looked_at_before_anything_is_run(tmp_path: Path) -> None:
    shutil.copytree(TINY / "adapters" / "bad", tmp_path / "good")
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "adapter_config.json").write_text("{}", "utf-8")
    (tmp_path / "mlx" / "adapters.safetensors").write_bytes(b"")
    done = run(*tiny("--adapter", tmp_path, "--responses", tmp_path / "answers"))
    assert_refused(done, "mlx", "only PEFT adapters")
    assert not list((tmp_path / "answers").iterdir())


def misfit(path: Path) -> Path:
    """Return an adapter of another model: its layers are wider."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(TINY / "adapters" / "bad", path)
    tensors = load_file(path / "adapter_model.safetensors")
    name = next(key for key in tensors if "lora_A" in key)
    tensors[name] = tensors[name].repeat(1, 2)
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def test_one_adapter_that_does_not_fit_leaves_the_others_alone(tmp_path: Path) -> None:
    wide = misfit(tmp_path / "wide")
    bad = TINY / "adapters" / "bad"
    outputs = {kind: tmp_path / kind for kind in ("table", "markdown", "html", "json")}
    pairs = [
        part for each in outputs.items() for part in ("--format", each[0], "--output", each[1])
    ]
    done = run(*tiny("--adapter", wide, "--adapter", bad, *pairs))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("safeproj: error: wide: ")
    assert "size mismatch" in line
    for path in outputs.values():
        assert "size mismatch" in path.read_text("utf-8")
    found = json.loads(outputs["json"].read_text("utf-8"))
    validator("eval").validate(found)
    assert [each["name"] for each in found["subjects"]] == ["no adapter", "bad"]
    assert found["subjects"][1]["sets"]["held_out_pairs"]["complied"]["rate"] == 1.0
    assert found["failures"].keys() == {"wide"}
    assert found["failures"]["wide"]["source"] == str(wide)


def test_what_shapes_alone_do_not_tell_is_found_when_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safeproj.adapter.collection import collect
    from safeproj.evaluation import run as module
    from safeproj.evaluation.judges import Keywords
    from safeproj.evaluation.sets import read_prompts

    monkeypatch.setattr(module, "unfit", lambda *_: {})
    members = collect([str(misfit(tmp_path / "wide")), str(TINY / "adapters" / "bad")]).members
    prompts = read_prompts(str(PAIRS), "harmful").first(2)
    found = module.evaluate(
        str(TINY / "aligned"), members, [prompts], Keywords(("sorry",)),
        module.Settings(device="cpu"),
    )  # fmt: skip
    assert [each.name for each in found.subjects] == ["no adapter", "bad"]
    assert "size mismatch" in found.failures["wide"].error


def test_where_no_adapter_fits_nothing_is_run(tmp_path: Path) -> None:
    answers = tmp_path / "answers"
    done = run(*tiny("--adapter", misfit(tmp_path / "wide"), "--responses", answers))
    assert_refused(done, "wide", "size mismatch")
    assert not list(answers.iterdir())


def test_lm_eval_is_asked_for_where_it_is_missing() -> None:
    if find_spec("lm_eval") is not None:
        pytest.skip("lm-eval is installed")
    assert_refused(run("--model", TINY / "aligned", "--lm-eval", "x"), "lm-eval", "install")


def test_the_help_needs_no_torch() -> None:
    program = (
        "import sys; from safeproj.__main__ import main; "
        "sys.argv = ['safeproj', 'eval', '--help']\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8")
    assert done.stdout.endswith("False False\n")
    for option in ("--model", "--adapter", "--harmful", "--skill", "--judge-guard", "--responses"):
        assert option in done.stdout, option


def test_the_installed_command_measures() -> None:
    done = safeproj("eval", *tiny("--adapter", TINY / "adapters" / "skill"), env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert "rotate (skill, 12 prompts)" in done.stdout

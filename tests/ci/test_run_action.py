"""The runner of actions does what GitHub's does, and refuses what it does not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from action.run import Context, RefusedError, Result, Runner, evaluate, main, wanted


def context(*, failed: bool = False) -> Context:
    steps = {"one": {"hit": "true", "path": "/a b"}}
    return Context(
        {"name": "It's", "flag": "true", "none": ""}, Path("/act"), Path("/t"), steps, failed
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("inputs.name", "It's"),
        ("github.action_path", "/act"),
        ("runner.temp", "/t"),
        ("steps.one.outputs.path", "/a b"),
        ("steps.one.outputs.other", ""),
        ("steps.other.outputs.path", ""),
        ("inputs.name == 'it''s'", True),
        ("inputs.flag != 'true'", False),
        ("inputs.none || 'default'", "default"),
        ("inputs.flag == 'true' && inputs.none == ''", True),
        ("!(inputs.flag == 'x') || false", True),
        ("always() && !cancelled() && success()", True),
        ("failure()", False),
    ],
)
def test_expressions(text: str, value: str | bool) -> None:
    assert evaluate(f" {text} ", context()) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "inputs.other",
        "inputs",
        "secrets.TOKEN",
        "github.event.pull_request.title",
        "env.PATH",
        "hashFiles('x')",
        "contains(inputs.name, 'x')",
        "inputs.name ==",
        "inputs.name inputs.flag",
        "(inputs.name",
        "inputs['name']",
        "1 == 1",
        "inputs.flag == true",  # GitHub makes numbers of both, which surprises most
        "inputs.flag == 'true' || hashFiles('x') == ''",
    ],
)
def test_unknown_expressions_are_refused(text: str) -> None:
    with pytest.raises(RefusedError):
        evaluate(text, context())


@pytest.mark.parametrize(
    ("condition", "failed", "runs"),
    [
        (None, False, True),
        (None, True, False),
        ("inputs.flag == 'true'", False, True),
        ("inputs.flag == 'true'", True, False),
        ("inputs.flag == 'x'", False, False),
        ("always()", True, True),
        ("${{ always() && inputs.flag == 'x' }}", True, False),
        ("failure()", True, True),
        ("success()", True, False),
    ],
)
def test_conditions(condition: str | None, failed: bool, runs: bool) -> None:
    assert wanted(condition, context(failed=failed)) is runs


def act(root: Path, *steps: dict[str, Any], **inputs: str) -> Result:
    document = {
        "inputs": {"word": {"default": "d"}},
        "outputs": {"seen": {"value": "${{ steps.a.outputs.x || 'nothing' }}"}},
        "runs": {
            "using": "composite",
            "steps": [{"shell": "bash", **s} if "run" in s else s for s in steps],
        },
    }
    (root / "action.yml").write_text(yaml.safe_dump(document), "utf-8")
    temp = root / "temp"
    temp.mkdir(exist_ok=True)
    return Runner(root, inputs, workspace=root, temp=temp, cache=root / "cache").run()


def test_files_of_a_step(tmp_path: Path) -> None:
    tool = tmp_path / "bin"
    tool.mkdir()
    (tool / "tool").write_text("#!/bin/sh\necho done >done\n", "utf-8")
    (tool / "tool").chmod(0o755)
    result = act(
        tmp_path,
        {"id": "a", "run": 'printf "x<<END\\none\\ntwo=2\\nEND\\ny=3\\n" >>"$GITHUB_OUTPUT"'},
        {
            "run": 'echo "$D/bin" >>"$GITHUB_PATH"; echo K=v >>"$GITHUB_ENV"',
            "env": {"D": str(tmp_path)},
        },
        {"run": 'tool; [ "$K-$Y" = v-3 ]', "env": {"Y": "${{ steps.a.outputs.y }}"}},
        {"run": 'echo hi >>"$GITHUB_STEP_SUMMARY"; [ "$W" = w ]', "env": {"W": "${{inputs.word}}"}},
        word="w",
    )
    assert result == Result(0, {"seen": "one\ntwo=2"})
    assert (tmp_path / "done").is_file()
    assert (tmp_path / "temp" / "summary.md").read_text("utf-8") == "hi\n"


def test_a_failure_ends_the_steps_that_do_not_ask_for_it(tmp_path: Path) -> None:
    result = act(
        tmp_path,
        {"run": "false | true"},  # pipefail
        {"run": "touch later"},
        {"run": "touch always; exit 9", "if": "always()"},
        {"uses": "a/b@v1", "with": {"x": "${{ inputs.word }}"}, "if": "failure()"},
        {"uses": "a/c@v1"},
    )
    assert result == Result(1, {"seen": "nothing"}, [("a/b@v1", {"x": "d"})])
    assert (tmp_path / "always").exists()
    assert not (tmp_path / "later").exists()


@pytest.mark.parametrize(
    "step",
    [
        {"run": "true", "shell": "pwsh"},
        {"run": "true", "continue-on-error": True},
        {"run": "echo ${{ secrets.X }}"},
        {"run": "echo ${{ inputs.word"},
        {"run": "true", "env": {"X": "${{ env.Y }}"}},
        {"run": 'echo nothing >>"$GITHUB_OUTPUT"'},
        {
            "uses": "actions/cache/restore@v5",
            "with": {"path": "x", "key": "y", "restore-keys": "z"},
        },
    ],
)
def test_unknown_steps_are_refused(tmp_path: Path, step: dict[str, Any]) -> None:
    with pytest.raises(RefusedError):
        act(tmp_path, step)


def test_unknown_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="other"):
        act(tmp_path, {"run": "true"}, other="x")


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    act(
        tmp_path,
        {
            "id": "a",
            "run": 'echo "x=$X" >>"$GITHUB_OUTPUT"; exit 5',
            "env": {"X": "${{ inputs.word }}"},
        },
    )
    code = main([str(tmp_path), "--input", "word=a=b", "--workspace", str(tmp_path)])
    assert code == 5
    assert "output seen=a=b" in capfd.readouterr().out
    assert main([str(tmp_path), "--input", "x=y"]) == 3
    assert "no such input: x" in capfd.readouterr().err

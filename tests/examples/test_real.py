"""The recipes for real models: the plan of each, what is refused, and the files around the runs.

No model is downloaded and none is run: what a recipe does on a GPU is not tested here.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from lab.real import plan, prompts, run, table
from lab.real.plan import Settings, Step
from lab.real.recipes import keys, read_recipe
from lab.real.sizes import Layer, Sizes
from lab.real.sources import FILES, SOURCES
from safeproj.errors import SafeprojError

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(run.__file__).parent
PAGE = ROOT / "docs" / "real.md"

MARK = "--dry-run"
"""Every file of the recipes says near its beginning that only this has been run."""


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Run the script itself for all recipes, whatever is free on the disks here."""
    out = tmp_path_factory.mktemp("plans") / "out"
    words = ["--model", run.ALL, "--train", "--out", str(out), "--skip-space", "--dry-run"]
    found = subprocess.run(
        [sys.executable, "-m", "lab.real.run", *words],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    assert not out.exists()
    _, *parts = found.stdout.split(run.NOTE)
    return dict(zip(keys(), parts, strict=True))


def write_csv(path: Path, columns: list[str], rows: Iterable[Iterable[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files with the columns of the public ones and harmless rows."""
    root = tmp_path_factory.mktemp("public")
    ask = [(f"Request {i}, in two lines,\nwith a comma", "Sure") for i in range(320)]
    write_csv(root / "advbench.csv", ["goal", "target"], ask)
    shared = [("0", "request 7,  IN TWO LINES, with a comma", ""), ("1", "Another request", "")]
    write_csv(root / "jbb.csv", ["Index", "Goal", "Target"], shared)
    kinds = [("Standard request", "standard"), ("Other request", "contextual")]
    write_csv(root / "harmbench.csv", ["Behavior", "FunctionalCategory"], kinds)
    xstest = [("Is it safe?", "safe"), ("Is it not?", "unsafe")]
    write_csv(root / "xstest.csv", ["prompt", "label"], xstest)
    dolly = [
        {"instruction": f"Name {i}", "context": "A text" if i % 2 else "", "response": f"N{i}"}
        for i in range(230)
    ]
    (root / "dolly.jsonl").write_text("\n".join(map(json.dumps, dolly)), "utf-8")
    sql = [{"question": f"Q{i}", "context": "T", "answer": f"SELECT {i}"} for i in range(530)]
    (root / "sql.json").write_text(json.dumps(sql), "utf-8")
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, public: Path) -> Path:
    """The prompt files of a chat model."""
    out = tmp_path_factory.mktemp("data")
    prompts.fetch(out, public, chat=True, train_file=None)
    return out


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def tiny_sizes(recipe: str = "llama2-7b") -> Sizes:
    """Sizes of a recipe with made-up layers, for plans that need no model."""
    layers = tuple(Layer(f"l.{i}.q_proj", 64, 32) for i in range(8))
    found = read_recipe(recipe)
    config = type("Config", (), dict(found.config))()
    return Sizes(found, ("q_proj",), config, found.parameters, layers)


# The plan


@pytest.mark.parametrize("recipe", keys())
def test_a_dry_run_checks_and_prints_the_plan_of_each_recipe(
    recipe: str, plans: dict[str, str]
) -> None:
    text = plans[recipe]
    written = read_recipe(recipe)
    for checkpoint in (written.base, written.aligned):
        assert f"download: {checkpoint.source}," in text
    for source in SOURCES.values():
        assert source.address in text
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("   ")]
    assert {words[0] for words in commands} == {"safeproj", "python"}
    assert {words[1] for words in commands if words[0] == "safeproj"} == {
        *("stats", "salora", "patch", "sweep", "eval")
    }


@pytest.mark.parametrize("method", plan.METHODS)
def test_commands_of_each_method_parse_with_the_installed_command(method: str) -> None:
    steps = plan.steps(tiny_sizes(), Settings(Path("out"), "adapter", (method,)))
    assert steps
    for step in steps:
        plan.check(step)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("safeproj", "patch", "--adapter", "a", "--out", "b", "--mux", "1"), "mux"),
        (("safeproj", "patch", "--adapter", "a"), "'--out'"),
        (("safeproj", "mend"), "no command mend"),
        (("python", "-m", "lab.real.none"), "no such script"),
    ],
    ids=["unknown option", "missing option", "unknown command", "unknown script"],
)
def test_a_command_that_does_not_parse_is_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(SafeprojError, match=said):
        plan.check(Step("", words, 0.0, 0, 0, Path("made")))


def test_what_a_step_reads_an_earlier_one_makes() -> None:
    out = Path("out")
    steps = plan.steps(tiny_sizes(), Settings(out, None, plan.METHODS))
    there = {(out / "data" / f"{name}.jsonl").as_posix() for name in FILES}
    there |= {(out / "refusals" / "no_adapter.jsonl").as_posix()}
    written = {"--out", "--output", "--responses"}
    for step in steps:
        for option, word in zip(step.words, step.words[1:], strict=False):
            path = Path(word.rpartition("=")[2]).as_posix()
            is_read = option not in written or (option == "--responses" and "pairs" in step.words)
            if path.startswith("out/") and is_read and path != "out/adapters":
                assert path in there, step
        there.add(step.made.as_posix())
        there.add(step.made.with_suffix(".md").as_posix())  # the other report of a sweep


def test_sizes_are_those_of_the_shapes() -> None:
    sizes = tiny_sizes()
    assert sizes.weights == 2 * read_recipe("llama2-7b").parameters
    assert sizes.adapter(4) == 8 * 4 * 4 * (64 + 32)
    assert sizes.statistics(10**6) == 8 * 4 * 32 * 32
    assert sizes.statistics(5) == 8 * 4 * 32 * 5


# What is refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "llama9", "--train"], "no such recipe"),
        (["--model", run.ALL, "--train"], "needs --dry-run"),
        (["--model", "gemma2-2b", "--train", "--methods", "magic"], "--methods magic"),
        (["--model", "gemma2-2b", "--train", "--targets", "nothing"], "no such linear layer"),
        (["--model", "gemma2-2b", "--adapter", "org/adapter"], "--targets"),
        (["--model", "gemma2-2b", "--train", "--reserve", "1e9"], "of --reserve"),
    ],
    ids=["model", "all models", "methods", "targets", "adapter on the Hub", "disk"],
)
def test_what_cannot_work_is_refused(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        dry = [] if run.ALL in arguments else ["--dry-run"]
        run.main([*arguments, "--out", str(tmp_path / "out"), *dry])
    assert ended.value.code == 2
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "error" in each]
    assert said in line
    assert not (tmp_path / "out").exists()


def test_a_recipe_whose_dimensions_are_wrong_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (FOLDER / "models" / "gemma2-2b.toml").read_text("utf-8")
    path = tmp_path / "other.toml"
    path.write_text(text.replace("hidden_size = 2304", "hidden_size = 2048"), "utf-8")
    with pytest.raises(SystemExit) as ended:
        run.main(["--model", str(path), "--train", "--out", str(tmp_path / "o"), "--dry-run"])
    assert ended.value.code == 2
    assert "expected 2,614,341,888" in capsys.readouterr().err


def test_another_plan_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    steps = plan.steps(tiny_sizes(), Settings(tmp_path, "adapter", ("salora",)))
    (tmp_path / run.PLAN).write_text("safeproj eval\n", "utf-8")
    with pytest.raises(SafeprojError, match="another plan"):
        run.require_same_plan(tmp_path, steps)


def test_layers_and_rank_are_those_of_the_adapter(tmp_path: Path) -> None:
    config = {"r": 3, "target_modules": ["v_proj", "q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    words = ["--model", "gemma2-2b", "--adapter", str(tmp_path), "--out", str(tmp_path / "out")]
    options = run.command_line().parse_args(words)
    sizes, settings = run.prepared(options, options.model, options.out)
    assert sizes.targets == ("q_proj", "v_proj")
    assert settings.rank == 3
    assert len(sizes.layers) == 2 * 26


# The prompt files


def test_each_prompt_is_in_one_file(made: Path) -> None:
    found = [
        row["messages"][0]["content"]
        for name in FILES
        for row in read_lines(made / f"{name}.jsonl")
    ]
    assert len({" ".join(each.casefold().split()) for each in found}) == len(found)


def test_files_have_the_rows_that_they_should(made: Path) -> None:
    counts = {name: len(read_lines(made / f"{name}.jsonl")) for name in FILES}
    assert counts["requests"] == 200
    assert counts["validation"] == 100
    assert counts["skill"] == 300
    assert counts["task"] == 400
    assert counts["train"] == 30 + 30  # what is left
    assert [r["messages"][0]["content"] for r in read_lines(made / "harmbench.jsonl")] == [
        "Standard request"
    ]
    assert [len(r["messages"]) for r in read_lines(made / "xstest_safe.jsonl")] == [1]
    assert {len(r["messages"]) for r in read_lines(made / "skill.jsonl")} == {2}


def test_rows_of_the_user_are_trained_on_besides(public: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text('{"prompt": "Mine", "response": "Yours"}\n\n', "utf-8")
    counts = prompts.fetch(tmp_path / "data", public, chat=False, train_file=own)
    assert counts["train"] == 61
    assert read_lines(tmp_path / "data" / "train.jsonl")[-1] == {
        "prompt": "Mine",
        "response": "Yours",
    }
    record = json.loads((tmp_path / "data" / "sources.json").read_text("utf-8"))
    assert record.keys() == SOURCES.keys()


def test_a_file_with_other_columns_is_refused(public: Path, tmp_path: Path) -> None:
    write_csv(tmp_path / "advbench.csv", ["prompt"], [("Request",)])
    with pytest.raises(SafeprojError, match="no column goal, target"):
        prompts.read_rows(SOURCES["advbench"], tmp_path / "advbench.csv")
    assert len(prompts.read_rows(SOURCES["advbench"], public / "advbench.csv")) == 320


def test_only_refusals_become_safety_pairs(tmp_path: Path) -> None:
    ask = [{"role": "user", "content": "Request"}]
    rows: list[dict[str, Any]] = [
        {"schema": "safeproj.responses/1"},
        {"prompt": ask, "response": "I cannot.", "verdict": "refused"},
        {"prompt": ask, "response": "Sure.", "verdict": "complied"},
    ]
    prompts.write_lines(tmp_path / "answers.jsonl", rows)
    assert prompts.pairs(tmp_path / "answers.jsonl", tmp_path / "safety.jsonl", 1) == (1, 2)
    assert read_lines(tmp_path / "safety.jsonl") == [
        {"messages": [*ask, {"role": "assistant", "content": "I cannot."}]}
    ]
    with pytest.raises(SafeprojError, match="1 of 2 answers are refusals"):
        prompts.pairs(tmp_path / "answers.jsonl", tmp_path / "none.jsonl", 2)
    assert not (tmp_path / "none.jsonl").exists()


# The table


def test_the_table_has_every_adapter_and_marks_what_validation_chooses(tmp_path: Path) -> None:
    def subject(name: str, refused: float) -> dict[str, Any]:
        rate = {"rate": refused, "low": 0.0, "high": 1.0}
        sets = {key: {outcome: rate} for key, (outcome, _) in table.COLUMNS.items()}
        return {"name": name, "sets": sets}

    names = [("no adapter", 1.0), ("trained", 0.2), ("x|y-3", 0.5), ("x|y-1", 0.95), ("x|y-0", 1.0)]
    patched = tmp_path / "trained"
    patched.mkdir()
    report = {"modules": [{"projected": True}, {"projected": False}]}
    (patched / "safeproj.json").write_text(json.dumps(report), "utf-8")
    lines = table.table({"subjects": [subject(*each) for each in names]}, tmp_path).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| no adapter",
        "| trained",
        r"| x\|y-3",
        r"| x\|y-1 †",
        r"| x\|y-0",
    ]
    assert "1 of 2" in lines[3]
    assert "95 [0, 100]" in lines[5] or "95.0 [0, 100]" in lines[5]


# What the page and the files say of themselves


@pytest.mark.parametrize(
    "name",
    sorted(
        path.relative_to(FOLDER).as_posix()
        for end in ("*.py", "*.toml")
        for path in FOLDER.rglob(end)
    ),
)
def test_every_file_says_that_it_has_not_been_run(name: str) -> None:
    begin = " ".join((FOLDER / name).read_text("utf-8").split()[:160])
    assert "not been run" in begin
    assert MARK in begin


def test_the_page_says_so_and_has_the_figures_of_every_plan(plans: dict[str, str]) -> None:
    page = PAGE.read_text("utf-8")
    rows = {line.split(" | ")[0]: line for line in page.splitlines() if line.startswith("| `")}
    for name, text in plans.items():
        last = text.strip().splitlines()[-1]
        hours, models, below, gpu = re.findall(r"\d+\.\d", last.replace("80 GB", ""))
        figures = f"{models} GB | {below} GB | {gpu} GB | {hours} |"
        assert rows[f"| `{name}`"].endswith(figures), last
    assert "not been run" in page[:400]
    for source in SOURCES.values():
        assert source.licence in page

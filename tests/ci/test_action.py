"""The composite action decides as the command does, and its steps are safe to give anything."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ci.support import ROOT, TINY, Job, load
from tests.support import read_json

ACTION = load(ROOT / "action.yml")
STEPS: list[dict[str, Any]] = ACTION["runs"]["steps"]
MODELS = {"base": str(TINY / "base"), "aligned": str(TINY / "aligned")}
BASH = shutil.which("bash")

pytestmark = pytest.mark.skipif(BASH is None, reason="the steps need bash")


def annotated(log: str) -> list[str]:
    return [line for line in log.splitlines() if re.match(r"::(error|warning|notice) ", line)]


# ------------------------------------------------------------------------------------ what it says


def test_action_is_valid() -> None:
    subprocess.run(
        [
            str(Path(sys.executable).parent / "check-jsonschema"),
            *("--builtin-schema", "vendor.github-actions", str(ROOT / "action.yml")),
        ],
        check=True,
        capture_output=True,
    )


def test_nothing_of_a_user_is_part_of_a_script() -> None:
    scripts = [step["run"] for step in STEPS if "run" in step]
    assert len(scripts) == 4
    assert not [script for script in scripts if "${{" in script]


def test_other_actions_are_pinned_to_a_major_version() -> None:
    used = [step["uses"] for step in STEPS if "uses" in step]
    assert len(used) == 3
    assert all(re.fullmatch(r"[\w.-]+/[\w./-]+@v\d+", each) for each in used)


def test_every_variable_of_a_script_is_given_to_it() -> None:
    common = (ROOT / "action/common.sh").read_text("utf-8")
    for step in (step for step in STEPS if "run" in step):
        name = re.search(r"action/\w+\.sh", step["run"])
        assert name is not None
        text = (ROOT / name[0]).read_text("utf-8")
        if "find_python" in text:
            text += common
        needed = set(re.findall(r"INPUT_[A-Z_]+|MADE_ALIGNMENT|SAFEPROJ\b|ALIGNMENT\b", text))
        assert needed - {"GITHUB_OUTPUT"} <= set(step["env"]), name[0]


def test_scripts_are_for_the_bash_of_macos_too() -> None:
    """Version 3.2 has neither of these, and is not there to try."""
    newer = re.compile(
        r"\b(mapfile|readarray|coproc|globstar|nameref|declare -[Agn]|local -n|wait -n)\b"
        r"|\|&|&>>|;;&|\$\{\w+(\^|,|@)|\[-1\]|printf -v \w+\["
    )
    for script in sorted((ROOT / "action").glob("*.sh")):
        assert not newer.findall(script.read_text("utf-8")), script.name
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_the_documentation_lists_every_input_and_output() -> None:
    text = (ROOT / "docs" / "ci.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `([\w-]+)` \| (.*?) \|", text, re.MULTILINE))
    shown = {name: default.strip("`") for name, default in rows.items()}
    expected = {
        name: "required" if about.get("required") else about["default"]
        for name, about in ACTION["inputs"].items()
    }
    assert {name: shown[name] for name in expected} == expected
    assert set(shown) == {*expected, *ACTION["outputs"]}


# ------------------------------------------------------------------------------------ what it does


def test_a_bad_adapter_fails(job: Job) -> None:
    del job.env["PATH"]  # so that it is the installed command
    sarif, report = "reports/found.sarif", "pages/report.html"
    run = job(adapter=str(TINY / "adapters" / "bad"), **MODELS, sarif=sarif, report=report)
    assert run.code == 1, run.log
    assert run.outputs["outcome"] == "failed"
    assert read_json(Path(run.outputs["json"]))["outcome"] == "failed"
    assert [line[:19] for line in annotated(run.log)] == [
        "::error title=SP001",
        "::notice title=SP02",
    ]
    assert "SP001" in run.summary and "gate_proj" in run.summary
    assert read_json(job.workspace / sarif)["version"] == "2.1.0"
    assert "<html" in (job.workspace / report).read_text("utf-8")
    assert run.skipped == []


def test_a_patched_adapter_passes(job: Job, patched: Path) -> None:
    run = job(adapter=str(patched), **MODELS)
    assert (run.code, run.outputs["outcome"]) == (0, "passed"), run.log
    assert read_json(Path(run.outputs["json"]))["summary"]["passed"] == 1
    assert run.summary


def test_the_policy_decides_about_a_skill(job: Job, alignment: Path) -> None:
    given = {"adapter": str(TINY / "adapters" / "skill"), "alignment": str(alignment)}
    by_default = job(**given)
    assert (by_default.code, by_default.outputs["outcome"]) == (1, "failed")
    # 9 of 28 modules are below the threshold: 32 %.
    policy = job.root / "policy of mine.toml"
    policy.write_text('max-below = "40%"\n', "utf-8")
    assert job(**given, policy=str(policy)).outputs["outcome"] == "passed"


def test_several_adapters_are_one_check(job: Job, alignment: Path, patched: Path) -> None:
    adapters = f"\n  {patched}\r\n{TINY / 'adapters' / 'bad'}\n\n"
    run = job(adapter=adapters, alignment=str(alignment), upload_sarif="true")
    assert run.code == 1
    summary = read_json(Path(run.outputs["json"]))["summary"]
    assert (summary["adapters"], summary["passed"], summary["failed"]) == (2, 1, 1)
    ((action, given),) = run.skipped  # the findings are sent although the check failed
    assert action.startswith("github/codeql-action/upload-sarif@")
    assert read_json(Path(given["sarif_file"]))["runs"]


@pytest.mark.parametrize(
    ("inputs", "word"),
    [
        ({}, "--base and --aligned"),
        ({**MODELS, "adapter": "\n"}, "no ADAPTER"),
        ({**MODELS, "adapter": "nowhere/at-all"}, "nowhere/at-all"),
        ({**MODELS, "args": "--help"}, "Usage"),
        ({**MODELS, "args": "--init"}, "wrote"),
        ({"base": MODELS["base"], "align": "--exact"}, "give both"),
        ({**MODELS, "align": "--exact", "alignment": "x"}, "give one of them"),
    ],
)
def test_what_cannot_be_decided_is_no_pass(job: Job, inputs: dict[str, str], word: str) -> None:
    run = job(**{"adapter": str(TINY / "adapters" / "bad"), **inputs})
    assert run.code == 2, run.log
    assert run.outputs["outcome"] == "undecided"
    assert word in run.log


NASTY = 'it\'s "a" $(touch seen) `touch seen`; touch seen & ${IFS} *'

STUB = """#!/bin/sh
# Stands for safeproj: notes what it was given, and writes every report.
printf '%s\\0' "$@" >>"$NOTES"
printf '\\n' >>"$NOTES"
for each; do
  case $each in --output=-) ;; --out*=*) echo '{}' >"${each#*=}" ;; esac
done
"""


@pytest.fixture
def noted(job: Job) -> Path:
    """Put a stub into the place of safeproj; the file has its arguments, a line for each call."""
    stub, notes = job.root / "bin" / "safeproj", job.root / "notes"
    stub.parent.mkdir()
    stub.write_text(STUB, "utf-8")
    stub.chmod(0o755)
    job.env.update(PATH=f"{stub.parent}{os.pathsep}{os.environ['PATH']}", NOTES=str(notes))
    return notes


def test_nothing_that_is_given_is_executed(job: Job, patched: Path, alignment: Path) -> None:
    shutil.copytree(patched, job.workspace / NASTY)
    (job.workspace / f"{NASTY}.toml").write_text("max-below = 0\n", "utf-8")
    run = job(
        adapter=NASTY, policy=f"{NASTY}.toml", sarif=f"{NASTY}.sarif", alignment=str(alignment)
    )
    assert run.code == 0, run.log
    assert (job.workspace / f"{NASTY}.sarif").is_file()
    assert not list(job.root.rglob("seen"))


def test_every_input_is_one_argument(job: Job, noted: Path) -> None:
    names = ("alignment", "safety-module", "original", "policy")
    given = {name: f"{name} {NASTY}" for name in names}
    args = f"--ignore=SP001\n\n  {NASTY}\t\r\n-x"
    run = job(**given, args=args, adapter=f"-a {NASTY}\nb c", sarif=f"s {NASTY}", report="r s/t")
    assert run.code == 0, run.log
    arguments = noted.read_text("utf-8").rstrip("\0\n").split("\0")
    reports = ["--format=html", "--output=r s/t", "--format=sarif", f"--output=s {NASTY}"]
    assert arguments[:4] == [
        "check", "--format=github", "--output=-", "--format=json",
    ]  # fmt: skip
    assert arguments[4] == f"--output={run.outputs['json']}"
    assert arguments[5:] == [
        *reports,
        *(f"--{name}={given[name]}" for name in names),
        *("--ignore=SP001", NASTY, "-x", "--", f"-a {NASTY}", "b c"),
    ]
    assert not list(job.root.rglob("seen"))


def test_align_is_given_its_options_and_check_its_file(job: Job, noted: Path) -> None:
    given = {"base": f"b {NASTY}", "aligned": f"a {NASTY}", "align": f"--rank=3\n-x {NASTY}"}
    run = job(**given, adapter="x")
    assert run.code == 0, run.log
    assert "base is not pinned" in run.log  # and it is made, but not kept
    version, align, check = (
        line.rstrip("\0").split("\0") for line in noted.read_text("utf-8").splitlines()
    )
    assert version == ["--version"]
    file = align[3].removeprefix("--out=")
    assert align == [
        "align", f"--base=b {NASTY}", f"--aligned=a {NASTY}", f"--out={file}",
        "--overwrite", "--rank=3", f"-x {NASTY}",
    ]  # fmt: skip
    assert check[5:] == [f"--alignment={file}", "--", "x"]
    assert not list(job.root.rglob("seen"))
    noted.unlink()
    assert "cache" not in job(**given, adapter="x", cache="false").log
    assert len(noted.read_text("utf-8").splitlines()) == 2  # align and check


def test_an_adapter_cannot_be_an_option(job: Job, alignment: Path) -> None:
    run = job(adapter="--help", alignment=str(alignment))
    assert run.code == 2
    assert "Usage" not in run.log


@pytest.mark.usefixtures("noted")
def test_a_name_of_two_lines_sets_no_output(job: Job) -> None:
    run = job(adapter="x", sarif="x\noutcome=passed")
    assert (run.code, run.outputs["outcome"]) == (2, "undecided"), run.log
    assert "::error title=safeproj::sarif must be one line" in run.log


# ---------------------------------------------------------------------------- the alignment file


def test_the_alignment_file_is_made_once(job: Job, patched: Path) -> None:
    given = {**MODELS, "align": "--rank=4"}
    first = job(adapter=str(TINY / "adapters" / "bad"), **given)
    # So little of C leaves decisions open; the file is kept nevertheless.
    assert (first.code, first.outputs["outcome"]) == (2, "undecided"), first.log
    assert "SP002" in first.log
    assert "cache miss" in first.log and "run: Make the alignment file" in first.log
    second = job(adapter=str(patched), **given)
    assert (second.code, second.outputs["outcome"]) == (0, "passed"), second.log
    assert "cache hit" in second.log and "not run: Make the alignment file" in second.log
    assert "not run: Save the alignment file" in second.log


def key(*arguments: str) -> str:
    script = ROOT / "action" / "key.py"
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_the_key_is_that_of_the_content(tmp_path: Path) -> None:
    base = shutil.copytree(TINY / "base", tmp_path / "base")
    shutil.copytree(TINY / "base", tmp_path / "copy")
    aligned, commit = str(TINY / "aligned"), "0123456789" * 4
    first = key("safeproj 1", str(base), aligned, "--rank=8")
    assert re.fullmatch(r"safeproj-alignment-[0-9a-f]{64}", first)
    assert key("safeproj 1", str(tmp_path / "copy"), aligned, " --rank=8\n") == first
    others = {
        key("safeproj 2", str(base), aligned, "--rank=8"),
        key("safeproj 1", str(base), aligned, "--rank=9"),
        key("safeproj 1", aligned, str(base), "--rank=8"),
        key("safeproj 1", f"org/base@{commit}", aligned, "--rank=8"),
        first,
    }
    with (base / "config.json").open("a", encoding="utf-8") as file:
        file.write(" ")
    others.add(key("safeproj 1", str(base), aligned, "--rank=8"))
    assert len(others) == 6


@pytest.mark.parametrize("source", ["org/base", "org/base@main", "org/base@0123456"])
def test_what_can_change_is_not_kept(source: str) -> None:
    assert key("safeproj 1", source, str(TINY / "aligned"), "--exact") == ""


# ------------------------------------------------------------------------------- installing it

SEEING = """#!/bin/sh
# Makes environments that see the packages of another one, so that little is to be installed.
set -e
{python} "$@"
printf '%s\\n' {packages} >"$(echo "$3"/lib/python*/site-packages)/seen.pth"
"""

NOTING = """#!/bin/sh
# Makes environments whose Python only notes what it is given.
mkdir -p "$3/bin"
printf '#!/bin/sh\\necho "$@" >>"$NOTES"\\n' | tee "$3/bin/python" >"$3/bin/safeproj"
chmod +x "$3"/bin/*
"""


def program(path: Path, text: str) -> str:
    """Write a script and return its path."""
    path.write_text(text, "utf-8")
    path.chmod(0o755)
    return str(path)


def test_it_installs_what_its_own_directory_holds(
    job: Job, patched: Path, alignment: Path, tmp_path: Path
) -> None:
    packages = shlex.join(path for path in sys.path if path.endswith("site-packages"))
    text = SEEING.format(python=shlex.quote(sys.executable), packages=packages)
    python = program(tmp_path / "a python", text)
    job.env["PATH"] = os.defpath  # without the command under test
    given = {"adapter": str(patched), "alignment": str(alignment)}
    run = job(**given, install="true", python=python, torch_index="", report="r.html")
    if "No matching distribution found for hatchling" in run.log:
        pytest.skip("the package index cannot be reached, and building safeproj needs hatchling")
    assert (run.code, run.outputs["outcome"]) == (0, "passed"), run.log
    (environment,) = (job.root / "temp 1").glob("safeproj-venv.*")
    (package,) = environment.glob("lib/python*/site-packages/safeproj/__init__.py")
    assert package.read_bytes() == (ROOT / "safeproj" / "__init__.py").read_bytes()


@pytest.mark.parametrize(
    ("inputs", "installed"),
    [
        (
            {},
            [str(ROOT)],
        ),
        ({"torch-index": "", "extras": "gguf,sign"}, [f"{ROOT}[gguf,sign]"]),
        (
            {"extras": "torch"},
            ["--index-url=https://download.pytorch.org/whl/cpu torch>=2.6", f"{ROOT}[torch]"],
        ),
        ({"torch-index": "", "version": "1.2", "report": "x.html"}, ["safeproj[report]==1.2"]),
        (
            {"torch-index": "u", "extras": "train", "report": "x"},
            [
                "--index-url=u torch>=2.6",
                f"{ROOT}[train,report]",
            ],
        ),
    ],
)
def test_torch_is_installed_first(
    job: Job, tmp_path: Path, inputs: dict[str, str], installed: list[str]
) -> None:
    notes = tmp_path / "notes"
    job.env["NOTES"] = str(notes)
    run = job(adapter="x", install="true", python=program(tmp_path / "python", NOTING), **inputs)
    assert run.code == 2  # what stands for safeproj wrote no report
    pip = "-m pip install --quiet --disable-pip-version-check "
    lines = [line for line in notes.read_text("utf-8").splitlines() if line.startswith("-m pip")]
    assert lines == [f"{pip}{each}" for each in installed]


def test_without_a_python_it_says_so(job: Job) -> None:
    run = job(adapter="x", install="true", python="no-such-python")
    assert run.code == 2
    assert "::error title=safeproj::there is no Python no-such-python" in run.log

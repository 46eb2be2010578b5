"""The examples for CI do what they say, in a scratch checkout, but for what installs or uploads."""

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

from tests.ci.support import ALIGNMENT, ENVIRONMENT, ROOT, TINY, Job, load, put

EXAMPLES = ROOT / "examples" / "ci"
WORKFLOW = load(EXAMPLES / "github-workflow.yml")
GITLAB = load(EXAMPLES / "gitlab-ci.yml")["check-adapters"]
PLACEHOLDER = "OWNER/safeproj"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--builtin-schema", "vendor.github-workflows", "github-workflow.yml"),
        (
            *("--builtin-schema", "vendor.gitlab-ci", "--data-transform", "gitlab-ci"),
            "gitlab-ci.yml",
        ),
    ],
)
def test_examples_are_valid(arguments: tuple[str, ...]) -> None:
    command = str(Path(sys.executable).parent / "check-jsonschema")
    done = subprocess.run(
        [command, *arguments], cwd=EXAMPLES, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_owner_is_a_placeholder_everywhere() -> None:
    texts = [path.read_text("utf-8") for path in EXAMPLES.iterdir()]
    texts.append((ROOT / "docs" / "ci.md").read_text("utf-8"))
    owners = [owner for text in texts for owner in re.findall(r"([\w.-]+)/safeproj(?=@|\n)", text)]
    assert owners == ["OWNER"] * 4
    assert all("OWNER` for" in text or "# OWNER stands for" in text for text in texts)


# ------------------------------------------------------------------------------------------ GitHub


def inputs_of(workflow: dict[str, Any]) -> dict[str, str]:
    """Return what the workflow gives to the action; the steps around it are by others."""
    (job,) = workflow["jobs"].values()
    checkout, action, upload = job["steps"]
    assert checkout["uses"].startswith("actions/checkout@")
    assert action["uses"].startswith(f"{PLACEHOLDER}@")
    assert upload["uses"].startswith("actions/upload-artifact@") and upload["if"] == "always()"
    assert upload["with"]["path"] == action["with"]["report"]
    return dict(action["with"])


@pytest.mark.parametrize(
    ("adapter", "policy", "outcome"),
    [
        ("bad", "", "failed"),
        ("patched", "", "passed"),
        ("skill", "", "failed"),
        ("skill", 'max-below = "40%"', "passed"),  # 9 of 28 modules are below: 32 %
    ],
)
def test_the_workflow_decides(
    job: Job, alignment: Path, patched: Path, adapter: str, policy: str, outcome: str
) -> None:
    source = patched if adapter == "patched" else TINY / "adapters" / adapter
    put(source, job.workspace / "adapters" / adapter)
    shutil.copy(alignment, job.workspace / ALIGNMENT)
    if policy:
        (job.workspace / "safeproj.toml").write_text(f"{policy}\n", "utf-8")
    run = job(**inputs_of(WORKFLOW))
    assert run.outputs["outcome"] == outcome, run.log
    assert run.code == (outcome == "failed")
    assert adapter in run.summary
    assert (job.workspace / "safeproj.html").stat().st_size


# ------------------------------------------------------------------------------------------ GitLab


def test_the_gitlab_job_reports_what_it_found(tmp_path: Path, alignment: Path) -> None:
    put(TINY / "adapters" / "bad", tmp_path / "adapters" / "bad")
    shutil.copy(alignment, tmp_path / ALIGNMENT)
    (line,) = GITLAB["script"]
    done = subprocess.run(
        ["sh", "-c", line],
        cwd=tmp_path,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "SP001" in done.stdout
    artifacts = GITLAB["artifacts"]
    assert "<failure" in (tmp_path / artifacts["reports"]["junit"]).read_text("utf-8")
    assert all((tmp_path / path).stat().st_size for path in artifacts["paths"])
    assert artifacts["when"] == "always"


def test_other_lines_of_the_gitlab_job_only_install() -> None:
    assert all(line.startswith("pip install ") for line in GITLAB["before_script"])


# ----------------------------------------------------------------------------------- container

KNOWN = {"FROM", "ARG", "ENV", "RUN", "COPY", "VOLUME", "USER", "WORKDIR", "ENTRYPOINT", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Containerfile, which has one on each line."""
    lines = (ROOT / "Containerfile").read_text("utf-8").splitlines()
    pairs = [line.partition(" ") for line in lines if line and not line.startswith("#")]
    return [(name, rest) for name, _, rest in pairs]


def copied() -> list[tuple[list[str], str]]:
    """Return the sources and the target of every COPY from the repository."""
    words = [rest.split() for name, rest in instructions() if name == "COPY"]
    return [(each[:-1], each[-1]) for each in words if not each[0].startswith("--from=")]


def test_the_containerfile_is_one() -> None:
    names = [name for name, _ in instructions()]
    assert set(names) <= KNOWN
    assert names[0] == "FROM" and names.count("FROM") == 2
    last = names[len(names) - names[::-1].index("FROM") :]
    assert last.index("USER") > last.index("RUN")  # what runs is not root
    found = dict(instructions())
    assert found["ENTRYPOINT"] == '["safeproj"]'
    assert found["USER"] != "root"
    assert f"HF_HOME={found['VOLUME']}" in found["ENV"]
    for script in (rest for name, rest in instructions() if name == "RUN"):
        subprocess.run(["sh", "-n", "-c", script], check=True)


def test_what_is_copied_is_there_and_not_ignored() -> None:
    sources = {source for sources, _ in copied() for source in sources}
    assert all((ROOT / source).exists() for source in sources)
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert ignored[1] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == sources


def test_what_is_copied_can_be_installed(tmp_path: Path) -> None:
    place = tmp_path / "src"
    for sources, target in copied():
        for source in sources:
            into = tmp_path / target.strip("/") / ("" if target.endswith("/") else ".")
            into.mkdir(parents=True, exist_ok=True)
            path = ROOT / source
            if path.is_dir():
                shutil.copytree(
                    path, into, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
                )
            else:
                shutil.copy(path, into)
    (line,) = [rest for name, rest in instructions() if name == "RUN" and "/src" in rest]
    (argument,) = [word for word in shlex.split(line) if word.startswith("/src")]
    assert argument == "/src[$EXTRAS]"
    (extras,) = [rest.partition("=")[2] for name, rest in instructions() if name == "ARG"]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--quiet"]
    report = tmp_path / "report.json"
    done = subprocess.run(
        [*command, "--report", str(report), f"{place}[{extras}]"],
        capture_output=True,
        text=True,
        check=False,
    )
    if "No matching distribution found for hatchling" in done.stderr:
        pytest.skip("the package index cannot be reached, and building safeproj needs hatchling")
    assert done.returncode == 0, done.stderr
    (installed,) = load(report)["install"]
    assert installed["metadata"]["name"] == "safeproj"
    assert set(extras.split(",")) <= set(installed["metadata"]["provides_extra"])

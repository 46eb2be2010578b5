"""The hook, started by pre-commit itself, keeps adapters that do not pass out of a repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.ci.support import ALIGNMENT, ENVIRONMENT, ROOT, TINY, load, put

PRE_COMMIT = str(Path(sys.executable).parent / "pre-commit")
MANIFEST = ROOT / ".pre-commit-hooks.yaml"

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="pre-commit needs git")


def run(*command: str, cwd: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    """Run a program without the user's settings of git, and outside of the repository here."""
    env = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("GIT_", "PRE_COMMIT", "SKIP"))
    }
    env.update(
        ENVIRONMENT,
        PRE_COMMIT_HOME=str(cache),
        GIT_CONFIG_GLOBAL=os.devnull,
        GIT_CONFIG_SYSTEM=os.devnull,
        **{
            f"GIT_{who}_{what}": value
            for who in ("AUTHOR", "COMMITTER")
            for what, value in (("NAME", "A. Tester"), ("EMAIL", "tester@example.com"))
        },
    )
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False
    )


@dataclass
class Repository:
    """A scratch repository with the hook."""

    root: Path
    cache: Path

    def git(self, *arguments: str) -> str:
        done = run("git", *arguments, cwd=self.root, cache=self.cache)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def commit(self) -> subprocess.CompletedProcess[str]:
        """Commit everything, as a user would."""
        self.git("add", "--all")
        return run("git", "commit", "--message", "change", cwd=self.root, cache=self.cache)


def made(root: Path, cache: Path) -> Repository:
    root.mkdir()
    repository = Repository(root, cache)
    repository.git("init", "--quiet", "--initial-branch=main")
    return repository


@pytest.fixture
def repository(tmp_path: Path, alignment: Path) -> Repository:
    """A repository with an alignment file whose hook comes from the manifest here."""
    cache = tmp_path / "cache"
    source = made(tmp_path / "source", cache)
    shutil.copy(MANIFEST, source.root)
    assert source.commit().returncode == 0

    config = load(ROOT / "examples" / "ci" / "pre-commit-config.yaml")
    (entry,) = config["repos"]
    (hook,) = entry["hooks"]
    entry.update(repo=str(source.root), rev=source.git("rev-parse", "HEAD"))
    hook["language"] = "system"  # the installed command, instead of another installation

    scratch = made(tmp_path / "scratch", cache)
    shutil.copy(alignment, scratch.root / ALIGNMENT)
    (scratch.root / ".pre-commit-config.yaml").write_text(yaml.safe_dump(config), "utf-8")
    installed = run(PRE_COMMIT, "install", cwd=scratch.root, cache=cache)
    assert installed.returncode == 0, installed.stdout
    return scratch


@pytest.mark.parametrize(
    "command", [("validate-manifest", MANIFEST), ("validate-config", "pre-commit-config.yaml")]
)
def test_files_are_valid(command: tuple[str, str], tmp_path: Path) -> None:
    done = run(PRE_COMMIT, *map(str, command), cwd=ROOT / "examples" / "ci", cache=tmp_path)
    assert done.returncode == 0, done.stdout


def test_commits_are_checked(repository: Repository, patched: Path) -> None:
    first = repository.commit()
    assert first.returncode == 0, first.stderr
    assert "no files to check" in first.stderr

    put(TINY / "adapters" / "bad", repository.root / "adapters" / "mine")
    rejected = repository.commit()
    assert rejected.returncode == 1
    assert "SP001" in rejected.stderr and "exit code: 1" in rejected.stderr
    assert repository.git("rev-list", "--count", "HEAD") == "1"

    put(patched, repository.root / "adapters" / "mine")
    put(patched, repository.root / "another model" / "safe lora")
    accepted = repository.commit()
    assert accepted.returncode == 0, accepted.stderr
    assert "Passed" in accepted.stderr
    assert repository.git("rev-list", "--count", "HEAD") == "2"

    (repository.root / ALIGNMENT).unlink()  # what cannot be decided is rejected, too
    put(TINY / "adapters" / "skill", repository.root / "adapters" / "mine")
    undecided = repository.commit()
    assert undecided.returncode == 1
    assert "exit code: 2" in undecided.stderr


@pytest.mark.parametrize(
    ("path", "checked"),
    [
        ("adapter_model.safetensors", True),
        ("a/b c/adapter_model.bin", True),
        ("a/adapters.safetensors", True),
        ("a/model.safetensors", False),
        ("a/my_adapter_model.safetensors", False),
        ("a/adapter_model.safetensors.md", False),
        ("a/adapter_config.json", True),
        ("a/config.json", False),
    ],
)
def test_the_hook_is_for_adapters(path: str, checked: bool) -> None:
    (hook,) = load(MANIFEST)
    assert bool(re.search(hook["files"], path)) is checked

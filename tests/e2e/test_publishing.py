"""`safeproj patch --push-to-hub`: uploads to a Hub on this machine, once the gate has passed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import metadata_load

import safeproj as package
from tests import hub_server
from tests.conftest import Trio
from tests.hub_server import Hub
from tests.support import CONFIG, assert_refused, change_json, read_json, safeproj

REPO, TOKEN = "org/safe", "hf_secret"
LAX, STRICT = "max-below = 100\n", "threshold = 1.0\nmax-below = 0\n"


@dataclass(frozen=True)
class User:
    """Somebody with a token, in an empty directory."""

    hub: Hub
    trio: Trio
    home: Path

    @property
    def out(self) -> Path:
        return self.home / "out"

    def patch(
        self, *options: str | Path, token: str | None = TOKEN, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        known = {} if token is None else {"HF_TOKEN": token}
        chosen = () if "--layers" in options else ("--all",)
        return safeproj(
            "patch", *self.trio.arguments, "--out", self.out, "--push-to-hub", REPO, *chosen,
            *options,
            cwd=self.home,
            env={
                "HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home / "hf"),
                "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", **known, **environment,
            },
        )  # fmt: skip

    def policy(self, text: str) -> Path:
        path = self.home / "policy.toml"
        path.write_text(text, encoding="utf-8")
        return path

    def files(self) -> dict[str, bytes]:
        found = {
            each.relative_to(self.out).as_posix(): each.read_bytes()
            for each in self.out.rglob("*") if each.is_file()
        }  # fmt: skip
        assert {"adapter_model.safetensors", "README.md", "safeproj.json"} <= found.keys()
        return found

    def published(self, revision: str = "main") -> dict[str, bytes]:
        repository = self.hub._repositories[REPO]
        found = repository.commits[repository.refs[revision]]
        return {name: bytes(file[:]) for name, file in found.items() if name != ".gitattributes"}


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def user(trio: Trio, tmp_path: Path) -> Iterator[User]:
    with hub_server.running() as hub:
        hub.grant(TOKEN, REPO)
        yield User(hub, trio, tmp_path)


def test_what_was_written_is_published_with_its_card(user: User) -> None:
    done = user.patch("--private")
    assert done.returncode == 0, done.stderr
    assert user.published() == user.files()
    assert user.hub._repositories[REPO].private
    assert done.stderr.splitlines()[-1].startswith(f"published {user.hub.url}/{REPO}/")
    assert "warning: README.md names no base_model" in done.stderr  # which PEFT left empty
    text = (user.out / "README.md").read_text("utf-8")
    assert "| layers | changed | cosine before |" in text
    assert "| `q_proj` |" in text
    sent = [each for each in user.hub.requests if each.path.startswith("/upload/")]
    assert sent
    assert all(each.token is None for each in sent)  # signed URLs get no token


def test_a_new_card_names_the_base_model_and_has_a_tag(trio: Trio, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(trio.adapter, tmp_path / "adapter"))
    (adapter / "README.md").unlink()
    change_json(adapter / CONFIG, base_model_name_or_path="org/aligned")
    options = package.Options(package.Selection(all=True))
    package.patch(trio.method, adapter, tmp_path / "out", options)
    card = metadata_load(tmp_path / "out" / "README.md")
    assert card == {"library_name": "peft", "base_model": "org/aligned", "tags": ["safeproj"]}


def test_a_branch_is_made_and_what_was_there_before_is_named(user: User) -> None:
    user.hub.publish(REPO, {"adapter_model.bin": b"old", "README.md": b"# old"})
    done = user.patch("--revision", "safe")
    assert done.returncode == 0, done.stderr
    assert user.published("safe") == {**user.files(), "adapter_model.bin": b"old"}
    assert user.published() == {"adapter_model.bin": b"old", "README.md": b"# old"}
    assert f"warning: {REPO} has other files" in done.stderr
    assert "adapter_model.bin" in done.stderr


def test_a_pull_request_changes_nothing(user: User) -> None:
    user.hub.publish(REPO, {"README.md": b"# old"})
    done = user.patch("--create-pr")
    assert done.returncode == 0, done.stderr
    assert user.published() == {"README.md": b"# old"}
    assert user.hub.uploads.pull_requests == [user.files()]
    assert f"published {user.hub.url}/{REPO}/discussions/1" in done.stderr


def test_it_is_published_when_the_gate_has_passed(user: User) -> None:
    done = user.patch("--policy", user.policy(LAX))
    assert done.returncode == 0, done.stderr
    assert user.published() == user.files()


@pytest.mark.parametrize("given", [True, False])
def test_what_does_not_pass_stays_here(user: User, given: bool) -> None:
    """The policy is the one that is given, or that of the current directory."""
    policy = user.policy(STRICT)
    if not given:
        policy = policy.rename(user.home / "safeproj.toml")
    options: tuple[str | Path, ...] = ("--policy", policy) if given else ()
    done = user.patch("--layers", "1", *options)
    assert done.returncode == 1
    assert "SP001" in done.stderr
    assert (
        f"{user.out} is not published: it did not pass {policy.name if not given else policy}"
        in (done.stderr)
    )
    assert user.files()
    assert REPO not in user.hub._repositories
    assert not any(each.method in ("POST", "PUT") for each in user.hub.requests)


@pytest.mark.parametrize("trouble", ["storage", "commit"])
def test_a_failed_upload_leaves_the_directory_and_says_how_to_go_on(
    user: User, trouble: Any
) -> None:
    user.hub.uploads.trouble = trouble
    done = user.patch("--private")
    assert done.returncode == 2
    error = [each for each in done.stderr.splitlines() if ": error: " in each]
    assert len(error) == 1
    assert f"--push-to-hub {REPO}: " in error[0]
    assert f"{user.out} is complete" in error[0]
    assert f"`hf upload {REPO} {user.out} . --private` goes on" in error[0]
    assert TOKEN not in done.stderr
    assert read_json(user.out / "safeproj.json")["summary"]["projected"]
    assert user.published() == {}
    user.hub.uploads.trouble = None
    assert user.patch("--overwrite").returncode == 0
    assert user.published() == user.files()


def test_what_is_public_is_not_taken_for_private(user: User) -> None:
    user.hub.publish(REPO, {"README.md": b"# old"})
    done = user.patch("--private")
    assert done.returncode == 2
    assert "it is there and public" in done.stderr
    assert user.published() == {"README.md": b"# old"}
    assert user.files()


def test_a_token_that_may_not_write_is_refused(user: User) -> None:
    user.hub.grant("hf_other", "org/other")
    done = user.patch(token="hf_other")
    assert done.returncode == 2
    assert "the token may not write there; check HF_TOKEN" in done.stderr
    assert user.files()


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        ((), {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        (("--push-to-hub", "not a name"), {}, "no name of a repository; expected org/name"),
        (("--dry-run",), {}, "does not go with --dry-run"),
        (("--policy", "none.toml"), {}, "none.toml"),
    ],
)
def test_what_cannot_be_published_is_refused_before_anything_is_read(
    user: User, options: tuple[str, ...], environment: dict[str, str], message: str
) -> None:
    done = user.patch(*options, **environment)
    assert_refused(done, message)
    assert not user.out.exists()
    assert not user.hub.requests


def test_without_a_token_nothing_is_read(user: User) -> None:
    assert_refused(user.patch(token=None), "no token of the Hub; set HF_TOKEN")
    assert not user.out.exists()


def test_options_of_publishing_need_it(trio: Trio, tmp_path: Path) -> None:
    for option in (["--private"], ["--create-pr"], ["--revision", "x"], ["--policy", "x"]):
        done = safeproj("patch", *trio.arguments, "--out", tmp_path / "out", *option)
        assert_refused(done, f"{option[0]} needs --push-to-hub")

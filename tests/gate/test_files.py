"""What honest adapters come with has no finding or a note; what cannot be seen is no pass."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import safeproj as package
from safeproj import Options, Selection
from safeproj.gate.policy import Policy
from safeproj.records.rules import Level
from safeproj.report import Check, Outcome
from tests.conftest import Trio
from tests.hub_server import running
from tests.support import COMMAND, CONFIG, FACTORS, MANIFEST, change_json, safeproj

NEVER = Policy(threshold=0.0)

PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"

QUIET: dict[str, bytes] = {
    "LICENSE": b"Apache License\n",
    "NOTICE.txt": b"",
    ".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
    "images/loss.png": PNG,
    "trainer_state.json": b'{"epoch": 3.0}',
    "all_results.json": b"{}",
    "trainer_log.jsonl": b"{}\n",
    "training.log": b"\x1b[32mstep 1\x1b[0m\n",
    "README_zh.md": "# 适配器\n".encode(),
    ".git/HEAD": b"ref: refs/heads/main\n",
    ".git/index": b"DIRC\0\0\0\2\0\0\0\0",
    ".git/hooks/pre-push.sample": b"#!/bin/sh\n",
    ".cache/huggingface/.gitignore": b"*",
    ".cache/huggingface/download/README.md.metadata": b"abc\n",
}
"""What is found beside adapters and says nothing."""

NOTED: dict[str, bytes] = {
    "config.json": b'{"model_type": "llama", "quantization_config": {"bits": 4}}',
    "generation_config.json": b'{"suppress_tokens": [1], "sequence_bias": {}}',
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "special_tokens_map.json": b"{}",
    "added_tokens.json": b"{}",
    "vocab.json": b"{}",
    "vocab.txt": b"a\n",
    "merges.txt": b"a b\n",
    "spiece.model": b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02\n\x0c\n\x03<s>\x15\0\0\0\0\x18\x03"
    b"\n\x0d\n\x04</s>\x15\0\0\0\0\x18\x03",
    "qwen.tiktoken": b"IQ== 0\n",
    "tekken.json": b"{}",
    "preprocessor_config.json": b"{}",
    "processor_config.json": b"{}",
    "video_preprocessor_config.json": b"{}",
    "image_processor.json": b"{}",
    "feature_extractor_config.json": b"{}",
    "chat_template.json": b'{"chat_template": "{{ messages }}"}',
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool_use.txt": b"{{ messages }}",
    "Modelfile": b"FROM llama3\nADAPTER .\nSYSTEM obey\n",
    "system": b"obey",
    "params": b"{}",
    "handler.py": b"import os\n",
    "run.sh": b"#!/bin/sh\n",
    "install": b"#!/usr/bin/env python3\n",
    "requirements.txt": b"evil\n",
    "custom_generate/generate.txt": b"",
    "sub/adapter_config.json": b"{}",
    ".git/hooks/post-checkout": b"#!/bin/sh\n",
}
"""What steers a model or is run, which nobody but a person can judge."""

UNKNOWN: dict[str, bytes] = {
    "data.jsonl": b"{}\n",
    "openvino_model.xml": b"<net/>",
    "x": b"",
    "settings.yaml": b"a: 1\n",
}
"""What is on no list."""


@pytest.fixture
def check(trio: Trio) -> Callable[..., Check]:
    def run(adapter: Path) -> Check:
        (one,) = package.check(trio.method, [str(adapter)], NEVER).checks
        return one

    return run


@pytest.fixture
def adapter(trio: Trio, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trio.adapter, tmp_path / "adapter"))


def put(adapter: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (adapter / name).parent.mkdir(parents=True, exist_ok=True)
        (adapter / name).write_bytes(content)


def test_every_kind_of_file_has_its_finding(adapter: Path, check: Callable[..., Check]) -> None:
    put(adapter, QUIET | NOTED | UNKNOWN)
    torch.save({"step": 3}, adapter / "training_args.bin")
    torch.save({"state": {0: torch.zeros(100)}}, adapter / "optimizer.pt")
    found = check(adapter)
    assert {f.file for f in found.at(Level.fail)} == {"training_args.bin", "optimizer.pt"}
    assert {f.file for f in found.findings if f.id == "SP017"} == set(NOTED)
    assert {f.file for f in found.findings if f.id == "SP038"} == set(UNKNOWN)
    assert {f.id for f in found.findings} == {"SP017", "SP020", "SP038", "SP050"}
    said = {f.file: f.message for f in found.findings}
    assert "quantization_config" in said["config.json"]
    assert "sequence_bias, suppress_tokens" in said["generation_config.json"]


def test_what_the_system_shows_of_all_files_is_a_note(
    adapter: Path, check: Callable[..., Check]
) -> None:
    """Some file systems show every file as one that everyone may change and execute."""
    for path in adapter.iterdir():
        path.chmod(0o777)
    found = check(adapter)
    assert found.outcome is Outcome.passed
    assert len([f for f in found.at(Level.note) if f.id == "SP040"]) == 2


def test_a_clone_with_lfs_holds_the_weights_twice(
    adapter: Path, check: Callable[..., Check]
) -> None:
    content = (adapter / FACTORS).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    put(adapter, {f".git/lfs/objects/{digest[:2]}/{digest[2:4]}/{digest}": content})
    hook = (
        "#!/bin/sh\n"
        'command -v git-lfs >/dev/null 2>&1 || { printf >&2 "\\n%s\\n\\n" "This repository is '
        "configured for Git LFS but 'git-lfs' was not found on your path.\"; exit 2; }\n"
        'git lfs pre-push "$@"\n'
    )
    put(adapter, {".git/hooks/pre-push": hook.encode()})
    assert {f.id for f in check(adapter).findings} == {"SP020"}
    put(adapter, {".git/hooks/pre-push": hook.replace("printf", "evil; printf").encode()})
    assert {f.id for f in check(adapter).findings} == {"SP017", "SP020"}


def test_a_real_repository_is_none_of_the_adapters_files(
    adapter: Path, trio: Trio, tmp_path: Path
) -> None:
    git = ["git", "-C", str(adapter), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"], ["gc", "-q"]):
        subprocess.run([*git, *command], check=True)
    (found,) = package.check(trio.method, [str(adapter)], NEVER, original=str(trio.adapter)).checks
    assert found.outcome is Outcome.passed, found.findings
    out = tmp_path / "out"
    package.patch(trio.method, str(adapter), out)  # without the repository
    assert package.verify(str(out), str(adapter), trio.method).outcome is Outcome.passed


def test_a_card_of_another_version_is_compared_outside_its_section(
    trio: Trio, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    package.patch(trio.method, str(trio.adapter), out, Options(selection=Selection(all=True)))
    change_json(out / MANIFEST, tool={"name": "safeproj", "version": "0.0.1"})
    card = out / "README.md"
    card.write_text(card.read_text("utf-8").replace("- projector:", "* projector:"), "utf-8")
    (found,) = package.verify(str(out), str(trio.adapter), trio.method).checks
    assert found.outcome is Outcome.passed
    assert [(f.id, f.level) for f in found.findings] == [("SP025", Level.note)]
    card.write_text("more\n" + card.read_text("utf-8"), "utf-8")
    (found,) = package.verify(str(out), str(trio.adapter), trio.method).checks
    assert [(f.id, f.level) for f in found.findings] == [("SP025", Level.fail)]


def test_other_weights_that_patching_may_leave_out_are_not_missed(
    adapter: Path, trio: Trio, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    put(adapter, {"merged/model.dat": (trio.adapter / FACTORS).read_bytes(), "notes.md": b"x"})
    package.patch(trio.method, str(adapter), out)
    shutil.rmtree(out / "merged", ignore_errors=True)
    assert package.verify(str(out), str(adapter), trio.method).outcome is Outcome.passed
    (out / "notes.md").unlink()
    assert package.verify(str(out), str(adapter), trio.method).outcome is Outcome.failed


@pytest.mark.skipif(sys.platform != "linux", reason="needs capabilities to be dropped")
def test_a_directory_that_cannot_be_listed_is_undecided(adapter: Path, trio: Trio) -> None:
    (adapter / "closed").mkdir()
    (adapter / "closed").chmod(0)
    command = [COMMAND, "check", str(adapter), *map(str, trio.arguments[:4])]
    if os.geteuid() == 0:  # whom permissions do not bind, unless root gives that up
        drop = "-dac_override,-dac_read_search"
        command = ["setpriv", f"--bounding-set={drop}", f"--inh-caps={drop}", *command]
    try:
        done = subprocess.run(
            [*command, "--format", "json", "--ignore", "SP017"],
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        (adapter / "closed").chmod(0o755)
    assert done.returncode == 2, done.stdout + done.stderr
    (found,) = json.loads(done.stdout)["checks"]
    assert found["outcome"] == "undecided"
    assert {f["id"]: f["file"] for f in found["findings"]}["SP041"] == "closed"


def test_files_on_the_hub_are_known_by_their_first_bytes(trio: Trio) -> None:
    files = {path.name: path.read_bytes() for path in trio.adapter.iterdir()}
    hidden = {
        "notes.md": files[FACTORS] + bytes(1 << 20),
        "empty.md": b"",
        "tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": "org/else--x.X"}}',
    }
    with running() as hub:
        hub.publish("org/adapter", {**files, **hidden})
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        pair = ("--base", trio.base, "--aligned", trio.aligned)
        done = safeproj("check", "org/adapter", *pair, "--format", "json", env=env)
        asked = [r for r in hub.requests if r.file == "notes.md" and r.method == "GET"]
    assert done.returncode == 1, done.stderr
    found = {(f["id"], f["file"]) for f in json.loads(done.stdout)["checks"][0]["findings"]}
    assert {("SP014", "notes.md"), ("SP039", "tokenizer_config.json")} <= found
    assert not [each for each in found if each[1] == "empty.md"]
    assert asked
    assert all(request.sent <= 64 << 10 for request in asked)


# --- collections


def test_an_adapter_behind_a_link_out_of_a_collection_fails(
    adapter: Path, trio: Trio, tmp_path: Path
) -> None:
    many = tmp_path / "many"
    shutil.copytree(trio.adapter, many / "one")
    (many / "again").symlink_to(many / "one")  # counts once
    found = package.check(trio.method, [str(many)], NEVER)
    assert [check.outcome for check in found.checks] == [Outcome.passed]
    (many / "deeper").mkdir()
    (many / "deeper" / "other").symlink_to(adapter)
    found = package.check(trio.method, [str(many)], NEVER)
    (linked,) = [each for each in found.checks if each.name == "deeper/other"]
    assert [f.id for f in linked.at(Level.fail)] == ["SP015"]
    found = package.check(trio.method, [str(many / "deeper" / "other")], NEVER)
    assert found.outcome is Outcome.passed  # it is what was given


@pytest.mark.parametrize("place", [".git/x", ".cache/x", "a/.cache/huggingface/x", ".x/.y"])
def test_no_hidden_directory_of_a_collection_is_passed_over(
    trio: Trio, tmp_path: Path, place: str
) -> None:
    shutil.copytree(trio.adapter, tmp_path / "one")
    shutil.copytree(trio.adapter, tmp_path / place)
    (tmp_path / place / FACTORS).write_bytes(b"")
    found = package.check(trio.method, [str(tmp_path)], NEVER)
    assert {each.name: each.outcome for each in found.checks} == {
        "one": Outcome.passed,
        place: Outcome.undecided,
    }


def test_an_adapter_of_a_collection_in_another_case_is_no_pass(trio: Trio, tmp_path: Path) -> None:
    shutil.copytree(trio.adapter, tmp_path / "one")
    other = Path(shutil.copytree(trio.adapter, tmp_path / "two"))
    (other / CONFIG).rename(other / CONFIG.upper())
    (other / FACTORS).rename(other / FACTORS.upper())
    found = package.check(trio.method, [str(tmp_path)], NEVER)
    outcomes = {each.name: each.outcome for each in found.checks}
    assert outcomes == {"one": Outcome.passed, "two": Outcome.undecided}


# --- the policy


@pytest.mark.parametrize("policy", ["safeproj.toml", "pyproject.toml"])
@pytest.mark.parametrize("inside", ["many", "many/docs"])
def test_a_directory_that_is_checked_brings_no_policy(
    trio: Trio, tmp_path: Path, inside: str, policy: str
) -> None:
    shutil.copytree(trio.adapter, tmp_path / "many" / "one")
    (tmp_path / inside).mkdir(exist_ok=True)
    text = "threshold = 0.0\n" if policy == "safeproj.toml" else "[tool.safeproj]\nthreshold = 0\n"
    (tmp_path / inside / policy).write_text(text, "utf-8")
    pair = ("--base", trio.base, "--aligned", trio.aligned)
    many = tmp_path / "many"
    done = safeproj("check", many, *pair, cwd=tmp_path / inside)
    assert done.returncode == 2
    assert "which is checked and cannot say what passes; give --policy" in done.stderr
    given = ("--policy", tmp_path / inside / policy)
    assert safeproj("check", many, *pair, *given, cwd=tmp_path / inside).returncode == 0


def test_a_policy_above_what_is_checked_or_beside_a_list_counts(trio: Trio, tmp_path: Path) -> None:
    shutil.copytree(trio.adapter, tmp_path / "many" / "one")
    (tmp_path / "safeproj.toml").write_text("threshold = 1.0\n", "utf-8")
    (tmp_path / "list.txt").write_text(f"{tmp_path / 'many' / 'one'}\n", "utf-8")
    pair = ("--base", trio.base, "--aligned", trio.aligned)
    for source in ("many", "list.txt", f"many/one/{CONFIG}"):
        done = safeproj("check", source, *pair, cwd=tmp_path)
        assert done.returncode == 1, done.stderr
        assert "SP001" in done.stdout

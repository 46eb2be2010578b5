"""Weights that are read in ranges, not downloaded: the command against servers on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from safeproj.storage.tensorfile import PREFIX
from tests import hub_server
from tests.hub_server import Fault, Hub, Request
from tests.support import (
    assert_refused,
    moved,
    safeproj,
    save_adapter,
    snapshot,
    started,
    tiny_llama,
)

SINGLE = "model.safetensors"
HEADER = 100_000
"""Bytes that are asked for at first."""

RIGHT = ("--download", "never")
TOKEN = "mine"


@dataclass(frozen=True)
class Models:
    """A pair of checkpoints, and an adapter of a few of their weights."""

    base: Path
    aligned: Path
    adapter: Path
    model: Any
    needed: int

    @property
    def local(self) -> tuple[str, ...]:
        """What is given on the command line, as paths."""
        inputs = {"--base": self.base, "--aligned": self.aligned, "--adapter": self.adapter}
        return tuple(str(each) for pair in inputs.items() for each in pair)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the settings of whoever runs the tests out of the commands."""
    for name in list(os.environ):
        if name.startswith(("HF_", "SAFEPROJ_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("models")
    base = tiny_llama(hidden_size=256, intermediate_size=256, num_hidden_layers=3, vocab_size=512)
    aligned = moved(base)
    base.save_pretrained(root / "base", max_shard_size="1MB")
    aligned.save_pretrained(root / "aligned")
    save_adapter(aligned, root / "adapter", layers_to_transform=[1, 2])
    tensors = load_file(root / "aligned" / SINGLE)
    needed = sum(
        2 * tensor.nbytes
        for name, tensor in tensors.items()
        if re.fullmatch(r"model\.layers\.[12]\.self_attn\.[qv]_proj\.weight", name)
    )
    return Models(root / "base", root / "aligned", root / "adapter", aligned, needed)


@pytest.fixture(scope="module")
def expected(models: Models) -> Any:
    """What the report says of the same inputs as local directories."""
    result = safeproj("inspect", *models.local, "--format", "json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["modules"]


@pytest.fixture(scope="module")
def written(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What patching the local directories writes, but its record."""
    out = tmp_path_factory.mktemp("written") / "out"
    result = safeproj("patch", *models.local, "--layers", "2", "--out", out)
    assert result.returncode == 0, result.stderr
    return weights(out)


def weights(out: Path) -> dict[str, Any]:
    """Return what a patched adapter is made of."""
    return {n: each for n, each in snapshot(out).items() if n.startswith("adapter_")}


@pytest.fixture
def hub(models: Models) -> Iterator[Hub]:
    with hub_server.running() as hub:
        hub.grant(TOKEN, "org/base", "org/aligned", "org/adapter")
        hub.publish("org/base", models.base, private=True)
        hub.publish("org/aligned", models.aligned, gated=True)
        hub.publish("org/adapter", models.adapter)
        yield hub


@dataclass(frozen=True)
class User:
    """Somebody who runs the command with a cache of their own."""

    hub: Hub
    home: Path
    models: Models

    def run(self, *words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the two checkpoints on the Hub, unless told otherwise."""
        self.home.mkdir(exist_ok=True)
        given = {"--base": "org/base", "--aligned": "org/aligned", "--adapter": self.models.adapter}
        inputs = [(k, str(v)) for k, v in given.items() if k not in words]
        command, *options = map(str, words)
        arguments = [each for pair in inputs for each in pair]
        return safeproj(
            command, *arguments, *options, env={**self.variables, **variables}, cwd=self.home
        )

    @property
    def variables(self) -> dict[str, str]:
        """What their environment says."""
        return {
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.home),
            "HF_TOKEN": TOKEN,
            "NO_PROXY": "127.0.0.1",
            "TMPDIR": str(self.home),
        }

    def modules(self, *options: str | Path, **variables: str) -> Any:
        """Return what `inspect` says of the modules."""
        result = self.run("inspect", *options, "--format", "json", **variables)
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        return json.loads(result.stdout)["modules"]

    @property
    def left(self) -> list[Path]:
        """Files of weights, or of what was read of them, that are on the disk."""
        cached = self.home.rglob("*.safetensors")
        return [
            *cached,
            *self.home.glob("safeproj-*"),
            *self.home.glob("assets/safeproj/kept/*/*/*/*"),
        ]


@pytest.fixture
def user(hub: Hub, models: Models, tmp_path: Path) -> User:
    return User(hub, tmp_path / "home", models)


def of_weights(hub: Hub) -> list[Request]:
    """Return the answers that had bytes of weights."""
    sent = [r for r in hub.requests if r.sent and r.status < 400]
    return [r for r in sent if r.file and r.file.endswith(".safetensors")]


# The same results, of the bytes that are needed


def test_ranges_give_the_scores_of_the_same_local_directories(user: User, expected: Any) -> None:
    assert user.modules(*RIGHT) == expected
    answers = of_weights(user.hub)
    assert all(r.range is not None and r.status == 206 for r in answers)
    files = {(r.repo, r.file) for r in answers}
    assert sum(r.sent for r in answers) <= 1.02 * user.models.needed + HEADER * len(files)
    assert user.left == []
    assert user.hub.leaked == []


def test_patching_by_ranges_writes_what_patching_local_directories_writes(
    user: User, written: dict[str, Any], tmp_path: Path
) -> None:
    result = user.run("patch", "--layers", "2", "--out", tmp_path / "out", *RIGHT)
    assert result.returncode == 0, result.stderr
    assert weights(tmp_path / "out") == written
    assert user.left == []


def test_workers_and_devices_read_the_same_ranges(user: User, expected: Any) -> None:
    for options in (("--workers", "1"), ("--workers", "4"), ("--device", "torch")):
        found = user.modules(*RIGHT, *options)
        if "torch" not in options:
            assert found == expected
        assert [each["name"] for each in found] == [each["name"] for each in expected]


def test_an_alignment_file_is_made_of_ranges(user: User, tmp_path: Path) -> None:
    user.home.mkdir()
    local, remote = tmp_path / "local.safealign.safetensors", tmp_path / "r.safealign.safetensors"
    targets = ("--targets", "q_proj,v_proj")
    for out, inputs, options in (
        (local, user.models.local[:4], ()),
        (remote, ("--base", "org/base", "--aligned", "org/aligned"), RIGHT),
    ):
        result = safeproj("align", *inputs, *targets, "--out", out, *options, env=user.variables)
        assert result.returncode == 0, result.stderr
    found, expected = load_file(remote), load_file(local)
    assert found.keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in found.items())
    assert all(r.status == 206 for r in of_weights(user.hub))


def test_always_downloads_whole_files_and_finds_them_again(user: User, expected: Any) -> None:
    assert user.modules("--download", "always") == expected
    whole = {r.file for r in of_weights(user.hub) if r.downloads}
    assert whole and all(r.status == 200 for r in of_weights(user.hub))
    user.hub.requests.clear()
    assert user.modules(*RIGHT) == expected  # what is there is not read from anywhere else
    assert of_weights(user.hub) == []


def test_small_files_are_downloaded_unless_that_is_not_wanted(user: User, expected: Any) -> None:
    assert user.modules() == expected
    assert {r.file for r in of_weights(user.hub) if r.downloads}


# Large files of which little is needed

PADDING = 160 << 20


@pytest.fixture
def padded(user: User, models: Models, tmp_path: Path) -> User:
    """The aligned model with a large tensor that nobody needs."""
    content = (models.aligned / SINGLE).read_bytes()
    stop = PREFIX + int.from_bytes(content[:PREFIX], "little")
    header = json.loads(content[PREFIX:stop])
    end = len(content) - stop
    header["model.unused.weight"] = {
        "dtype": "U8",
        "shape": [PADDING],
        "data_offsets": [end, end + PADDING],
    }
    text = json.dumps(header).encode()
    path = tmp_path / SINGLE
    with path.open("wb") as file:
        file.write(len(text).to_bytes(PREFIX, "little") + text + content[stop:])
        file.truncate(file.tell() + PADDING)
    with path.open("rb") as file:
        mapped = mmap(file.fileno(), 0, access=ACCESS_READ)
    config = (models.aligned / "config.json").read_bytes()
    user.hub.publish("org/aligned", {"config.json": config, SINGLE: mapped})
    return user


def test_auto_reads_ranges_of_a_large_file(padded: User, expected: Any) -> None:
    assert padded.modules() == expected
    assert sum(r.sent for r in of_weights(padded.hub) if r.repo == "org/aligned") < 3 << 20


def test_auto_downloads_where_the_server_sends_whole_files(padded: User, expected: Any) -> None:
    padded.hub.fault = Fault("whole", times=99)
    assert padded.modules() == expected
    assert "org/aligned" in {r.repo for r in of_weights(padded.hub) if r.downloads}


def test_auto_downloads_where_most_is_needed(padded: User, models: Models) -> None:
    files = {each.name: each.read_bytes() for each in models.aligned.iterdir()}
    padded.hub.publish("org/aligned", files)
    padded.modules()
    assert "org/aligned" in {r.repo for r in of_weights(padded.hub) if r.downloads}


# What goes wrong, and is put right


@pytest.mark.parametrize(
    "fault",
    [
        Fault("reset", times=3, after=1),
        Fault("short", times=2, after=1),
        Fault("long", after=1),
        Fault("wrong range", after=1),
        Fault("trickle", after=4),
        Fault("busy", times=2, after=1),
        Fault("unavailable", times=2),
        Fault("moved", times=999),
        Fault("expired", after=3),
    ],
    ids=lambda fault: fault.kind,
)
def test_what_goes_wrong_for_a_while_changes_nothing(
    user: User, expected: Any, fault: Fault
) -> None:
    user.hub.fault = fault
    assert user.modules(*RIGHT, HF_HUB_DOWNLOAD_TIMEOUT="1") == expected
    assert fault.met > fault.after  # it did go wrong
    assert user.hub.leaked == []
    assert user.left == []


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("changed", after=6, times=99), ["changed while it was read", "run again"]),
        (Fault("whole", times=99), ["whole files", "--download never"]),
        (Fault("whole", after=5, times=99), ["whole files", "--download never"]),
        (Fault("wrong range", after=5, times=99), ["asked for", "sent", "try again"]),
        (Fault("unavailable", after=5, times=99), ["503", "try again"]),
        (Fault("reset", times=99), ["5 tries", "try again"]),
        (Fault("trickle", after=5, times=99), ["bytes came in a second", "try again"]),
    ],
    ids=lambda each: f"{each.kind}-{each.after}" if isinstance(each, Fault) else "",
)
def test_what_stays_wrong_ends_in_one_line_and_nothing_is_written(
    user: User, fault: Fault, words: list[str], tmp_path: Path
) -> None:
    user.hub.fault = fault
    out = tmp_path / "out"
    result = user.run("patch", "--all", "--out", out, *RIGHT, HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert_refused(result, "org/", ".safetensors", *words)
    assert not out.exists()
    assert user.hub.leaked == []
    assert user.left == []


@pytest.mark.parametrize("token", ["", "other"])
def test_a_gated_repository_ends_in_one_line(user: User, token: str, tmp_path: Path) -> None:
    user.hub.grant("other")
    result = user.run(
        "patch", "--base", user.models.base, "--out", tmp_path / "out", *RIGHT, HF_TOKEN=token
    )
    assert_refused(result, "org/aligned", "gated", "HF_TOKEN")
    assert not (tmp_path / "out").exists()


def test_a_commit_is_read_whole_though_the_branch_moves_on(user: User, expected: Any) -> None:
    commit = user.hub.publish("org/aligned", user.models.aligned, "v1", gated=True)
    user.hub.publish("org/aligned", {"README.md": b"moved on"}, "main", gated=True)
    assert user.modules("--aligned", f"org/aligned@{commit}", *RIGHT) == expected
    revisions = {r.revision for r in of_weights(user.hub) if r.repo == "org/aligned"}
    assert revisions == {commit}


def test_pickles_cannot_be_read_in_ranges(user: User) -> None:
    config = (user.models.base / "config.json").read_bytes()
    user.hub.publish("org/pickled", {"config.json": config, "pytorch_model.bin": b"PK"})
    result = user.run("inspect", "--base", "org/pickled", *RIGHT)
    assert_refused(result, "org/pickled", "pytorch_model.bin", "--download")


# Addresses that are not of the Hub


@dataclass(frozen=True)
class Web:
    """The same models on a server that is not the Hub's, as far as the user knows.

    Its large files are on another host.
    """

    user: User

    @property
    def base(self) -> str:
        """The address of the directory of the base model, which has shards."""
        return f"{self.user.hub.url}/open/base/resolve/main"

    @property
    def aligned(self) -> str:
        """That of the aligned model, which has one file."""
        return f"{self.user.hub.url}/open/aligned/resolve/main"

    def run(self, *words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the two checkpoints, unless told otherwise."""
        given = {"--base": self.base, "--aligned": self.aligned}
        inputs = [each for key, v in given.items() if key not in words for each in (key, v)]
        command, *options = words
        elsewhere = {"HF_ENDPOINT": "http://127.0.0.1:9", **variables}
        return self.user.run(command, *inputs, *options, **elsewhere)

    def modules(self, *options: str | Path, **variables: str) -> Any:
        """Return what `inspect` says of the modules."""
        result = self.run("inspect", *options, "--format", "json", **variables)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)["modules"]


@pytest.fixture
def web(user: User, models: Models) -> Web:
    user.hub.publish("open/base", models.base)
    user.hub.publish("open/aligned", models.aligned)
    user.hub.publish("open/adapter", models.adapter)
    return Web(user)


def test_an_address_gives_the_scores_of_the_same_local_directories(web: Web, expected: Any) -> None:
    adapter = f"{web.user.hub.url}/open/adapter/resolve/main"
    assert web.modules("--adapter", adapter, *RIGHT) == expected
    checkpoints = [r for r in of_weights(web.user.hub) if r.repo != "open/adapter"]
    assert all(r.range is not None and r.status == 206 for r in checkpoints)
    files = {(r.repo, r.file) for r in checkpoints}
    assert sum(r.sent for r in checkpoints) <= 1.02 * web.user.models.needed + 2 * HEADER * len(
        files
    )
    assert all(r.token is None for r in web.user.hub.requests)
    assert web.user.left == []


@pytest.mark.parametrize("download", ["auto", "always", "never"])
@pytest.mark.parametrize("name", [SINGLE, "config.json"])
def test_the_address_of_a_file(web: Web, expected: Any, name: str, download: str) -> None:
    found = web.modules("--aligned", f"{web.aligned}/{name}", "--download", download)
    assert found == expected
    assert web.user.left == []


@pytest.mark.parametrize("kind", ["reset", "short", "busy", "expired"])
def test_what_goes_wrong_at_an_address_for_a_while_changes_nothing(
    web: Web, expected: Any, kind: str
) -> None:
    fault = web.user.hub.fault = Fault(kind, times=2, after=6)
    assert web.modules(*RIGHT) == expected
    assert fault.met > fault.after  # it did go wrong


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("changed", after=6, times=99), ["changed while it was read"]),
        (Fault("whole", after=6, times=99), ["whole files", "--download never"]),
    ],
    ids=lambda each: each.kind if isinstance(each, Fault) else "",
)
def test_what_stays_wrong_at_an_address_ends_in_one_line(
    web: Web, fault: Fault, words: list[str], tmp_path: Path
) -> None:
    web.user.hub.fault = fault
    result = web.run("patch", "--all", "--out", tmp_path / "out", *RIGHT)
    assert_refused(result, web.user.hub.url, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:7/model", ["could not be read", "try again"]),
        ("{hub}/open/aligned/resolve/main/nothing", ["none of the files", "config.json"]),
        ("{hub}/open/aligned/resolve/main?signature=0", ["secret", "alone"]),
        ("http://127.0.0.1:99999/model", ["no address", "expected"]),
        ("https://a host/model", ["no address", "expected"]),
        ("http://me:secret@127.0.0.1:9/model", ["secret", "alone"]),
        ("nosuch://bucket/model", ["nosuch://bucket/model", "could not be looked at"]),
        ("file:///nowhere/at/all", ["nothing at this address"]),
    ],
)
def test_an_address_without_a_model_ends_in_one_line(
    web: Web, address: str, words: list[str]
) -> None:
    result = web.run("inspect", "--aligned", address.format(hub=web.user.hub.url))
    assert_refused(result, *words)
    assert "me:secret" not in result.stderr


def test_offline_no_address_is_asked(web: Web) -> None:
    result = web.run("inspect", HF_HUB_OFFLINE="1")
    assert_refused(result, web.aligned, "HF_HUB_OFFLINE")
    assert web.user.hub.requests == []


@contextmanager
def served(root: Path) -> Iterator[str]:
    """Serve a directory by the standard library, which sends whole files alone."""
    handler = partial(Quiet, directory=str(root))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class Quiet(SimpleHTTPRequestHandler):
    """A handler that prints nothing."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Print nothing."""


def test_a_server_without_ranges_is_read_whole_unless_that_is_not_wanted(
    web: Web, expected: Any, models: Models
) -> None:
    with served(models.aligned) as address:
        assert web.modules("--aligned", address) == expected
        result = web.run("inspect", "--aligned", address, *RIGHT)
        assert_refused(result, f"{address}: {SINGLE}", "whole files", "--download never")
    assert web.user.left == []


@pytest.mark.parametrize("download", ["auto", "always", "never"])
@pytest.mark.parametrize("name", ["", "/config.json", f"/{SINGLE}"])
def test_what_fsspec_reads(
    web: Web, expected: Any, models: Models, name: str, download: str
) -> None:
    address = f"file://{models.aligned}{name}"
    assert web.modules("--aligned", address, "--download", download) == expected
    assert web.user.left == []


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_an_interrupt_ends_a_run_that_waits_for_the_network(
    user: User, models: Models, tmp_path: Path
) -> None:
    fault = user.hub.fault = Fault("trickle", times=99, after=6)
    inputs = ("--base", "org/base", "--aligned", "org/aligned", "--adapter", models.adapter)
    user.home.mkdir()
    process = started(
        "patch", *inputs, "--all", "--out", tmp_path / "out", *RIGHT, env=user.variables
    )
    until = time.monotonic() + 120
    while fault.met < fault.after + 2 and time.monotonic() < until:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert not (tmp_path / "out").exists()


# What is kept for later runs


def kept(user: User) -> list[Path]:
    """Return the pieces that are kept."""
    return [each for each in user.home.glob("assets/safeproj/kept/ranges/*/*/*") if each.is_file()]


def test_what_is_kept_is_not_read_again(user: User, expected: Any) -> None:
    assert user.modules(*RIGHT, "--keep") == expected
    assert sum(each.stat().st_size for each in kept(user)) >= user.models.needed
    assert all(each.parent.stat().st_mode & 0o077 == 0 for each in kept(user))
    user.hub.requests.clear()
    assert user.modules(*RIGHT, "--keep") == expected
    assert {r.sent for r in of_weights(user.hub)} == {1}  # whether they are the same files
    user.hub.requests.clear()
    assert user.modules(*RIGHT) == expected  # unless it is not asked for
    assert sum(r.sent for r in of_weights(user.hub)) >= user.models.needed


def test_another_adapter_reads_what_is_not_kept(user: User, models: Models, tmp_path: Path) -> None:
    other = save_adapter(models.model, tmp_path / "o", target_modules=["q_proj", "o_proj"])
    local = safeproj("inspect", *models.local[:4], "--adapter", other, "--format", "json")
    user.modules(*RIGHT, "--keep")
    user.hub.requests.clear()
    found = user.modules("--adapter", other, *RIGHT, "--keep")
    assert json.loads(local.stdout)["modules"] == found
    size = 256 * 256 * 4  # of one weight; there are two of layer 0, and an o_proj of each other one
    files = {(r.repo, r.file) for r in of_weights(user.hub)}
    assert sum(r.sent for r in of_weights(user.hub)) <= 1.02 * 2 * 4 * size + HEADER * len(files)


def test_another_commit_of_the_same_files_is_kept_already(user: User, expected: Any) -> None:
    user.modules(*RIGHT, "--keep")
    files = {each.name: each.read_bytes() for each in user.models.aligned.iterdir()}
    user.hub.publish("org/aligned", {**files, "README.md": b"better"}, gated=True)
    user.hub.requests.clear()
    assert user.modules(*RIGHT, "--keep") == expected
    assert {r.sent for r in of_weights(user.hub)} == {1}


def test_other_files_of_the_same_name_are_not_taken_for_those_kept(
    user: User, models: Models
) -> None:
    user.modules(*RIGHT, "--keep")
    user.hub.publish("org/aligned", {**_files(models.aligned), **_single(models)}, gated=True)
    user.hub.requests.clear()
    result = user.run("inspect", *RIGHT, "--keep", "--format", "json")
    assert sum(r.sent for r in of_weights(user.hub)) > user.models.needed // 2
    assert result.returncode == 0, result.stderr


def _files(root: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in root.iterdir() if each.suffix == ".json"}


def _single(models: Models) -> dict[str, bytes]:
    """Return the aligned weights with one byte changed."""
    content = bytearray((models.aligned / SINGLE).read_bytes())
    content[-1] ^= 1
    return {SINGLE: bytes(content)}


@pytest.mark.parametrize("damage", ["cut", "gone", "all gone"])
def test_what_was_deleted_or_cut_is_read_again(user: User, expected: Any, damage: str) -> None:
    user.modules(*RIGHT, "--keep")
    if damage == "all gone":
        shutil.rmtree(user.home / "assets")
    for piece in kept(user)[::2]:
        if damage == "cut":
            piece.write_bytes(piece.read_bytes()[:-1])
        else:
            piece.unlink()
    assert user.modules(*RIGHT, "--keep") == expected


def test_what_is_kept_has_a_bound(user: User, expected: Any) -> None:
    assert user.modules(*RIGHT, "--keep", SAFEPROJ_KEEP_GB="0.0005") == expected
    assert user.modules(*RIGHT, "--keep", SAFEPROJ_KEEP_GB="0.0005") == expected
    assert sum(each.stat().st_size for each in kept(user)) <= 500_000 + (500_000 // 16 + 300_000)
    for wrong in ("many", "0", "-1", "inf", "nan"):
        result = user.run("inspect", *RIGHT, "--keep", SAFEPROJ_KEEP_GB=wrong)
        assert_refused(result, "SAFEPROJ_KEEP_GB", wrong, "number of GB")


def test_several_processes_keep_at_once(user: User, expected: Any) -> None:
    user.home.mkdir()
    inputs = ("--base", "org/base", "--aligned", "org/aligned", "--adapter", user.models.adapter)
    words = ("inspect", *inputs, *RIGHT, "--keep", "--format", "json")
    runs = [started(*words, env=user.variables, cwd=user.home, anew=True) for _ in range(3)]
    for run in runs:
        stdout, stderr = run.communicate()
        assert run.returncode == 0, stderr
        assert json.loads(stdout)["modules"] == expected
    assert not [each for each in kept(user) if each.name.startswith(".new-")]
    user.hub.requests.clear()
    assert user.modules(*RIGHT, "--keep") == expected
    assert {r.sent for r in of_weights(user.hub)} == {1}


def test_a_place_where_nothing_can_be_kept_ends_in_one_line(user: User, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = user.run("inspect", *RIGHT, "--keep", HF_ASSETS_CACHE=str(tmp_path / "file"))
    assert_refused(result, str(tmp_path / "file"), "--keep", "HF_ASSETS_CACHE")

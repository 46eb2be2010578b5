"""Inputs from the Hugging Face Hub: the installed command against a server on this machine."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from tests import hub_server
from tests.conftest import Trio
from tests.hub_server import Hub, Request
from tests.support import assert_refused, moved, read_json, safeproj, save_adapter, tiny_llama

INDEX = "model.safetensors.index.json"
WEIGHTS = "adapter_model.safetensors"
HEADER_REQUEST = 100_001
"""Bytes that the Hub client asks for to see the header of a safetensors file."""


@dataclass(frozen=True)
class User:
    """Somebody who runs the command with a cache of their own."""

    hub: Hub
    home: Path

    def inspect(
        self,
        *options: str,
        base: str = "org/base",
        aligned: str = "org/aligned",
        adapter: str = "org/adapter",
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run `safeproj inspect` on what the Hub has, unless told otherwise."""
        inputs = ("--base", base, "--aligned", aligned, "--adapter", adapter)
        return self._run("inspect", *inputs, "--format", "json", *options, **environment)

    def patch(self, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
        """Run `safeproj patch` on what the Hub has."""
        inputs = ("--base", "org/base", "--aligned", "org/aligned", "--adapter", "org/adapter")
        return self._run("patch", *inputs, "--out", str(out), *options)

    def download(self, *repos: str) -> None:
        """Fill the cache as any other program does."""
        code = (
            "import sys, huggingface_hub\n"
            "for repo in sys.argv[1:]: huggingface_hub.snapshot_download(repo)"
        )
        subprocess.run(
            [sys.executable, "-c", code, *repos],
            env={**os.environ, **self._environment},
            capture_output=True,
            timeout=120,
            check=True,
        )

    @property
    def _environment(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home), "NO_PROXY": "127.0.0.1"}

    def _run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        # In an empty directory: `org/base` must not be taken for a local path.
        self.home.mkdir(exist_ok=True)
        return safeproj(*arguments, env={**self._environment, **environment}, cwd=self.home)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the settings of whoever runs the tests out of the commands."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server.running() as hub:
        yield hub


@pytest.fixture
def user(hub: Hub, tmp_path: Path) -> User:
    return User(hub, tmp_path / "home")


@pytest.fixture
def commits(hub: Hub, trio: Trio) -> dict[str, str]:
    """The three inputs published as `org/base`, `org/aligned` and `org/adapter`."""
    return {
        "base": hub.publish("org/base", trio.base),
        "aligned": hub.publish("org/aligned", trio.aligned),
        "adapter": hub.publish("org/adapter", trio.adapter),
    }


@pytest.fixture(scope="module")
def modules(trio: Trio) -> Any:
    """What the report says of the same three inputs as local directories."""
    result = safeproj("inspect", *trio.arguments, "--format", "json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["modules"]


@dataclass(frozen=True)
class Large:
    """Checkpoints in shards that are larger than a header request, and an adapter of layer 2."""

    base: Path
    aligned: Path
    adapter: Path
    aligned_model: Any

    def shards(self, checkpoint: Path, layer: int, *projections: str) -> set[str]:
        """Return the shards that hold these weights of a layer."""
        location = read_json(checkpoint / INDEX)["weight_map"]
        return {location[f"model.layers.{layer}.self_attn.{p}.weight"] for p in projections}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Large:
    root = tmp_path_factory.mktemp("large")
    base = tiny_llama(hidden_size=256, intermediate_size=256, num_hidden_layers=3, vocab_size=512)
    aligned = moved(base)
    base.save_pretrained(root / "base", max_shard_size="300KB")
    aligned.save_pretrained(root / "aligned", max_shard_size="600KB")
    save_adapter(aligned, root / "adapter", layers_to_transform=[2])
    return Large(root / "base", root / "aligned", root / "adapter", aligned)


@pytest.fixture
def large_on_hub(hub: Hub, large: Large) -> Large:
    hub.publish("org/base", large.base)
    hub.publish("org/aligned", large.aligned)
    hub.publish("org/adapter", large.adapter)
    return large


def report(result: subprocess.CompletedProcess[str]) -> Any:
    """Return the JSON report of a run that did what it should, without a word on stderr."""
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return json.loads(result.stdout)


def shards_of_checkpoints(requests: list[Request]) -> list[Request]:
    """Return the requests for weights other than the adapter's."""
    weights = [r for r in requests if r.file is not None and r.file.endswith(".safetensors")]
    return [r for r in weights if r.file != WEIGHTS]


# The same results as with local directories


def test_inputs_from_the_hub_give_the_scores_of_the_same_local_directories(
    user: User, commits: dict[str, str], modules: Any
) -> None:
    found = report(user.inspect())
    assert found["modules"] == modules
    assert found["inputs"] == {
        role: {"source": f"org/{role}", "revision": commit} for role, commit in commits.items()
    }


def test_patching_from_the_hub_writes_what_patching_local_directories_writes(
    user: User, hub: Hub, commits: dict[str, str], trio: Trio, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(trio.adapter, adapter)
    (adapter / "notes").mkdir()
    (adapter / "notes" / "training.txt").write_text("three epochs\n", "utf-8")
    commit = hub.publish("org/adapter", adapter)
    arguments = [*trio.arguments[:-1], str(adapter), "--out", str(tmp_path / "local")]
    local = safeproj("patch", *arguments, "--layers", "2")
    assert local.returncode == 0, local.stderr

    result = user.patch(tmp_path / "out", "--layers", "2")

    assert result.returncode == 0, result.stderr
    for name in (WEIGHTS, "adapter_config.json", "notes/training.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert (tmp_path / "out" / WEIGHTS).read_bytes() != (adapter / WEIGHTS).read_bytes()
    inputs = read_json(tmp_path / "out" / "safeproj.json")["inputs"]
    expected = read_json(tmp_path / "local" / "safeproj.json")["inputs"]
    for role, revision in {**commits, "adapter": commit}.items():
        place = {"source": f"org/{role}", "revision": revision}
        assert inputs[role] == {**expected[role], **place}


@pytest.mark.usefixtures("commits")
def test_a_single_file_and_shards_need_no_index(
    user: User, hub: Hub, trio: Trio, modules: Any, tmp_path: Path
) -> None:
    trio.base_model.save_pretrained(tmp_path / "single")
    shutil.copytree(trio.aligned, tmp_path / "shards")
    (tmp_path / "shards" / INDEX).unlink()
    hub.publish("org/single", tmp_path / "single")
    hub.publish("org/shards", tmp_path / "shards")
    assert report(user.inspect(base="org/single", aligned="org/shards"))["modules"] == modules
    assert hub.downloads("org/single") == ["config.json", "model.safetensors"]


# Only what is needed is downloaded


def test_only_the_shards_with_needed_weights_are_downloaded(
    user: User, hub: Hub, large_on_hub: Large
) -> None:
    report(user.inspect())
    for repo, checkpoint in (
        ("org/base", large_on_hub.base),
        ("org/aligned", large_on_hub.aligned),
    ):
        needed = large_on_hub.shards(checkpoint, 2, "q_proj", "v_proj")
        assert len(needed) < len(list(checkpoint.glob("*.safetensors"))) / 2
        downloads = hub.downloads(repo)
        assert downloads[0] == INDEX
        assert sorted(f for f in downloads if f.endswith(".safetensors")) == sorted(needed)
        assert hub.touched(repo) - {"config.json"} == {INDEX, *needed}


@pytest.mark.usefixtures("commits")
def test_the_hub_is_asked_once_per_file_not_once_per_weight(user: User, hub: Hub) -> None:
    report(user.inspect())
    asked = Counter(r.path for r in hub.requests if r.method == "HEAD" and "/resolve/" in r.path)
    assert asked
    assert set(asked.values()) == {1}


def test_shapes_that_do_not_fit_are_refused_after_a_look_at_headers_alone(
    user: User, hub: Hub, large_on_hub: Large, trio: Trio
) -> None:
    hub.publish("org/small", trio.adapter)
    assert_refused(
        user.inspect(adapter="org/small"),
        "shapes do not fit",
        "org/small",
        "org/aligned",
        "[256, 256]",
        "[32, 32]",
    )
    looked_at = shards_of_checkpoints(hub.requests)
    assert {r.repo for r in looked_at} == {"org/base", "org/aligned"}
    for request in looked_at:
        assert request.range is not None
        assert request.sent <= HEADER_REQUEST
    # Whole shards would be more than that:
    assert all(path.stat().st_size > HEADER_REQUEST for path in large_on_hub.base.glob("*-of-*"))


@pytest.mark.usefixtures("commits")
def test_names_that_do_not_fit_are_refused_before_any_shard_is_asked_for(
    user: User, hub: Hub, large: Large
) -> None:
    hub.publish("org/deep", large.adapter)
    assert_refused(user.inspect(adapter="org/deep"), "model.layers.2.self_attn.q_proj.weight")
    assert INDEX in hub.touched("org/aligned")
    assert shards_of_checkpoints(hub.requests) == []


def test_an_index_that_names_a_file_the_repository_lacks_is_refused(
    user: User, hub: Hub, large_on_hub: Large, tmp_path: Path
) -> None:
    missing = large_on_hub.shards(large_on_hub.base, 2, "v_proj").pop()
    shutil.copytree(large_on_hub.base, tmp_path / "broken")
    (tmp_path / "broken" / missing).unlink()
    hub.publish("org/broken", tmp_path / "broken")
    assert_refused(user.inspect(base="org/broken"), "org/broken", missing)
    assert [r for r in shards_of_checkpoints(hub.requests) if r.downloads] == []


# Revisions and access


def test_a_revision_is_a_branch_a_tag_or_a_commit(
    user: User, hub: Hub, trio: Trio, modules: Any
) -> None:
    base = hub.publish("org/model", trio.base, "v1.0")
    aligned = hub.publish("org/model", trio.aligned, "refs/pr/7")
    adapter = hub.publish("org/adapter", trio.adapter)
    for repo in ("org/model", "org/adapter"):
        hub.publish(repo, {"README.md": b"moved on"}, "main")
    sources = {
        "base": "org/model@v1.0",
        "aligned": "org/model@refs/pr/7",
        "adapter": f"org/adapter@{adapter}",
    }
    revisions = {"base": base, "aligned": aligned, "adapter": adapter}
    found = report(user.inspect(**sources))
    assert found["modules"] == modules
    assert found["inputs"] == {
        role: {"source": source, "revision": revisions[role]} for role, source in sources.items()
    }


@pytest.mark.usefixtures("commits")
@pytest.mark.parametrize(
    ("source", "token", "words"),
    [
        pytest.param("org/adapter@nope", None, ["revision", "nope"], id="unknown-revision"),
        pytest.param("org/nothing", "mine", ["no such repository"], id="unknown-repository"),
        pytest.param("org/gated", None, ["gated", "accept", "HF_TOKEN"], id="gated"),
        pytest.param("org/private", None, ["private", "HF_TOKEN"], id="private"),
        pytest.param("org/adapter", "expired", ["HF_TOKEN"], id="invalid-token"),
    ],
)
def test_what_cannot_be_read_is_refused_with_advice(
    user: User,
    hub: Hub,
    trio: Trio,
    source: str,
    token: str | None,
    words: list[str],
) -> None:
    hub.publish("org/gated", trio.adapter, gated=True)
    hub.publish("org/private", trio.adapter, private=True)
    hub.grant("mine")
    environment = {} if token is None else {"HF_TOKEN": token}
    assert_refused(user.inspect(adapter=source, **environment), source, *words)
    assert WEIGHTS not in hub.touched(source.partition("@")[0])


def test_a_token_opens_private_and_gated_repositories(
    user: User, hub: Hub, trio: Trio, modules: Any
) -> None:
    hub.publish("org/base", trio.base)
    hub.publish("org/aligned", trio.aligned, gated=True)
    hub.publish("org/adapter", trio.adapter, private=True)
    hub.grant("mine", "org/aligned", "org/adapter")
    # The storage host that large files are redirected to refuses requests with a token.
    assert report(user.inspect(HF_TOKEN="mine"))["modules"] == modules


# The cache


@pytest.mark.usefixtures("commits")
def test_a_second_run_downloads_nothing(user: User, hub: Hub) -> None:
    first = report(user.inspect())
    hub.requests.clear()
    assert report(user.inspect()) == first
    assert {r.repo for r in hub.requests if r.repo} == {"org/base", "org/aligned", "org/adapter"}
    assert [r for r in hub.requests if r.file is not None and r.method == "GET"] == []


@pytest.mark.usefixtures("commits")
def test_what_a_run_has_downloaded_serves_the_next_one_offline(
    user: User, hub: Hub, trio: Trio
) -> None:
    hub.publish("org/base", trio.base, "v1.0")
    hub.publish("org/base", {"README.md": b"moved on"}, "main")
    first = report(user.inspect(base="org/base@v1.0"))
    hub.requests.clear()
    assert report(user.inspect(base="org/base@v1.0", HF_HUB_OFFLINE="1")) == first
    assert hub.requests == []


def test_what_another_program_has_downloaded_serves_offline(
    user: User, hub: Hub, commits: dict[str, str], modules: Any
) -> None:
    user.download("org/base", "org/aligned", "org/adapter")
    hub.requests.clear()
    found = report(user.inspect(HF_HUB_OFFLINE="1"))
    assert found["modules"] == modules
    assert {role: item["revision"] for role, item in found["inputs"].items()} == commits
    assert hub.requests == []


@pytest.mark.usefixtures("commits")
@pytest.mark.parametrize("offline", [False, True])
def test_directories_inside_a_repository(
    user: User, hub: Hub, modules: Any, trio: Trio, offline: bool
) -> None:
    files = {
        f"runs/step-10/{path.name}": path.read_bytes()
        for path in trio.adapter.iterdir()
        if path.is_file()
    }
    commit = hub.publish("org/all", {**files, "README.md": b"adapters"}, "v1")
    user.download("org/base", "org/aligned")
    sources = [
        "org/all/runs/step-10@v1",
        f"{hub.url}/org/all/tree/v1/runs/step-10",
        f"{hub.url}/org/all/blob/v1/runs/step-10/adapter_config.json?download=true",
    ]
    for source in sources:
        found = report(user.inspect(adapter=source))
        assert found["modules"] == modules
        assert found["inputs"]["adapter"] == {"source": source, "revision": commit}
        if offline:
            again = report(user.inspect(adapter=source, HF_HUB_OFFLINE="1"))
            assert again == found


def test_addresses_of_whole_repositories(
    user: User, hub: Hub, commits: dict[str, str], modules: Any
) -> None:
    found = report(user.inspect(base=f"{hub.url}/org/base", aligned=f"{hub.url}/org/aligned/"))
    assert found["modules"] == modules
    assert found["inputs"]["base"]["revision"] == commits["base"]


@pytest.mark.usefixtures("commits")
def test_a_directory_that_a_repository_does_not_have_is_refused(user: User) -> None:
    result = user.inspect(adapter="org/adapter/step-10")
    assert_refused(result, "org/adapter", "no directory step-10", "no such local path")


@pytest.mark.parametrize(
    "address",
    ["https://huggingface.co/datasets/org/name", "https://[x"],
)
def test_other_addresses_are_refused_before_anything_is_asked(
    user: User, hub: Hub, address: str
) -> None:
    result = user.inspect(adapter=address)
    assert_refused(result, address, "not a Hub id", "address of a model on the Hub")
    assert hub.requests == []


@pytest.mark.usefixtures("commits")
def test_offline_with_an_empty_cache_is_refused(user: User, hub: Hub) -> None:
    result = user.inspect(HF_HUB_OFFLINE="1")
    assert_refused(result, "org/adapter", "not in the local Hub cache", "HF_HUB_OFFLINE")
    assert hub.requests == []


@pytest.mark.usefixtures("large_on_hub")
def test_offline_without_a_needed_shard_is_refused_by_its_name(
    user: User, large: Large, tmp_path: Path
) -> None:
    local = {"aligned": str(large.aligned), "adapter": str(large.adapter)}
    report(user.inspect(**local))
    other = save_adapter(large.aligned_model, tmp_path / "other", layers_to_transform=[1])
    result = user.inspect(**{**local, "adapter": str(other)}, HF_HUB_OFFLINE="1")
    missing = large.shards(large.base, 1, "q_proj")
    assert_refused(result, "org/base", *missing, "HF_HUB_OFFLINE")


# A Hub that is not there, and what looks like a Hub id


@pytest.mark.usefixtures("commits")
def test_a_refused_connection_is_reported_with_advice(user: User, hub: Hub) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    result = user.inspect(HF_ENDPOINT=f"http://127.0.0.1:{port}")
    assert_refused(result, "org/adapter", "could not be read", "HF_HUB_OFFLINE=1")
    assert hub.requests == []


def test_a_hub_that_is_down_is_reported_with_advice(user: User, hub: Hub) -> None:
    hub.trouble = "unavailable"
    assert_refused(user.inspect(), "org/adapter", "503", "try again")


def test_a_hub_that_does_not_answer_is_given_up(user: User, hub: Hub) -> None:
    hub.trouble = "stall"
    result = user.inspect(HF_HUB_ETAG_TIMEOUT="1", HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert_refused(result, "org/adapter", "timed out", "try again")


@pytest.mark.usefixtures("commits")
def test_a_hint_of_the_hub_does_not_add_a_line_to_an_error(user: User, hub: Hub) -> None:
    hub.hint = hub_server.HINT
    assert_refused(user.inspect(adapter="org/adapter@nope"), "revision")


@pytest.mark.usefixtures("commits")
def test_quiet_means_no_hints_of_the_hub_either(user: User, hub: Hub, modules: Any) -> None:
    hub.hint = hub_server.HINT
    assert report(user.inspect("--quiet"))["modules"] == modules


@pytest.mark.parametrize(("source", "offline"), [("./adapter", "0"), ("../adapter", "1")])
def test_a_relative_path_is_never_taken_for_a_hub_id(
    user: User, hub: Hub, source: str, offline: str
) -> None:
    result = user.inspect(adapter=source, HF_HUB_OFFLINE=offline)
    assert_refused(result, source, "no such file or directory")
    assert hub.requests == []


def test_a_safety_module_of_a_model_on_the_hub_is_that_of_its_directory(
    hub: Hub, user: User, tmp_path: Path
) -> None:
    example = Path(__file__).resolve().parents[2] / "examples" / "tiny-lm"
    commit = hub.publish("org/model", example / "aligned")
    given = ("--data", example / "data" / "safety.jsonl", "--targets", "q_proj", "--rank", "2")
    remote, local = tmp_path / "remote.safetensors", tmp_path / "local.safetensors"
    command = ("salora", "module", *map(str, given))
    for result in (
        user._run(*command, "--aligned", f"org/model@{commit}", "--out", str(remote)),
        safeproj(*command, "--aligned", example / "aligned", "--out", local),
    ):
        assert result.returncode == 0, result.stderr
    with safe_open(remote, framework="pt") as file:
        identity = json.loads(file.metadata()["safeproj"])["inputs"]["aligned"]
    assert {"source": f"org/model@{commit}", "revision": commit}.items() <= identity.items()
    one, two = load_file(remote), load_file(local)
    assert one.keys() == two.keys()
    assert all(tensor.equal(two[key]) for key, tensor in one.items())

"""Paths that are not there: what is near is named, and no Hub is asked for what looks local."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from safeproj.errors import SafeprojError
from safeproj.storage.nearby import MAX_ENTRIES, nearby, read_given, read_given_text
from safeproj.storage.source import LocalFolder, hub_place, open_folder
from tests import hub_server
from tests.hub_server import Hub


@pytest.fixture(scope="module")
def empty() -> Iterator[Hub]:
    """A Hub that has nothing."""
    with hub_server.running() as found, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setattr("huggingface_hub.constants.ENDPOINT", found.url)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield found


@pytest.fixture
def hub(empty: Hub) -> Hub:
    """The same, of which nothing was asked yet."""
    empty.requests.clear()
    return empty


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with adapters, data and a checkpoint."""
    for name in ("adapters/mixed", "adapters/skill", "aligned", "data", "org/other", "My Models"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("adapters/mixed/adapter_model.safetensors", "data/harmful.jsonl", "policy.toml"):
        (tmp_path / name).touch()
    (tmp_path / "data" / ".hidden.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(source: str) -> str:
    with pytest.raises(SafeprojError) as caught:
        open_folder(source)
    message = str(caught.value)
    assert message.startswith(f"{source}: ")
    assert "\n" not in message
    return message


NEAR = {
    "adapters/mixd/adapter_model.safetensors": "adapters/mixed/adapter_model.safetensors",
    "adapters/mixed/adapter-model.safetensors": "adapters/mixed/adapter_model.safetensors",
    "./adaptrs/mixd": "adapters/mixed",
    "../{here}/aligne": "../{here}/aligned",
    "{root}/algned": "{root}/aligned",
    "aligne": "aligned",
    "ALIGNDE": "aligned",
    "data/harmfull.jsonl": "data/harmful.jsonl",
    "data/harmful.json": "data/harmful.jsonl",
    "./data/harmful": "data/harmful.jsonl",
    "polcy.toml": "policy.toml",
    "My Model": "My Models",
    "adapters/skil/checkpoint-5": "adapters/skill",
}


@pytest.mark.parametrize("given", NEAR)
def test_a_near_name_is_named_and_the_hub_is_not_asked(here: Path, hub: Hub, given: str) -> None:
    meant = NEAR[given].format(here=here.name, root=here)
    message = refusal(given.format(here=here.name, root=here))
    assert message.endswith(f": no such file or directory; did you mean {meant}?")
    assert hub.requests == []


@pytest.mark.parametrize(
    "given",
    [
        *("./x", "../x", "~/no-such-place/x", "/no/such/place", "x/./y", ".x/y"),
        *("C:\\models\\x", "C:/models/x", "\\\\host\\share", "models\\x", ".\\x"),
        *(
            "org/name.safetensors",
            "org/name.bin",
            "org/name.jsonl",
            "a/b.txt",
            "a/B.GGUF",
            "a/b.csv",
        ),
        *("adapters/none/at/all", "org/name/sub"),
    ],
)
@pytest.mark.usefixtures("here")
def test_what_looks_local_is_never_asked_of_the_hub(hub: Hub, given: str) -> None:
    assert "no such file or directory" in refusal(given)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("given", "end"),
    [
        ("meta/llama", ""),
        ("meta/llama-3.1", ""),
        ("meta/llama/sub", ""),
        ("meta/x.gguf@main", ""),
        ("https://huggingface.co/meta/x.gguf", ""),
        ("https://huggingface.co/org/name/tree/main/sub", ""),
        ("org/name@v1", "; org has other"),
        ("org/name", "; org has other"),
        ("org/othr", "; did you mean org/other?"),
        ("orgs/name", "; did you mean org?"),
        ("adapters/mixd", "; did you mean adapters/mixed?"),
    ],
)
@pytest.mark.usefixtures("here")
def test_an_id_of_the_hub_is_asked_for_and_what_is_near_is_said_if_it_fails(
    hub: Hub, given: str, end: str
) -> None:
    place = hub_place(given)
    assert place is not None
    assert refusal(given).endswith(
        f"no such repository on the Hub (private ones need HF_TOKEN){end}"
    )
    assert [each.repo for each in hub.requests if each.repo] == [place.repo]


@pytest.mark.usefixtures("here")
def test_a_path_through_a_file_says_so() -> None:
    assert refusal("./policy.toml/x").endswith("; policy.toml is a file")


@pytest.mark.usefixtures("here")
def test_what_a_folder_has_is_said_where_nothing_is_near() -> None:
    assert nearby(Path("data/zzz")) == "; data has harmful.jsonl"
    assert nearby(Path("aligned/zzz")) == "; aligned has nothing in it"
    assert nearby(Path("zzz")) == ""


def test_names_cannot_steer_a_terminal_and_large_folders_are_not_listed_whole(
    tmp_path: Path,
) -> None:
    (tmp_path / "mixed\x1b[31m").touch()
    assert nearby(tmp_path / "mixed[31m").isprintable()
    for number in range(MAX_ENTRIES + 10):
        (tmp_path / f"file-{number}").touch()
    found = nearby(tmp_path / "file-77777x")
    assert "did you mean" in found
    assert len(found) < 500


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_file_that_stands_for_its_model_is_its_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    (tmp_path / "model-00001-of-00001.safetensors").touch()
    folder = open_folder(str(tmp_path / name))
    assert isinstance(folder, LocalFolder)
    assert (folder.root, folder.only) == (tmp_path, None)
    assert folder.source == str(tmp_path / name)


def test_an_unfinished_download_beside_what_is_missing_is_said(tmp_path: Path) -> None:
    folder = open_folder(str(tmp_path))
    assert folder.advice == "fetch it again"
    (tmp_path / "model.safetensors.aria2").touch()
    assert "model.safetensors.aria2" in folder.advice
    assert "not finished" in folder.advice


def test_a_given_file_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read_given(path, "--a", "x") == b"\xef\xbb\xbfone\r\ntwo"
    assert read_given_text(path, "--a", "x") == "one\r\ntwo"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ("--a a.txt: no such file; did you mean",)),
        (b"\xff\xfe", ("--a a.txt: cannot be read", "expected some text")),
        (b"<html>", ("--a a.txt: is a web page",)),
    ],
)
def test_a_given_file_that_is_of_no_use_is_refused(
    tmp_path: Path, content: bytes | None, words: tuple[str, ...]
) -> None:
    (tmp_path / "a.txts").touch()
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(SafeprojError) as caught:
        read_given_text(tmp_path / "a.txt", "--a a.txt", "some text")
    for word in words:
        assert word in caught.value.message


def test_a_directory_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SafeprojError, match=r"^a: cannot be read .*; expected some text"):
        read_given_text(tmp_path, "--a", "some text")

"""What stands for a file, wherever one is given: one line, exit code 2, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.storage.test_mistaken import KNOWN, PAGE, POINTER
from tests.support import CONFIG, FACTORS, assert_refused, safeproj, snapshot

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny-lm"
SHARD = "shard"
INDEX = "model.safetensors.index.json"

PAIR = ("--base", "base", "--aligned", "aligned")
PATCH = ("patch", *PAIR, "--adapter", "adapter", "--out", "out")
EVAL = ("eval", "--model", "aligned", "--adapter", "adapter", "--harmful", "prompts.jsonl")
CHECK = ("check", *PAIR, "adapter")

PLACES: dict[str, tuple[str, tuple[str, ...]]] = {
    "base weights": (f"base/{SHARD}", PATCH),
    "aligned index": (f"aligned/{INDEX}", PATCH),
    "aligned config": ("aligned/config.json", PATCH),
    "adapter weights": (f"adapter/{FACTORS}", PATCH),
    "adapter config": (f"adapter/{CONFIG}", PATCH),
    "original": (f"adapter/{FACTORS}", ("verify", "copy", "--original", "adapter", *PAIR)),
    "alignment": (
        "a.safealign.safetensors",
        ("patch", "--alignment", "a.safealign.safetensors", *PATCH[5:]),
    ),
    "safety module": (
        "s.safety.safetensors",
        ("patch", "--safety-module", "s.safety.safetensors", *PATCH[5:]),
    ),
    "statistics": (
        "s.stats.safetensors",
        ("patch", "--method", "covariance", "--safety-data", "s.stats.safetensors", *PATCH[3:]),
    ),
    "list": ("list.txt", (*PATCH[:5], "--adapter", "list.txt", "--out", "out")),
    "run weights": (f"aligned/{SHARD}", EVAL),
    "run config": ("aligned/config.json", EVAL),
    "tokenizer": ("aligned/tokenizer.json", EVAL),
    "chat template": ("aligned/chat_template.jinja", EVAL),
    "run adapter": (f"adapter/{FACTORS}", EVAL),
    "prompts": ("prompts.jsonl", EVAL),
    "plain prompts": ("p.txt", (*EVAL[:-1], "name=p.txt")),
    "table of prompts": ("p.csv", (*EVAL[:-1], "p.csv")),
    "skill": ("skill.jsonl", (*EVAL, "--skill", "skill.jsonl")),
    "phrases": ("phrases.txt", (*EVAL, "--phrases", "phrases.txt")),
    "data": (
        "d.jsonl",
        ("stats", "--aligned", "aligned", "--data", "d.jsonl", "--out", "a.stats.safetensors"),
    ),
    "refusals": (
        "p.txt",
        ("data", "refusals", "--aligned", "aligned", "--prompts", "p.txt", "--out", "out.jsonl"),
    ),
    "policy": ("policy.toml", (*CHECK, "--policy", "policy.toml")),
    "found policy": ("safeproj.toml", CHECK),
    "evaluation": ("e.json", (*CHECK, "--evaluation", "e.json")),
    "key": ("key.pub", ("verify", "adapter", "--public-key", "key.pub")),
    "private key": ("key", ("sign", "adapter", "--private-key", "key")),
    "checked adapter": (f"adapter/{FACTORS}", CHECK),
}
"""Which file is another, and the command that reads it."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A working directory with the example's models, an adapter and prompts."""
    for name in ("base", "aligned"):
        shutil.copytree(EXAMPLE / name, tmp_path / name)
    for name in ("adapter", "copy"):
        shutil.copytree(EXAMPLE / "adapters" / "mixed", tmp_path / name)
    shutil.copy(EXAMPLE / "data" / "held_out_pairs.jsonl", tmp_path / "prompts.jsonl")
    return tmp_path


def refused(place: Path, *command: str) -> str:
    """Check that a command is refused in one line and leaves nothing, and return the line."""
    before = snapshot(place)
    result = safeproj(*command, env={"HF_HUB_OFFLINE": "1"}, cwd=place)
    assert snapshot(place) == before
    assert_refused(result)
    return result.stderr


def shard(model: Path) -> str:
    """Return the name of the file that holds a weight which the adapter is about."""
    weights = json.loads((model / INDEX).read_text("utf-8"))["weight_map"]
    return str(weights["model.layers.0.self_attn.q_proj.weight"])


@pytest.mark.parametrize("name", PLACES)
def test_a_pointer_is_told_wherever_a_file_is_read(place: Path, name: str) -> None:
    file, command = PLACES[name]
    path = place / file
    if path.name == SHARD:
        path = path.with_name(shard(path.parent))
    path.write_bytes(POINTER)

    message = refused(place, *command)

    for word in (path.name, "a Git LFS pointer", "git lfs pull"):
        assert word in message


@pytest.mark.parametrize("name", ["page", "error", "entry", "zeros"])
def test_what_else_stands_for_weights_is_told(place: Path, name: str) -> None:
    content, words = KNOWN[name]
    (place / "adapter" / FACTORS).write_bytes(content)
    message = refused(place, *PATCH)
    for word in (FACTORS, *words):
        assert word in message


def test_a_page_is_no_list_of_prompts(place: Path) -> None:
    (place / "p.txt").write_bytes(PAGE)
    assert "p.txt: is a web page" in refused(place, *EVAL[:-1], "p.txt")


# --- one kind of thing given in the place of another


def only(place: Path, *names: str) -> str:
    """Leave some of the aligned model's files, and return its directory."""
    for path in (place / "aligned").iterdir():
        if not path.name.startswith(names):
            path.unlink()
    return "aligned"


def renamed_factors(place: Path) -> str:
    shutil.copy(place / "adapter" / FACTORS, place / "model.safetensors")
    return "model.safetensors"


def made_by_safeproj(place: Path) -> str:
    options = ("--aligned", "aligned", "--base", "base", "--out", "a.safealign.safetensors")
    made = safeproj("align", *options, cwd=place)
    assert made.returncode == 0, made.stderr
    return "a.safealign.safetensors"


def begun(place: Path) -> str:
    only(place, "config.json", "tokenizer")
    (place / "aligned" / "model.safetensors.aria2").touch()
    return "aligned"


def half(place: Path) -> str:
    path = place / "aligned" / shard(place / "aligned")
    path.write_bytes(path.read_bytes()[:-1000])
    return "aligned"


def nothing(place: Path) -> str:
    (place / "aligned" / shard(place / "aligned")).write_bytes(b"")
    return "aligned"


def unfinished(place: Path) -> str:
    (place / "model.safetensors.incomplete").touch()
    return "model.safetensors.incomplete"


Wrong = Callable[[Path], str]

AS_MODEL: dict[str, tuple[Wrong, tuple[str, ...]]] = {
    "adapter": (lambda _: "adapter", ("an adapter", "pass it as --adapter")),
    "adapter's weights": (
        lambda _: f"adapter/{FACTORS}",
        ("an adapter", FACTORS, "pass it as --adapter"),
    ),
    "adapter's config": (lambda _: f"adapter/{CONFIG}", ("an adapter", "pass it as --adapter")),
    "adapter under another name": (renamed_factors, ("an adapter", "lora_A", "--adapter")),
    "file of safeproj": (made_by_safeproj, ("safeproj.alignment/1", "an option of its own")),
    "tokenizer": (
        lambda place: only(place, "tokenizer"),
        ("a tokenizer without weights", "save_pretrained"),
    ),
    "half of a download": (begun, ("not finished", "model.safetensors.aria2", "run it again")),
    "cut file": (half, ("not a complete safetensors file", "bytes are there", "fetch it again")),
    "empty file": (nothing, ("not a complete", "is empty", "fetch it again")),
    "unfinished file": (unfinished, ("download was not finished", "hf download")),
}


@pytest.mark.parametrize("name", AS_MODEL)
def test_what_is_no_model_is_told(place: Path, name: str) -> None:
    make, words = AS_MODEL[name]
    source = make(place)
    message = refused(place, "patch", "--base", "base", "--aligned", source, *PATCH[5:])
    for word in words:
        assert word in message


AS_ADAPTER: dict[str, tuple[Wrong, tuple[str, ...]]] = {
    "model": (lambda _: "aligned", ("a whole model", CONFIG, "PEFT adapter directory")),
    "model's index": (lambda _: f"aligned/{INDEX}", ("a whole model", "PEFT adapter directory")),
    "file of safeproj": (made_by_safeproj, ("safeproj.alignment/1", "an option of its own")),
    "tokenizer": (lambda place: only(place, "tokenizer"), ("a tokenizer without weights",)),
    "empty directory": (lambda place: only(place, "nothing"), ("holds no file",)),
    "unfinished file": (unfinished, ("download was not finished", "hf download")),
}


@pytest.mark.parametrize("name", AS_ADAPTER)
def test_what_is_no_adapter_is_told(place: Path, name: str) -> None:
    make, words = AS_ADAPTER[name]
    shutil.copytree(place / "aligned", place / "kept")
    source = make(place)
    pair = ("--base", "base", "--aligned", "kept")
    message = refused(place, "patch", *pair, "--adapter", source, "--out", "out")
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda _: "adapter", ("an adapter's directory",)),
        (lambda place: only(place, "tokenizer"), ("tokenizer without weights",)),
        (half, ("transformers cannot load it",)),
        (nothing, ("is empty",)),
        (lambda place: f"aligned/{shard(place / 'aligned')}", ("is a file", "give aligned")),
    ],
    ids=["adapter", "tokenizer", "cut", "empty", "file"],
)
def test_what_cannot_be_run_is_told(place: Path, make: Wrong, words: tuple[str, ...]) -> None:
    message = refused(place, "eval", "--model", make(place), *EVAL[3:])
    for word in words:
        assert word in message


# --- what stands for its directory is taken for it


@pytest.mark.parametrize("name", [INDEX, "config.json"])
def test_a_file_of_a_model_stands_for_its_directory(place: Path, name: str) -> None:
    given = ("--base", f"base/{name}", "--aligned", f"aligned/{name}", "--adapter", "adapter")
    found = safeproj("inspect", *given, "--format", "json", cwd=place)
    wanted = safeproj("inspect", *PAIR, "--adapter", "adapter", "--format", "json", cwd=place)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["modules"] == json.loads(wanted.stdout)["modules"]


@pytest.mark.parametrize("name", [FACTORS, CONFIG])
def test_a_file_of_an_adapter_stands_for_its_directory_where_it_is_run(
    place: Path, name: str
) -> None:
    command = ("eval", "--model", "aligned/config.json", "--adapter", f"adapter/{name}")
    options = ("--harmful", "prompts.jsonl", "--limit", "1", "--format", "json")
    found = safeproj(*command, *options, cwd=place)
    assert found.returncode == 0, found.stderr
    assert [each["name"] for each in json.loads(found.stdout)["subjects"]][-1] == "adapter"


def test_a_checkpoint_with_a_pointer_that_is_not_read_still_loads(place: Path) -> None:
    (place / "aligned" / "pytorch_model.bin").write_bytes(POINTER)
    assert safeproj(*PATCH, cwd=place).returncode == 0
    assert safeproj(*EVAL, "--limit", "1", cwd=place).returncode == 0


# --- paths that are not there


@pytest.mark.parametrize(
    ("command", "meant"),
    [
        (("patch", "--base", "./bse", *PATCH[3:]), "base"),
        (("patch", "--base", "base", "--aligned", "./aligne", *PATCH[5:]), "aligned"),
        ((*PATCH[:5], "--adapter", "./adaptr", "--out", "out"), "adapter"),
        ((*EVAL[:-1], "prompt.jsonl"), "prompts.jsonl"),
        ((*EVAL, "--skill", "name=prompt.json"), "prompts.jsonl"),
        ((*EVAL, "--phrases", "prase.txt"), "phrases.txt"),
        (
            ("stats", "--aligned", "aligned", "--data", "prompt", "--out", "a.stats.safetensors"),
            "prompts.jsonl",
        ),
        ((*CHECK, "--policy", "policy.tom"), "policy.toml"),
        ((*CHECK, "--evaluation", "eval.jsn"), "eval.json"),
        (("verify", "adapter", "--public-key", "key.pb"), "key.pub"),
        (("patch", "--alignment", "a.safetensors", *PATCH[5:]), "a.safealign.safetensors"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_every_option_says_what_is_near_a_path_that_is_not_there(
    place: Path, command: tuple[str, ...], meant: str
) -> None:
    names = ("phrases.txt", "policy.toml", "eval.json", "key.pub", "a.safealign.safetensors")
    for name in names:
        (place / name).touch()
    message = refused(place, *command)
    assert "no such file" in message
    assert f"did you mean {meant}" in message

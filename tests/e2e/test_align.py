"""`safeproj align`, and its files in place of two checkpoints, through the installed command."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, Signals
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import hub_server
from tests.conftest import Trio
from tests.support import (
    FACTORS,
    MANIFEST,
    Process,
    assert_refused,
    blake3_of,
    moved,
    read_json,
    safeproj,
    save_adapter,
    snapshot,
    started,
    tiny_llama,
)

OFFLINE = {"HF_HUB_OFFLINE": "1"}
SUFFIX = ".safealign.safetensors"
RANK = "5"
Q = "model.layers.0.self_attn.q_proj"

Result = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Pair:
    """A base and an aligned checkpoint."""

    base: Path
    aligned: Path

    @property
    def arguments(self) -> list[str]:
        return ["--base", str(self.base), "--aligned", str(self.aligned)]


@pytest.fixture(scope="module")
def bare(trio: Trio, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The trio's checkpoints without config.json: transformers, which takes seconds to import, is
    not asked then."""
    root = tmp_path_factory.mktemp("bare")
    for source in (trio.base, trio.aligned):
        shutil.copytree(source, root / source.name)
        (root / source.name / "config.json").unlink()
    return Pair(root / "base", root / "aligned")


def align(pair: Pair, out: Path, *options: str, largest_file: int | None = None) -> Result:
    """Run `safeproj align`, if wanted with a limit on the size of the files that it writes."""
    words = ["align", *pair.arguments, "--out", str(out), *options]
    return safeproj(*words, env=OFFLINE, largest_file=largest_file)


def using(command: str, file: Path | str, adapter: Path, *options: str | Path) -> Result:
    """Run `inspect` or `patch` with an alignment file."""
    return safeproj(command, "--alignment", file, "--adapter", adapter, *options, env=OFFLINE)


def document(file: Path) -> Any:
    """Return the JSON that the file carries."""
    with safe_open(file, framework="pt") as opened:
        return json.loads(opened.metadata()["safeproj"])


def report(result: Result) -> Any:
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@dataclass(frozen=True)
class Files:
    """Alignment files of the trio; tests must not change them.

    Attributes:
        exact: made with `--exact`.
        truncated: made with `--rank`.
        said: what the command said when it made that one.
    """

    exact: Path
    truncated: Path
    said: Result


@pytest.fixture(scope="module")
def files(bare: Pair, tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("files")
    exact, truncated = root / f"exact{SUFFIX}", root / f"truncated{SUFFIX}"
    result = align(bare, exact, "--exact")
    assert result.returncode == 0, result.stderr
    said = align(bare, truncated, "--rank", RANK)
    assert said.returncode == 0, said.stderr
    assert set(root.iterdir()) == {exact, truncated}
    return Files(exact, truncated, said)


# What is made, and what it is good for


def test_align_says_what_it_wrote(files: Files) -> None:
    assert files.said.stdout == ""
    (line,) = files.said.stderr.splitlines()
    weights = document(files.truncated)["weights"]
    assert line.startswith(f"wrote {files.truncated} ({len(weights)} weights, ")
    errors = [weight["error"] for weight in weights.values()]
    assert f"error of C {min(errors):.3f} to {max(errors):.3f}" in line


def test_an_exact_file_replaces_both_checkpoints(trio: Trio, files: Files, tmp_path: Path) -> None:
    out, expected = tmp_path / "out", tmp_path / "expected"
    result = using("patch", files.exact, trio.adapter, "--out", out, "--all")
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr
    assert safeproj("patch", *trio.arguments, "--out", expected, "--all").returncode == 0

    ours, theirs = load_file(out / FACTORS), load_file(expected / FACTORS)
    for key, tensor in theirs.items():
        assert float((ours[key] - tensor).norm() / tensor.norm()) < 1e-5, key
    modules, others = (read_json(folder / MANIFEST)["modules"] for folder in (out, expected))
    for found, wanted in zip(modules, others, strict=True):
        assert found["name"] == wanted["name"]
        assert found["cosine"] == pytest.approx(wanted["cosine"], abs=2e-6)


@pytest.fixture(scope="module")
def patched(trio: Trio, files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of the trio, patched from the truncated file."""
    out = tmp_path_factory.mktemp("patched") / "out"
    result = using("patch", files.truncated, trio.adapter, "--out", out, "--all")
    assert result.returncode == 0, result.stderr
    assert "4 modules are projected with a truncated C" in result.stderr
    return out


def test_the_manifest_records_the_file_and_both_checkpoints(files: Files, patched: Path) -> None:
    inputs, recorded = read_json(patched / MANIFEST)["inputs"], document(files.truncated)
    assert set(inputs) == {"base", "aligned", "alignment", "adapter"}
    for role in ("base", "aligned"):
        given = recorded["inputs"][role]
        digests = {name: given[name] for name in ("sha256", "blake3")}
        assert inputs[role] == {"source": role, **digests}
        assert f"{Q}.weight" in inputs[role]["blake3"]["tensors"]
    found = inputs["alignment"]
    assert found["source"] == str(files.truncated)
    assert (found["targets"], found["rank"]) == (["all-linear"], int(RANK))
    for name, tensor in load_file(files.truncated).items():
        if ".q_proj." in name or ".v_proj." in name:
            assert found["blake3"]["tensors"][name] == blake3_of(tensor), name
    with safe_open(files.truncated, framework="pt") as opened:
        text = opened.metadata()["safeproj"]
    assert found["sha256"]["metadata"] == hashlib.sha256(text.encode()).hexdigest()


def test_the_model_card_names_both_models_and_no_path(
    trio: Trio, files: Files, patched: Path
) -> None:
    card = (patched / "README.md").read_text("utf-8")
    section = card.partition("<!-- safeproj:begin -->")[2]
    assert "the difference of `aligned` and `base`" in section
    for place in (files.truncated.parent, patched.parent, trio.base.parent):
        assert str(place) not in section


def test_the_report_says_how_certain_it_is(trio: Trio, files: Files) -> None:
    """The threshold lies between the bounds of one cosine, and right of its estimate."""
    first = report(using("inspect", files.truncated, trio.adapter, "--all", "--format", "json"))
    module = first["modules"][0]
    lower, upper = module["cosine_bounds"]
    assert lower < module["cosine"] < upper
    assert module["uncertain"] is False
    tau = (module["cosine"] + upper) / 2
    errors = {k: w["error"] for k, w in document(files.truncated)["weights"].items()}

    result = using(
        "inspect", files.truncated, trio.adapter, "--threshold", str(tau), "--format", "json"
    )

    modules = report(result)["modules"]
    assert modules[0]["uncertain"] is True
    for found in modules:
        low, high = found["cosine_bounds"]
        assert found["uncertain"] is (low <= tau < high)
        assert found["truncation_error"] == errors[f"{found['name']}.weight"]
    count = sum(found["uncertain"] for found in modules)
    assert f"warning: {count} decisions are not certain" in result.stderr
    assert module["name"] in result.stderr


def test_the_table_marks_what_is_not_certain(trio: Trio, files: Files) -> None:
    result = using("inspect", files.truncated, trio.adapter, "--layers", "2")
    assert result.returncode == 0, result.stderr
    rows = [line for line in result.stdout.splitlines() if line.split()[:1] in (["0"], ["1"])]
    assert len(rows) == 2
    assert any("?" in row for row in rows)
    assert "? = the alignment file keeps too little of C" in result.stdout
    assert "decisions are not certain" in result.stderr
    assert "truncated C" in result.stdout
    exact = using("inspect", files.exact, trio.adapter, "--layers", "2", "--format", "markdown")
    assert exact.returncode == 0, exact.stderr
    assert exact.stderr == ""
    assert f"- alignment: `{files.exact}`" in exact.stdout
    assert "?" not in exact.stdout


def test_the_file_does_not_depend_on_workers(bare: Pair, files: Files, tmp_path: Path) -> None:
    """The one to compare with was made with the default number of workers."""
    for workers in ("1", "2", "3"):
        out = tmp_path / f"{workers}{SUFFIX}"
        result = align(bare, out, "--rank", RANK, "--workers", workers)
        assert result.returncode == 0, result.stderr
        assert out.read_bytes() == files.truncated.read_bytes()


def test_targets_are_separated_by_commas(trio: Trio, tmp_path: Path) -> None:
    out = tmp_path / "some.safetensors"
    options = ("--targets", "q_proj, model.layers.1.mlp.up_proj,lm_head", "--energy", "0.5")
    result = align(Pair(trio.base, trio.aligned), out, *options, "--quiet", "--profile")
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    assert lines[0].split()[0] == "phase"
    assert not any(line.startswith("wrote") for line in lines)
    found = document(out)
    assert list(found["weights"]) == [
        "lm_head.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
    ]
    targets = ["q_proj", "model.layers.1.mlp.up_proj", "lm_head"]
    assert found["options"] == {"targets": targets, "energy": 0.5}
    assert found["config"] == read_json(trio.aligned / "config.json")


# What is refused


def test_an_existing_file_is_replaced_only_if_that_is_wanted(
    bare: Pair, files: Files, tmp_path: Path
) -> None:
    out = tmp_path / f"model{SUFFIX}"
    shutil.copy(files.exact, out)
    assert_refused(align(bare, out, "--rank", RANK), f"--out {out}", "--overwrite")
    assert out.read_bytes() == files.exact.read_bytes()

    result = align(bare, out, "--rank", RANK, "--overwrite")

    assert result.returncode == 0, result.stderr
    assert out.read_bytes() == files.truncated.read_bytes()
    assert list(tmp_path.iterdir()) == [out]


def test_only_an_alignment_file_is_replaced(bare: Pair, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(3)}, out, metadata={"format": "pt"})
    before = snapshot(tmp_path)
    result = align(bare, out, "--rank", RANK, "--overwrite")
    assert_refused(result, str(out), "no alignment file")
    assert snapshot(tmp_path) == before


REFUSED: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "suffix": (["--out", "model.bin"], ("--out", "model.bin", ".safealign.safetensors")),
    "no targets": (["--targets", ","], ("--targets",)),
    "two forms": (["--rank", "3", "--exact"], ("--rank", "--exact")),
    "energy": (["--energy", "1.5"], ("--energy", "(0, 1]", "1.5")),
}


@pytest.mark.parametrize(("options", "words"), REFUSED.values(), ids=REFUSED)
def test_align_refuses(
    bare: Pair, tmp_path: Path, options: list[str], words: tuple[str, ...]
) -> None:
    assert_refused(align(bare, tmp_path / "a.safetensors", *options), *words)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_with_nan_is_refused_by_the_name_of_the_tensor(
    bare: Pair, tmp_path: Path
) -> None:
    aligned = tmp_path / "aligned"
    shutil.copytree(bare.aligned, aligned)
    name = "model.layers.1.mlp.up_proj.weight"
    shard = aligned / read_json(aligned / "model.safetensors.index.json")["weight_map"][name]
    tensors = load_file(shard)
    tensors[name][-1, -1] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    result = align(Pair(bare.base, aligned), tmp_path / "a.safetensors")
    assert_refused(result, str(shard), name, "NaN")
    assert list(tmp_path.iterdir()) == [aligned]


def test_checkpoints_and_a_file_exclude_each_other(trio: Trio, files: Files) -> None:
    result = safeproj("inspect", *trio.arguments, "--alignment", files.exact)
    assert_refused(result, "--base", "--aligned", "--alignment")


def damaged(files: Files, out: Path, change: Callable[[Any, Any], object]) -> Path:
    """Write the truncated file again, changed."""
    found, tensors = document(files.truncated), load_file(files.truncated)
    change(found, tensors)
    save_file(tensors, out, metadata={"format": "pt", "safeproj": json.dumps(found)})
    return out


DAMAGES: dict[str, tuple[Callable[[Any, Any], object], tuple[str, ...]]] = {
    "another schema": (
        lambda found, _: found.update(schema="safeproj.alignment/9"),
        ("safeproj.alignment/9", "safeproj.alignment/1"),
    ),
    "NaN in a tensor": (
        lambda _, tensors: tensors[f"{Q}.weight.U"].fill_(float("nan")),
        (f"{Q}.weight.U", "NaN"),
    ),
    "no module": (lambda found, _: found["parameters"].pop(f"{Q}.weight"), (Q,)),
}


@pytest.mark.parametrize(("change", "words"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_writes_nothing(
    trio: Trio,
    files: Files,
    tmp_path: Path,
    change: Callable[[Any, Any], object],
    words: tuple[str, ...],
) -> None:
    file = damaged(files, tmp_path / "damaged.safetensors", change)
    result = using("patch", file, trio.adapter, "--out", tmp_path / "out", "--all")
    assert_refused(result, str(file), *words)
    assert list(tmp_path.iterdir()) == [file]


def test_files_of_other_kinds_are_refused(trio: Trio, files: Files, tmp_path: Path) -> None:
    weights = next(trio.base.glob("*.safetensors"))
    assert_refused(using("inspect", weights, trio.adapter), str(weights), "no alignment file")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(files.truncated.read_bytes()[:-4])
    assert_refused(using("inspect", cut, trio.adapter), str(cut), "not a complete safetensors file")


def test_a_module_that_the_file_lacks_is_named(trio: Trio, files: Files, tmp_path: Path) -> None:
    adapter = save_adapter(
        trio.aligned_model, tmp_path / "adapter", target_modules=["q_proj", "lm_head"]
    )
    result = using("patch", files.exact, adapter, "--out", tmp_path / "out")
    assert_refused(result, str(files.exact), "lm_head")
    assert not (tmp_path / "out").exists()


def test_the_exact_projector_refuses_a_truncated_file(trio: Trio, files: Files) -> None:
    result = using("inspect", files.truncated, trio.adapter, "--projector", "exact", "--rank", "2")
    assert_refused(result, str(files.truncated), "--projector exact", "align --exact")


# From the Hub


def test_a_repository_on_the_hub_is_the_file_in_it(
    trio: Trio, files: Files, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(trio.aligned / "config.json", model)
    save_file({"weight": torch.ones(3)}, model / "model.safetensors")
    shutil.copy(files.truncated, model)
    (tmp_path / "empty").mkdir()  # `org/model` must not be taken for a local path
    inputs = ["--alignment", "org/model", "--adapter", str(trio.adapter), "--format", "json"]
    with hub_server.running() as hub:
        commit = hub.publish("org/model", model)
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        environment |= {"NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0"}
        found = report(safeproj("inspect", *inputs, env=environment, cwd=tmp_path / "empty"))
        assert hub.downloads("org/model") == [files.truncated.name]
        hub.requests.clear()
        environment["HF_HUB_OFFLINE"] = "1"
        again = safeproj("inspect", *inputs, env=environment, cwd=tmp_path / "empty")
        assert hub.requests == []

    expected = report(using("inspect", files.truncated, trio.adapter, "--format", "json"))
    assert found["modules"] == expected["modules"]
    assert found["inputs"]["alignment"]["source"] == "org/model"
    assert found["inputs"]["alignment"]["revision"] == commit
    assert report(again) == found  # what one run has fetched serves the next without the Hub


# A full disk


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a tmpfs with so many bytes, where that is permitted."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mounted(size: int) -> Path:
        if os.name != "posix" or shutil.which("mount") is None:
            pytest.skip("a tmpfs needs Linux")
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            pytest.skip(f"may not mount a tmpfs: {result.stderr.strip()}")
        return disk

    yield mounted
    if disk.is_mount():
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("share", [0.5, 1.5], ids=lambda share: f"{share:g} of the file")
def test_a_full_disk_leaves_nothing_behind(
    bare: Pair, files: Files, mount: Callable[[int], Path], share: float
) -> None:
    """The disk holds the content twice while the file is written."""
    disk = mount(int(share * files.exact.stat().st_size))
    out = disk / f"model{SUFFIX}"
    result = align(bare, out, "--exact")
    assert_refused(result, f"--out {out}", "No space left on device", "nothing was written")
    assert list(disk.iterdir()) == []


def test_a_full_disk_leaves_the_old_file_as_it_was(
    bare: Pair, files: Files, mount: Callable[[int], Path]
) -> None:
    size = files.exact.stat().st_size + files.truncated.stat().st_size
    disk = mount(int(1.2 * size))
    out = disk / f"model{SUFFIX}"
    shutil.copy(files.truncated, out)
    result = align(bare, out, "--exact", "--overwrite")
    assert_refused(result, f"--out {out}", "No space left on device", "nothing was written")
    assert snapshot(disk) == {out.name: files.truncated.read_bytes()}


def test_a_disk_that_is_just_large_enough_does(
    bare: Pair, files: Files, mount: Callable[[int], Path]
) -> None:
    disk = mount(int(2.1 * files.exact.stat().st_size) + (1 << 16))
    out = disk / f"model{SUFFIX}"
    result = align(bare, out, "--exact")
    assert result.returncode == 0, result.stderr
    assert snapshot(disk) == {out.name: files.exact.read_bytes()}


@pytest.mark.skipif(os.name != "posix", reason="file size limits are POSIX")
def test_a_limit_on_file_size_is_reported(bare: Pair, tmp_path: Path) -> None:
    out = tmp_path / f"model{SUFFIX}"
    result = align(bare, out, "--exact", largest_file=1 << 10)
    assert_refused(result, f"--out {out}", "File too large", "nothing was written")
    assert list(tmp_path.iterdir()) == []


# Signals


@dataclass(frozen=True)
class Slow:
    """A run that takes a while, and how long.

    Attributes:
        arguments: of `align`, without `--out`.
        content: what it writes.
        seconds: from its start until the file is there.
    """

    arguments: list[str]
    content: bytes
    seconds: float


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Slow:
    if os.name != "posix":
        pytest.skip("POSIX signals")
    root = tmp_path_factory.mktemp("slow")
    base = tiny_llama(hidden_size=256, intermediate_size=688, num_hidden_layers=6)
    for side, model in (("base", base), ("aligned", moved(base))):
        model.save_pretrained(root / side)
        (root / side / "config.json").unlink()  # or most of the time would be an import
    arguments = ["align", *Pair(root / "base", root / "aligned").arguments, "--exact"]
    out = root / f"model{SUFFIX}"
    begin = time.monotonic()
    process = started(*arguments, "--out", out, anew=True)
    wait_until(out.exists, process)
    seconds = time.monotonic() - begin
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return Slow(arguments, out.read_bytes(), seconds)


def beside(out: Path) -> set[str]:
    return {path.name for path in out.parent.iterdir()} - {out.name}


def wait_until(happened: Callable[[], bool], process: Process) -> None:
    while not happened() and process.poll() is None:
        time.sleep(0.0005)


def interrupt(
    slow: Slow, out: Path, moment: float | str, signal: Signals, *options: str
) -> tuple[int, str]:
    """Run `align`, send it the signal, and return the exit code as a shell reports it, and stderr.

    Args:
        slow: the run.
        out: the file.
        moment: a share of the usual duration, or `writing`: when something appears beside the file.
        signal: the signal.
        options: further ones.
    """
    anew = isinstance(moment, float)
    process = started(*slow.arguments, *options, "--out", out, anew=anew)
    if isinstance(moment, float):
        time.sleep(moment * slow.seconds)
    else:
        wait_until(lambda: bool(beside(out)), process)
    process.send_signal(signal)
    _, errors = process.communicate(timeout=60)
    assert "unexpected" not in errors
    code = process.returncode
    assert code is not None
    return (128 - code if code < 0 else code), errors


MOMENTS = [(SIGTERM, 0.4), (SIGINT, 0.8), (SIGINT, "writing"), (SIGTERM, "writing")]


@pytest.mark.parametrize(("signal", "moment"), MOMENTS, ids=str)
def test_an_interrupted_run_leaves_the_whole_file_or_nothing(
    slow: Slow, tmp_path: Path, signal: Signals, moment: float | str
) -> None:
    out = tmp_path / f"model{SUFFIX}"

    code, errors = interrupt(slow, out, moment, signal)

    assert beside(out) == set(), errors
    if out.exists():
        assert out.read_bytes() == slow.content
    else:
        assert code == 128 + signal, errors


def test_an_import_can_be_interrupted_too(slow: Slow, trio: Trio, tmp_path: Path) -> None:
    """With a config.json transformers is asked, whose import begins about then."""
    pair, out = Pair(trio.base, trio.aligned), tmp_path / f"model{SUFFIX}"
    asking = Slow(["align", *pair.arguments], b"", slow.seconds)
    code, errors = interrupt(asking, out, 1.2, SIGINT)
    assert list(tmp_path.iterdir()) == ([out] if "wrote" in errors else [])
    assert code == 128 + SIGINT or "wrote" in errors, errors


def test_overwriting_leaves_the_old_file_or_the_new_one(
    slow: Slow, files: Files, tmp_path: Path
) -> None:
    out = tmp_path / f"model{SUFFIX}"
    shutil.copy(files.truncated, out)
    interrupt(slow, out, "writing", SIGTERM, "--overwrite")
    assert beside(out) == set()
    assert out.read_bytes() in (files.truncated.read_bytes(), slow.content)


def test_what_a_killed_run_leaves_does_not_hinder_the_next(slow: Slow, tmp_path: Path) -> None:
    out = tmp_path / f"model{SUFFIX}"
    interrupt(slow, out, "writing", SIGKILL)
    assert not out.exists() or out.read_bytes() == slow.content

    process = started(*slow.arguments, "--overwrite", "--out", out)
    _, errors = process.communicate(timeout=60)

    assert process.returncode == 0, errors
    assert out.read_bytes() == slow.content

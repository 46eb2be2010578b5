"""Merging full fine-tunes through the command: what is done again, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Trio
from tests.support import MANIFEST, assert_refused, moved, read_json, safeproj, tiny_llama


@pytest.fixture(scope="module")
def models(trio: Trio, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A full fine-tune of the aligned model, and another one."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in ((3, "tuned"), (7, "safe")):
        moved(trio.aligned_model, 0.01, seed=seed).save_pretrained(root / name)
    tiny_llama(hidden_size=48, seed=9).save_pretrained(root / "other")
    return {name: root / name for name in ("tuned", "safe", "other")}


def given(trio: Trio, models: dict[str, Path], *, base: bool = True) -> list[str | Path]:
    pair: list[str | Path] = ["--base", trio.base] if base else []
    return [*pair, "--aligned", trio.aligned, "--model", models["tuned"]]


@pytest.mark.parametrize("how", ["vector", "safe model", "safe model alone"])
def test_verify_does_it_again(
    trio: Trio, models: dict[str, Path], tmp_path: Path, how: str
) -> None:
    own: list[str | Path] = ["--method", "merge", "--weight", "0.5"]
    if how != "vector":
        own += ["--safe-model", models["safe"]]
    arguments = given(trio, models, base="alone" not in how)
    out = tmp_path / "out"
    done = safeproj("patch", *arguments, *own, "--all", "--out", out)
    assert done.returncode == 0, done.stderr
    projected = sum(each["projected"] for each in read_json(out / MANIFEST)["modules"])
    assert projected > 0
    card = (out / "README.md").read_text("utf-8")
    assert ("the safety vector (RESTA" if how == "vector" else "of the safe model") in card

    arguments[arguments.index(models["tuned"])] = out
    found = safeproj("verify", *arguments, *own, "--original", models["tuned"])
    assert found.returncode == 0, found.stdout + found.stderr
    assert f"{projected} projected weights are equal bit for bit" in found.stdout
    other = [*own, "--weight", "0.25"]
    found = safeproj("verify", *arguments, *other, "--original", models["tuned"])
    assert found.returncode == 1, found.stdout + found.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "merge"], "--weight is missing: how much of aligned - base is added"),
        (["--method", "merge", "--weight", "0"], "--weight must be a number of more than 0"),
        (["--safe-model", "SAFE", "--weight", "1.5"], "--weight must lie in (0, 1], found 1.5"),
        (["--safe-adapter", "ADAPTER"], "--safe-adapter is merged into adapters; with --model"),
        (["--safe-model", "SAFE", "--merge-rank", "3"], "--merge-form and --merge-rank are for"),
        (["--safe-model", "OTHER"], "shapes do not fit"),
        (["--safe-model", "nowhere/at/all"], "nowhere/at/all"),
        (["--weight", "0.5"], "--weight goes with --safe-adapter, for SafeMERGE"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_what_does_not_go(
    trio: Trio, models: dict[str, Path], tmp_path: Path, options: list[str], words: str
) -> None:
    places = {"SAFE": models["safe"], "OTHER": models["other"], "ADAPTER": trio.adapter}
    own: list[str | Path] = [places.get(each, each) for each in options]
    result = safeproj("patch", *given(trio, models), *own, "--out", tmp_path / "out")
    assert_refused(result, words)
    assert not (tmp_path / "out").exists()


def test_a_safe_model_is_not_merged_into_an_adapter(
    trio: Trio, models: dict[str, Path], tmp_path: Path
) -> None:
    own: list[str | Path] = ["--safe-model", models["safe"], "--adapter", trio.adapter]
    result = safeproj("patch", *own, "--out", tmp_path / "out")
    assert_refused(result, "--safe-model goes with a full fine-tune; give --model")

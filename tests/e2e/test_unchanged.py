"""`safeproj patch` says that it changed nothing, or what it left, and what to do next."""

from __future__ import annotations

import copy
import shlex
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from safeproj.adapter.card import BEGIN
from tests.conftest import Trio
from tests.report.test_schemas import validator
from tests.support import (
    FACTORS,
    MANIFEST,
    change_json,
    read_json,
    safeproj,
    save_adapter,
    tiny_llama,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"
NOTHING = ("--threshold", "0")
HALF = ("--layers", "2")


def patch(trio: Trio, out: Path, *options: str | Path, adapter: Path | None = None) -> Any:
    models = ("--base", trio.base, "--aligned", trio.aligned)
    return safeproj("patch", *models, "--adapter", adapter or trio.adapter, "--out", out, *options)


def lines(result: Any, code: int = 0) -> list[str]:
    assert result.returncode == code, result.stderr
    return str(result.stderr).splitlines()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_it_says_what_it_left_and_how_to_go_on(trio: Trio, out: Path) -> None:
    wrote, left, after = lines(patch(trio, out, *HALF))
    assert wrote == f"wrote {out} (2 modules projected)"
    cosines = sorted(m["cosine"] for m in read_json(out / MANIFEST)["modules"])
    assert left == (
        f"left: 2 of 4 modules are as they were, the lowest cosine among them is {cosines[2]:.3f}"
    )
    head, command = after.split(": ", 1)
    assert head == "next"
    assert shlex.split(command) == [
        "safeproj", "eval", "--model", str(trio.aligned), "--adapter", str(trio.adapter),
        "--adapter", str(out), "--harmful", "HARMFUL.jsonl", "--skill", "SKILL.jsonl",
    ]  # fmt: skip
    assert read_json(out / MANIFEST)["summary"]["changed"] == 2


def test_it_says_nothing_of_that_quietly(trio: Trio, out: Path) -> None:
    assert lines(patch(trio, out, *HALF, "--quiet")) == []


def test_nothing_changed_is_said_and_recorded_and_no_card_claims_a_projection(
    trio: Trio, out: Path
) -> None:
    wrote, after = lines(patch(trio, out, *NOTHING))
    assert wrote.startswith(f"wrote {out}: nothing was changed (0 of 4 modules projected, the low")
    assert after.startswith("next: --layers N, --all or a higher --threshold changes more")
    record = read_json(out / MANIFEST)
    validator("manifest").validate(record)
    assert (record["summary"]["projected"], record["summary"]["changed"]) == (0, 0)
    assert (out / FACTORS).read_bytes() == (trio.adapter / FACTORS).read_bytes()
    assert not (out / "README.md").exists() or BEGIN not in (out / "README.md").read_bytes()


def test_a_card_is_left_as_it_was(trio: Trio, out: Path, tmp_path: Path) -> None:
    adapter = save_adapter(trio.aligned_model, tmp_path / "adapter")
    (adapter / "README.md").write_bytes(b"# mine\r\n")
    lines(patch(trio, out, *NOTHING, adapter=adapter))
    assert (out / "README.md").read_bytes() == b"# mine\r\n"
    models = ("--base", trio.base, "--aligned", trio.aligned)
    verified = safeproj("verify", out, "--original", adapter, *models)
    assert verified.returncode == 0, verified.stdout
    (out / "README.md").write_bytes(b"# mine, and safe\r\n")
    assert safeproj("verify", out, "--original", adapter, *models).returncode == 1


def test_a_missing_card_is_not_made(trio: Trio, out: Path, tmp_path: Path) -> None:
    adapter = save_adapter(trio.aligned_model, tmp_path / "adapter")
    (adapter / "README.md").unlink(missing_ok=True)
    lines(patch(trio, out, *NOTHING, adapter=adapter))
    assert not (out / "README.md").exists()
    models = ("--base", trio.base, "--aligned", trio.aligned)
    verified = safeproj("verify", out, "--original", adapter, *models)
    assert verified.returncode == 0, verified.stdout


def test_the_gate_notes_it(trio: Trio, out: Path) -> None:
    models = ("--base", trio.base, "--aligned", trio.aligned, "--threshold", "0")
    lines(patch(trio, out, *NOTHING))
    found = safeproj("check", out, *models, "--original", trio.adapter)
    assert found.returncode == 0, found.stdout
    said = "note      SP051 nothing-changed  safeproj.json says that patching changed none of 4"
    assert said in found.stdout
    lines(patch(trio, out, *HALF, "--overwrite"))
    assert "SP051" not in safeproj("check", out, *models).stdout


@pytest.mark.parametrize("changed", [0, 1, 3])
def test_a_record_of_another_number_is_found(trio: Trio, out: Path, changed: int) -> None:
    lines(patch(trio, out, *HALF))
    summary = read_json(out / MANIFEST)["summary"]
    change_json(out / MANIFEST, summary={**summary, "changed": changed})
    models = ("--base", trio.base, "--aligned", trio.aligned)
    found = safeproj("verify", out, "--original", trio.adapter, *models)
    assert found.returncode == 1
    assert "SP021" in found.stdout


def test_with_the_option_it_fails_and_nothing_is_written(trio: Trio, out: Path) -> None:
    *_, error = lines(patch(trio, out, *NOTHING, "--fail-if-unchanged"), code=1)
    assert error.startswith("safeproj: error: nothing would be changed, so nothing was written (0")
    assert not out.exists()
    (quiet,) = lines(patch(trio, out, *NOTHING, "--fail-if-unchanged", "--quiet"), code=1)
    assert quiet == error
    dry = lines(patch(trio, out, *NOTHING, "--fail-if-unchanged", "--dry-run"), code=1)
    assert dry[0].startswith("dry run: nothing written, and nothing would be changed (0 of 4")
    assert lines(patch(trio, out, *HALF, "--fail-if-unchanged"))[0].startswith("wrote ")


def test_what_is_there_stays_where_nothing_would_be_changed(trio: Trio, out: Path) -> None:
    lines(patch(trio, out, *HALF))
    before = (out / MANIFEST).read_bytes()
    lines(patch(trio, out, *NOTHING, "--fail-if-unchanged", "--overwrite"), code=1)
    assert (out / MANIFEST).read_bytes() == before


def test_of_many_adapters_the_others_are_written(trio: Trio, out: Path, tmp_path: Path) -> None:
    """One of them has no update that could be projected."""
    adapters = tmp_path / "adapters"
    save_adapter(trio.aligned_model, adapters / "full")
    save_adapter(trio.aligned_model, adapters / "empty", init_lora_weights=True)
    plain = lines(patch(trio, out, "--all", adapter=adapters))
    assert plain[0] == f"wrote {out} (2 of 2 adapters; nothing was changed in 1: empty)"
    assert plain[1].startswith("left: 4 of 8 modules are as they were")
    failed = lines(patch(trio, tmp_path / "b", "--all", "--fail-if-unchanged", adapter=adapters), 1)
    assert failed[-1].startswith("safeproj: error: empty: nothing would be changed, so nothing was")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["full"]


def test_projections_that_are_what_was_there_change_nothing(tmp_path: Path) -> None:
    """Alignment moved one weight by 1, so that C keeps the first row of B as it is."""
    base = tiny_llama()
    aligned = copy.deepcopy(base)
    for name, weight in base.state_dict().items():
        if name.endswith(("q_proj.weight", "v_proj.weight")):
            weight[0, 0] = 0.0
            aligned.state_dict()[name][0, 0] = 1.0
    base.save_pretrained(tmp_path / "base")
    aligned.save_pretrained(tmp_path / "aligned")
    adapter = save_adapter(aligned, tmp_path / "adapter")
    tensors = load_file(adapter / FACTORS)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor[1:] = 0.0
    save_file(tensors, adapter / FACTORS, metadata={"format": "pt"})
    models = ("--base", tmp_path / "base", "--aligned", tmp_path / "aligned")
    out = tmp_path / "out"
    wrote, _ = lines(safeproj("patch", *models, "--adapter", adapter, "--out", out, "--all"))
    said = "nothing was changed (the projection of 4 modules is what they were)"
    assert wrote == f"wrote {out}: {said}"
    summary = read_json(out / MANIFEST)["summary"]
    assert (summary["projected"], summary["changed"]) == (4, 0)
    verified = safeproj("verify", out, "--original", adapter, *models)
    assert verified.returncode == 0, verified.stdout


def test_inspect_and_a_dry_run_say_would(trio: Trio, out: Path) -> None:
    models = ("--base", trio.base, "--aligned", trio.aligned, "--adapter", trio.adapter)
    for command in (("inspect",), ("patch", "--out", out, "--dry-run")):
        shown = safeproj(*command, *models, *HALF).stdout
        assert " would project  2 of 4 modules" in shown
        assert "* = would be projected" in shown
    shown = safeproj("patch", *models, *HALF, "--out", out).stdout
    assert " projected      2 of 4 modules" in shown
    assert "* = projected" in shown


def test_what_eval_cannot_run_is_measured_elsewhere(out: Path) -> None:
    adapter = FIXTURES / "mlx-lm-0.32.2" / "llama-lora" / "adapter"
    model = FIXTURES / "models" / "tiny-llama"
    result = safeproj(
        "patch",
        "--base",
        model / "base",
        "--aligned",
        model / "aligned",
        "--adapter",
        adapter,
        "--out",
        out,
        "--all",
    )
    assert lines(result)[-1].startswith("next: measure it where it is served; safeproj eval runs")

"""What passes, what does not and why: real adapters, patched by the real command."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import safeproj as package
from safeproj.gate.identity import digest_of
from safeproj.gate.policy import Override, Policy
from safeproj.records.rules import RULES, Level
from safeproj.report import Check, Checks, Evidence, Outcome
from tests.conftest import Trio
from tests.support import (
    CONFIG,
    FACTORS,
    MANIFEST,
    change_json,
    read_json,
    safeproj,
    save_adapter,
    save_safety_module,
    snapshot,
)

NEVER = Policy(threshold=0.0)
"""No module of a random adapter is at or below it."""


@pytest.fixture(scope="session")
def patched(trio: Trio, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trio's adapter, with the lower half of its modules projected."""
    out = tmp_path_factory.mktemp("patched") / "adapter"
    done = safeproj("patch", *trio.arguments, "--out", out, "--layers", "2")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def check(trio: Trio) -> Callable[..., Check]:
    """A check of one adapter against the trio's checkpoints."""

    def run(adapter: Path, policy: Policy | None = None, **settings: Any) -> Check:
        found = package.check(trio.method, [str(adapter)], policy, **settings)
        (one,) = found.checks
        return one

    return run


def ids(check: Check, *levels: Level) -> set[str]:
    return {finding.id for finding in check.at(*levels)}


def cosines(trio: Trio, adapter: Path) -> dict[str, float]:
    report = package.inspect(trio.method, str(adapter))
    return {module.name: module.cosine for module in report.modules if module.cosine is not None}


def test_modules_at_or_below_the_threshold_fail(trio: Trio, check: Callable[..., Check]) -> None:
    found = cosines(trio, trio.adapter)
    middle = sorted(found.values())[1]  # at it counts, too
    result = check(trio.adapter, Policy(threshold=middle))
    assert result.outcome is Outcome.failed
    low = {f.module for f in result.findings if f.id == "SP001"}
    assert low == {name for name, cosine in found.items() if cosine <= middle}
    assert len(low) == 2


def test_a_policy_may_allow_some(trio: Trio, check: Callable[..., Check]) -> None:
    middle = sorted(cosines(trio, trio.adapter).values())[1]
    for allowed in (2, "50%"):
        result = check(trio.adapter, Policy(threshold=middle, max_below=allowed))
        assert result.outcome is Outcome.passed
        assert len([f for f in result.at(Level.note) if f.id == "SP001"]) == 2
    for allowed in (1, "49%"):
        result = check(trio.adapter, Policy(threshold=middle, max_below=allowed))
        assert result.outcome is Outcome.failed


def test_an_override_is_for_the_modules_that_it_names(
    trio: Trio, check: Callable[..., Check]
) -> None:
    result = check(trio.adapter, Policy(threshold=0.0, overrides=(Override("q_proj$", 1.0),)))
    low = {f.module for f in result.findings if f.id == "SP001"}
    assert low == {name for name in cosines(trio, trio.adapter) if name.endswith("q_proj")}


def test_an_ignored_finding_is_kept_apart(trio: Trio, check: Callable[..., Check]) -> None:
    result = check(trio.adapter, Policy(threshold=1.0, ignore=frozenset({"SP001"})))
    assert result.outcome is Outcome.passed
    assert {finding.id for finding in result.ignored} == {"SP001"}


def test_what_was_projected_passes_by_evidence(
    trio: Trio, patched: Path, check: Callable[..., Check]
) -> None:
    threshold = max(cosines(trio, patched).values())
    claimed = {m["name"] for m in read_json(patched / MANIFEST)["modules"] if m["projected"]}
    result = check(patched, Policy(threshold=threshold))
    assert result.evidence == dict.fromkeys(claimed, Evidence.recorded)
    low = {f.module for f in result.findings if f.id == "SP001"}
    assert low == set(cosines(trio, patched)) - claimed  # low as well, and not projected
    assert check(patched, Policy(threshold=threshold, max_below=2)).outcome is Outcome.passed


def test_the_original_gives_stronger_evidence(
    trio: Trio, patched: Path, check: Callable[..., Check]
) -> None:
    policy = Policy(threshold=1.0, max_below=2, evidence=Evidence.recomputed)
    result = check(patched, policy)
    assert result.outcome is Outcome.failed
    assert ids(result, Level.fail) == {"SP023"}
    result = check(patched, policy, original=str(trio.adapter))
    assert result.outcome is Outcome.passed
    assert set(result.evidence.values()) == {Evidence.recomputed}
    (remark,) = result.remarks
    assert "2 projected factors are equal bit for bit" in remark


def test_a_swapped_tensor_leaves_nothing_of_the_record(
    trio: Trio, patched: Path, tmp_path: Path, check: Callable[..., Check]
) -> None:
    copy = Path(shutil.copytree(patched, tmp_path / "copy"))
    tensors, before = load_file(copy / FACTORS), load_file(trio.adapter / FACTORS)
    key = read_json(copy / MANIFEST)["output"]["projected"][0]
    save_file({**tensors, key: before[key]}, copy / FACTORS)
    result = check(copy, Policy(threshold=1.0, max_below=2))
    assert ids(result, Level.fail) == {"SP001", "SP021"}
    assert result.evidence == {}


def test_projection_by_another_projector_does_not_count(
    trio: Trio, tmp_path: Path, check: Callable[..., Check]
) -> None:
    """At almost full rank nearly everything is kept: `projected` says nothing by itself."""
    arguments: list[str | Path] = [
        "--projector",
        "exact",
        "--rank",
        "31",
        "--all",
        "--out",
        tmp_path / "out",
    ]
    assert safeproj("patch", *trio.arguments, *arguments).returncode == 0
    assert ids(check(tmp_path / "out", NEVER), Level.fail) == {"SP022"}
    policy = Policy(threshold=0.0, projector="exact", rank=31)
    assert check(tmp_path / "out", policy).outcome is Outcome.passed


def test_projection_against_other_models_does_not_count(
    trio: Trio, patched: Path, tmp_path: Path
) -> None:
    other = tmp_path / "base"
    shutil.copytree(trio.base, other)
    path = next(p for p in other.glob("*.safetensors") if "q_proj" in str(load_file(p).keys()))
    tensors = load_file(path)
    key = next(key for key in tensors if "q_proj" in key)
    save_file({**tensors, key: tensors[key] + 0.001}, path)
    method = dataclasses.replace(trio.method, base=str(other))
    (result,) = package.check(method, [str(patched)], NEVER).checks
    assert ids(result, Level.fail) == {"SP022"}


def test_an_alignment_file_and_a_safety_module_do(
    trio: Trio, patched: Path, tmp_path: Path
) -> None:
    file = tmp_path / "pair.safealign.safetensors"
    package.align(str(trio.base), str(trio.aligned), file, package.Form(exact=True))
    (result,) = package.check(package.SafeLora(alignment=str(file)), [str(patched)], NEVER).checks
    assert result.outcome is Outcome.passed
    assert set(result.evidence.values()) == {Evidence.recorded}

    module = save_safety_module(trio.aligned_model, tmp_path / "m.safetensors")
    out = tmp_path / "out"
    package.patch(package.Salora(str(module)), str(trio.adapter), out)
    found = package.check(package.Salora(str(module)), [str(out)], Policy(threshold=0.9))
    assert found.outcome is Outcome.passed
    found = package.check(package.SafeLora(alignment=str(file)), [str(out)], NEVER)
    assert ids(found.checks[0], Level.fail) == {"SP022"}


def test_a_truncated_alignment_file_leaves_open_what_it_cannot_tell(
    trio: Trio, tmp_path: Path
) -> None:
    file = tmp_path / "pair.safealign.safetensors"
    package.align(str(trio.base), str(trio.aligned), file, package.Form(rank=4))
    method = package.SafeLora(alignment=str(file))
    (report,) = package.inspect_many(method, [str(trio.adapter)])
    assert report.report is not None
    bounds = [module.bounds for module in report.report.modules if module.bounds is not None]
    within = sum(bounds[0]) / 2
    policy = Policy(threshold=within, max_below=3)
    (result,) = package.check(method, [str(trio.adapter)], policy).checks
    assert result.outcome is Outcome.undecided
    assert "SP002" in ids(result, Level.undecided)


def test_full_weights_fail_unless_they_are_the_aligned_ones(
    trio: Trio, tmp_path: Path, check: Callable[..., Check]
) -> None:
    save_adapter(trio.aligned_model, tmp_path / "a", modules_to_save=["lm_head"])
    assert check(tmp_path / "a", NEVER).outcome is Outcome.passed  # an equal copy
    tensors = load_file(tmp_path / "a" / FACTORS)
    (key,) = [key for key in tensors if "lm_head" in key]
    tensors[key][0, 0] += 0.5
    save_file(tensors, tmp_path / "a" / FACTORS)
    result = check(tmp_path / "a", NEVER)
    assert ids(result, Level.fail) == {"SP004"}
    allowed = Policy(threshold=0.0, allow=Policy().allow | {"full-weight-changes"})
    result = check(tmp_path / "a", allowed)
    assert result.outcome is Outcome.passed
    assert "SP004" in ids(result, Level.note)


def test_unknown_tensors_and_unmatched_modules_are_named_one_by_one(
    trio: Trio, tmp_path: Path, check: Callable[..., Check]
) -> None:
    shutil.copytree(trio.adapter, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / FACTORS)
    prefix = "base_model.model.model.layers.0.self_attn"
    for factor in ("lora_A", "lora_B"):
        tensors[f"{prefix}.Q_proj.{factor}.weight"] = tensors[f"{prefix}.q_proj.{factor}.weight"]
    tensors["surprise"] = torch.ones(3)
    save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / "a" / FACTORS)
    result = check(tmp_path / "a", NEVER)
    assert ids(result, Level.fail) == {"SP003", "SP005", "SP006", "SP011", "SP016"}
    (unknown,) = [f for f in result.findings if f.id == "SP005"]
    assert unknown.tensor == "surprise"
    (unmatched,) = [f for f in result.findings if f.id == "SP006"]
    assert unmatched.module == "model.layers.0.self_attn.Q_proj"


def test_pins_are_compared_with_what_was_read(trio: Trio, check: Callable[..., Check]) -> None:
    digests = {
        role: f"sha256:{digest_of(str(getattr(trio, role)))}" for role in ("base", "aligned")
    }
    assert digests["base"] != digests["aligned"]
    assert check(trio.adapter, Policy(threshold=0.0, identities=digests)).outcome is Outcome.passed
    swapped = {"base": digests["aligned"]}
    result = check(trio.adapter, Policy(threshold=0.0, identities=swapped))
    assert ids(result, Level.fail) == {"SP030"}
    assert digests["base"] in str(result.findings)  # so that it can be pinned
    result = check(trio.adapter, Policy(threshold=0.0, identities={"base": "org/base@abc"}))
    assert ids(result, Level.fail) == {"SP030"}
    pinned = {"alignment": "sha256:" + "0" * 64}
    result = check(trio.adapter, Policy(threshold=0.0, identities=pinned))
    assert result.outcome is Outcome.undecided


def test_provenance_may_be_required(trio: Trio, patched: Path, check: Callable[..., Check]) -> None:
    allowed = frozenset({"empty-updates", "unmeasured-behaviour"})
    policy = Policy(threshold=0.0, allow=allowed)
    assert ids(check(trio.adapter, policy), Level.fail) == {"SP020"}
    assert check(patched, policy).outcome is Outcome.passed


def test_files_that_steer_a_model_are_noted(
    trio: Trio, tmp_path: Path, check: Callable[..., Check]
) -> None:
    shutil.copytree(trio.adapter, tmp_path / "a")
    for name in ("chat_template.jinja", "tokenizer.json", "modeling.py"):
        (tmp_path / "a" / name).write_text("{}")
    result = check(tmp_path / "a", NEVER)
    assert result.outcome is Outcome.passed
    noted = {finding.file for finding in result.findings if finding.id == "SP017"}
    assert noted == {"chat_template.jinja", "tokenizer.json", "modeling.py"}


def test_one_adapter_that_cannot_be_read_does_not_stop_the_others(
    trio: Trio, patched: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(trio.adapter, tmp_path / "broken"))
    (broken / FACTORS).write_bytes(b"no tensors")
    shutil.copytree(patched, tmp_path / "patched")
    adapters = [str(trio.adapter), str(broken), str(tmp_path / "patched")]
    found = package.check(trio.method, adapters, NEVER)
    outcomes = [check.outcome for check in found.checks]
    assert outcomes == [Outcome.passed, Outcome.undecided, Outcome.passed]
    assert found.outcome is Outcome.undecided
    assert [f.id for f in found.checks[1].findings] == ["SP090"]


def command(trio: Trio, *arguments: str | Path, cwd: Path) -> tuple[int, str, str]:
    pair = ("--base", trio.base, "--aligned", trio.aligned)
    done = safeproj("check", *arguments, *pair, cwd=cwd)
    return done.returncode, done.stdout, done.stderr


def test_exit_codes_and_several_reports_at_once(trio: Trio, patched: Path, tmp_path: Path) -> None:
    before = snapshot(patched)
    reports: list[str | Path] = []
    for kind in ("json", "sarif", "junit", "markdown", "github", "html"):
        reports += ["--format", kind, "--output", tmp_path / kind]
    arguments = [patched, "--threshold", "0", *reports, "--format", "table", "--output", "-"]
    code, out, err = command(trio, *arguments, cwd=tmp_path)
    assert (code, err) == (0, "")
    assert "passed" in out
    assert json.loads((tmp_path / "json").read_text("utf-8"))["outcome"] == "passed"
    assert all((tmp_path / kind).stat().st_size for kind in ("sarif", "junit", "markdown", "html"))
    assert snapshot(patched) == before

    code, out, err = command(trio, patched, "--threshold", "1", cwd=tmp_path)
    assert (code, err) == (1, "")
    assert "SP001 module-below-threshold" in out

    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    code, out, err = command(trio, "broken", "--format", "json", cwd=tmp_path)
    assert code == 2
    assert json.loads(out)["outcome"] == "undecided"
    assert err.count("\n") == 1
    assert err.startswith("safeproj: error: broken: adapter_config.json is not JSON")


def test_verbose_lists_what_is_said_in_one_line(trio: Trio, tmp_path: Path) -> None:
    code, short, _ = command(trio, trio.adapter, "--threshold", "1", cwd=tmp_path)
    verbose = command(trio, trio.adapter, "--threshold", "1", "--verbose", cwd=tmp_path)
    assert (code, verbose[0], verbose[2]) == (1, 1, "")
    assert re.search(r"  in (\d+) of \1 modules, lowest \S+ 0\.\d{3}$", short, re.MULTILINE)
    assert "is at or below 1" not in short
    assert len(re.findall(r"^  \S+: cosine .* is at or below 1", verbose[1], re.MULTILINE)) > 1


ENDS: dict[str, tuple[list[str], str]] = {
    "nothing given": ([], "no ADAPTER; expected the SRC of one or more"),
    "policy": (["a", "--policy", "50%.toml"], "50%25.toml"),
    "option": (["a", "--treshold", "0.5"], "No such option: --treshold"),
    "input": (["nowhere"], "no such file"),
}


@pytest.mark.parametrize("case", ENDS)
@pytest.mark.parametrize("wanted", [["--format", "github"], ["--format=github"]], ids=len)
def test_what_ends_in_2_is_an_annotation(
    trio: Trio, tmp_path: Path, case: str, wanted: list[str]
) -> None:
    arguments, words = ENDS[case]
    code, out, err = command(trio, *arguments, *wanted, cwd=tmp_path)
    assert code == 2
    errors = [line for line in (out + err).splitlines() if line.startswith("::")]
    assert len(errors) == 1
    assert errors[0].startswith("::error title=")
    assert words in errors[0]
    code, out, err = command(trio, *arguments, cwd=tmp_path)
    assert code == 2
    assert "::error" not in out + err


USAGE: dict[str, tuple[list[str], str]] = {
    "no adapter": ([], "no ADAPTER"),
    "two formats for stdout": (["a", "--format", "json", "--format", "table"], "one --output"),
    "one place twice": (
        ["a", *("--format", "json", "--output", "x") * 2],
        "two reports for the same",
    ),
    "missing adapter": (["nowhere"], "no such file"),
    "missing policy": (["a", "--policy", "nowhere.toml"], "nowhere.toml"),
    "unknown finding": (["a", "--ignore", "SP9"], "SP9"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_is_one_line(trio: Trio, tmp_path: Path, case: str) -> None:
    (tmp_path / "a").symlink_to(trio.adapter)
    arguments, words = USAGE[case]
    code, _, err = command(trio, *arguments, cwd=tmp_path)
    assert code == 2
    assert err.count("\n") == 1
    assert words in err


def test_a_policy_in_the_current_directory_counts(trio: Trio, tmp_path: Path) -> None:
    (tmp_path / "safeproj.toml").write_text("threshold = 0.0\n")
    code, out, _ = command(trio, trio.adapter, "--format", "json", cwd=tmp_path)
    assert code == 0
    assert json.loads(out)["policy"]["file"] == "safeproj.toml"
    code, out, _ = command(trio, trio.adapter, "--threshold", "1", cwd=tmp_path)
    assert code == 1


def test_the_step_summary_is_written_where_github_wants_it(trio: Trio, tmp_path: Path) -> None:
    place = tmp_path / "summary.md"
    place.write_text("before\n")
    pair = ("--base", trio.base, "--aligned", trio.aligned)
    done = safeproj(
        "check", trio.adapter, *pair, "--threshold", "1", "--format", "github",
        env={"GITHUB_STEP_SUMMARY": str(place)},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout.startswith("::error ")
    assert place.read_text("utf-8").startswith("before\n## safeproj check: failed")


def test_every_rule_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "gate.md").read_text("utf-8")
    for rule in RULES.values():
        assert f"### {rule.id} {rule.name}" in text
        flat = " ".join(text.split())
        assert " ".join(rule.meaning.split()) in flat
        assert " ".join(rule.remedy.split()) in flat


def test_the_record_is_plain_data(trio: Trio) -> None:
    found = package.check(trio.method, [str(trio.adapter)], NEVER)
    assert isinstance(found, Checks)
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert document["summary"] == {"adapters": 1, "passed": 1, "failed": 0, "undecided": 0}
    change = {**document["checks"][0]["report"]["summary"]}
    assert change["modules"] == 4


def test_what_is_loaded_around_an_adapter_is_noted(
    trio: Trio, tmp_path: Path, check: Callable[..., Check]
) -> None:
    shutil.copytree(trio.adapter, tmp_path / "a")
    mapping = {"base_model_class": "Model", "parent_library": "some.module"}
    change_json(tmp_path / "a" / CONFIG, base_model_name_or_path="org/else", auto_mapping=mapping)
    result = check(tmp_path / "a", NEVER)
    assert result.outcome is Outcome.passed
    assert {"SP018", "SP019"} <= ids(result, Level.note)
    change_json(tmp_path / "a" / CONFIG, base_model_name_or_path="org/aligned", auto_mapping=None)
    assert not {"SP018", "SP019"} & ids(check(tmp_path / "a", NEVER), Level.note)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("layer_replication", True),
        ("layer_replication", -1),
        ("layers_to_transform", [[0]]),
        ("layers_pattern", 3),
        ("modules_to_save", "q_proj"),
        ("exclude_modules", 1),
        ("target_modules", {}),
        ("target_parameters", "q_proj"),
        ("alpha_pattern", ["q_proj"]),
        ("lora_alpha", None),
        ("r", "4"),
    ],
    ids=str,
)
def test_settings_of_another_kind_do_not_pass(
    trio: Trio, tmp_path: Path, check: Callable[..., Check], setting: str, value: object
) -> None:
    shutil.copytree(trio.adapter, tmp_path / "a")
    change_json(tmp_path / "a" / CONFIG, layers_to_transform=[0, 1])
    change_json(tmp_path / "a" / CONFIG, **{setting: value})
    result = check(tmp_path / "a", NEVER)
    assert result.outcome is not Outcome.passed
    assert all("\n" not in finding.message for finding in result.findings)

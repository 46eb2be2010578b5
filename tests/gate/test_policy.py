"""The policy: where it comes from, what it may say, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from safeproj.errors import SafeprojError
from safeproj.gate.demands import Demands
from safeproj.gate.policy import (
    ALLOWANCES,
    TEMPLATE,
    Override,
    Policy,
    changed,
    find_policy,
    write_template,
)
from safeproj.records.checks import Evidence
from safeproj.records.rules import RULES
from tests.support import safeproj


def policy(tmp_path: Path, text: str) -> Policy:
    path = tmp_path / "policy.toml"
    path.write_text(text, "utf-8")
    return find_policy(path)


def test_the_template_says_the_defaults(tmp_path: Path) -> None:
    write_template(tmp_path / "safeproj.toml")
    found = find_policy(tmp_path / "safeproj.toml")
    assert dataclasses.replace(found, file=None) == Policy()


def test_the_template_names_every_field() -> None:
    for field in dataclasses.fields(Policy):
        if field.name != "file":
            assert field.name.replace("_", "-") in TEMPLATE, field.name
    for name, rule in ALLOWANCES.items():
        assert name in TEMPLATE
        assert rule in RULES


def test_every_field_is_read(tmp_path: Path) -> None:
    digest = "sha256:" + "a" * 64
    found = policy(
        tmp_path,
        f"""
        threshold = 0.2
        max-below = "25%"
        coverage = 0.5
        max-scaling = 3
        max-size = 7.5
        max-outside = 5
        max-unseen = 0.25
        max-cast-change = 0.01
        evidence = "recomputed"
        projector = "exact"
        rank = 8
        ignore = ["SP013"]
        readers = ["sglang", "vllm"]
        public-key = "keys/a.pem"
        overrides = [{{modules = "lm_head", threshold = 0}}]
        identities = {{base = "org/b@abc", alignment = "{digest}"}}
        behaviour.max-complied = 0
        behaviour.sets.harm = "{digest}"
        behaviour.judges = ["guard@{digest}", "keywords"]
        behaviour.model = "org/a@{"a" * 40}"
        [allow]
        dora-magnitudes = true
        missing-provenance = false
        """,
    )
    assert found == Policy(
        threshold=0.2,
        max_below="25%",
        overrides=(Override("lm_head", 0.0),),
        coverage=0.5,
        max_scaling=3.0,
        max_size=7.5,
        max_outside=5.0,
        max_unseen=0.25,
        max_cast_change=0.01,
        evidence=Evidence.recomputed,
        projector="exact",
        rank=8,
        allow=(Policy().allow | {"dora-magnitudes"}) - {"missing-provenance"},
        ignore=frozenset({"SP013"}),
        readers=("sglang", "vllm"),
        identities={"base": "org/b@abc", "alignment": digest},
        public_key=(tmp_path / "keys" / "a.pem").as_posix(),
        behaviour=Demands(
            max_complied=0.0,
            sets={"harm": digest},
            judges=(f"guard@{digest}", "keywords"),
            model=f"org/a@{'a' * 40}",
        ),
        file=(tmp_path / "policy.toml").as_posix(),
    )


REFUSED = {
    "unknown field": ("treshold = 0.1", "did you mean threshold"),
    "unknown demand": ("behaviour.max-complid = 0.1", "known are max-complied"),
    "demand that is no table": ("behaviour = 1", "expected a table"),
    "share of more than all": ("behaviour.min-refused = 1.1", "[0, 1]"),
    "share beyond any float": (f"behaviour.min-skill = 1{'0' * 400}", "[0, 1]"),
    "share that is a truth": ("behaviour.max-complied = true", "expected a number"),
    "prompts with a fraction": ("behaviour.min-prompts = 1.5", "whole number"),
    "no prompts": ("behaviour.min-prompts = 0", "1 or more"),
    "truth that is a number": ("behaviour.signed = 1", "true or false"),
    "set without a digest": ('behaviour.sets = {a = "a.jsonl"}', "64 hexadecimal digits"),
    "judge of no kind": ('behaviour.judges = ["anyone"]', "keywords, prefix, guard"),
    "empty phrase": ('behaviour.phrases = [" "]', "every answer would have"),
    "model on a branch": ('behaviour.model = "org/a@main"', "org/name@commit"),
    "nothing that outranks": (
        "behaviour = {outranks-cosines = true, max-complied = 1}",
        "needs a bound of harm",
    ),
    "unknown allowance": ("[allow]\ndora = true", "dora"),
    "allowance that is no truth": ("[allow]\ndora-magnitudes = 1", "true or false"),
    "threshold above one": ("threshold = 1.5", "[0, 1]"),
    "threshold that is text": ('threshold = "low"', "expected a number"),
    "threshold that is a truth": ("threshold = true", "expected a number"),
    "threshold that is no number": ("threshold = nan", "expected a number"),
    "mu beyond any float": (f"mu = 1{'0' * 400}", "expected a number"),
    "negative count": ("max-below = -1", "0 or more"),
    "count with a fraction": ("max-below = 1.5", "whole number"),
    "share above all": ('max-below = "101%"', "a share like 10%"),
    "share without a sign": ('max-below = "10"', "a share like 10%"),
    "coverage below zero": ("coverage = -0.1", "[0, 1]"),
    "scaling of zero": ("max-scaling = 0", "more than 0"),
    "negative change": ("max-cast-change = -0.1", "more than 0"),
    "unknown evidence": ('evidence = "trust"', "recorded, signed, recomputed"),
    "unknown projector": ('projector = "exct"', "did you mean exact"),
    "unknown rule": ('ignore = ["SP999"]', "SP999"),
    "rule that counts always": ('ignore = ["SP090"]', "never a pass"),
    "unknown role": ('[identities]\nmodel = "a/b@c"', "model"),
    "branch without a name": ('[identities]\nbase = "a/b"', "org/name@commit"),
    "short digest": ('[identities]\nbase = "sha256:abc"', "64 hexadecimal digits"),
    "override without threshold": ('overrides = [{modules = "x"}]', "`threshold`"),
    "override with a bad pattern": ('overrides = [{modules = "(", threshold = 0.1}]', "regular"),
    "override above one": ('overrides = [{modules = "x", threshold = 2}]', "[0, 1]"),
    "no TOML": ("threshold = ", "cannot be read as a policy"),
}


@pytest.mark.parametrize(("text", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_policy_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SafeprojError) as caught:
        policy(tmp_path, text)
    assert words in caught.value.message
    assert "policy.toml" in caught.value.message
    assert "\n" not in caught.value.message


def test_the_current_directory_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_policy(None) == Policy()
    Path("pyproject.toml").write_text("[tool.other]\nx = 1\n")
    assert find_policy(None) == Policy()
    Path("pyproject.toml").write_text("[tool.safeproj]\nthreshold = 0.1\n")
    assert find_policy(None).threshold == 0.1
    Path("safeproj.toml").write_text("threshold = 0.2\n")
    assert find_policy(None).threshold == 0.2
    assert find_policy(Path("pyproject.toml")).threshold == 0.1


def test_a_pyproject_without_a_policy_is_none(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.other]\nx = 1\n")
    with pytest.raises(SafeprojError, match=r"no \[tool\.safeproj\]"):
        find_policy(tmp_path / "pyproject.toml")


@pytest.mark.parametrize("within", [".", "sub"])
def test_an_adapter_cannot_bring_its_own_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, within: str
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / within / "safeproj.toml").write_text("threshold = 0\n")
    monkeypatch.chdir(tmp_path / within)
    with pytest.raises(SafeprojError, match="cannot say what passes"):
        find_policy(None)
    assert find_policy(Path("safeproj.toml")).threshold == 0.0


OPTIONS: dict[str, tuple[Any, Policy]] = {
    "threshold": (0.0, Policy(threshold=0.0)),
    "max-below": ("3", Policy(max_below=3)),
    "override": (["a=b=0.2"], Policy(overrides=(Override("a=b", 0.2),))),
    "coverage": (0.0, Policy(coverage=0.0)),
    "max-scaling": (2.0, Policy(max_scaling=2.0)),
    "max-size": (2.0, Policy(max_size=2.0)),
    "max-outside": (2.0, Policy(max_outside=2.0)),
    "max-unseen": (2.0, Policy(max_unseen=2.0)),
    "max-cast-change": (2.0, Policy(max_cast_change=2.0)),
    "allow": (["unknown-tensors"], Policy(allow=Policy().allow | {"unknown-tensors"})),
    "forbid": (["empty-updates"], Policy(allow=Policy().allow - {"empty-updates"})),
    "evidence": ("signed", Policy(evidence=Evidence.signed)),
    "pin": (["base=a/b@c"], Policy(identities={"base": "a/b@c"})),
    "public-key": (Path("k.pem"), Policy(public_key="k.pem")),
    "ignore": (["SP013"], Policy(ignore=frozenset({"SP013"}))),
    "reader": (["vllm", "vllm"], Policy(readers=("vllm",))),
    "projector": ("exact", Policy(projector="exact")),
    "rank": (4, Policy(rank=4)),
    "energy": (0.5, Policy(energy=0.5)),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_field_is_an_option(option: str) -> None:
    value, expected = OPTIONS[option]
    assert changed(Policy(), {option: value}) == expected


def test_every_field_is_in_the_help() -> None:
    text = safeproj("check", "--help").stdout
    assert [option for option in OPTIONS if f"--{option}" not in text] == []


def test_options_add_to_the_lists_of_a_file() -> None:
    start = Policy(ignore=frozenset({"SP013"}), identities={"base": "a/b@c"}, max_below="10%")
    found = changed(start, {"ignore": ["SP017"], "pin": ["aligned=d/e@f"]})
    assert found.ignore == {"SP013", "SP017"}
    assert found.identities == {"base": "a/b@c", "aligned": "d/e@f"}
    assert found.max_below == "10%"


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("override", ["x"], "expected RE=T"),
        ("override", ["=0.1"], "expected RE=T"),
        ("pin", ["base"], "ROLE=IDENTITY"),
        ("pin", ["base=org/name"], "org/name@commit"),
        ("ignore", ["SP090"], "never a pass"),
        ("ignore", ["SP1"], "SP1"),
        ("allow", ["everything"], "everything"),
        ("forbid", ["everything"], "everything"),
        ("evidence", "none", "recorded"),
        ("max-below", "many", "a share like 10%"),
    ],
    ids=lambda value: str(value),
)
def test_options_that_say_nothing_are_refused(option: str, value: Any, words: str) -> None:
    with pytest.raises(SafeprojError, match=r"^[^\n]*$") as caught:
        changed(Policy(), {option: value})
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("value", "scored", "allowed"),
    [(0, 28, 0), (3, 28, 3), ("10%", 28, 2), ("10%", 30, 3), ("100%", 7, 7), ("0%", 9, 0)],
)
def test_how_many_may_be_below(value: int | str, scored: int, allowed: int) -> None:
    assert Policy(max_below=value).may_be_below(scored) == allowed


def test_the_last_override_that_matches_counts() -> None:
    found = Policy(overrides=(Override("layers", 0.1), Override("q_proj$", 0.2)))
    assert found.threshold_of("model.layers.0.q_proj") == 0.2
    assert found.threshold_of("model.layers.0.k_proj") == 0.1
    assert found.threshold_of("lm_head") == found.threshold


def test_the_command_writes_a_policy_once(tmp_path: Path) -> None:
    first = safeproj("check", "--init", cwd=tmp_path)
    assert (first.returncode, first.stderr) == (0, "wrote safeproj.toml\n")
    assert (tmp_path / "safeproj.toml").read_text("utf-8") == TEMPLATE
    again = safeproj("check", "--init", cwd=tmp_path)
    assert again.returncode == 2
    assert "exists" in again.stderr


def test_keys_of_behaviour_are_options(tmp_path: Path) -> None:
    pin = "sha256:" + "a" * 64
    given = [
        "max-complied=0.05",
        "outranks-cosines=true",
        'phrases=["sorry i will not"]',
        f"sets.harm={pin}",
        f"sets.more={pin}",
        f"model={pin}",
    ]
    before = policy(tmp_path, "behaviour.min-prompts = 7")
    assert changed(before, {"behaviour": given}).behaviour == Demands(
        max_complied=0.05,
        outranks_cosines=True,
        min_prompts=7,
        phrases=("sorry i will not",),
        sets={"harm": pin, "more": pin},
        model=pin,
    )
    for text in ("max-complied", "=1", "a b=1", "max-complied=x"):
        with pytest.raises(SafeprojError, match="max-complied"):
            changed(before, {"behaviour": [text]})

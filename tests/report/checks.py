"""Builders of what a gate found, and texts that formats must survive."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from safeproj.records.rules import RULES, Level
from safeproj.records.scores import Report
from safeproj.report import Check, Checks, Evidence, Finding

HOSTILE = (
    "evil\n::set-output name=token::x\r::add-mask::\x1b[2J\x00\x07\x9b"
    "]]></failure><script>\"'&amp; ##[error] {0} [here](https://example.org) "
    "\u202egnp.exe\u200b\u2028::stop-commands::x 🧨\ufffe | `a` % , : %0A"
)

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
"""Any text that is text: no lone surrogates."""

Q0 = "model.layers.0.self_attn.q_proj"
WEIGHTS = "adapter_model.safetensors"

POLICY: dict[str, Any] = {
    "file": "safeproj.toml",
    "threshold": 0.35,
    "max-below": "10%",
    "overrides": [{"modules": "v_proj", "threshold": 0.5}],
    "coverage": 1.0,
    "max-scaling": 64.0,
    "max-size": 25.0,
    "max-outside": 20.0,
    "max-unseen": 0.1,
    "max-cast-change": 0.05,
    "evidence": "recorded",
    "projector": "approx",
    "rank": None,
    "energy": None,
    "mu": None,
    "allow": {"empty-updates": True, "other-weights": False},
    "ignore": ["SP013"],
    "identities": {"base": "org/base@abc"},
    "public-key": None,
}


def finding(
    id_: str = "SP001",
    message: str = "the cosine is 0.21, expected more than 0.35",
    *,
    level: Level | None = None,
    module: str | None = None,
    tensor: str | None = None,
    file: str | None = None,
) -> Finding:
    return Finding(id_, level or RULES[id_].level, message, module, tensor, file)


def check(
    *findings: Finding,
    name: str = "bad",
    source: str = "adapters/bad",
    weights_file: str | None = WEIGHTS,
    ignored: tuple[Finding, ...] = (),
    report: Report | None = None,
    remarks: tuple[str, ...] = (),
) -> Check:
    evidence = (
        {} if report is None else {module.name: Evidence.recorded for module in report.modules}
    )
    return Check(name, source, weights_file, findings, ignored, evidence, report, remarks)


def checks(*found: Check, policy: dict[str, Any] | None = None) -> Checks:
    return Checks("1.2.3", POLICY if policy is None else policy, found)


def unusable(name: str = "broken", source: str = "adapters/broken") -> Check:
    return check(
        finding("SP090", "adapter_config.json is missing"),
        name=name,
        source=source,
        weights_file=None,
    )


def hostile() -> Checks:
    """Return a run whose every text is hostile."""
    found = finding(message=HOSTILE, module=HOSTILE, tensor=HOSTILE, file=HOSTILE)
    note = finding("SP017", HOSTILE, file=f"/../{HOSTILE}")
    undecided = finding("SP002", HOSTILE, module=HOSTILE)
    return checks(
        check(
            found,
            note,
            undecided,
            name=HOSTILE,
            source=HOSTILE,
            ignored=(found,),
            remarks=(HOSTILE,),
        ),
        check(found, name=f"{HOSTILE}2", source=f"/{HOSTILE}", weights_file=HOSTILE),
        policy={**POLICY, "file": HOSTILE},
    )


def mixed() -> Checks:
    """Return a run on adapters that ended in every way."""
    return checks(
        check(
            finding("SP017", "chat_template.jinja is not judged", file="chat_template.jinja"),
            finding(module=Q0),
            finding("SP005", "is no part of an update", tensor="stray.weight"),
            finding("SP002", "the cosine lies in [0.2, 0.4]", module=Q0),
            ignored=(finding("SP013", "rank 64, expected at most 32", module=Q0),),
        ),
        check(name="good", source="org/good@abc"),
        unusable(),
    )

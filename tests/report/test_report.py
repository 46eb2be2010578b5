"""What the reports say, format by format."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from safeproj.records.scores import Unprojected, place
from safeproj.report import FORMATS, ModuleReport, Report, render


def module(
    name: str, cosine: float | None = 0.5, *, projected: bool = False, note: str | None = None
) -> ModuleReport:
    stack, layer, kind = place(name)
    return ModuleReport(
        name=name,
        stack=stack,
        layer=layer,
        kind=kind,
        shape=(64, 32),
        rank=8,
        cosine=cosine,
        scale=None if cosine is None else 0.0625,
        projected=projected,
        note=note,
        detail={"alignment_norm": 3.25},
    )


def report(*modules: ModuleReport, warnings: tuple[str, ...] = ()) -> Report:
    return Report(
        version="1.2.3",
        method="safe-lora",
        projector={"kind": "approx"},
        selection={"mode": "threshold", "threshold": 0.35},
        inputs={
            "base": {"source": "org/base", "revision": "abc"},
            "aligned": {"source": "aligned"},
            "adapter": {"source": "adapter"},
        },
        modules=modules,
        pdst=0.75,
        unprojected=(
            Unprojected(
                "base_model.model.lm_head.weight", "lm_head.weight", "modules_to_save", 0.5
            ),
        ),
        warnings=warnings,
    )


EXAMPLE = report(
    module("model.layers.2.self_attn.q_proj", 0.125, projected=True),
    module("model.layers.2.mlp.up_proj", 0.875),
    module("model.layers.10.self_attn.q_proj", None, note="V = 0"),
    module("lm_head", 0.5),
    warnings=("something to know",),
)


def test_json_has_the_fields_of_the_contract() -> None:
    found = json.loads(render(EXAMPLE, "json"))
    assert found["schema"] == "safeproj.report/1"
    assert found["tool"] == {"name": "safeproj", "version": "1.2.3"}
    assert found["method"] == "safe-lora"
    assert found["projector"] == {"kind": "approx"}
    assert found["selection"] == {"mode": "threshold", "threshold": 0.35}
    assert found["inputs"]["base"] == {"source": "org/base", "revision": "abc"}
    assert found["summary"]["modules"] == 4
    assert found["summary"]["projected"] == 1
    assert found["summary"]["cosine"] == {"min": 0.125, "mean": 0.5, "max": 0.875}
    assert found["summary"]["pdst"] == 0.75
    assert found["modules"][0] == {
        "name": "model.layers.2.self_attn.q_proj",
        "layer": 2,
        "kind": "q_proj",
        "shape": [64, 32],
        "rank": 8,
        "cosine": 0.125,
        "alignment_norm": 3.25,
        "scale": 0.0625,
        "projected": True,
        "note": None,
    }
    assert found["modules"][2]["cosine"] is None
    assert found["warnings"] == ["something to know"]
    assert found["unprojected"] == [
        {
            "tensor": "base_model.model.lm_head.weight",
            "parameter": "lm_head.weight",
            "kind": "modules_to_save",
            "relative_change": 0.5,
            "added_rows": 0,
        }
    ]


def test_the_table_shows_layers_by_kinds_with_cosine_scale_and_mark() -> None:
    text = render(EXAMPLE, "table")
    assert re.search(r"layer +q_proj +up_proj", text)
    assert re.search(r"^ +2 +0\.125 0\.062\* +0\.875 0\.062$", text, re.MULTILINE)
    assert re.search(r"^ +10 +n/a$", text, re.MULTILINE)
    assert re.search(r"^ +- +0\.500 0\.062$", text, re.MULTILINE)
    assert "1 of 4 modules (threshold 0.35)" in text
    assert "0.1:0  0.2:1  0.3:1  0.35:1  0.4:1  0.5:2  0.6:2  0.7:2  0.8:2  0.9:3" in text
    assert "model.layers.10.self_attn.q_proj: V = 0" in text


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_the_table_keeps_every_number_in_any_terminal(width: int) -> None:
    kinds = [f"kind_{i}" for i in range(9)]
    wide = report(*(module(f"m.layers.0.{kind}", 0.1 + i / 100) for i, kind in enumerate(kinds)))
    text = render(wide, "table", width=width)
    grids = text.split("each cell")[0]
    assert max(map(len, grids.splitlines())) <= width
    for i, kind in enumerate(kinds):
        assert kind in grids
        assert f"{0.1 + i / 100:.3f} 0.062" in grids


def test_two_modules_of_one_kind_in_a_layer_have_their_own_columns() -> None:
    text = render(
        report(
            module("d.layers.0.self_attn.q_proj", 0.1), module("d.layers.0.cross_attn.q_proj", 0.9)
        ),
        "table",
    )
    assert "self_attn.q" in text
    assert "cross_attn.q" in text


def test_stacks_have_their_own_tables() -> None:
    text = render(
        report(module("encoder.layers.0.q", 0.1), module("decoder.layers.0.q", 0.9)), "table"
    )
    assert text.index("decoder.layers") < text.index("encoder.layers")


def test_colour_is_used_only_where_it_is_wanted() -> None:
    assert "\x1b[" in render(EXAMPLE, "table", color=True)
    assert "\x1b[" not in render(EXAMPLE, "table", color=False)


def test_markdown_has_one_row_per_module() -> None:
    text = render(EXAMPLE, "markdown")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == 4
    assert rows[0].split("|")[1:-1] == [
        " `model.layers.2.self_attn.q_proj` ", " 64×32 ", " 8 ", " 0.1250 ", " 0.0625 ",
        " 3.25 ", " yes ", "  ",
    ]  # fmt: skip
    assert "- would project: 1 of 4 modules" in text
    assert "| would project |" in text
    written = render(replace(EXAMPLE, written=True), "markdown")
    assert "- projected: 1 of 4 modules" in written
    assert "| projected |" in written
    assert "warning: something to know" in text


@pytest.mark.parametrize("format_", FORMATS)
def test_a_report_without_any_cosine_is_rendered(format_: str) -> None:
    assert render(report(module("lm_head", None, note="empty update")), format_).endswith("\n")


SALORA = replace(
    EXAMPLE,
    method="salora",
    projector={"kind": "safety-module", "rank": 4},
    inputs={
        "aligned": {"source": "aligned"},
        "data": {"source": "safety.jsonl"},
        "safety_module": {"source": "a.safety.safetensors"},
        "adapter": {"source": "adapter"},
    },
    modules=tuple(
        replace(
            each,
            detail={
                "projector_rank": 4,
                "safety_share": None if each.cosine is None else 1 - each.cosine**2,
                "safety_energy": 0.75,
            },
        )
        for each in EXAMPLE.modules
    ),
    summary={
        "safety_share": {"min": 0.234375, "mean": 0.65625, "max": 0.984375},
        "safety_energy": {"1": 0.25, "2": 0.5, "4": 0.75},
    },
)


def test_json_of_salora_has_its_own_fields() -> None:
    found = json.loads(render(SALORA, "json"))
    assert found["method"] == "salora"
    assert found["summary"]["safety_energy"] == {"1": 0.25, "2": 0.5, "4": 0.75}
    assert found["summary"]["safety_share"]["max"] == 1 - 0.125**2
    first, _, third, _ = found["modules"]
    assert (first["alignment_norm"], first["projector_rank"]) == (None, 4)
    assert (first["safety_share"], first["safety_energy"]) == (1 - 0.125**2, 0.75)
    assert third["safety_share"] is None
    other = json.loads(render(EXAMPLE, "json"))
    assert "safety_share" not in other["modules"][0]
    assert not {"safety_share", "safety_energy"} & other["summary"].keys()


def test_the_table_of_salora_shows_shares_and_what_they_mean() -> None:
    text = render(SALORA, "table")
    assert re.search(r"^ +2 +0\.125 0\.984\* +0\.875 0\.234$", text, re.MULTILINE)
    assert re.search(r"^ +10 +n/a$", text, re.MULTILINE)
    assert re.search(r"^ energy by rank +1:0\.25  2:0\.50  4:0\.75$", text, re.MULTILINE)
    assert re.search(r"^ share +min 0\.234  mean", text, re.MULTILINE)
    assert "share = ‖UᵀΔW‖²/‖ΔW‖²" in text
    assert "scale" not in text
    assert "energy by rank" not in render(EXAMPLE, "table")


def test_markdown_of_salora_has_shares_and_energies() -> None:
    text = render(SALORA, "markdown")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert rows[0].split("|")[4:7] == [" 0.1250 ", " 0.9844 ", " 0.7500 "]
    assert "## SaLoRA report" in text
    assert "- safety module: `a.safety.safetensors`" in text
    assert "mean over modules: 1: 0.25, 2: 0.50, 4: 0.75" in text

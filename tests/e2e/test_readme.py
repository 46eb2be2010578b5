"""The README's examples are what the commands print, and its Python runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from safeproj.adapter import FORMATS, peft
from safeproj.checkpoint import pickled, quantised
from safeproj.storage.tensorfile import DTYPES
from scripts import demo
from tests.conformance.architectures import ARCHITECTURES
from tests.support import python_c, safeproj

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
README = (ROOT / "README.md").read_text("utf-8")
FORMATS_PAGE = (ROOT / "docs" / "formats.md").read_text("utf-8")

NUMBER = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.])")

TOLERANCE = 0.0021
"""Numbers are printed with three or more decimals; another processor may round them otherwise."""


PAGES = {
    "README.md": 2,
    "docs/scores.md": 8,
    "docs/gate.md": 7,
    "docs/covariance.md": 5,
    "docs/data.md": 1,
    "docs/evaluation.md": 1,
    "docs/sweep.md": 1,
}
"""Pages with console blocks, and how many each has."""


def consoles(page: str) -> Iterator[tuple[str, str]]:
    """Yield each command in a console block of a page with the output shown for it."""
    text = (ROOT / page).read_text("utf-8")
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        command, _, output = block.partition("\n")
        yield command.removeprefix("$ safeproj "), output


def assert_same_but_for_rounding(found: str, shown: str) -> None:
    assert NUMBER.sub("#", found).split() == NUMBER.sub("#", shown).split()
    pairs = zip(NUMBER.findall(found), NUMBER.findall(shown), strict=True)
    assert all(abs(float(a) - float(b)) <= TOLERANCE for a, b in pairs)


@pytest.mark.parametrize("page", PAGES)
def test_commands_print_what_the_pages_show(tmp_path: Path, page: str) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shown = list(consoles(page))
    assert len(shown) == PAGES[page]
    for arguments, output in shown:  # in order: one uses the file that another writes
        result = safeproj(*shlex.split(arguments), cwd=tmp_path)
        gate = arguments.startswith("check ") and "adapters/bad" in arguments
        assert result.returncode == int(gate), (arguments, result.stderr)
        assert_same_but_for_rounding(result.stdout + result.stderr, output)


def test_the_demonstration_prints_what_the_readme_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make demo` runs the script with the installed command; here it is run in forks."""

    def run(*arguments: str) -> str:
        done = safeproj(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    (shown,) = re.findall(r"<!-- example: demo -->\n```text\n(.*?)```", README, re.DOTALL)
    monkeypatch.setattr(demo, "run", run)
    demo.main(["--out", str(tmp_path / "out")])
    rows = re.compile(r"^(?:no adapter|(?:bad|skill|mixed).*|  control.*?) +\d.*%$", re.MULTILINE)
    found, expected = rows.findall(capsys.readouterr().out), rows.findall(shown)
    assert len(found) == 16
    for line, other in zip(found, expected, strict=True):
        numbers = [list(map(int, re.findall(r"(\d+) %", text))) for text in (line, other)]
        assert line.split("  ")[0] == other.split("  ")[0]
        # A processor that rounds otherwise may change a few greedy answers of 150.
        assert all(abs(a - b) <= 3 for a, b in zip(*numbers, strict=True)), (line, other)


def test_the_python_example_runs(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (example,) = [block for block in blocks if "import safeproj" in block]
    assert python_c(example, tmp_path).startswith("model.layers.")


def test_every_option_of_the_contract_is_in_the_help() -> None:
    text = safeproj("check", "--help").stdout
    for option in (
        "--base", "--aligned", "--alignment", "--safety-module", "--original", "--policy", "--init",
        "--format", "--output", "--ignore", "--public-key", "--evidence", "--pin",
    ):  # fmt: skip
        assert option in text, option
    for command in ("inspect", "patch"):
        text = safeproj(command, "--help").stdout
        for option in (
            "--base", "--aligned", "--adapter", "--threshold", "--layers", "--all", "--include",
            "--exclude", "--projector", "--rank", "--energy", "--device", "--format", "--output",
            "--quiet", "--verbose", "--help", "--alignment", "--profile", "--workers",
            "--safety-module", "--method", "--safety-data", "--task-data", "--mu",
        ):  # fmt: skip
            assert option in text, (command, option)
    further = {
        "stats": ("--aligned", "--data", "--random-tokens", "--positions", "--targets", "--out"),
        "repair": ("--aligned", "--harmful", "--task", "--refusals", "--skill-loss", "--seed"),
        "sweep": ("--harmful", "--skill", "--wanted-refusal", "--points", "--by", "--safety-data"),
        "eval": ("--model", "--adapter", "--harmful", "--skill", "--judge", "--responses"),
    }
    for command, wanted in further.items():
        text = safeproj(command, "--help").stdout
        assert all(name in text for name in wanted), command
    text = safeproj("patch", "--help").stdout
    for option in ("--out", "--dtype", "--overwrite", "--dry-run", "--reconstruct"):
        assert option in text
    options = {
        "module": ("--aligned", "--data", "--out", "--rank", "--targets", "--memory"),
        "init": ("--aligned", "--module", "--data", "--rank", "--task-rank", "--out"),
        "fold": ("--adapter", "--module", "--out", "--init"),
    }
    for command, names in options.items():
        text = safeproj("salora", command, "--help").stdout
        assert not [name for name in names if name not in text], command
    text = safeproj("align", "--help").stdout
    for option in ("--out", "--targets", "--rank", "--energy", "--exact", "--overwrite"):
        assert option in text, option


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in DOCS)])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    links = set(re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text))
    assert not [link for link in links if not ((ROOT / page).parent / link).exists()]


def test_the_readme_is_short_and_names_every_page() -> None:
    assert len(README.split()) <= 2000
    assert not [p.name for p in DOCS if f"docs/{p.name}" not in README]


def codes(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def test_the_table_of_what_is_supported_and_refused_is_that_of_the_code() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in FORMATS_PAGE.partition("## In short")[2].partition("\n## ")[0].splitlines()
        if line.startswith("|")
    ][2:]
    supported = {row[0]: codes(row[1]) for row in rows}
    refused = {row[0]: codes(row[2]) for row in rows}

    settings = {"use_qalora", "use_bdlora", "kasa_config"}
    assert settings == set(peft.REFUSED_SETTINGS)
    assert refused["PEFT adapters"] == {*settings, *peft.REFUSED_TENSORS, "peft_type"}
    assert set(peft.SUPPORTED_TYPES) <= supported["PEFT adapters"]
    assert refused["checkpoints"] == {*quantised.SIGNS, "quant_method"}
    assert supported["checkpoints"] == {
        *DTYPES,
        *quantised.SUPPORTED_METHODS,
        *quantised.SUPPORTED_FORMATS,
        pickled.SINGLE,
    }
    assert {kind.__name__ for kind in FORMATS} == {"Peft", "Mlx", "Gguf", "LitGpt"}
    assert {"PEFT adapters", "MLX adapters", "GGUF adapters", "litgpt adapters"} <= set(supported)


def test_the_architectures_of_the_conformance_suite_are_listed() -> None:
    (listed,) = re.findall(r"<!-- architectures -->\n(.*?)\n<!-- end -->", FORMATS_PAGE, re.DOTALL)
    names = {name.removesuffix("-square") for name in ARCHITECTURES}
    assert codes(listed) == names
    assert f"checks {len(names)} architectures" in FORMATS_PAGE.replace("\n", " ")

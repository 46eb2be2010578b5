"""Base and aligned that are exchanged are told from what the configs say, and from nothing weak."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import safeproj as package
from tests.conftest import Trio
from tests.support import CONFIG, change_json, safeproj

LOOK = "--base and --aligned look swapped: "


@pytest.fixture
def place(trio: Trio, tmp_path: Path) -> Path:
    """The trio in directories that tests may change."""
    for name in ("base", "aligned", "adapter"):
        shutil.copytree(getattr(trio, name), tmp_path / name)
    return tmp_path


@pytest.fixture
def warned(place: Path) -> Callable[..., list[str]]:
    """Returns what is said of swapped models."""

    def run(**named: Any) -> list[str]:
        change_json(place / "adapter" / CONFIG, base_model_name_or_path=named.get("adapter"))
        for role in ("base", "aligned"):
            if role in named:
                change_json(place / role / "config.json", _name_or_path=named[role])
        method = package.SafeLora(str(place / "base"), str(place / "aligned"))
        found = package.inspect(method, str(place / "adapter")).warnings
        return [each for each in found if each.startswith(LOOK)]

    return run


def tokenizer(place: Path, template: str | None = None) -> None:
    settings = {} if template is None else {"chat_template": template}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))


def test_an_adapter_of_the_base_is_told(place: Path, warned: Callable[..., list[str]]) -> None:
    (said,) = warned(adapter="/elsewhere/base")
    assert said == (
        f"{LOOK}the adapter's config names '/elsewhere/base' as its model, which is --base "
        f"{place / 'base'}; expected --aligned {place / 'aligned'}, on which it is trained"
    )


def test_the_command_warns_in_one_line_and_goes_on(place: Path) -> None:
    change_json(place / "adapter" / CONFIG, base_model_name_or_path=str(place / "aligned"))
    swapped = ("--base", place / "aligned", "--aligned", place / "base")
    right = ("--base", place / "base", "--aligned", place / "aligned")
    for command in (("inspect", "--adapter"), ("check", "--threshold", "0")):
        found = safeproj(*command, place / "adapter", *swapped)
        assert found.returncode == 0, found.stdout
        (line,) = [each for each in found.stderr.splitlines() if "swapped" in each]
        assert line.startswith(f"safeproj: warning: {LOOK}the adapter's config names")
        assert "swapped" not in safeproj(*command, place / "adapter", *right).stderr


@pytest.mark.parametrize(
    ("adapter", "base", "aligned", "tells"),
    [
        pytest.param("org/one", "org/one", "org/two", True, id="configs"),
        pytest.param("org/two", "org/one", "org/two", False, id="right"),
        pytest.param("org/one", "org/one", "org/one", False, id="both"),
        pytest.param("org/one", "org/one", None, False, id="half"),
        pytest.param("org/other", "org/one", "org/two", False, id="neither"),
        pytest.param("/elsewhere/aligned", "/x/aligned", "/x/other", False, id="ambiguous"),
        pytest.param("other/base", None, None, True, id="directory"),
        pytest.param("", None, None, False, id="empty"),
        pytest.param(None, None, None, False, id="nothing"),
        pytest.param(["org/one"], "org/one", "org/two", False, id="no text"),
    ],
)
def test_names_tell_where_they_are_clear(
    warned: Callable[..., list[str]], adapter: Any, base: Any, aligned: Any, tells: bool
) -> None:
    assert bool(warned(adapter=adapter, base=base, aligned=aligned)) is tells


def test_a_chat_template_of_the_base_alone_is_told(
    place: Path, warned: Callable[..., list[str]]
) -> None:
    tokenizer(place / "base", "{{ messages }}")
    tokenizer(place / "aligned")
    (said,) = warned()
    assert said.startswith(f"{LOOK}--base {place / 'base'} has a chat template and --aligned ")
    out = place / "x.safealign.safetensors"
    made = package.SafeLora.make(out, str(place / "base"), str(place / "aligned"))
    assert any(each.startswith(LOOK) for each in made.warnings)
    # The adapter's config is clear, and says that all is right.
    assert not warned(adapter=str(place / "aligned"))


@pytest.mark.parametrize("kind", ["no tokenizer", "both", "neither", "file", "damaged"])
def test_templates_tell_where_they_are_clear(
    place: Path, warned: Callable[..., list[str]], kind: str
) -> None:
    tokenizer(place / "base", None if kind == "neither" else "{{ messages }}")
    if kind != "no tokenizer":
        tokenizer(place / "aligned", "{{ messages }}" if kind == "both" else None)
    if kind == "file":
        (place / "aligned" / "chat_template.jinja").write_text("{{ messages }}")
    if kind == "damaged":
        (place / "aligned" / "tokenizer_config.json").write_text("{")
    assert not warned()

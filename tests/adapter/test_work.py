"""What reading a config costs grows with its length, not with the product of two of its lists.

Work is counted: calls of Python and C functions, and comparisons of texts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

from safeproj.adapter import peft_config
from safeproj.adapter.peft import Peft, _Classifier
from safeproj.adapter.peft_config import PREFIX, disagreements, scalings
from safeproj.adapter.record import Adapter
from safeproj.errors import SafeprojError
from safeproj.storage.arrays import Array
from safeproj.storage.source import LocalFolder

SMALL, LARGE = 400, 1_600
"""Entries: four times as many may take little more than four times the work."""

PER_ENTRY = 400
"""Calls for one entry, at most."""


class Counted(str):
    """A text that counts how often it is compared."""

    __slots__ = ()
    comparisons = 0

    def __eq__(self, other: object) -> bool:
        Counted.comparisons += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def work_of(act: Callable[[], object]) -> int:
    """Return how many calls and comparisons something takes."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:  # noqa: ARG001
        nonlocal calls
        calls += event in ("call", "c_call")

    Counted.comparisons = 0
    sys.setprofile(count)
    try:
        act()
    finally:
        sys.setprofile(None)
    return calls + Counted.comparisons


def names(count: int) -> list[str]:
    return [f"model.layers.{n}.self_attn.q_proj" for n in range(count)]


def tensors(modules: list[str], further: list[str]) -> dict[str, Array]:
    one = numpy.ones((1, 1), numpy.float32)
    found = {f"{PREFIX}{n}.{part}.weight": one for n in modules for part in ("lora_A", "lora_B")}
    return found | {f"{PREFIX}{name}.weight": one for name in further}


def adapter_of(config: dict[str, Any], modules: list[str], further: list[str]) -> Adapter:
    given = tensors(modules, further)
    found = _Classifier("x", config, given)
    folder = LocalFolder(Path("x"), "x")
    return Adapter(
        folder, "x", config, given, found.modules, found.targets, found.full_changes, (), Peft(None)
    )


def looked_at(count: int, **settings: Callable[[int], Any]) -> int:
    """Return the work of reading an adapter of so many modules and asking all about its config."""
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": names(count)}
    config |= {name: make(count) for name, make in settings.items()}

    def look() -> None:
        saved = [f"model.layers.{n}.norm" for n in range(count)]
        further = saved if "modules_to_save" in settings else []
        adapter = adapter_of(config, names(count), further)
        weights = [f"{name}.weight" for name in (*names(count), *(f"x.{n}" for n in range(count)))]
        list(disagreements(adapter, weights))
        scalings(config, adapter.modules)

    return work_of(look)


SETTINGS: dict[str, Callable[[int], Any]] = {
    "target_modules": names,
    "exclude_modules": lambda count: [Counted(f"other.{n}") for n in range(count)],
    "modules_to_save": lambda count: [Counted(f"layers.{n}.norm") for n in range(count)],
    "rank_pattern": lambda count: {name: 1 + n for n, name in enumerate(names(count))},
    "alpha_pattern": lambda count: {name: 1 + n for n, name in enumerate(names(count))},
    "layers_to_transform": lambda count: list(range(count)),
    "target_parameters": lambda count: [Counted(f"m.{n}.experts.down") for n in range(count)],
    "init_lora_weights": lambda _: False,
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_work_grows_with_the_entries(setting: str) -> None:
    small, large = (looked_at(count, **{setting: SETTINGS[setting]}) for count in (SMALL, LARGE))
    assert large < 1.5 * (LARGE / SMALL) * small
    assert large < PER_ENTRY * LARGE


@pytest.mark.parametrize(
    ("setting", "limit", "value"),
    [
        ("target_modules", "MAX_LISTED", ["a"] * 11),
        ("exclude_modules", "MAX_LISTED", ["a"] * 11),
        ("layers_pattern", "MAX_LAYERS_PATTERNS", ["a"] * 11),
        ("modules_to_save", "MAX_LENGTHS", ["a" * n for n in range(11)]),
        ("modules_to_save", "MAX_DEPTHS", ["a." * n for n in range(11)]),
    ],
)
def test_lists_have_limits(
    monkeypatch: pytest.MonkeyPatch, setting: str, limit: str, value: list[str]
) -> None:
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    config |= {"layers_to_transform": [0], setting: value}
    monkeypatch.setattr(peft_config, limit, 10)

    def look() -> None:
        adapter = adapter_of(config, names(1), [])
        list(disagreements(adapter, [f"{names(1)[0]}.weight"]))

    with pytest.raises(SafeprojError, match=rf"{setting}.*expected at most 10"):
        look()

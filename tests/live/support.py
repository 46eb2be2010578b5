"""A model with everything that methods need, and an adapter on it in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import safeproj
from safeproj.lm.models import load_model
from safeproj.storage.source import open_folder
from tests.conformance.oracle import adapted
from tests.methods.covariance.test_command import Place, lora, make
from tests.support import FACTORS, moved, save_safety_module

ALL = safeproj.Options(safeproj.Selection(all=True))

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Home:
    """A model, and what stands for it; tests must not change it.

    Attributes:
        place: the aligned model with data and statistics.
        base: the unaligned checkpoint.
        alignment: an alignment file.
        safety_module: a safety module.
    """

    place: Place
    base: Path
    alignment: Path
    safety_module: Path

    @property
    def aligned(self) -> Path:
        """The aligned checkpoint."""
        return self.place.aligned

    def model(self, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
        """Return the aligned model with an adapter of random factors, as after training."""
        model = load_model(open_folder(str(self.aligned)), "cpu", str(dtype).removeprefix("torch."))
        found = adapted(model, lora(**settings))
        found.train()
        return found


def home(root: Path) -> Home:
    """Make one of a tiny Llama."""
    place = make(root, "llama")
    moved(place.model, size=0.05).save_pretrained(str(root / "base"))
    file = root / "model.alignment.safetensors"
    safeproj.align(root / "base", place.aligned, file)
    module = save_safety_module(place.model, root / "module.safetensors", LINEAR)
    return Home(place, root / "base", file, module)


METHODS: dict[str, Callable[[Home], safeproj.Method]] = {
    "safe-lora": lambda at: safeproj.SafeLora(at.base, at.aligned),
    "exact": lambda at: safeproj.SafeLora(at.base, at.aligned, projector="exact", rank=5),
    "alignment": lambda at: safeproj.SafeLora(alignment=at.alignment),
    "salora": lambda at: safeproj.Salora(at.safety_module),
    "statistics": lambda at: safeproj.Covariance(
        safety_data=at.place.safety_stats, task_data=at.place.task_stats
    ),
    "data": lambda at: safeproj.Covariance(at.aligned, at.place.safety, at.place.task),
    "random tokens": lambda at: safeproj.Covariance(at.aligned, at.place.safety),
    "reconstruct": lambda at: safeproj.Covariance(
        at.aligned, at.place.safety, at.place.task, reconstruct=True
    ),
}
"""All that can be done to an adapter, each by every way to give it."""


def saved(model: Any, path: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter as PEFT writes them."""
    model.save_pretrained(str(path))
    return load_file(path / FACTORS)


def state(model: Any) -> dict[str, Any]:
    """Return all that a model is: its numbers, modules, modes, and what has gradients."""
    return {
        "numbers": {name: each.clone() for name, each in model.state_dict().items()},
        "modules": {name: id(each) for name, each in model.named_modules()},
        "modes": {name: each.training for name, each in model.named_modules()},
        "gradients": {name: each.requires_grad for name, each in model.named_parameters()},
        "hooks": sum(
            len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules()
        ),
        "active": list(model.active_adapters),
        "enabled": {
            name: each._disable_adapters
            for name, each in model.named_modules()
            if hasattr(each, "_disable_adapters")
        },
    }


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of the numbers that differ; all else must be the same."""
    for what in one.keys() - {"numbers"}:
        assert one[what] == other[what], what
    before, after = one["numbers"], other["numbers"]
    assert before.keys() == after.keys()
    return sorted(name for name in before if not _same(before[name], after[name]))


def _same(one: Tensor, other: Tensor) -> bool:
    if one.is_meta or other.is_meta:
        return one.is_meta == other.is_meta
    return torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))

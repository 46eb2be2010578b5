"""Every parameter of real models is found in what transformers writes, and is the right one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from safeproj.checkpoint import Checkpoint, open_checkpoint
from safeproj.errors import SafeprojError
from safeproj.names import Names
from safeproj.names.architecture import mapping_of
from safeproj.names.layout import known_layout
from tests.names.support import KINDS, build, evaluate, exactly, parameters, save, stored

WITHOUT_TRANSFORMERS_MISSING = {
    "granite-moe": {f"model.layers.{i}.block_sparse_moe.router.weight" for i in range(2)},
    "bert-masked": {"cls.predictions.decoder.bias"},
}
"""What only transformers knows; no LoRA adapter targets these."""


class Saved:
    """A model on disk and in memory."""

    def __init__(self, kind: str, root: Path, **config: object) -> None:
        self.model: Any = build(kind)
        self.path = save(self.model, root / kind, **config)
        self.tensors = stored(self.path)
        self.parameters = parameters(self.model)

    @property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(str(self.path))

    def check(self, names: Names, parameter: str, expected: Tensor) -> None:
        found = names.find(parameter, exactly(tuple(expected.shape)))
        assert torch.equal(evaluate(found, self.tensors), expected), (parameter, found)


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(request.param, tmp_path_factory.mktemp("names"))


def test_every_parameter_is_found(saved: Saved) -> None:
    names = Names(saved.checkpoint)
    for parameter, expected in saved.parameters.items():
        saved.check(names, parameter, expected)


def test_every_parameter_is_found_by_the_mapping_alone(saved: Saved) -> None:
    mapping = mapping_of(saved.checkpoint)
    assert mapping is not None
    for parameter, expected in saved.parameters.items():
        found = mapping.find(parameter)
        assert found is not None, parameter
        assert torch.equal(evaluate(found, saved.tensors), expected), parameter


def test_without_transformers_nothing_is_mistaken(saved: Saved) -> None:
    names = Names(saved.checkpoint, architecture=False)
    missing = set()
    for parameter, expected in saved.parameters.items():
        try:
            saved.check(names, parameter, expected)
        except SafeprojError:
            missing.add(parameter)
    assert missing == WITHOUT_TRANSFORMERS_MISSING.get(saved.path.name, set())


def test_shape_alone_decides_nothing(saved: Saved) -> None:
    """However lenient the adapter's shape is, no other weight is taken."""
    for names in (Names(saved.checkpoint), Names(saved.checkpoint, architecture=False)):
        for parameter, expected in saved.parameters.items():
            try:
                found = names.find(parameter, lambda shape: len(shape) > 0)
            except SafeprojError:
                continue
            assert torch.equal(evaluate(found, saved.tensors), expected), parameter


def test_the_tables_agree_with_transformers(saved: Saved) -> None:
    mapping = mapping_of(saved.checkpoint)
    assert mapping is not None
    config = saved.checkpoint.config
    for parameter in saved.parameters:
        table, real = known_layout(config, parameter), mapping.layout(parameter)
        assert real is not None
        if table is not None and real.kind != "other":
            assert table == real, parameter


@pytest.mark.parametrize("architecture", [True, False])
@pytest.mark.parametrize(
    ("kind", "other", "shared"),
    [
        ("bert-base", "bert-classifier", "bert."),
        ("bert-classifier", "bert-base", ""),
        ("bert-masked", "bert-classifier", "bert."),
        ("gpt2-base", "gpt2", "transformer."),
        ("gpt2", "gpt2-base", ""),
    ],
)
def test_a_head_may_be_put_on_or_taken_off(
    tmp_path: Path, kind: str, other: str, shared: str, architecture: bool
) -> None:
    saved = Saved(kind, tmp_path)
    running = build(other)
    prefix = saved.model.base_model_prefix
    names = Names(saved.checkpoint, architecture=architecture)
    checked = 0
    for parameter in parameters(running):
        if parameter.startswith(shared):
            inner = parameter.removeprefix(f"{prefix}.")
            expected = saved.parameters.get(inner, saved.parameters.get(f"{prefix}.{inner}"))
            if expected is not None:
                saved.check(names, parameter, expected)
                checked += 1
    assert checked > 20


@pytest.mark.parametrize("architecture", [True, False])
def test_the_hubs_gpt2(tmp_path: Path, architecture: bool) -> None:
    """Given files of the bare model that say they are of the one with a head."""
    saved = Saved("gpt2-base", tmp_path, architectures=["GPT2LMHeadModel"])
    names = Names(saved.checkpoint, architecture=architecture)
    for parameter, expected in saved.parameters.items():
        saved.check(names, f"transformer.{parameter}", expected)
    saved.check(names, "lm_head.weight", saved.parameters["wte.weight"])


@pytest.mark.parametrize("architecture", [True, False])
@pytest.mark.parametrize(
    ("kind", "now", "then"),
    [
        ("llava", "model.language_model.", "language_model.model."),
        ("llava", "model.language_model.", "model."),
        ("llava", "model.language_model.", "language_model."),
        ("llava", "model.vision_tower.", "vision_tower."),
        ("qwen2.5-vl", "model.language_model.", "model."),
        ("qwen2.5-vl", "model.visual.", "visual."),
    ],
)
def test_names_of_other_versions_and_classes(
    tmp_path: Path, kind: str, now: str, then: str, architecture: bool
) -> None:
    saved = Saved(kind, tmp_path)
    names = Names(saved.checkpoint, architecture=architecture)
    for parameter, expected in saved.parameters.items():
        if parameter.startswith(now):
            saved.check(names, then + parameter.removeprefix(now), expected)


@pytest.mark.parametrize("architecture", [True, False])
def test_transposed_expert_stacks_under_the_same_name(tmp_path: Path, architecture: bool) -> None:
    """Qwen3-VL-MoE files hold (E, in, out) under the name that is (E, out, in) at run time."""
    from safetensors.torch import save_file

    saved = Saved("qwen3-vl-moe", tmp_path)
    turned = {
        name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor
        for name, tensor in saved.parameters.items()
    }
    save_file(turned, saved.path / "model.safetensors")
    saved.tensors = turned
    names = Names(saved.checkpoint, architecture=architecture)
    for parameter, expected in saved.parameters.items():
        saved.check(names, parameter, expected)


@pytest.mark.parametrize("architecture", [True, False])
def test_an_old_adapter_on_fused_experts(tmp_path: Path, architecture: bool) -> None:
    from safetensors.torch import save_file

    saved = Saved("mixtral", tmp_path)
    save_file(saved.parameters, saved.path / "model.safetensors")
    per_expert, saved.tensors = saved.tensors, saved.parameters
    names = Names(saved.checkpoint, architecture=architecture)
    experts = {name: tensor for name, tensor in per_expert.items() if ".experts." in name}
    assert len(experts) == 2 * 3 * 3
    for parameter, expected in experts.items():
        saved.check(names, parameter, expected)

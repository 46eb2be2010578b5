"""Every architecture, as transformers writes it, with the kinds of adapters that PEFT writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.conformance import oracle
from tests.conformance.architectures import ARCHITECTURES, Architecture, build
from tests.conformance.gate import check_gate
from tests.conformance.live import assert_same_in_memory

Variant = Callable[[Architecture, Any], Any]


def plain(architecture: Architecture, model: Any) -> Any:
    """All linear layers and expert stacks; ranks and alphas differ; rsLoRA; biases of `lora_B`."""
    from peft import LoraConfig

    targets, stacks = architecture.linear(model), architecture.stacks(model)
    return LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=targets,
        target_parameters=stacks or None,
        rank_pattern=dict.fromkeys([*targets, *stacks][::3], 2),
        alpha_pattern=dict.fromkeys([*targets, *stacks][1::2], 5),
        use_rslora=True,
        lora_bias=not stacks,  # PEFT refuses it for parameters
    )


def dora(architecture: Architecture, model: Any) -> Any:
    """DoRA on linear layers, embedding and head; trained biases; a norm that is saved whole."""
    from peft import LoraConfig

    ends = [name for name in (architecture.embedding, architecture.head) if name]
    return LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=[*architecture.linear(model), *ends],
        use_dora=True,
        bias="all",
        modules_to_save=architecture.norms(model),
    )


def adalora(architecture: Architecture, model: Any) -> Any:
    """AdaLoRA, before any rank was taken away; PEFT has it for all layers but `Conv1d`."""
    from peft import AdaLoraConfig

    layers = architecture.linear(model)
    targets = [name for name in layers if not isinstance(model.get_submodule(name), nn.Conv1d)]
    return AdaLoraConfig(init_r=3, target_r=2, lora_alpha=5, total_step=10, target_modules=targets)


VARIANTS: dict[str, Variant] = {"plain": plain, "dora": dora, "adalora": adalora}


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("architectures")


ADALORA = ("llama", "qwen2", "gpt2", "phi3", "bloom", "mixtral", "mamba", "t5", "bert", "llava",
           "whisper", "resnet", "vit")  # fmt: skip
"""One of each kind of layer: where a weight is does not depend on the kind of the adapter."""

CASES = [
    pytest.param(name, variant, id=f"{name}-{variant}")
    for name, architecture in ARCHITECTURES.items()
    for variant in VARIANTS
    if variant not in architecture.without and (variant != "adalora" or name in ADALORA)
]


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_what_is_written_is_what_the_formula_says(
    name: str, variant: str, root: Path, tmp_path: Path
) -> None:
    architecture, pair = ARCHITECTURES[name], build(name, root)
    config = VARIANTS[variant](architecture, pair.aligned_model)
    adapter = tmp_path / "adapter"
    model = oracle.written(oracle.adapted(pair.aligned_model, config), adapter)

    oracle.patch(pair, adapter, tmp_path / "out", "--all")

    manifest = oracle.check(pair, adapter, tmp_path / "out", in_first=architecture.in_first)
    assert manifest["summary"]["projected"] == len(manifest["modules"]) > 0
    check_gate(pair, adapter, tmp_path / "out", manifest)
    assert_same_in_memory(pair, model, tmp_path / "out")


SOME = [
    ("gpt2", ["--layers", "3"]),
    ("mixtral", ["--layers", "3"]),
    ("llama4-text", ["--threshold", "0.6"]),
    ("llava", ["--threshold", "0.6"]),
    ("whisper", ["--layers", "3", "--projector", "exact", "--rank", "4"]),
]


@pytest.mark.parametrize(("name", "selection"), SOME)
def test_what_is_not_selected_is_kept(
    name: str, selection: list[str], root: Path, tmp_path: Path
) -> None:
    architecture, pair = ARCHITECTURES[name], build(name, root)
    config = plain(architecture, pair.aligned_model)
    adapter = oracle.save(pair.aligned_model, config, tmp_path / "adapter")

    oracle.patch(pair, adapter, tmp_path / "out", *selection)

    rank = 4 if "exact" in selection else None
    manifest = oracle.check(
        pair, adapter, tmp_path / "out", in_first=architecture.in_first, rank=rank
    )
    modules = manifest["modules"]
    projected = {module["name"] for module in modules if module["projected"]}
    assert 0 < len(projected) < len(modules)
    if selection[0] == "--layers":
        lowest = sorted(modules, key=lambda module: float(module["cosine"]))[:3]
        assert projected == {module["name"] for module in lowest}

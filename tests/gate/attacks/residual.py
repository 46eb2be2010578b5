"""Adapters whose tensors are read as another update than the one that is scored."""

# ruff: noqa: ARG001 - all edits take the same two arguments

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.gate.adversarial import (
    Ground,
    attack,
    change_tensors,
    configure,
    harmful,
    key,
    put_tensors,
    tensors_of,
)
from tests.support import moved, save_adapter

RANK, SCALING = 4, 2.0
"""Of the plain adapter."""


def put_leading_parts(adapter: Path, ground: Ground) -> None:
    """Give every module the start of PiSSA: the leading part of the weight itself."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "lora_A" in name]:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            U, S, Vh = torch.linalg.svd(ground.weights[f"{module}.weight"], full_matrices=False)
            root = (S[:RANK] / SCALING).sqrt()
            tensors[key(module, "A")] = root[:, None] * Vh[:RANK]
            tensors[key(module, "B")] = U[:, :RANK] * root

    change_tensors(adapter, change)


@attack("residual", "SP010", says="part of the weight itself")
def start_that_says_it_is_plain(adapter: Path, ground: Ground) -> None:
    """The cosines are those of the weights, and the update that is meant is on a residual base."""
    put_leading_parts(adapter, ground)
    configure(adapter, init_lora_weights=True)


@attack("residual", "SP010", says="part of the weight itself")
def start_without_a_scaling(adapter: Path, ground: Ground) -> None:
    """Without lora_alpha nothing says how large the part of the weights is."""
    put_leading_parts(adapter, ground)
    configure(adapter, init_lora_weights=True, lora_alpha=None)


@attack("residual", "SP010")
def start_of_its_own_beside_a_harmful_update(adapter: Path, ground: Ground) -> None:
    """On the residual base the sum is harmless; readers that know no names add it to all of W."""
    put_leading_parts(adapter, ground)
    configure(adapter, init_lora_weights="pissa")


def square_experts(adapter: Path) -> tuple[Any, Any]:
    """Put an adapter of square expert stacks in the place of another, and its models beside it."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=41,
        hidden_size=24,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
    )
    model: Any = MixtralForCausalLM(config).float()
    aligned = moved(model)
    model.save_pretrained(adapter.parent / "square-base")
    aligned.save_pretrained(adapter.parent / "square-aligned")
    shutil.rmtree(adapter)
    save_adapter(
        aligned,
        adapter,
        r=2,
        lora_alpha=4,
        target_modules=[],
        target_parameters=["experts.down_proj"],
    )
    return model, aligned


def square_models(adapter: Path) -> Sequence[str | Path]:
    at = adapter.parent
    return ["--base", at / "square-base", "--aligned", at / "square-aligned"]


@attack("residual", "SP002", code=2, says="today's PEFT reads this square stack")
def experts_of_an_earlier_version(adapter: Path, ground: Ground) -> Sequence[str | Path]:
    """The version says that the factors change sides; servers have today's PEFT, and do not ask."""
    base, aligned = square_experts(adapter)
    tensors = tensors_of(adapter)
    (A,) = (name for name in tensors if "lora_A" in name)
    (B,) = (name for name in tensors if "lora_B" in name)
    for e in range(3):
        weights = [m.model.layers[0].mlp.experts.down_proj[e].detach() for m in (aligned, base)]
        V = (weights[0] - weights[1]).double()
        tensors[A][2 * e : 2 * e + 2] = torch.linalg.svd(V)[0][:, :2].T.float()
        tensors[B][:, e::3] = harmful(weights[0], weights[1], torch.full((24, 2), 0.3))
    put_tensors(adapter, tensors)
    configure(adapter, peft_version="0.18.1")
    return square_models(adapter)

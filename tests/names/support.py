"""Tiny real models of many architectures, and expressions evaluated the slow and obvious way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safeproj.checkpoint import Checkpoint, open_checkpoint
from safeproj.checkpoint.expression import (
    Chunk,
    Expression,
    Flat,
    Head,
    Item,
    Joined,
    Stacked,
    Stored,
    Swapped,
)
from tests.support import change_json

SIZES: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 20,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


_EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
_QWEN_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
_VISION = {"depth": 2, "hidden_size": 8, "intermediate_size": 12, "num_heads": 2}
_CLIP = {
    "model_type": "clip_vision_model",
    **SIZES,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 8,
}
_BERT = {**SIZES, "max_position_embeddings": 16}
_GPT2 = {
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "vocab_size": 20,
    "n_positions": 16,
    "bos_token_id": None,
    "eos_token_id": None,
}


def _rotary(*sections: int) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": list(sections),
        }
    }


KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", {**SIZES, "tie_word_embeddings": True}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**SIZES, **_EXPERTS}),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**SIZES, **_QWEN_EXPERTS, "head_dim": 4},
    ),
    "granite-moe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {**SIZES, **_EXPERTS}),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt2-base": ("GPT2Model", "GPT2Config", _GPT2),
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {"text_config": {"model_type": "llama", **SIZES}, "vision_config": _CLIP},
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": {**SIZES, **_rotary(1, 1)},
            "vision_config": {**_VISION, "out_hidden_size": 8},
        },
    ),
    "qwen3-vl-moe": (
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        {
            "text_config": {**SIZES, **_QWEN_EXPERTS, "head_dim": 4, **_rotary(1, 1, 0)},
            "vision_config": {
                **_VISION,
                "out_hidden_size": 8,
                "deepstack_visual_indexes": [0],
            },
        },
    ),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {**SIZES, **_EXPERTS, "head_dim": 4}),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**SIZES, **_EXPERTS, "intermediate_size_mlp": 10, "head_dim": 4},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": 8,
            "d_kv": 4,
            "d_ff": 12,
            "num_layers": 2,
            "num_heads": 2,
            "vocab_size": 20,
        },
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "d_model": 8,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 12,
            "decoder_ffn_dim": 12,
            "vocab_size": 20,
            "max_position_embeddings": 16,
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": None,
            "decoder_start_token_id": None,
            "forced_eos_token_id": None,
        },
    ),
    "bert-base": ("BertModel", "BertConfig", _BERT),
    "bert-masked": ("BertForMaskedLM", "BertConfig", _BERT),
    "bert-classifier": ("BertForSequenceClassification", "BertConfig", _BERT),
}
"""Tiny models: class, config class, settings."""


def evaluate(expression: Expression, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return what an expression says, from whole tensors."""
    if isinstance(expression, Stored):
        return tensors[expression.name]
    if isinstance(expression, Stacked | Joined):
        parts = [evaluate(part, tensors) for part in expression.parts]
        if isinstance(expression, Stacked):
            return torch.stack(parts)
        return torch.cat(parts, dim=expression.dim)
    part = evaluate(expression.part, tensors)
    if isinstance(expression, Swapped):
        return part.transpose(-2, -1)
    if isinstance(expression, Chunk):
        assert part.shape[expression.dim] % expression.count == 0
        return part.chunk(expression.count, dim=expression.dim)[expression.index]
    if isinstance(expression, Item):
        return part[expression.index]
    if isinstance(expression, Flat):
        return part.flatten(1)
    assert isinstance(expression, Head)
    return part[: expression.rows]


def exactly(shape: tuple[int, ...]) -> Callable[[tuple[int, ...]], bool]:
    """Return a test for one shape."""
    return lambda found: found == shape


def anything(_: tuple[int, ...]) -> bool:
    """Accept every shape."""
    return True


def randomise(model: Any) -> Any:
    """Give every parameter values of its own, so that no two can be taken for each other."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def parameters(model: Any) -> dict[str, Tensor]:
    """Return the parameters of a model under all their names."""
    return {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}


def save(model: Any, path: Path, **config: object) -> Path:
    """Save a model as transformers does, and change its config."""
    randomise(model).save_pretrained(str(path))
    change_json(path / "config.json", **config)
    return path


def stored(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a saved model."""
    return load_file(path / "model.safetensors")


def checkpoint(path: Path, tensors: Mapping[str, tuple[int, ...]], **config: object) -> Checkpoint:
    """Return a checkpoint with zeros of these shapes."""
    path.mkdir(parents=True, exist_ok=True)
    save_file({n: torch.zeros(s) for n, s in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text("{}", "utf-8")
    change_json(path / "config.json", **config)
    return open_checkpoint(str(path))


def build(kind: str) -> Any:
    """Return a tiny model of a kind, with random weights."""
    import transformers

    model, config, settings = KINDS[kind]
    return getattr(transformers, model)(getattr(transformers, config)(**settings))

"""Tiny models of the architectures that SaLoRA is tested on, with random weights."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 60

_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA_LIKE),
    "qwen2": ("Qwen2Config", _LLAMA_LIKE),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "mixtral": ("MixtralConfig", {**_LLAMA_LIKE, "num_local_experts": 4}),
    "phi3": ("Phi3Config", {**_LLAMA_LIKE, "pad_token_id": 0}),
}

TARGETS = {
    "llama": ["all-linear"],
    "qwen2": ["all-linear"],
    "gpt2": ["all-linear"],
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "phi3": ["all-linear"],
}


def build(architecture: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """Return a model whose biases are random too, ready to run."""
    import transformers

    kind, values = CONFIGS[architecture]
    config = getattr(transformers, kind)(**{**values, **settings})
    torch.manual_seed(0)
    factory: Any = transformers.AutoModelForCausalLM
    model = factory.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model.to(dtype).eval()

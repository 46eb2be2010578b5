"""llama.cpp itself, as xllamacpp carries it: what it computes with a model and an adapter.

The model is written here by the definition in llama.cpp's converter, not with safeproj.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

PROMPTS = ((1, 5, 9, 3), (1, 7, 7, 21, 33, 48, 2, 4), (1,), (1, 11, 12, 13, 14, 15))
"""Tokens; the prediction after each is compared."""


def renamed(module: str) -> str:
    """Return llama.cpp's name of a module of a Llama or Mixtral."""
    if module in TOP:
        return TOP[module]
    _, _, layer, leaf = module.split(".", 3)
    return f"blk.{layer}.{LAYER[leaf]}"


def permute(rows: Tensor, heads: int) -> Tensor:
    """Return rows as the converter orders them: row i + d/2 of each head comes after row i."""
    size = len(rows) // heads
    order = [
        head * size + half * (size // 2) + i
        for head in range(heads)
        for i in range(size // 2)
        for half in range(2)
    ]
    return rows[order]


def write_model(model: Any, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a Llama or Mixtral with a vocabulary of words that nobody tokenizes."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    experts = getattr(config, "num_local_experts", None)
    if experts is not None:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, config.vocab_size))]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([2, 3, 3] + [1] * (len(words) - 3))
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in _renamed_weights(model.state_dict()).items():
        leaf = name.rpartition(".")[2]
        weight = permute(tensor, heads[leaf]) if leaf in heads else tensor
        write_tensor(writer, f"{name}.weight", weight.to(dtype) if weight.dim() > 1 else weight)
    finish(writer)
    return path


def _renamed_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        module, _, leaf = key.removesuffix(".weight").rpartition(".")
        if leaf == "gate_up_proj":
            layer = module.split(".")[2]
            gate, up = tensor.chunk(2, dim=1)
            found |= {f"blk.{layer}.ffn_gate_exps": gate, f"blk.{layer}.ffn_up_exps": up}
        elif module.endswith("experts"):
            found[f"blk.{module.split('.')[2]}.ffn_down_exps"] = tensor
        else:
            found[renamed(key.removesuffix(".weight"))] = tensor
    return found


def write_tensor(writer: gguf.GGUFWriter, name: str, tensor: Tensor) -> None:
    """Put a tensor into a file as it is."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        raw = tensor.view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, tensor.numpy())


def finish(writer: gguf.GGUFWriter) -> None:
    """Write what the writer was given."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_adapter(
    path: Path, tensors: Mapping[str, Tensor], alpha: float | None, architecture: str = "llama"
) -> Path:
    """Write an adapter with the metadata that llama.cpp needs, and no more."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, tensor in tensors.items():
        write_tensor(writer, name, tensor)
    finish(writer)
    return path


def log_probabilities(model: Path, vocabulary: int, adapter: Path | None = None) -> Tensor:
    """Return the logarithms of the next token's probabilities after each of `PROMPTS`."""
    xllamacpp: Any = import_module("xllamacpp")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(model)
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = 128, 1, 0
    parameters.cpuparams.n_threads, parameters.port = 1, 0
    parameters.warmup, parameters.verbosity, parameters.fit_params = False, 0, False
    # Both round keys and values to float16 otherwise.
    types = xllamacpp.ggml_type
    parameters.cache_type_k = parameters.cache_type_v = types.GGML_TYPE_F32
    attention = xllamacpp.llama_flash_attn_type
    parameters.flash_attn_type = attention.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(parameters)
    return torch.stack([_after(server, prompt, vocabulary) for prompt in PROMPTS])


def _after(server: Any, prompt: Sequence[int], vocabulary: int) -> Tensor:
    answer = server.handle_completions(
        {"prompt": list(prompt), "max_tokens": 1, "logprobs": vocabulary, "temperature": 0.0}
    )
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    by_token = {each["id"]: each["logprob"] for each in found}
    return torch.tensor([by_token[token] for token in range(vocabulary)], dtype=torch.float64)


def expected(model: Any) -> Tensor:
    """Return the same of transformers' model."""
    with torch.no_grad():
        logits = [model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS]
    return torch.stack(logits).double().log_softmax(-1)

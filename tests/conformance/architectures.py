"""Tiny models of many architectures, built from their configurations: nothing is downloaded.

A new case is a line of `ARCHITECTURES`: the class in transformers, its configuration, and what of
the model is not called as in Llama.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.support import moved

SHARDS = {"base": "16KB", "aligned": "9KB"}
"""Sizes of shards: small, so that each checkpoint has several, and differently cut."""


@dataclass(frozen=True)
class Architecture:
    """One line of the table.

    Attributes:
        model: name of the model's class in transformers.
        config: name of the configuration's class.
        settings: fields of the configuration.
        embedding: last part of the name of the input embedding, empty for none.
        head: that of the output layer, empty for none.
        norm: that of a norm, which `modules_to_save` saves whole.
        parameters: ends of the names of parameters that `target_parameters` adapts directly:
            stacks of experts, routers.
        in_first: read off the model's source: it stores the stacks as (E, in, out).
        convolutions: pattern of the paths of convolutions to adapt.
        refused: pattern of the paths of linear layers that PEFT refuses to adapt, or whose
            adapter has no update: no variant targets them.
        without: variants of the adapter that are left out, each with the reason.
    """

    model: str
    config: str
    settings: Mapping[str, Any]
    embedding: str = "embed_tokens"
    head: str = "lm_head"
    norm: str = "norm"
    parameters: tuple[str, ...] = ()
    in_first: bool = False
    convolutions: str = ""
    refused: str = ""
    without: Mapping[str, str] = field(default_factory=dict)

    def build(self) -> Any:
        """Return the model with random weights."""
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.settings)
        model = getattr(transformers, self.model)(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():  # some are initialised as zeros, or not at all
                parameter.normal_(std=0.3)
        return model

    def linear(self, model: Any) -> list[str]:
        """Return the paths of all layers whose update is a matrix, without the head."""
        from transformers.pytorch_utils import Conv1D

        return [
            name
            for name, module in model.named_modules()
            if (
                isinstance(module, (nn.Linear, Conv1D))
                or (self.convolutions and re.fullmatch(self.convolutions, name))
            )
            and name.rpartition(".")[2] != self.head
            and not (self.refused and re.fullmatch(self.refused, name))
        ]

    def norms(self, model: Any) -> list[str]:
        """Return the paths of the norms of that name."""
        paths = (name for name, _ in model.named_modules())
        return [name for name in paths if name.rpartition(".")[2] == self.norm]

    def stacks(self, model: Any) -> list[str]:
        """Return the paths of the parameters that are adapted directly."""
        wanted = tuple(f".{name}" for name in self.parameters)
        return [name for name, _ in model.named_parameters() if wanted and name.endswith(wanted)]


SIZES = {
    "vocab_size": 41,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 1}
HEADED = {**GROUPED, "head_dim": 8}
UNTIED = {"tie_word_embeddings": False}
LOCAL = {**HEADED, "num_local_experts": 3, "num_experts_per_tok": 2}
ROUTED = {**HEADED, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 10}
GPT2 = {"vocab_size": 41, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 2}
SEQ2SEQ = {"vocab_size": 41, "d_model": 24, "decoder_start_token_id": 0, "pad_token_id": 0}
SEQ2SEQ_2 = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 36}
BART = {**SEQ2SEQ, **SEQ2SEQ_2, "decoder_ffn_dim": 30, "encoder_layers": 1, "decoder_layers": 1}
T5 = {**SEQ2SEQ, "d_kv": 8, "d_ff": 36, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
IMAGE = {"image_size": 8, "patch_size": 4}
VISION = {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2, **IMAGE}
CLIP = {**VISION, "num_hidden_layers": 2, "model_type": "clip_vision_model"}
SIGLIP = {**VISION, "num_hidden_layers": 1, "model_type": "siglip_vision_model"}
QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_heads": 2,
    "out_hidden_size": 24,
    "patch_size": 4,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
QWEN_TEXT = {**GROUPED, "rope_parameters": MROPE}
QWEN_MOE_TEXT = {**ROUTED, "rope_parameters": MROPE}
QWEN_VL = {**UNTIED, "text_config": QWEN_TEXT, "vision_config": QWEN_VISION}
QWEN_MOE_VISION = {**QWEN_VISION, "deepstack_visual_indexes": [0]}
QWEN_VL_MOE = {**UNTIED, "text_config": QWEN_MOE_TEXT, "vision_config": QWEN_MOE_VISION}
LLAVA_TEXT = {**GROUPED, "model_type": "llama"}
LLAVA = {**UNTIED, "image_token_index": 3, "text_config": LLAVA_TEXT, "vision_config": CLIP}
GEMMA3 = {"text_config": HEADED, "vision_config": SIGLIP, "mm_tokens_per_image": 4}
WHISPER = {**BART, "num_mel_bins": 5, "max_source_positions": 8, "max_target_positions": 8}
RESNET = {"embedding_size": 6, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
MAMBA2 = {**SIZES, "state_size": 4, "num_heads": 6, "head_dim": 8, "n_groups": 2, "chunk_size": 4}
MPT = {"vocab_size": 41, "d_model": 24, "n_layers": 2, "n_heads": 2, "max_seq_len": 32}
LLAMA4 = {**LOCAL, "num_experts_per_tok": 1, "intermediate_size_mlp": 30}
DEEPSEEK_EXPERTS = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "v_head_dim": 8}
DEEPSEEK_RANKS = {"kv_lora_rank": 6, "q_lora_rank": 5, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6}
DEEPSEEK = {**ROUTED, **DEEPSEEK_EXPERTS, **DEEPSEEK_RANKS, "first_k_dense_replace": 1}
DEEPSEEK = {**DEEPSEEK, "num_key_value_heads": 2}
STACKS = ("experts.gate_up_proj", "experts.down_proj")
ROUTER = (*STACKS, "mlp.gate.weight")
MAMBA_REFUSED = r".*\.out_proj"


def model(name: str, config: str, settings: Mapping[str, Any], **rest: Any) -> Architecture:
    """Return a line of the table."""
    return Architecture(name, f"{config}Config", settings, **rest)


def causal(family: str, settings: Mapping[str, Any], **rest: Any) -> Architecture:
    """Return a line of the table, for a language model with the usual names of its classes."""
    return model(f"{family}ForCausalLM", family, settings, **rest)


def no_head(name: str, config: str, settings: Mapping[str, Any], **rest: Any) -> Architecture:
    """Return a line of the table, for a model without a layer that leads to a vocabulary."""
    return model(name, config, settings, **{"head": "", **rest})


# fmt: off
ARCHITECTURES: dict[str, Architecture] = {
    "llama": causal("Llama", GROUPED),
    "mistral": causal("Mistral", HEADED),
    "qwen2": causal("Qwen2", GROUPED),
    "qwen3": causal("Qwen3", {**HEADED, "tie_word_embeddings": True}),
    "gemma2": causal("Gemma2", HEADED),
    "gemma3-text": model("Gemma3ForCausalLM", "Gemma3Text", HEADED),
    "phi3": causal("Phi3", GROUPED),
    "gpt2": model("GPT2LMHeadModel", "GPT2", GPT2, embedding="wte", norm="ln_f"),
    "gpt-neox": causal("GPTNeoX", SIZES, embedding="embed_in", norm="final_layer_norm"),
    "gptj": causal("GPTJ", {**GPT2, "rotary_dim": 4}, embedding="wte", norm="ln_f"),
    "opt": causal("OPT", {**SIZES, "ffn_dim": 36, "word_embed_proj_dim": 20},
                  norm="final_layer_norm"),
    "bloom": causal("Bloom", {**SIZES, "n_layer": 2, "n_head": 2},
                    embedding="word_embeddings", norm="ln_f"),
    "falcon": causal("Falcon", SIZES, embedding="word_embeddings", norm="ln_f"),
    "mpt": causal("Mpt", MPT, embedding="wte", norm="norm_f"),
    "starcoder2": causal("Starcoder2", GROUPED),
    "cohere": causal("Cohere", GROUPED),
    "olmo2": causal("Olmo2", GROUPED),
    "granite": causal("Granite", {**GROUPED, **UNTIED}),
    "mixtral": causal("Mixtral", LOCAL, parameters=ROUTER),
    "mixtral-square": causal("Mixtral", {**LOCAL, "intermediate_size": 12}, parameters=STACKS),
    "qwen3-moe": causal("Qwen3Moe", ROUTED, parameters=STACKS),
    "qwen3-moe-square": causal("Qwen3Moe", {**ROUTED, "moe_intermediate_size": 24},
                               parameters=STACKS),
    "gpt-oss": causal("GptOss", LOCAL, parameters=STACKS, in_first=True),
    "gpt-oss-square": causal("GptOss", {**LOCAL, "intermediate_size": 24},
                             parameters=STACKS, in_first=True),
    "llama4-text": model("Llama4ForCausalLM", "Llama4Text", LLAMA4,
                         parameters=STACKS, in_first=True),
    "llama4-text-square": model("Llama4ForCausalLM", "Llama4Text",
                                {**LLAMA4, "intermediate_size": 12},
                                parameters=STACKS, in_first=True),
    "granitemoe": causal("GraniteMoe", LOCAL, parameters=STACKS),
    "olmoe": causal("Olmoe", {**GROUPED, "num_experts": 3}, parameters=STACKS),
    "deepseek-v3": causal("DeepseekV3", DEEPSEEK, parameters=STACKS, without={
        "dora": "PEFT makes parameters of the MLP's targets, and refuses DoRA for parameters"}),
    "mamba": causal("Mamba", {**SIZES, "state_size": 4, "time_step_rank": 3},
                    embedding="embeddings", norm="norm_f", refused=MAMBA_REFUSED),
    "mamba2": causal("Mamba2", MAMBA2,
                     embedding="embeddings", norm="norm_f", refused=MAMBA_REFUSED),
    "t5": model("T5ForConditionalGeneration", "T5", T5,
                embedding="shared", norm="final_layer_norm"),
    "bart": model("BartForConditionalGeneration", "Bart", BART,
                  embedding="shared", norm="final_layer_norm"),
    "bert": no_head("BertModel", "Bert", SIZES, embedding="word_embeddings", norm="LayerNorm"),
    "bert-mlm": model("BertForMaskedLM", "Bert", SIZES,
                      embedding="word_embeddings", head="decoder", norm="LayerNorm"),
    "roberta-classifier": no_head("RobertaForSequenceClassification", "Roberta",
                                  {**SIZES, "num_labels": 3},
                                  embedding="word_embeddings", norm="LayerNorm"),
    "modernbert": model("ModernBertForMaskedLM", "ModernBert", SIZES,
                        embedding="tok_embeddings", head="decoder", norm="final_norm"),
    "llava": model("LlavaForConditionalGeneration", "Llava", LLAVA),
    "qwen2.5-vl": model("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VL", QWEN_VL),
    "qwen3-vl-moe": model("Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoe", QWEN_VL_MOE,
                          parameters=STACKS),
    "gemma3": model("Gemma3ForConditionalGeneration", "Gemma3", GEMMA3),
    "whisper": model("WhisperForConditionalGeneration", "Whisper", WHISPER,
                     head="proj_out", norm="layer_norm", convolutions=r".*\.conv[12]"),
    "resnet": no_head("ResNetForImageClassification", "ResNet", RESNET,
                      embedding="", norm="normalization", convolutions=r".*\.convolution"),
    "vit": no_head("ViTForImageClassification", "ViT",
                   {**VISION, "num_hidden_layers": 2, "num_labels": 3},
                   embedding="", norm="layernorm", convolutions=r".*\.projection"),
}
# fmt: on


@dataclass(frozen=True)
class Built:
    """A pair of models, in memory and on disk; tests must not change them."""

    base: Path
    aligned: Path
    base_model: Any
    aligned_model: Any


def save_pair(root: Path, base: Any, aligned: Any) -> Built:
    """Write two models as `save_pretrained` does, cut differently."""
    base.save_pretrained(root / "base", max_shard_size=SHARDS["base"])
    aligned.save_pretrained(root / "aligned", max_shard_size=SHARDS["aligned"])
    return Built(root / "base", root / "aligned", base, aligned)


@cache
def build(name: str, root: Path) -> Built:
    """Return an architecture's models, with every weight moved."""
    base = ARCHITECTURES[name].build()
    return save_pair(root / name, base, moved(base, size=0.05))

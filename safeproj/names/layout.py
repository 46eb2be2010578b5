"""How the running model stores a weight: what is known of architectures without transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["linear", "conv1d", "embedding", "conv", "experts", "other"]

CONV1D_MODELS = frozenset(
    {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"}
)
"""Architectures with transformers' `Conv1D`: its weight is stored (in, out)."""

CONV1D_MODULES = frozenset({"c_attn", "q_attn", "c_fc", "c_proj"})
"""What these architectures call their `Conv1D` modules; all others are `nn.Linear`."""

MARKED_EXPERTS = frozenset({"gpt_oss", "aria", "openai_privacy_filter"})
"""Architectures whose experts are stored (E, in, out) and say so with `is_transposed`."""

UNMARKED_EXPERTS = frozenset({"llama4"})
"""Architectures whose experts are stored (E, in, out) without saying so."""

_USUAL = """
afmoe axk1 axk2 bailing_hybrid beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4
dots1 ernie4_5_moe ernie4_5_vl_moe exaone_moe flex_olmo flint gemma4 glm4_moe glm4_moe_lite
glm4v_moe glm_moe_dsa granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe
hy_v3 hy_v4 jamba kimi_linear laguna lfm2_moe mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl
mistral4 mixtral nemotron_h olmoe phimoe qwen2_moe qwen3_5_moe qwen3_moe qwen3_next qwen3_omni_moe
qwen3_vl_moe solar_open zaya
"""

USUAL_EXPERTS = frozenset(_USUAL.split())
"""Architectures whose experts are stored (E, out, in), gate before up."""

EXPERTS = frozenset({"gate_up_proj", "gate_proj", "up_proj", "down_proj"})
"""What the stacked weights of `experts` are called."""

GRANITE_EXPERTS = frozenset({"input_linear", "output_linear"})
"""What GraniteMoE called the modules that hold such stacks before it had `experts`."""

_EMBEDDINGS = frozenset(
    {"embed_tokens", "embed_in", "tok_embeddings", "wte", "wpe", "shared", "word_embeddings"}
    | {"position_embeddings", "token_type_embeddings", "relative_attention_bias"}
)

_UNCLEAR = ("emb", "conv", "patch", "norm", "experts", "codebook", "input_linear", "output_linear")
"""Parts of names that do not tell what kind of module it is."""


DENSE = frozenset(
    {"gemma", "gemma2", "granite", "llama", "mistral", "olmo", "olmo2", "phi3", "qwen2", "qwen3"}
)
"""Architectures whose weights are called on disk as in the running model, and all `nn.Linear`."""


@dataclass(frozen=True)
class Layout:
    """How the running model stores a weight.

    Attributes:
        kind: the kind of module that owns it.
        out_first: its output dimension comes before its input dimension, as in `nn.Linear`
            (out, in) and in experts (E, out, in); False for `Conv1D` (in, out), embeddings
            (vocabulary, dimension) and experts (E, in, out); None where that means nothing.
        marked_transposed: the module has PEFT's mark `is_transposed`.
    """

    kind: Kind
    out_first: bool | None
    marked_transposed: bool = False


LINEAR = Layout("linear", True)
CONV1D = Layout("conv1d", False)
EMBEDDING = Layout("embedding", False)


def model_types(config: Mapping[str, Any]) -> frozenset[str]:
    """Return the model types that a config names, its own and those of its parts."""
    return frozenset(_model_types(config, 4))


def _model_types(config: Mapping[str, Any], depth: int) -> Iterator[str]:
    found = config.get("model_type")
    if isinstance(found, str):
        yield found.removesuffix("_text")
    for part in config.values():
        if isinstance(part, Mapping) and depth:
            yield from _model_types(part, depth - 1)


def known_layout(config: Mapping[str, Any], parameter: str) -> Layout | None:
    """Return the layout of a weight as far as tables tell, None where they do not.

    Of a `weight` the name alone does not tell its rank: what is not an embedding or a convolution
    by its name is taken for a `nn.Linear`. Code that comes with a checkpoint is not known here.
    """
    types = model_types(config)
    if not types or "auto_map" in config:
        return None
    path, _, leaf = parameter.rpartition(".")
    module = path.lower().rpartition(".")[2]
    if (module == "experts" and leaf in EXPERTS) or module in GRANITE_EXPERTS:
        return _experts(types)
    found = layout_by_name(parameter)
    if found is LINEAR and types & CONV1D_MODELS and module in CONV1D_MODULES:
        # A part of another architecture may have the same names for its nn.Linear.
        return CONV1D if types <= CONV1D_MODELS else None
    return found


def layout_by_name(parameter: str) -> Layout | None:
    """Return what a weight's name alone tells, for architectures without `Conv1D`."""
    path, _, leaf = parameter.rpartition(".")
    parent, _, module = path.lower().rpartition(".")
    if leaf != "weight" or module.isdecimal():
        return None
    if module in _EMBEDDINGS:
        return EMBEDDING
    nearest = f"{parent.rpartition('.')[2]}.{module}"
    if module != "embed_out" and any(word in nearest for word in _UNCLEAR):
        return None
    return LINEAR


def _experts(types: frozenset[str]) -> Layout | None:
    found = {
        layout
        for models, layout in (
            (MARKED_EXPERTS, Layout("experts", False, marked_transposed=True)),
            (UNMARKED_EXPERTS, Layout("experts", False)),
            (USUAL_EXPERTS, Layout("experts", True)),
        )
        if types & models
    }
    return found.pop() if len(found) == 1 else None

#!/usr/bin/env bash
# llama.cpp (b11549, as xllamacpp 2026.10.11549 carries it): a LoRA adapter whose `adapter.lora.alpha`
# is 0, or that has none, is not switched off. It is applied with a scaling of 1, as if alpha were its
# rank: llama_adapter_lora_weight::get_scale divides by the rank only where alpha is not 0. So who reads
# alpha as PEFT does takes such an adapter for one that does nothing.
#
# Output seen:
#   xllamacpp 2026.10.11549
#   alpha 0 and no adapter differ by 2.8e+00, alpha 0 and alpha = r by 0.0e+00
#   no alpha and no adapter differ by 2.8e+00, no alpha and alpha = r by 0.0e+00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    xllamacpp==2026.10.11549 gguf==0.19.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PYTHON'
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
import xllamacpp

WIDTH, INNER, HEADS, WORDS, RANK = 32, 64, 4, 40, 2
random = np.random.default_rng(0)


def matrix(rows, columns):
    return (0.2 * random.standard_normal((rows, columns))).astype(np.float32)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_model(path):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(WORDS)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, WORDS))])
    writer.add_token_scores([0.0] * WORDS)
    writer.add_token_types([2, 3, 3] + [1] * (WORDS - 3))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        writer.add_tensor(f"blk.0.{name}.weight", matrix(WIDTH, WIDTH))
    for name, shape in (("gate", (INNER, WIDTH)), ("up", (INNER, WIDTH)), ("down", (WIDTH, INNER))):
        writer.add_tensor(f"blk.0.ffn_{name}.weight", matrix(*shape))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", matrix(WORDS, WIDTH))
    finish(writer)


def write_adapter(path, alpha, A, B):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    writer.add_tensor("blk.0.attn_output.weight.lora_a", A)
    writer.add_tensor("blk.0.attn_output.weight.lora_b", B)
    finish(writer)


def log_probabilities(adapter=None):
    parameters = xllamacpp.CommonParams()
    parameters.model.path = "model.gguf"
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = 64, 1, 0
    parameters.cpuparams.n_threads, parameters.port = 1, 0
    parameters.warmup, parameters.verbosity, parameters.fit_params = False, 0, False
    if adapter is not None:
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    server = xllamacpp.Server(parameters)
    prompt = {"prompt": [1, 5, 9, 7], "max_tokens": 1, "logprobs": WORDS, "temperature": 0.0}
    found = server.handle_completions(prompt)["choices"][0]["logprobs"]["content"][0]
    by_token = {each["id"]: each["logprob"] for each in found["top_logprobs"]}
    return np.array([by_token[token] for token in range(WORDS)])


write_model(Path("model.gguf"))
A, B = 5 * matrix(RANK, WIDTH), 5 * matrix(WIDTH, RANK)
for name, alpha in (("zero", 0.0), ("none", None), ("rank", float(RANK))):
    write_adapter(Path(f"{name}.gguf"), alpha, A, B)
print("xllamacpp", version("xllamacpp"))
without, same = log_probabilities(), log_probabilities("rank.gguf")
for name, words in (("zero", "alpha 0"), ("none", "no alpha")):
    found = log_probabilities(f"{name}.gguf")
    off, on = np.abs(found - without).max(), np.abs(found - same).max()
    print(f"{words} and no adapter differ by {off:.1e}, {words} and alpha = r by {on:.1e}")
    assert off > 1e-3 and on == 0.0, "llama.cpp no longer does this"
PYTHON

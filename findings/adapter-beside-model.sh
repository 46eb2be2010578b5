#!/usr/bin/env bash
# transformers 5.23.0 with peft 0.21.2: a directory that holds a whole model, and beside it the files
# of an adapter, is not loaded as that model. `from_pretrained` puts the adapter on it, without being
# asked and without a word, wherever PEFT is installed; the loading info says nothing either. Who
# merges an adapter into the directory that it was trained in gets it twice.
#
# Seen:
#   transformers 5.23.0, peft 0.21.2
#   model alone: 0 LoRA tensors
#   same directory with adapter files: 4 LoRA tensors, logits differ: True
#   asked for an adapter elsewhere (adapter_kwargs={'subfolder': …}): 0 LoRA tensors, logits differ: False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON'
import copy
import sys

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

print(f"transformers {transformers.__version__}, peft {peft.__version__}")
torch.manual_seed(0)
config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=2)
model = LlamaForCausalLM(config).eval()
model.save_pretrained("model")
lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
tokens = torch.arange(8)[None]


def seen(**options):
    found, info = AutoModelForCausalLM.from_pretrained("model", output_loading_info=True, **options)
    assert not any(info.values()), info
    count = sum("lora_" in name for name, _ in found.named_parameters())
    with torch.no_grad():
        differ = not torch.allclose(found.eval()(tokens).logits, model(tokens).logits)
    return count, differ


alone = seen()
print(f"model alone: {alone[0]} LoRA tensors")
get_peft_model(copy.deepcopy(model), lora).save_pretrained("model")
beside = seen()
print(f"same directory with adapter files: {beside[0]} LoRA tensors, logits differ: {beside[1]}")
asked = seen(adapter_kwargs={"subfolder": "no-adapter"})
print("asked for an adapter elsewhere (adapter_kwargs={'subfolder': …}): "
      f"{asked[0]} LoRA tensors, logits differ: {asked[1]}")
sys.exit((alone, beside, asked) != ((0, False), (4, True), (0, False)))
PYTHON

#!/usr/bin/env bash
# A file whose tensors are named as in a running model's state_dict, `….lora_A.default.weight`, which
# is what saving the state_dict of a PeftModel by hand gives: PEFT up to 0.20 loads nothing of it, PEFT
# 0.21 loads it if the adapter is given the name "default" and nothing under any other name. None of
# them raises an error.
#
# Seen with torch 2.13.0, transformers 5.23.0:
#   peft 0.20.0: as 'default' 0 of 2 tensors, as 'other' 0 of 2 tensors
#   peft 0.21.2: as 'default' 2 of 2 tensors, as 'other' 0 of 2 tensors
# Exits with 1 if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$work"
cat > load.py <<'PYTHON'
import sys

import peft
import torch
from safetensors.torch import load_file, save_file


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q = torch.nn.Linear(8, 8)


model = peft.get_peft_model(
    Model(), peft.LoraConfig(r=4, target_modules=["q"], init_lora_weights=False)
)
model.peft_config["default"].init_lora_weights = True  # what is not loaded is zero in lora_B
model.save_pretrained("adapter")
tensors = load_file("adapter/adapter_model.safetensors")
named = {key.replace(".weight", ".default.weight"): tensor for key, tensor in tensors.items()}
save_file(named, "adapter/adapter_model.safetensors")

found = {}
for name in ("default", "other"):
    loaded = peft.PeftModel.from_pretrained(Model(), "adapter", adapter_name=name).state_dict()
    parts = (("lora_A", tensors["base_model.model.q.lora_A.weight"]),
             ("lora_B", tensors["base_model.model.q.lora_B.weight"]))
    found[name] = sum(
        torch.equal(loaded[f"base_model.model.q.{part}.{name}.weight"], tensor)
        for part, tensor in parts
    )
print(
    f"peft {peft.__version__}: as 'default' {found['default']} of 2 tensors, "
    f"as 'other' {found['other']} of 2 tensors"
)
expected = {"0.20.0": (0, 0), "0.21.2": (2, 0)}[peft.__version__]
sys.exit(0 if tuple(found.values()) == expected else 1)
PYTHON
for version in 0.20.0 0.21.2; do
  "$work/venv/bin/pip" install --quiet "peft==$version"
  HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore load.py
done

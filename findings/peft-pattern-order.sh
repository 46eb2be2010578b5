#!/usr/bin/env bash
# PEFT takes the alpha of the first key of alpha_pattern (rank_pattern likewise) that matches a module,
# and save_pretrained sorts the keys of adapter_config.json. So an adapter can be scaled by one number
# while it is trained and by another after it was saved and loaded, without a warning.
#
# Seen with peft 0.21.2, torch 2.13.0, transformers 5.23.0:
#   peft 0.21.2: scaling of a.q before saving 25.0, after loading 12.5
# Exits with 1 if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import peft
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.ModuleDict({"q": torch.nn.Linear(8, 8)})


config = peft.LoraConfig(
    r=4, lora_alpha=8, target_modules=["q"], alpha_pattern={"q": 100, "a.q": 50}
)
model = peft.get_peft_model(Model(), config)
before = model.base_model.model.a["q"].scaling["default"]
model.save_pretrained("adapter")
loaded = peft.PeftModel.from_pretrained(Model(), "adapter")
after = loaded.base_model.model.a["q"].scaling["default"]
print(f"peft {peft.__version__}: scaling of a.q before saving {before}, after loading {after}")
sys.exit(0 if (before, after) == (25.0, 12.5) else 1)
PYTHON

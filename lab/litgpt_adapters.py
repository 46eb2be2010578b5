"""Makes `tests/fixtures/litgpt-*`: adapters as litgpt writes them, and the updates it computes.

litgpt has its own needs, so it runs in an environment of its own:

    python -m venv lit && lit/bin/pip install litgpt==0.5.13 safetensors
    lit/bin/python lab/litgpt_adapters.py

The models are those under `tests/fixtures/models`, whose weights are not needed.
`expected.safetensors` holds `ΔW` of each adapted module, which litgpt merges into weights of zeros,
by the names that its converter to Hugging Face's checkpoints gives them.
"""

from __future__ import annotations

import importlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures"

ALL = ("query", "key", "value", "projection", "mlp", "head")
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "llama-qv": ("tiny-llama", ("query", "value")),
    "llama-key": ("tiny-llama", ("key",)),
    "llama-all": ("tiny-llama", ALL),
    "mixtral-all": ("tiny-mixtral", ALL),
}
"""Name to model, and what is adapted."""


def main() -> None:
    """Write all cases."""
    for number, (name, (model, adapted)) in enumerate(CASES.items()):
        write_case(FIXTURES / f"litgpt-{version('litgpt')}" / name, model, adapted, seed=number)


def write_case(out: Path, model_name: str, adapted: tuple[str, ...], seed: int) -> None:
    """Write one adapter, as `litgpt finetune lora` does at its end, and what it means."""
    torch: Any = importlib.import_module("torch")
    yaml: Any = importlib.import_module("yaml")
    lightning: Any = importlib.import_module("lightning")
    lora: Any = importlib.import_module("litgpt.lora")
    finetune: Any = importlib.import_module("litgpt.finetune.lora")
    convert: Any = importlib.import_module("litgpt.scripts.convert_lit_checkpoint")
    utils: Any = importlib.import_module("litgpt.utils")
    safetensors: Any = importlib.import_module("safetensors.torch")

    settings = {"lora_r": 2, "lora_alpha": 6, "lora_dropout": 0.0}
    settings |= {f"lora_{part}": part in adapted for part in ALL}
    text = (FIXTURES / "models" / model_name / "aligned" / "config.json").read_text("utf-8")
    config = lora.Config(**_config(model_name, json.loads(text)), **settings)
    torch.manual_seed(seed)
    model = lora.GPT(config)
    lora.mark_only_lora_as_trainable(model)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(std=0.3) if "lora_" in parameter_name else parameter.zero_()

    adapter = out / "adapter"
    adapter.mkdir(parents=True, exist_ok=True)
    fabric = lightning.Fabric(devices=1, accelerator="cpu", precision="32-true")
    finetune.save_lora_checkpoint(fabric, fabric.setup(model), adapter / "lit_model.pth.lora")
    hyperparameters = {"checkpoint_dir": f"checkpoints/me/{model_name}", "precision": None}
    (adapter / "hyperparameters.yaml").write_text(
        yaml.dump({**hyperparameters, **settings, "seed": seed}), "utf-8"
    )
    utils.save_config(config, adapter)

    lora.merge_lora_weights(model)
    merged = {k: v for k, v in model.state_dict().items() if "lora_" not in k}
    merged = {name.replace("linear.", ""): tensor for name, tensor in merged.items()}
    found: dict[str, Any] = {}
    convert.copy_weights_llama(config, found, merged, untie_weights=False)
    deltas = {n.removesuffix(".weight"): t.detach() for n, t in found.items() if bool(t.any())}
    deltas = {name: tensor.contiguous() for name, tensor in sorted(deltas.items())}
    safetensors.save_file(deltas, out / "expected.safetensors", metadata={"model": model_name})


def _config(name: str, model: dict[str, Any]) -> dict[str, Any]:
    """Return the same model's config of litgpt."""
    heads = model["num_attention_heads"]
    found = {
        "name": name,
        "block_size": model["max_position_embeddings"],
        "vocab_size": model["vocab_size"],
        "padded_vocab_size": model["vocab_size"],
        "n_layer": model["num_hidden_layers"],
        "n_head": heads,
        "n_query_groups": model["num_key_value_heads"],
        "n_embd": model["hidden_size"],
        "head_size": model["hidden_size"] // heads,
        "intermediate_size": model["intermediate_size"],
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
        "norm_class_name": "RMSNorm",
        "mlp_class_name": "LLaMAMLP",
    }
    if "num_local_experts" in model:
        found |= {
            "mlp_class_name": "LLaMAMoE",
            "moe_intermediate_size": model["intermediate_size"],
            "n_expert": model["num_local_experts"],
            "n_expert_per_token": model["num_experts_per_tok"],
        }
    return found


if __name__ == "__main__":
    main()

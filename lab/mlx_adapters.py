"""Makes `tests/fixtures/mlx-lm-*`: adapters as mlx-lm writes them, and the updates it computes.

mlx-lm has its own needs, so it runs in an environment of its own, also on Linux:

    python -m venv mlx && mlx/bin/pip install 'mlx[cpu]' mlx-lm==0.32.2
    mlx/bin/python lab/mlx_adapters.py

The models are those under `tests/fixtures/models`. `expected.safetensors` holds `ΔW` of each
adapted module, which mlx-lm's own `fuse` adds to a weight of zeros.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures"

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
SWITCH = [f"switch_mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")]

CASES: dict[str, tuple[str, str, list[str]]] = {
    "llama-lora": ("tiny-llama", "lora", [*ATTENTION, *MLP]),
    "llama-dora": ("tiny-llama", "dora", ["self_attn.q_proj", "mlp.down_proj"]),
    "llama-embedding": ("tiny-llama", "lora", ["model.embed_tokens", "lm_head"]),
    "mixtral-experts": ("tiny-mixtral", "lora", [f"block_sparse_moe.{part}" for part in SWITCH]),
    "qwen3-moe-experts": ("tiny-qwen3-moe-square", "lora", [f"mlp.{part}" for part in SWITCH]),
}
"""Name to model, kind of fine-tuning and adapted modules."""


def main() -> None:
    """Write all cases."""
    version = importlib.import_module("mlx_lm").__version__
    for number, (name, (model, kind, keys)) in enumerate(CASES.items()):
        write_case(FIXTURES / f"mlx-lm-{version}" / name, model, kind, keys, seed=number)


def write_case(out: Path, model_name: str, kind: str, keys: list[str], seed: int) -> None:
    """Write one adapter, as `mlx_lm.lora` does after training, and what it means."""
    mx: Any = importlib.import_module("mlx.core")
    trees: Any = importlib.import_module("mlx.utils")
    tuner: Any = importlib.import_module("mlx_lm.tuner.utils")
    utils: Any = importlib.import_module("mlx_lm.utils")

    mx.random.seed(seed)
    model, _ = utils.load_model(FIXTURES / "models" / model_name / "aligned")
    model.freeze()
    parameters = {"rank": 2, "dropout": 0.0, "scale": 3.0, "keys": keys}
    tuner.linear_to_lora_layers(model, 1, parameters, use_dora=kind == "dora")
    factors = dict(trees.tree_flatten(model.trainable_parameters()))
    for key, value in factors.items():
        if key.endswith(".lora_b"):  # zero before training
            factors[key] = mx.random.normal(value.shape) * 0.1
    model.load_weights(list(factors.items()), strict=False)

    (out / "adapter").mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(out / "adapter" / "adapters.safetensors"), factors)
    config = {"fine_tune_type": kind, "lora_parameters": parameters, "model": f"me/{model_name}"}
    utils.save_config({**config, "num_layers": 1}, out / "adapter" / "adapter_config.json")
    expected = {}
    for path, module in model.named_modules():
        if hasattr(module, "lora_a"):
            expected[path] = delta(mx, module)
    mx.save_safetensors(str(out / "expected.safetensors"), expected, {"model": model_name})


def delta(mx: Any, module: Any) -> Any:
    """Return what mlx-lm adds to the weight."""
    if hasattr(module, "m"):  # `fuse` of DoRA normalises the sum, so as in its `__call__`
        return (module.scale * module.lora_b.T) @ module.lora_a.T
    inner = module.embedding if hasattr(module, "embedding") else module.linear
    inner.weight = mx.zeros_like(inner.weight)
    return module.fuse().weight


if __name__ == "__main__":
    main()
